"""MEMOIR through EasyEdit's editor: the memory follows what EasyEdit does with its weight."""

import pytest
import torch

from easyedit_rls import HyperParamsError, NumericalError, StateMismatchError
from easyedit_rls.config.files import shipped
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.editors.base import Setup
from easyedit_rls.editors.memoir import MEMOIR
from easyedit_rls.host.memoir import MEMOIRHyperParams
from easyedit_rls.model.attached_memory import find_memory_of, load_memory, remove_memory, save_memory

PARTS = ("prompts", "subject", "target_new", "ground_truth", "rephrase_prompts")
KEYS = ("prompt", "subject", "target_new", "ground_truth", "rephrase_prompt")


@pytest.fixture(params=["tiny-gpt", "tiny-llama"])
def hp(easyeditor, request):
    own = {"layer": 1, "n_iter": 6, "n_templates": 0}
    return lambda **changes: easyeditor.MEMOIRHyperParams(model_name=request.param, **{**own, **changes})


def requests_of(edits):
    rows = zip(*(edits[part] for part in PARTS))
    return [{**dict(zip(KEYS, row)), "locality": {}, "portability": {}} for row in rows]


def tensors(model):
    return {name: tensor.clone() for name, tensor in find_memory_of(model)[1].tensors().items()}


def expected(easyeditor, settings, *batches):
    """The memory that the editor itself makes of these batches, on a fresh model."""
    editor = easyeditor.BaseEditor.from_hparams(settings)
    hp = RLSEditHyperParams.for_model(editor.model, seed=settings.seed)
    ours = MEMOIR(Setup(editor.model, editor.tok, hp, [], settings.own()))
    for batch in batches:
        ours.edit(parse_requests([{k: r[k] for k in KEYS[:3]} for r in batch]))
    return tensors(editor.model)


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in other)


def test_it_is_a_method_of_easyedits(easyeditor, hp):
    from easyeditor.editors.batch_editor import BatchEditor
    from easyeditor.util.alg_dict import ALG_DICT

    assert ALG_DICT["MEMOIR"] is easyeditor.apply_memoir_to_model
    assert BatchEditor.is_batchable_method("MEMOIR")
    assert issubclass(easyeditor.MEMOIRHyperParams, easyeditor.HyperParams)


def test_sequential_edits_are_one_stream(easyeditor, hp, edits):
    editor = easyeditor.BaseEditor.from_hparams(hp())
    unedited = {name: weight.clone() for name, weight in editor.model.named_parameters()}
    metrics, model, _ = editor.edit(**edits, sequential_edit=True, verbose=False)
    assert len(metrics) == 4
    assert same(tensors(model), expected(easyeditor, hp(), *([r] for r in requests_of(edits))))
    remove_memory(model)
    assert all(torch.equal(weight, unedited[name]) for name, weight in model.named_parameters())


def test_batches_are_one_stream(easyeditor, hp, edits):
    settings, requests = hp(batch_size=2), requests_of(edits)
    editor = easyeditor.BaseEditor.from_hparams(settings)
    _, model, _ = editor.batch_edit(**edits, sequential_edit=True, verbose=False)
    assert same(tensors(model), expected(easyeditor, settings, requests[:2], requests[2:]))


def test_independent_edits_each_begin_without_the_others(easyeditor, hp, edits):
    """EasyEdit puts W_m back behind each; the masks of that edit go with the next call."""
    editor = easyeditor.BaseEditor.from_hparams(hp())
    editor.edit(**edits, sequential_edit=False, verbose=False)
    memory = find_memory_of(editor.model)[1]
    assert float(memory.weight.abs().max()) == 0.0
    editor.edit_requests(requests_of(edits)[:1], sequential_edit=True, verbose=False)
    assert same(tensors(editor.model), expected(easyeditor, hp(), requests_of(edits)[:1]))


def test_a_copy_is_edited_beside_the_model(easyeditor, hp, edits):
    editor = easyeditor.BaseEditor.from_hparams(hp())
    requests = requests_of(edits)
    first, _ = easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests[:1], hp())
    before = tensors(first)
    other, originals = easyeditor.apply_memoir_to_model(
        first, editor.tok, requests[1:], hp(), copy=True, return_orig_weights=True
    )
    assert same(tensors(first), before)
    found, wanted = tensors(other), expected(easyeditor, hp(), requests[:1], requests[1:])
    assert torch.equal(found["masks"], wanted["masks"])
    # a copy's weights may lie elsewhere in memory, which products with few rows tell in their last bits
    torch.testing.assert_close(found["weight"], wanted["weight"], atol=1e-5, rtol=1e-4)
    assert torch.equal(*originals.values(), before["weight"])


def test_other_settings_are_told_apart(easyeditor, hp, edits):
    editor = easyeditor.BaseEditor.from_hparams(hp())
    requests = requests_of(edits)[:1]
    easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests, hp())
    with pytest.raises(StateMismatchError, match=r"1 edits .*reset_cache"):
        easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests, hp(edit_lr=0.5))
    easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests, hp(edit_lr=0.5), reset_cache=True)
    assert len(find_memory_of(editor.model)[1].masks) == 1
    before = tensors(editor.model)
    with pytest.raises(NumericalError):  # nothing is forgotten
        easyeditor.apply_memoir_to_model(
            editor.model, editor.tok, requests, hp(edit_lr=1e38), reset_cache=True
        )
    assert same(tensors(editor.model), before)
    easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests, hp(edit_lr=0.5))
    with pytest.raises(StateMismatchError, match="2 edits"):
        easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests, hp(edit_lr=0.5, n_templates=1))
    with pytest.raises(HyperParamsError, match=r"object.*MEMOIRHyperParams.from_hparams"):
        easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests, object())


def test_a_memory_that_was_loaded_goes_on(easyeditor, hp, edits, tmp_path):
    editor, requests = easyeditor.BaseEditor.from_hparams(hp()), requests_of(edits)
    easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests[:1], hp())
    save_memory(editor.model, tmp_path)
    other = easyeditor.BaseEditor.from_hparams(hp())
    load_memory(other.model, tmp_path)
    easyeditor.apply_memoir_to_model(other.model, other.tok, requests[1:2], hp())
    easyeditor.apply_memoir_to_model(editor.model, editor.tok, requests[1:2], hp())
    assert same(tensors(other.model), tensors(editor.model))


def test_settings_files(tmp_path):
    for name in shipped("MEMOIR"):
        assert 0.4 <= MEMOIRHyperParams.from_hparams(name).irr_threshold <= 0.55
    (tmp_path / "own.yaml").write_text("model_name: tiny\ndevice: 0.0\ntop_k: 7\n")
    found = MEMOIRHyperParams.from_hparams(tmp_path / "own.yaml")
    assert (found.device, found.top_k, found.alg_name) == (0, 7, "MEMOIR")
    (tmp_path / "own.yaml").write_text("model_name: tiny\nedit_rl: 7\n")
    with pytest.raises(HyperParamsError, match="did you mean 'edit_lr'"):
        MEMOIRHyperParams.from_hparams(tmp_path / "own.yaml")
    (tmp_path / "own.yaml").write_text("model_name: tiny\nedit_lr: -1\n")
    with pytest.raises(HyperParamsError, match="edit_lr is -1"):
        MEMOIRHyperParams.from_hparams(tmp_path / "own.yaml")
