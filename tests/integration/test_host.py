"""The EasyEdit side without EasyEdit: a stand-in of its tables and helpers, and its way of handing over
edits.

`tests/host` runs the same contracts against a real checkout.
"""

import copy
import gc
import sys
import warnings
import weakref
from dataclasses import asdict, dataclass
from types import ModuleType

import pytest
import torch

import easyedit_rls
from easyedit_rls import (
    HostError,
    HyperParamsError,
    LayoutError,
    RequestError,
    RLSEditor,
    RLSEditWarning,
    StateMismatchError,
    UnsaidWarning,
)
from easyedit_rls.host import apply_rls_to_model, is_registered
from easyedit_rls.host.find import easyeditor


@pytest.fixture
def host(monkeypatch, tmp_path):
    """Modules with the names that the package imports from EasyEdit."""

    @dataclass
    class HyperParams:
        def to_dict(self):
            return asdict(self)

    class BatchEditor:
        @staticmethod
        def is_batchable_method(name):
            return name == "MEMIT"

    parts = {
        "easyeditor": {"__file__": str(tmp_path / "easyeditor" / "__init__.py")},
        "easyeditor.util": {},
        "easyeditor.util.nethook": {"get_parameter": lambda model, name: model.get_parameter(name)},
        "easyeditor.util.hparams": {
            "HyperParams": HyperParams,
            "load_hparams_config": dict,
            "normalize_alg_name": lambda config, name: config,
        },
        "easyeditor.util.alg_dict": {"ALG_DICT": {"MEMIT": print}},
        "easyeditor.editors": {},
        "easyeditor.editors.batch_editor": {"BatchEditor": BatchEditor},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    return sys.modules["easyeditor"]


def weights(model, hp):
    return [
        model.get_parameter(f"{hp.rewrite_module_tmp.format(layer)}.weight").detach().clone()
        for layer in hp.layers
    ]


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def edit_alone(model, tok, hp, *batches):
    twin = copy.deepcopy(model)
    editor = RLSEditor(twin, tok, hp)
    for batch in batches:
        editor.edit(batch)
    return weights(twin, hp)


def put_back(model, originals):
    with torch.no_grad():
        for name, value in originals.items():
            model.get_parameter(name)[...] = value


def test_edits_that_are_taken_back_leave_no_trace(host, model, tok, requests, settings):
    hp, unedited = settings(), copy.deepcopy(model)
    for request in requests:
        edited, originals = apply_rls_to_model(
            model, tok, [request], hp, return_orig_weights=True, keep_original_weight=False, train_ds=None
        )
        assert edited is model
        assert same(weights(model, hp), edit_alone(unedited, tok, hp, [request]))
        put_back(model, originals)
    assert same(weights(model, hp), weights(unedited, hp))


def test_edits_that_stay_are_one_stream(host, model, tok, requests, settings):
    hp, unedited = settings(), copy.deepcopy(model)
    for request in requests:
        _, originals = apply_rls_to_model(model, tok, [request], hp)
        assert originals == {}
    assert same(weights(model, hp), edit_alone(unedited, tok, hp, *([request] for request in requests)))


def test_two_models_share_nothing(host, model, tok, requests, settings):
    hp, unedited, other = settings(), copy.deepcopy(model), copy.deepcopy(model)
    apply_rls_to_model(model, tok, requests[:1], hp)
    apply_rls_to_model(other, tok, requests[1:2], hp)
    apply_rls_to_model(model, tok, requests[2:3], hp)
    assert same(weights(other, hp), edit_alone(unedited, tok, hp, requests[1:2]))
    assert same(weights(model, hp), edit_alone(unedited, tok, hp, requests[:1], requests[2:3]))


def test_a_copy_takes_the_state_along(host, model, tok, requests, settings):
    hp, unedited = settings(), copy.deepcopy(model)
    apply_rls_to_model(model, tok, requests[:1], hp)
    copied, originals = apply_rls_to_model(model, tok, requests[1:2], hp, copy=True, return_orig_weights=True)
    assert same(originals.values(), weights(model, hp))
    apply_rls_to_model(model, tok, requests[2:3], hp)
    assert same(weights(copied, hp), edit_alone(unedited, tok, hp, requests[:1], requests[1:2]))
    assert same(weights(model, hp), edit_alone(unedited, tok, hp, requests[:1], requests[2:3]))


def test_reset_cache_starts_anew(host, model, tok, requests, settings):
    hp = settings()
    apply_rls_to_model(model, tok, requests[:2], hp)
    with torch.no_grad():
        model.get_parameter(f"{hp.rewrite_module_tmp.format(hp.layers[0])}.weight")[0, 0] += 1
    as_found = copy.deepcopy(model)
    with pytest.raises(StateMismatchError, match="reset_cache=True"):
        apply_rls_to_model(model, tok, requests[2:], hp)
    apply_rls_to_model(model, tok, requests[2:], hp, reset_cache=True)

    del as_found._easyedit_rls_states
    assert same(weights(model, hp), edit_alone(as_found, tok, hp, requests[2:]))


def test_another_objective_has_its_own_state(host, model, tok, requests, settings):
    hp, other, unedited = settings(), settings(lambda_reg=2.0), copy.deepcopy(model)
    for _ in range(2):  # each taken back before the other comes
        for some in (hp, other):
            _, originals = apply_rls_to_model(model, tok, requests[:1], some, return_orig_weights=True)
            assert same(weights(model, hp), edit_alone(unedited, tok, some, requests[:1]))
            put_back(model, originals)
    assert (
        len(model._easyedit_rls_states) == 1
    )  # an empty state is not kept: it is as large as all covariances

    apply_rls_to_model(model, tok, requests[:1], hp)
    with pytest.warns(RLSEditWarning, match=r"1 edits made under other settings \(lambda_reg 0\.1 -> 2\.0\)"):
        apply_rls_to_model(model, tok, requests[1:2], other)


def test_settings_that_do_not_fit_leave_nothing_behind(host, model, tok, requests, settings):
    hp, unedited = settings(), copy.deepcopy(model)
    with pytest.raises(LayoutError):
        apply_rls_to_model(model, tok, requests[:1], settings(rewrite_module_tmp="no.such.{}.module"))
    apply_rls_to_model(model, tok, requests[:1], hp)
    assert same(weights(model, hp), edit_alone(unedited, tok, hp, requests[:1]))


def test_settings_changed_in_place_are_another_objective(host, model, tok, requests, settings):
    hp = settings()
    apply_rls_to_model(model, tok, requests[:1], hp)
    hp.layers.remove(1)
    with pytest.warns(RLSEditWarning, match=r"layers \[1, 2\] -> \[2\]"):
        apply_rls_to_model(model, tok, requests[1:2], hp)


def test_the_state_ends_with_its_model(host, model, tok, requests, settings):
    apply_rls_to_model(model, tok, requests[:1], settings())
    (kept,) = model._easyedit_rls_states.values()
    state = weakref.ref(kept.state)
    gc.disable()  # a model on a GPU must go at once, not when the collector comes round
    try:
        del kept, model._easyedit_rls_states
        assert state() is None
    finally:
        gc.enable()


def test_a_lost_subject_is_explained(host, model, tok, settings):
    with pytest.raises(RequestError, match=r"Request 0, field 'subject'.*normal_edit can't pass one"):
        apply_rls_to_model(model, tok, [{"prompt": "A", "target_new": "b", "ground_truth": None}], settings())


def test_data_for_evaluation_is_no_reason_to_refuse_an_edit(host, model, tok, requests, settings):
    hp, unedited = settings(), copy.deepcopy(model)
    odd = {
        "ground_truth": [["a", "b"], "c"],
        "rephrase_prompt": 3,
        "locality": {"near": {"prompt": ["x", "y"], "ground_truth": [["z"]]}},
    }
    given = [{**requests[0], **odd}]
    apply_rls_to_model(model, tok, given, hp)
    assert same(weights(model, hp), edit_alone(unedited, tok, hp, requests[:1]))
    assert given == [{**requests[0], **odd}]


def test_registration_and_its_end(host):
    hyperparams = easyedit_rls.register()
    assert easyedit_rls.register() is hyperparams is host.RLSEditHyperParams
    assert issubclass(hyperparams, sys.modules["easyeditor.util.hparams"].HyperParams)
    batchable = sys.modules["easyeditor.editors.batch_editor"].BatchEditor.is_batchable_method
    assert [batchable(name) for name in ("RLSEdit", "MEMIT", "ROME")] == [True, True, False]

    easyedit_rls.unregister()
    assert not is_registered()
    assert [batchable(name) for name in ("RLSEdit", "MEMIT", "ROME")] == [False, True, False]
    assert not hasattr(host, "apply_rls_to_model")
    sys.modules["easyeditor.util.alg_dict"].ALG_DICT["RLSEdit"] = print
    with pytest.raises(HostError, match="taken by something else"):
        easyedit_rls.register()


def test_a_missing_host_is_said_with_the_cure(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "easyeditor"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not path.endswith("EasyEdit")])
    monkeypatch.delenv("EASYEDIT_HOME", raising=False)
    with pytest.raises(HostError, match=r"EASYEDIT_HOME is not set.*git clone"):
        easyeditor()
    monkeypatch.setenv("EASYEDIT_HOME", str(tmp_path))
    with pytest.raises(HostError, match=r"holds no EasyEdit"):
        easyedit_rls.register()
    (tmp_path / "easyeditor").mkdir()
    (tmp_path / "easyeditor" / "__init__.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(
        HostError,
        match=r"can't be imported: No module named 'a_package_that_is_not_there'.*requirements\.txt",
    ):
        easyedit_rls.register()


def ledger_of(model):
    return [
        kept.state.ledger for kept in model._easyedit_rls_states.values() if kept.state.ledger is not None
    ]


def let_go(model):
    """As when the process ends."""
    for ledger in ledger_of(model):
        ledger.close()


def test_a_failing_reset_forgets_nothing(host, model, tok, requests, settings, tmp_path, monkeypatch):
    for hp in (settings(), settings(state_dir=str(tmp_path))):
        model, unedited = copy.deepcopy(model), copy.deepcopy(model)
        apply_rls_to_model(model, tok, requests[:1], hp)
        before = weights(model, hp)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(
                "easyedit_rls.facts.keys.LayerWalk.advance_to",
                lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
            )
            apply_rls_to_model(model, tok, requests[1:2], hp, reset_cache=True)
        with pytest.raises(RequestError):
            apply_rls_to_model(
                model, tok, [{"prompt": "x", "subject": "y", "target_new": "z"}], hp, reset_cache=True
            )
        assert same(weights(model, hp), before)
        apply_rls_to_model(model, tok, requests[2:3], hp)
        assert same(weights(model, hp), edit_alone(unedited, tok, settings(), requests[:1], requests[2:3]))
        let_go(model)
        del model._easyedit_rls_states
        model = unedited


def test_a_stream_goes_on_in_a_new_process(host, model, tok, requests, settings, tmp_path):
    hp, unedited = settings(state_dir=str(tmp_path)), copy.deepcopy(model)
    apply_rls_to_model(model, tok, requests[:2], hp)
    _, originals = apply_rls_to_model(model, tok, requests[2:3], hp, return_orig_weights=True)
    put_back(model, originals)  # the host takes the last batch back, and the next call writes that down
    apply_rls_to_model(model, tok, requests[3:], hp)
    let_go(model)

    second = copy.deepcopy(unedited)
    _, originals = apply_rls_to_model(second, tok, requests[2:3], hp, return_orig_weights=True)
    assert same(originals.values(), weights(model, hp))
    alone = edit_alone(unedited, tok, settings(), requests[:2], requests[3:], requests[2:3])
    assert same(weights(second, hp), alone)
    put_back(second, originals)  # and what is put back is what the ledger had
    assert apply_rls_to_model(second, tok, requests[2:3], hp)[0] is second
    assert same(weights(second, hp), alone)


def test_a_first_call_that_fails_leaves_the_model_as_it_was(
    host, model, tok, requests, settings, tmp_path, monkeypatch
):
    hp, unedited = settings(state_dir=str(tmp_path)), copy.deepcopy(model)
    apply_rls_to_model(model, tok, requests[:2], hp)
    let_go(model)
    second = copy.deepcopy(unedited)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "easyedit_rls.facts.keys.LayerWalk.advance_to",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        apply_rls_to_model(second, tok, requests[2:], hp)
    assert same(weights(second, hp), weights(unedited, hp))
    apply_rls_to_model(second, tok, requests[2:], hp)
    assert same(weights(second, hp), edit_alone(unedited, tok, settings(), requests[:2], requests[2:]))


def test_reset_cache_begins_a_new_journal(host, model, tok, requests, settings, tmp_path):
    hp = settings(state_dir=str(tmp_path))
    apply_rls_to_model(model, tok, requests[:2], hp)
    base = copy.deepcopy(model)
    del base._easyedit_rls_states
    apply_rls_to_model(model, tok, requests[2:], hp, reset_cache=True)
    assert same(weights(model, hp), edit_alone(base, tok, settings(), requests[2:]))
    let_go(model)
    again = copy.deepcopy(base)
    apply_rls_to_model(
        again, tok, requests[:1], hp, reset_cache=True
    )  # a new process that wants none of what is there
    assert same(weights(again, hp), edit_alone(base, tok, settings(), requests[:1]))
    assert [path.name for path in sorted(tmp_path.glob("journal-*"))] == [
        "journal-0001",
        "journal-0002",
        "journal-0003",
    ]


def test_a_copy_can_not_share_the_ledger(host, model, tok, requests, settings, tmp_path):
    with pytest.raises(HyperParamsError, match=r"copy=True.*state_dir"):
        apply_rls_to_model(model, tok, requests, settings(state_dir=str(tmp_path)), copy=True)


def test_a_failing_reset_writes_nothing_into_the_old_journal(
    host, model, tok, requests, settings, tmp_path, monkeypatch
):
    hp = settings(state_dir=str(tmp_path), checkpoint_every=1)
    unedited = copy.deepcopy(model)
    apply_rls_to_model(model, tok, requests[:1], hp)
    before = weights(model, hp)
    let_go(model)
    again = copy.deepcopy(unedited)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "easyedit_rls.facts.keys.LayerWalk.advance_to",
            lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
        )
        apply_rls_to_model(again, tok, requests[1:2], hp, reset_cache=True)
    resumed = RLSEditor(copy.deepcopy(unedited), tok, hp)
    assert same([weight.snapshot() for weight in resumed.layout.edited.values()], list(before))
    resumed.close()


def test_what_is_raised_behind_the_edit_takes_nothing_back(host, model, tok, requests, settings, tmp_path):
    hp = settings(state_dir=str(tmp_path), v_num_grad_steps=2)
    apply_rls_to_model(model, tok, requests[:1], hp)
    with warnings.catch_warnings(), pytest.raises(UnsaidWarning):
        warnings.simplefilter("error")
        apply_rls_to_model(model, tok, requests[1:], hp, reset_cache=True)
    apply_rls_to_model(model, tok, requests[:1], hp)  # weights, state and ledger are all behind it
    assert [path.name for path in sorted(tmp_path.glob("journal-*"))] == ["journal-0001", "journal-0002"]
    let_go(model)
