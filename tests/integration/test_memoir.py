"""MEMOIR: who sees the memory, what is learned, and what is kept of it."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from easyedit_rls import (
    GateError,
    HyperParamsError,
    LayoutError,
    NumericalError,
    RLSEditHyperParams,
    StateMismatchError,
    evaluate,
)
from easyedit_rls.data.requests import parse_requests
from easyedit_rls.editors.base import EDITORS, Setup
from easyedit_rls.editors.memoir import MEMOIR
from easyedit_rls.evaluation.scores import score
from easyedit_rls.model.attached_memory import (
    find_memory_of,
    load_memory,
    prompts_of,
    remove_memory,
    save_memory,
)
from easyedit_rls.model.batching import pad
from tests import zoo
from tests.conftest import FAMILIES, tiny_settings
from tests.helpers import same, tensors_of

FRONTS = ("Once upon a time. ", "It rains. ")
OWN = {"layer": 1, "n_iter": 40, "edit_lr": 2.0, "irr_threshold": 0.7}


@pytest.fixture
def begin(model, tok, family):
    def make(other=None, fronts=FRONTS, **changes):
        setup = Setup(
            model if other is None else other, tok, tiny_settings(family), fronts, {**OWN, **changes}
        )
        return MEMOIR.begin(setup)

    return make


@pytest.fixture
def facts(requests):
    return parse_requests(requests)


def prompt_of(fact):
    return fact.before + fact.subject + fact.after


def unlike(model, tok, texts, threshold=0.7):
    """Those of the texts that share less than the threshold with every edit."""
    memory, found = find_memory_of(model)[1], []
    for text in texts:
        with torch.no_grad():
            model(**tok(text, return_tensors="pt"))
        found += [text] if float(memory.overlap) < threshold else []
    return found


def test_without_edits_the_outputs_are_the_models(model, family, begin, facts, logits):
    unedited = FAMILIES[family]()
    begin()
    assert all(torch.equal(logits(model, prompt_of(f)), logits(unedited, prompt_of(f))) for f in facts)


def test_an_edits_own_prompt_has_its_mask(model, begin, facts, logits):
    editor = begin()
    editor.edit(facts)
    assert editor.masked.masks.shape == (len(facts), editor.masked.masks.shape[1])
    assert editor.masked.masks.sum(1).tolist() == [editor.masked.top_k] * len(facts)
    for number, fact in enumerate(facts):
        logits(model, prompt_of(fact))
        assert float(editor.masked.overlap) == 1.0
        assert torch.equal(editor.masked.selected[0], editor.masked.masks[number])


def test_below_the_threshold_logits_are_the_models(model, family, tok, begin, facts, logits, demo_text):
    unedited, weights = FAMILIES[family](), tensors_of(model)
    begin().edit(facts)
    words = demo_text.split()
    texts = unlike(model, tok, [" ".join(words[at : at + 4]) for at in range(0, 200, 4)])
    assert len(texts) > 10
    assert all(torch.equal(logits(model, text), logits(unedited, text)) for text in texts)
    with pytest.warns(UserWarning, match="save_memory"):
        assert same(tensors_of(model), weights)  # none of the model's own was written
    assert not torch.equal(logits(model, prompt_of(facts[0])), logits(unedited, prompt_of(facts[0])))


def test_without_decay_inputs_outside_the_mask_stay(begin, facts, model):
    editor = begin(weight_decay=0.0)
    editor.edit(facts[:1])
    before, first = editor.masked.weight.clone(), editor.masked.masks[0]
    outside = (~first)[None] if editor.masked._is_linear else (~first)[:, None]
    assert float((before * outside).abs().max()) == 0.0
    assert float(before.abs().max()) > 0.0
    editor.edit(facts[1:2])
    second = editor.masked.masks[1]
    outside = (~second)[None] if editor.masked._is_linear else (~second)[:, None]
    moved = (editor.masked.weight - before) * outside
    assert float(moved.abs().max()) == 0.0
    remove_memory(model)
    decayed = begin(weight_decay=0.1)
    decayed.edit(facts[:2])
    assert float(decayed.masked.weight.norm()) < float(editor.masked.weight.norm())


def test_facts_are_learned(model, tok, begin, facts):
    """The last one surely, since nothing was learned after it."""
    assert evaluate(model, tok, facts, show_progress=False).rewrite_accuracy == 0.0
    begin(n_iter=200).edit(facts)
    found = [record.rewrite_accuracy for record in evaluate(model, tok, facts, show_progress=False).records]
    assert found[-1] == 1.0
    assert sum(found) >= 2


def test_it_learns_where_nothing_shall_learn(begin, facts):
    with torch.inference_mode():
        editor = begin()
        editor.edit(facts[:1])
    assert editor.masked.weight.any()
    assert not editor.masked.weight.is_inference()


def test_offloaded_weights_are_refused(model, begin):
    model.get_output_embeddings().to("meta")
    with pytest.raises(LayoutError, match="offloaded"):
        begin()


def test_a_batch_of_prompts_is_what_each_gives_alone(model, tok, begin, facts, logits):
    """Padding on either side, edited and unedited prompts together."""
    begin().edit(facts)
    texts = [prompt_of(facts[0]), "Nothing of the kind is said here", prompt_of(facts[1]) + " and so on"]
    rows = [tok(text).input_ids for text in texts]
    for side in ("left", "right"):
        batch = pad(rows, side, torch.device("cpu"))
        kwargs = {"attention_mask": batch.mask, "position_ids": batch.positions}
        with torch.no_grad():
            found = model(input_ids=batch.ids, **kwargs).logits
        for row, mask, text in zip(found, batch.mask.bool(), texts):
            torch.testing.assert_close(row[mask], logits(model, text)[0], atol=1e-4, rtol=1e-4)


def test_a_generation_keeps_its_prompts_mask(model, tok, begin, facts):
    """With a cache, and without one where the prompt's length is told, the same tokens follow."""
    editor = begin()
    editor.edit(facts)
    ids = tok(prompt_of(facts[0]), return_tensors="pt").input_ids
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert torch.equal(editor.masked.selected[0], editor.masked.masks[0])
    with torch.no_grad(), prompts_of(model, [ids.shape[1]]):
        whole = model(written).logits[0, ids.shape[1] - 1 : -1]
    assert whole.argmax(1).tolist() == written[0, ids.shape[1] :].tolist()
    assert editor.masked.told is None


def test_beams_keep_it_too(model, tok, begin, facts):
    """In a padded batch each prompt gets what it gets alone, and that is not the unedited model's."""
    begin().edit(facts)
    rows = [tok(prompt_of(fact)).input_ids for fact in facts[:3]]

    def written(rows):
        batch = pad(rows, "left", torch.device("cpu"))
        kwargs = {"attention_mask": batch.mask, "max_new_tokens": 6, "num_beams": 3, "do_sample": False}
        return model.generate(batch.ids, **kwargs)[:, batch.ids.shape[1] :].tolist()

    found = written(rows)
    assert found == [written([row])[0] for row in rows]
    remove_memory(model)
    assert found != written(rows)


def test_each_cache_keeps_its_own_prompts(model, tok, begin, facts):
    """Two talks in turn don't mix, and a prompt in chunks is one prompt."""
    editor = begin()
    editor.edit(facts)
    ids = tok(prompt_of(facts[0]), return_tensors="pt").input_ids
    other = tok("Nothing of the kind is said", return_tensors="pt").input_ids
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        model(other, use_cache=True)
        found = model(ids[:, -1:], cache=cache).logits
        assert torch.equal(editor.masked.selected[0], editor.masked.masks[0])
        fresh = model(ids, use_cache=True).past_key_values
        torch.testing.assert_close(found, model(ids[:, -1:], cache=fresh).logits)
        cache = model(ids[:, :2], use_cache=True).past_key_values
        model(ids[:, 2:], cache=cache, use_cache=True)
        assert float(editor.masked.overlap) == pytest.approx(1.0, abs=0.1)
        assert torch.equal(editor.masked.selected[0], editor.masked.masks[0])


def test_a_part_of_the_model_is_refused(model, tok, begin, facts, logits):
    begin().edit(facts)
    logits(model, prompt_of(facts[0]))
    with torch.no_grad(), pytest.raises(GateError, match="Call the model"):
        model.base_model(torch.arange(5)[None])


def test_scores_know_what_the_prompt_is(model, tok, begin, facts):
    """A target's tokens don't change who is asked; nor does what else is scored in the same pass."""
    editor = begin(irr_threshold=1.0)  # any token more, and the mask is another
    editor.edit(facts)
    probes = [f.probe(f.prompt, f.target) for f in facts]
    longer = [f.probe(f"{f.prompt} {f.target}", "well and good") for f in facts]  # texts that begin alike
    longer += [f.probe(f.prompt, f"{f.target} well and good") for f in facts]
    apart = [score(model, tok, [probe], show_progress=False)[0].nll for probe in longer]
    found = [one.nll for one in score(model, tok, [*longer, *probes], show_progress=False)]
    assert found[: len(longer)] == pytest.approx(apart, rel=1e-3)
    alone = [score(model, tok, [probe], show_progress=False)[0].nll for probe in probes]
    together = [s.nll for s in score(model, tok, probes * 3, show_progress=False)][: len(facts)]
    assert together == pytest.approx(alone, rel=1e-3)
    remove_memory(model)
    unedited = [s.nll for s in score(model, tok, probes, show_progress=False)]
    assert all(a < b for a, b in zip(alone, unedited))


def test_what_goes_on_behind_other_prompts_is_refused(model, tok, begin, facts):
    begin().edit(facts)
    ids = tok(prompt_of(facts[0]), return_tensors="pt").input_ids
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        with pytest.raises(GateError, match="did not run with this memory"):
            model(ids[:, -1:], cache=copy.deepcopy(cache))


def test_saved_and_loaded(model, family, begin, facts, logits, tmp_path):
    begin().edit(facts)
    save_memory(model, tmp_path)
    other = FAMILIES[family]()
    load_memory(other, tmp_path)
    for fact in facts:
        assert torch.equal(logits(other, prompt_of(fact)), logits(model, prompt_of(fact)))
    tensors = load_file(tmp_path / "masked_memory.safetensors")
    assert set(tensors) == {"weight", "masks", "permutation", "background"}
    assert tensors["masks"].shape == (len(facts), -(-len(tensors["permutation"]) // 8))  # a bit an input
    remove_memory(other)
    with pytest.raises(GateError, match="no memory with masks"):
        save_memory(other, tmp_path / "none")
    with pytest.raises(GateError, match="There is no"):
        load_memory(other, tmp_path / "none")


def test_it_goes_on_from_its_memory(model, family, begin, facts, tmp_path):
    """As a comparison does that was broken off: its tensors are all it needs."""
    straight = begin()
    straight.edit(facts[:2])
    kept = {name: tensor.clone() for name, tensor in straight.memory().items()}
    straight.edit(facts[2:])
    again = begin(FAMILIES[family]())
    assert again.remember(kept, 1)
    again.edit(facts[2:])
    assert same(again.memory(), straight.memory())


def test_off_without_a_trace(model, family, begin, facts):
    unedited = FAMILIES[family]()
    begin().edit(facts)
    remove_memory(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in unedited.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not model._forward_pre_hooks_with_kwargs
    assert same(tensors_of(model), tensors_of(unedited))


def test_a_second_memory_does_not_drop_the_first(model, family, begin, facts, tmp_path):
    editor = begin()
    editor.edit(facts[:1])
    with pytest.raises(GateError, match=r"1 edits .*remove_memory"):
        begin()
    assert find_memory_of(model)[1] is editor.masked
    save_memory(model, tmp_path)
    remove_memory(model)
    with pytest.raises(GateError, match="was taken off"):
        editor.edit(facts[1:])
    other = FAMILIES[family]()
    with torch.no_grad():
        other.get_submodule(tiny_settings(family).rewrite_module_tmp.format(1)).weight.mul_(1.5)
    with pytest.raises(GateError, match="was made with another model"):
        load_memory(other, tmp_path)
    assert find_memory_of(other) is None


def test_masks_follow_the_weight(begin, facts):
    """Where a host puts it back, the last batch's masks go, whatever failed in between."""
    editor = begin()
    editor.edit(facts[:1])
    before = editor.masked.weight.clone()
    editor.edit(facts[1:2])
    editor.edit([])
    editor.settings.edit_lr = 1e38
    with pytest.raises(NumericalError, match="not finite"):
        editor.edit(facts[2:])
    editor.settings.edit_lr = OWN["edit_lr"]
    assert len(editor.masked.masks) == 2
    with torch.no_grad():
        editor.masked.weight.copy_(before)
    editor.edit(facts[2:3])
    assert len(editor.masked.masks) == 2
    with torch.no_grad():
        editor.masked.weight.mul_(2)
    with pytest.raises(StateMismatchError, match="not what the last batch left"):
        editor.edit(facts[3:])


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_every_family_has_its_memory(name, tok, facts, logits):
    model, unedited = zoo.make(name), zoo.make(name)
    hp = RLSEditHyperParams.for_model(model)
    editor = MEMOIR.begin(Setup(model, tok, hp, FRONTS, {**OWN, "n_background": 4}))
    editor.edit(facts[:2])
    prompt = prompt_of(facts[0])
    assert not torch.equal(logits(model, prompt), logits(unedited, prompt))
    editor.masked.threshold = 1.1
    assert torch.equal(logits(model, prompt), logits(unedited, prompt))


def test_a_batch_that_fails_leaves_the_memory_as_it_was(begin, facts, monkeypatch, model, logits):
    editor = begin()
    editor.edit(facts[:1])
    before = {name: tensor.clone() for name, tensor in editor.memory().items()}
    real = torch.nn.utils.clip_grad_norm_
    calls = []

    def fail(*args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr("torch.nn.utils.clip_grad_norm_", fail)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(facts[1:])
    assert same(editor.memory(), before)
    assert editor.masked.forced is None
    assert not editor.masked.weight.requires_grad


def test_a_copy_goes_its_own_way_and_types_are_its_own(model, begin, facts, logits):
    editor = begin()
    editor.edit(facts)
    other, prompt = copy.deepcopy(model), prompt_of(facts[0])
    found = logits(model, prompt)
    with torch.no_grad():
        editor.masked.weight.zero_()
    assert torch.equal(logits(other, prompt), found)
    assert not torch.equal(logits(model, prompt), found)
    other.bfloat16()
    assert find_memory_of(other)[1].weight.dtype == torch.float32
    assert logits(other, prompt).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "error", "said"),
    [
        ({"top_k": 0}, HyperParamsError, "top_k is 0"),
        ({"top_k": 10_000}, HyperParamsError, "up to"),
        ({"irr_threshold": 1.5}, HyperParamsError, "irr_threshold is 1.5"),
        ({"edit_rl": 1.0}, HyperParamsError, "Did you mean edit_lr"),
        ({"layer": 99}, LayoutError, "no layer 99"),
        ({"loss": "sum"}, HyperParamsError, "'mean' or 'published'"),
    ],
)
def test_wrong_settings(begin, changes, error, said):
    with pytest.raises(error, match=said):
        begin(**changes)


def test_the_published_loss_counts_places_behind_the_prompt(begin, facts):
    rows = begin()._rows(facts[0], 0)
    width = max(len(row.ids) for row in rows) - 1
    shares = begin(loss="published")._shares(rows, width)
    n = [width - (row.target_start - 2) for row in rows]
    assert shares.tolist() == pytest.approx(
        [1 / k / len(rows) for k, row in zip(n, rows) for _ in row.target]
    )
    assert float(begin()._shares(rows, width).sum()) == pytest.approx(1.0)


def test_it_is_registered_and_tells_all_settings(begin):
    assert EDITORS.get("MEMOIR") is MEMOIR
    told = begin().describe()
    assert told["layer"] == 1
    assert told["top_k"] > 0
    json.dumps(told)
