"""Half precision: adapters are made from the master weights, and the copy in `v_dtype` is cast once."""

import copy
import gc
import weakref
from itertools import pairwise

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import easyedit_rls.facts.values
from easyedit_rls import AnchorPairs, RLSEditor
from easyedit_rls.compare.objective import Objective
from easyedit_rls.host import apply_rls_to_model
from easyedit_rls.ledger.export import write_adapter
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_manifest, read_moment
from easyedit_rls.model.cast import CastParameters
from easyedit_rls.model.layout import cast_copy, find_layout
from tests.conftest import FAMILIES
from tests.integration.test_host import host  # noqa: F401, a fixture
from tests.tolerances import FLOAT32, FLOAT32_SUM

LOW = torch.bfloat16


@pytest.fixture(params=[torch.bfloat16, torch.float16], ids=str)
def half_ledger(request, family, tok, requests, settings, tmp_path):
    """Four edits at `keys: mean` to a model in half precision: their ledger, the editor, and the type."""
    model = FAMILIES[family]().to(request.param)
    model.save_pretrained(tmp_path / "base")
    with RLSEditor(model, tok, settings(keys="mean"), state_dir=tmp_path / "state") as editor:
        editor.edit(requests[:2])
        editor.edit(requests[2:])
    return tmp_path / "state", editor, request.param


def export(ledger, adapter, rank=None):
    """As `easyedit-rls state export` does it; returns the report and what was written."""
    journal = latest(ledger)
    report = write_adapter(adapter, read_manifest(journal), read_moment(journal), rank)
    return report, load_file(adapter / "adapter_model.safetensors")


def test_an_adapter_has_the_rank_of_the_edits(half_ledger, tmp_path):
    """The twin: the rounded weights' own change is another one, of nearly full rank."""
    ledger, editor, _ = half_ledger
    report, written = export(ledger, tmp_path / "adapter")
    assert report.rank == 4  # one key an edit
    assert all(error < FLOAT32 for error in report.errors.values())
    for layer, weight in editor.layout.edited.items():
        name = f"base_model.model.{weight.parameter_name.removesuffix('.weight')}"
        A, B = (written[f"{name}.lora_{part}.weight"].double() for part in "AB")
        W_0 = editor.state.unedited[layer].double()
        change = editor.state.layers[layer].weight.double() - W_0
        assert float(((B @ A).T - change).norm() / change.norm()) < FLOAT32
        rounded = weight.read().double() - W_0
        assert int(torch.linalg.matrix_rank(rounded)) > 20
        assert float((rounded - change).norm() / change.norm()) > FLOAT32


def test_a_merged_adapter_gives_the_edited_weights_but_for_a_rounding(half_ledger, tmp_path):
    ledger, editor, dtype = half_ledger
    export(ledger, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    merged = dict(adapted.merge_and_unload().named_parameters())
    for layer, weight in editor.layout.edited.items():
        ours, theirs = weight.parameter.detach().float(), merged[weight.parameter_name].detach().float()
        change = editor.state.layers[layer].weight - editor.state.unedited[layer]
        # the sum is rounded, and before it perhaps the change
        allowed = torch.finfo(dtype).eps * (ours.abs() + change.abs().max())
        assert bool(((ours - theirs).abs() <= allowed).all())
        assert float((ours != theirs).double().mean()) < 0.1


def test_a_state_without_edits_exports_no_change(family, tok, requests, settings, tmp_path):
    """Anchors with values of their own count from the first edit on: after a roll-back nothing is edited."""
    model = FAMILIES[family]()
    d_k, d_v = find_layout(model, settings()).edited[1].shape
    random = torch.Generator().manual_seed(0)
    keys, values = ({layer: torch.randn(8, d, generator=random) for layer in (1, 2)} for d in (d_k, d_v))
    anchors = AnchorPairs(keys, values)
    with RLSEditor(model, tok, settings(), anchors=anchors, state_dir=tmp_path / "state") as editor:
        editor.edit(requests[0])
        editor.rollback()
        assert not torch.equal(editor.state.layers[1].weight, editor.state.unedited[1])
    _, written = export(tmp_path / "state", tmp_path / "adapter", rank=1)
    assert not any(bool(tensor.any()) for tensor in written.values())


def fresh(layout, hp):
    """A twin that shares nothing with earlier ones."""
    return cast_copy(find_layout(layout.model, hp), LOW)


def assert_same(low, expected):
    """Parameters and buffers bit for bit, laid out alike."""
    models = low.model, expected.model
    ours, theirs = ({**dict(model.named_parameters()), **dict(model.named_buffers())} for model in models)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        wanted = theirs[name]
        assert (tensor.dtype, tensor.stride()) == (wanted.dtype, wanted.stride()), name
        assert torch.equal(tensor, wanted), name
        assert not tensor.requires_grad, name
    low.refuse_if_replaced()


def casts_of(low):
    """Each parameter's cast with torch's count of the writes to it."""
    return {name: (parameter, parameter._version) for name, parameter in low.model.named_parameters()}


def recast(before, after):
    """Names of the parameters that were cast anew, or again, between two twins."""

    def is_kept(name):
        return after[name][0] is before[name][0] and after[name][1] == before[name][1]

    return {name for name in after if not is_kept(name)}


def edited_names(editor):
    return {weight.parameter_name for weight in editor.layout.edited.values()}


@pytest.fixture
def twins(monkeypatch):
    """The casts of every twin that is made for values."""
    found = []

    def noting(layout, dtype):
        low = cast_copy(layout, dtype)
        found.append(casts_of(low))
        return low

    monkeypatch.setattr(easyedit_rls.facts.values, "cast_copy", noting)
    return found


def test_only_edited_weights_are_cast_again(model, tok, requests, settings, twins):
    editor = RLSEditor(model, tok, settings(v_dtype="bfloat16", v_num_grad_steps=3))
    editor.edit(requests[:2])
    editor.edit(requests[2])
    editor.rollback()
    editor.retract(1)
    editor.edit(requests[3])
    assert len(twins) == 3
    for before, after in pairwise(twins):
        assert recast(before, after) == edited_names(editor)
        assert all(after[name][0] is before[name][0] for name in after)  # in the memory of the last ones
    assert twins[0].keys() > edited_names(editor)


def test_values_are_those_of_a_fresh_cast_throughout_a_stream(family, tok, requests, settings, monkeypatch):
    def host_writes(editor):
        with torch.no_grad():
            editor.layout.edited[2].parameter.mul_(1.25)
            editor.model.get_input_embeddings().weight[7] += 0.5
        editor.adopt_weights()

    def stream(make):
        monkeypatch.setattr(easyedit_rls.facts.values, "cast_copy", make)
        editor = RLSEditor(FAMILIES[family](), tok, settings(v_dtype="bfloat16", v_num_grad_steps=4))
        weights = []
        for act in (
            lambda: editor.edit(requests[:2]),
            lambda: editor.edit(requests[2]),
            editor.rollback,
            lambda: editor.edit(requests[3]),
            lambda: editor.retract(1),
            lambda: editor.edit({**requests[1], "target_new": "people"}),
            lambda: host_writes(editor),
            lambda: editor.edit(requests[2]),
        ):
            act()
            weights.append([weight.snapshot() for weight in editor.layout.edited.values()])
        return weights

    first = []

    def never_brought_up_to_date(layout, dtype):
        first.append(cast_copy(layout, dtype) if not first else first[0])
        return first[0]

    kept = stream(cast_copy)
    anew = stream(lambda layout, _: fresh(layout, settings()))
    stale = stream(never_brought_up_to_date)
    assert all(torch.equal(a, b) for one, other in zip(kept, anew) for a, b in zip(one, other))
    assert not torch.equal(stale[1][0], kept[1][0])  # the twin


def in_place(layout):
    with torch.no_grad():
        layout.model.get_input_embeddings().weight[3, 5] += 1.0


def through_data(layout):
    layout.model.get_input_embeddings().weight.data += 0.01


def one_value_of_an_edited_one(layout):
    layout.edited[2].parameter.data[1, 3] += 1.0


def another_parameter(layout):
    head = layout.model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach() * 1.5)


def loaded(layout):
    state = layout.model.state_dict()
    layout.model.load_state_dict({name: tensor * 0.75 for name, tensor in state.items()})


def a_buffer(layout):
    layout.model.register_buffer("shift", torch.ones(2))


def other_memory(layout):
    for parameter in layout.model.parameters():
        parameter.data = parameter.data.clone()


def to_a_type_and_back(layout):
    layout.model.half().float()


def other_strides(layout):
    parameter = layout.model.get_input_embeddings().weight
    parameter.data = parameter.data.T.contiguous().T


CHANGES = (in_place, through_data, one_value_of_an_edited_one, another_parameter, loaded, a_buffer)
REARRANGEMENTS = (other_memory, to_a_type_and_back, other_strides)


@pytest.mark.parametrize("change", [*CHANGES, *REARRANGEMENTS], ids=lambda change: change.__name__)
def test_the_copy_follows_whatever_happens_to_the_model(model, settings, change):
    hp = settings()
    layout = find_layout(model, hp)
    first = cast_copy(layout, LOW)
    assert_same(first, fresh(layout, hp))
    before = {name: tensor.clone() for name, tensor in first.model.state_dict().items()}
    change(layout)
    low = cast_copy(layout, LOW)
    assert_same(low, fresh(layout, hp))
    after = low.model.state_dict()
    is_alike = after.keys() == before.keys() and all(torch.equal(before[name], after[name]) for name in after)
    assert change in REARRANGEMENTS or not is_alike


def test_tensors_that_torch_does_not_count_are_cast_each_time(family, settings):
    with torch.inference_mode():
        model = FAMILIES[family]()
    layout = find_layout(model, settings())
    cast_copy(layout, LOW)
    with torch.inference_mode():
        model.get_input_embeddings().weight[0, 1] += 1.0
    assert_same(cast_copy(layout, LOW), fresh(layout, settings()))


def test_another_type_frees_the_first_copy(model, settings):
    layout = find_layout(model, settings())
    seen = weakref.ref(cast_copy(layout, LOW).model.get_input_embeddings().weight)
    low = cast_copy(layout, torch.float16)
    gc.collect()
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.float16}
    assert seen() is None


def test_two_editors_of_one_model_share_no_copy(model, tok, requests, settings, twins):
    few = {"v_dtype": "bfloat16", "v_num_grad_steps": 3}
    one = RLSEditor(model, tok, settings(**few))
    other = RLSEditor(model, tok, settings(**few, layers=[0, 1, 2]))
    one.edit(requests[0])
    other.edit(requests[1])
    one.adopt_weights()
    one.edit(requests[2])
    other.adopt_weights()
    other.edit(requests[3])
    first, second, third, fourth = twins
    assert recast(first, third) == edited_names(other)  # layer 0 too, which only the other writes to
    assert recast(second, fourth) == edited_names(other)
    assert not {id(cast) for cast, _ in first.values()} & {id(cast) for cast, _ in second.values()}
    for editor in (one, other):
        assert_same(cast_copy(editor.layout, LOW), fresh(editor.layout, editor.hparams))


def test_a_deep_copy_of_an_editor_casts_its_own_model(model, tok, requests, settings, twins):
    editor = RLSEditor(model, tok, settings(v_dtype="bfloat16", v_num_grad_steps=3))
    editor.edit(requests[0])
    other = copy.deepcopy(editor)
    other.edit(requests[1])
    editor.edit(requests[2])
    first, second, third = twins
    assert not {id(cast) for cast, _ in first.values()} & {id(cast) for cast, _ in second.values()}
    assert recast(first, third) == edited_names(editor)
    for one in (editor, other):
        assert_same(cast_copy(one.layout, LOW), fresh(one.layout, one.hparams))


def test_a_deep_copy_takes_no_casts_along(model, settings):
    layout = find_layout(model, settings())
    low = cast_copy(layout, LOW)
    assert layout.casts._casts
    assert not copy.deepcopy(layout).casts._casts
    assert not low.casts._casts


def test_the_copy_goes_with_its_editor(model, tok, requests, settings, twins):
    editor = RLSEditor(model, tok, settings(v_dtype="bfloat16", v_num_grad_steps=2))
    editor.edit(requests[0])
    seen = [weakref.ref(cast) for cast, _ in twins.pop().values()]
    gc.collect()
    assert all(ref() is not None for ref in seen)  # kept for the next batch
    del editor
    gc.collect()
    assert all(ref() is None for ref in seen)


def test_another_parameter_with_the_same_number_and_memory_is_cast_anew():
    """As where one is freed and the next one gets its id and memory; a value between the samples differs."""
    casts, parameter = CastParameters(), torch.nn.Parameter(torch.zeros(4096))
    casts.updated([parameter], LOW, [])
    parameter.data[1] = 1.0
    other = torch.nn.Parameter(parameter.data)
    casts._casts[id(other)] = casts._casts.pop(id(parameter))
    assert float(casts.updated([other], LOW, [])[id(other)][1]) == 1.0


def test_a_replaced_parameter_is_let_go(model, settings):
    layout = find_layout(model, settings())
    cast_copy(layout, LOW)
    seen = weakref.ref(model.get_output_embeddings().weight)
    model.set_input_embeddings(torch.nn.Embedding(600, 32))
    model.get_output_embeddings().weight = torch.nn.Parameter(torch.zeros(600, 32))
    gc.collect()
    assert seen() is None


def test_states_that_the_host_keeps_on_the_model_are_not_copied(model, settings):
    class State:
        def __deepcopy__(self, memo):
            raise AssertionError("a state was copied")

    model.__dict__["_easyedit_rls_states"] = {"objective": State()}
    assert cast_copy(find_layout(model, settings()), LOW).model.config.vocab_size == 600


def test_the_host_casts_once_too(
    host,  # noqa: F811
    model,
    tok,
    requests,
    settings,
    twins,
):
    """EasyEdit makes an editor of each batch; what they keep between them goes with the model."""
    hp = settings(v_dtype="bfloat16", v_num_grad_steps=3)
    for request in requests[:3]:
        apply_rls_to_model(model, tok, [request], hp)
    edited = {hp.rewrite_module_tmp.format(layer) + ".weight" for layer in hp.layers}
    assert all(recast(before, after) == edited for before, after in pairwise(twins))
    seen = [weakref.ref(cast) for cast, _ in twins[0].values()]
    twins.clear()
    del model.__dict__["_easyedit_rls_states"]
    gc.collect()
    assert all(reference() is None for reference in seen)


def test_adopting_keeps_the_masters_of_layers_that_nobody_changed(family, tok, requests, settings):
    editor = RLSEditor(FAMILIES[family]().bfloat16(), tok, settings(keys="mean"))
    editor.edit(requests[:2])
    master = editor.state.layers[1].weight.clone()
    with torch.no_grad():
        editor.layout.edited[2].parameter.mul_(1.25)
    editor.adopt_weights()
    assert torch.equal(editor.state.layers[1].weight, master)
    assert torch.equal(editor.state.layers[2].weight, editor.layout.edited[2].read())


def test_the_objective_is_taken_at_the_masters(family, tok, requests, settings):
    model, hp = FAMILIES[family]().bfloat16(), settings(keys="mean")
    objective, editor = Objective(model, tok, hp), RLSEditor(model, tok, hp)
    editor.edit(requests)
    state = editor.state
    wanted = (
        sum(float((state.layers[n].weight - W_0).square().sum()) for n, W_0 in state.unedited.items())
        * hp.lambda_reg**2
    )
    assert objective.terms(editor.model, editor)["deviation"] == pytest.approx(wanted, rel=FLOAT32_SUM)
    assert objective.terms(editor.model, None)["deviation"] != pytest.approx(wanted, rel=FLOAT32_SUM)
