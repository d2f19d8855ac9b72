"""Every path through EasyEdit's editor keeps the state contract: the state follows the weights.

The judge is `RLSEditor` on a freshly loaded model; all comparisons are bit for bit.
"""

import copy
from functools import partial

import pytest
import torch

from easyedit_rls import RequestError, RLSEditor, RLSEditWarning, StateMismatchError
from easyedit_rls.model.gate import gate_weight_name, is_behind_gate

PARTS = ("prompts", "subject", "target_new", "ground_truth", "rephrase_prompts")


def requests_of(edits):
    keys = ("prompt", "subject", "target_new", "ground_truth", "rephrase_prompt")
    return [
        {**dict(zip(keys, row)), "locality": {}, "portability": {}}
        for row in zip(*(edits[part] for part in PARTS))
    ]


def reordered(edits, order):
    picked = {part: [edits[part][i] for i in order] for part in PARTS}
    near = edits["locality_inputs"]["near"]
    return {
        **picked,
        "locality_inputs": {"near": {key: [values[i] for i in order] for key, values in near.items()}},
    }


@pytest.fixture(autouse=True)
def _few_ordinary_keys(monkeypatch):
    monkeypatch.setattr("easyedit_rls.anchors.ordinary.N_KEYS", 2000)


@pytest.fixture(params=["weights", "gated"])
def each_memory(hparams, request):
    return partial(hparams, memory=request.param)


def names_of(hp):
    """Of the parameters that edits go to."""
    names = [f"{hp.rewrite_module_tmp.format(layer)}.weight" for layer in hp.layers]
    return [gate_weight_name(name) for name in names] if hp.memory == "gated" else names


def weights(model, hp):
    """What the model holds there; before the first edit a gate is not there yet, and has the model's own."""
    known = dict(model.named_parameters())
    own = [f"{hp.rewrite_module_tmp.format(layer)}.weight" for layer in hp.layers]
    return [known.get(name, known[mine]).detach().clone() for name, mine in zip(names_of(hp), own)]


def same(these, those):
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def new_editor(easyeditor, hp, seen=None):
    """EasyEdit's editor; `seen` gets the weights as they are after each call of the algorithm."""
    editor = easyeditor.BaseEditor.from_hparams(hp)
    if seen is not None:
        apply = editor.apply_algo

        def recorded(model, *args, **kwargs):
            model, originals = apply(model, *args, **kwargs)
            seen.append(weights(model, hp))
            return model, originals

        editor.apply_algo = recorded
    return editor


def expected(easyeditor, hp, *batches):
    """Weights that a fresh RLSEditor on a fresh model writes for these batches."""
    editor = easyeditor.BaseEditor.from_hparams(hp)
    ours = RLSEditor(editor.model, editor.tok, hp)
    for batch in batches:
        ours.edit(batch)
    return weights(editor.model, hp)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 1, 0, 2]])
def test_independent_edits_equal_fresh_editors_in_any_order(easyeditor, each_memory, edits, order):
    hp, seen = each_memory(), []
    editor = new_editor(easyeditor, hp, seen)
    before = weights(editor.model, hp)
    metrics, _, originals = editor.edit(**reordered(edits, order), sequential_edit=False, verbose=False)

    requests = requests_of(edits)
    assert len(metrics) == 4
    assert all(same(got, expected(easyeditor, hp, [requests[i]])) for got, i in zip(seen, order, strict=True))
    assert same(weights(editor.model, hp), before)
    assert sorted(originals) == sorted(names_of(hp))


def test_sequential_edits_are_one_stream(easyeditor, each_memory, edits):
    hp = each_memory()
    editor = new_editor(easyeditor, hp)
    editor.edit(**edits, sequential_edit=True, verbose=False)
    assert same(
        weights(editor.model, hp), expected(easyeditor, hp, *([request] for request in requests_of(edits)))
    )


def test_edit_requests_and_a_second_call_go_on_with_the_stream(easyeditor, each_memory, edits):
    hp, requests = each_memory(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    editor.edit_requests(requests[:2], sequential_edit=True, verbose=False)
    editor.edit_requests(requests[2:], sequential_edit=True, verbose=False)
    assert same(weights(editor.model, hp), expected(easyeditor, hp, *([request] for request in requests)))


def test_independent_batches_equal_fresh_editors(easyeditor, each_memory, edits):
    hp, seen, requests = each_memory(batch_size=2), [], requests_of(edits)
    editor = new_editor(easyeditor, hp, seen)
    before = weights(editor.model, hp)
    editor.batch_edit(**edits, sequential_edit=False, verbose=False)
    assert same(seen[0], expected(easyeditor, hp, requests[:2]))
    assert same(seen[1], expected(easyeditor, hp, requests[2:]))
    assert same(weights(editor.model, hp), before)


def test_sequential_batches_are_one_stream(easyeditor, each_memory, edits):
    hp, requests = each_memory(batch_size=3), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    metrics, model, _ = editor.batch_edit(**edits, sequential_edit=True, verbose=False)
    assert same(weights(editor.model, hp), expected(easyeditor, hp, requests[:3], requests[3:]))
    assert model is editor.model
    assert all("near_acc" in metric["post"]["locality"] for metric in metrics)


def test_undone_edits_do_not_stay_in_a_later_stream(easyeditor, each_memory, edits):
    hp, requests = each_memory(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    editor.edit_requests(requests[:2], sequential_edit=True, verbose=False)
    editor.edit_requests(requests[2:3], sequential_edit=False, verbose=False)
    editor.edit_requests(requests[3:], sequential_edit=True, verbose=False)
    assert same(
        weights(editor.model, hp), expected(easyeditor, hp, requests[:1], requests[1:2], requests[3:])
    )


@pytest.mark.parametrize("sequential", [True, False])
def test_generate_edit(easyeditor, hparams, edits, sequential, monkeypatch):
    hp, seen = hparams(), []
    editor = new_editor(easyeditor, hp, seen)
    before = weights(editor.model, hp)
    generate = editor.model.generate  # it asks for 512 tokens of each answer
    monkeypatch.setattr(
        editor.model, "generate", lambda **kwargs: generate(**{**kwargs, "max_new_tokens": 4})
    )
    hop = {"por_hop": {"prompt": [["Bread is made of"]] * 2, "ground_truth": [["rye"]] * 2}}
    two = reordered(edits, [0, 1])
    editor.generate_edit(**two, portability_inputs=hop, sequential_edit=sequential, verbose=False)

    first, second = requests_of(edits)[:2]
    assert same(seen[0], expected(easyeditor, hp, [first]))
    stream = ([first], [second]) if sequential else ([second],)
    assert same(seen[1], expected(easyeditor, hp, *stream))
    assert same(weights(editor.model, hp), seen[1] if sequential else before)


def test_a_copy_is_edited_and_its_original_is_not(easyeditor, each_memory, edits):
    hp, requests = each_memory(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    apply, model, tok = easyeditor.apply_rls_to_model, editor.model, editor.tok
    apply(model, tok, requests[:1], hp)
    first = weights(model, hp)
    copied, originals = apply(model, tok, requests[1:2], hp, copy=True, return_orig_weights=True)
    assert same(weights(model, hp), first)
    assert same(originals.values(), first)
    apply(model, tok, requests[2:3], hp)
    apply(copied, tok, requests[3:], hp)
    assert same(weights(model, hp), expected(easyeditor, hp, requests[:1], requests[2:3]))
    assert same(weights(copied, hp), expected(easyeditor, hp, requests[:1], requests[1:2], requests[3:]))


def test_a_deep_copy_starts_with_the_state_and_goes_its_own_way(easyeditor, each_memory, edits):
    hp, requests = each_memory(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    easyeditor.apply_rls_to_model(editor.model, editor.tok, requests[:1], hp)
    twin = copy.deepcopy(editor.model)
    easyeditor.apply_rls_to_model(editor.model, editor.tok, requests[1:2], hp)
    easyeditor.apply_rls_to_model(twin, editor.tok, requests[2:3], hp)
    assert same(weights(twin, hp), expected(easyeditor, hp, requests[:1], requests[2:3]))


def test_two_editors_interleaved_equal_the_two_apart(easyeditor, each_memory, edits):
    hp, requests = each_memory(), requests_of(edits)
    one, two = new_editor(easyeditor, hp), new_editor(easyeditor, hp)
    for i in range(2):
        one.edit_requests(requests[i : i + 1], sequential_edit=True, verbose=False)
        two.edit_requests(requests[i + 2 : i + 3], sequential_edit=i == 0, verbose=False)
    assert same(weights(one.model, hp), expected(easyeditor, hp, requests[:1], requests[1:2]))
    assert same(weights(two.model, hp), expected(easyeditor, hp, requests[2:3]))


def test_an_editor_made_anew_knows_nothing_of_the_old_one(easyeditor, hparams, edits):
    hp, requests = hparams(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    editor.edit_requests(requests[:2], sequential_edit=True, verbose=False)
    del editor
    editor = new_editor(easyeditor, hp)
    editor.edit_requests(requests[2:], sequential_edit=True, verbose=False)
    assert same(weights(editor.model, hp), expected(easyeditor, hp, requests[2:3], requests[3:]))


def test_reset_cache_forgets_the_edits_but_not_the_weights(easyeditor, hparams, edits):
    hp, requests = hparams(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    apply, model, tok = easyeditor.apply_rls_to_model, editor.model, editor.tok
    apply(model, tok, requests[:2], hp)
    anew = copy.deepcopy(model)
    apply(model, tok, requests[2:], hp, reset_cache=True)

    ours = RLSEditor(anew, tok, hp)  # a fresh editor takes the weights as they are for unedited
    ours.edit(requests[2:])
    assert same(weights(model, hp), weights(anew, hp))


def test_weights_changed_by_somebody_else_are_refused(easyeditor, each_memory, edits):
    hp, requests = each_memory(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    editor.edit_requests(requests[:2], sequential_edit=True, verbose=False)
    with torch.no_grad():
        editor.model.get_parameter(f"{hp.rewrite_module_tmp.format(hp.layers[0])}.weight")[0, 0] += 1
    changed = weights(editor.model, hp)
    with pytest.raises(StateMismatchError, match=rf"layers \[{hp.layers[0]}\].*reset_cache=True"):
        editor.edit_requests(requests[2:], sequential_edit=True, verbose=False)
    assert same(weights(editor.model, hp), changed)


def test_another_objective_has_a_state_of_its_own_and_says_what_it_forgets(easyeditor, hparams, edits):
    hp, other, requests = hparams(), hparams(lambda_reg=2.0), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    apply, model, tok = easyeditor.apply_rls_to_model, editor.model, editor.tok
    _, originals = apply(model, tok, requests[:1], hp, return_orig_weights=True)
    with pytest.warns(RLSEditWarning, match=r"1 edits made under other settings \(lambda_reg .* -> 2\.0\)"):
        apply(model, tok, requests[1:2], other)
    for key, value in originals.items():
        easyeditor.copy_to_param(model.get_parameter(key), value)
    with pytest.raises(StateMismatchError):  # of the new objective: not the weights that it found
        apply(model, tok, requests[1:2], other)


def test_normal_edit_says_why_it_cannot_serve(easyeditor, hparams, edits):
    editor = new_editor(easyeditor, hparams())
    with pytest.raises(
        RequestError, match=r"Request 0, field 'subject'.*normal_edit can't pass one.*batch_edit"
    ):
        editor.normal_edit(edits["prompts"], edits["target_new"])


@pytest.mark.parametrize("padding", ["left", "right"])
def test_nothing_but_the_edited_weights_is_touched(easyeditor, each_memory, edits, padding):
    hp, requests = each_memory(), requests_of(edits)
    editor = new_editor(easyeditor, hp)
    model, tok = editor.model, editor.tok
    tok.padding_side = padding
    model.train()
    given, before = (
        copy.deepcopy(requests),
        {name: p.detach().clone() for name, p in model.named_parameters()},
    )
    before |= dict(zip(names_of(hp), weights(model, hp)))  # a gate is not there yet
    _, originals = easyeditor.apply_rls_to_model(model, tok, requests, hp, return_orig_weights=True)

    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(originals)
    assert all(torch.equal(before[name], original) for name, original in originals.items())
    assert same(weights(model, hp), expected(easyeditor, hp, requests))
    assert requests == given
    assert tok.padding_side == padding
    assert model.training
    assert all(p.requires_grad for name, p in model.named_parameters() if not is_behind_gate(name))
    gates = len(hp.layers) if hp.memory == "gated" else 0
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == gates
