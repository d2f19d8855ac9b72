"""EasyEdit's own editors, driven for comparisons: one class each."""

import copy
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import HyperParamsError, RLSEditHyperParams, evaluate, parse_requests
from easyedit_rls.data.requests import Probe
from easyedit_rls.editors.base import EDITORS, Setup
from easyedit_rls.errors import LayoutError
from easyedit_rls.evaluation.scores import score
from easyedit_rls.host.registration import registered
from tests.conftest import tiny_settings
from tests.host.test_parity import REQUESTS

MORE = {"prompt": "The lake Garda", "subject": "lake Garda", "target_new": "stones"}
CHANGES = {
    "FT": {"lr": 5e-2},
    "ULTRAEDIT": {"lr": 3e-2},
    "AlphaEdit": {"nullspace_threshold": 1e3},
    "SPHERE": {"nullspace_threshold": 1e3},
    "EMMET": {"emmet_lambda": 1e-3},
    "PMET": {"clamp_norm_factor": 20.0},
    "LoRA": {"num_steps": 10},
    "GRACE": {"n_iter": 20},
    "WISE": {"n_iter": 20, "act_ratio": 0.1},
}
TEMPLATES = ["The weather was fine. "]
NAMES = sorted(name for name in EDITORS.names() if EDITORS.get(name).needs_host)
INSIDE = {"LoRA", "GRACE", "WISE"}  # those that put modules into the model
REMEMBERING = {"AlphaEdit", "SPHERE", *INSIDE}


@pytest.fixture
def setup(easyeditor, model_folder, demo_text, tmp_path):
    """What a named editor of a tiny model begins with; each call loads the model anew."""
    from tests.host.conftest import host_settings

    (tmp_path / "text.txt").write_text(demo_text, encoding="utf-8")
    text = {"mom2_dataset": str(tmp_path / "text.txt"), "mom2_update_weight": 1.0, "v_num_grad_steps": 15}

    def make(name, folder="tiny-llama", is_tied=False, **changes):
        hparams = RLSEditHyperParams.from_dict({**host_settings(easyeditor, folder).to_dict(), **text})
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        if is_tied:  # then MEMIT and others find no weight of the head's name
            model.lm_head.weight = model.model.embed_tokens.weight
        tok = AutoTokenizer.from_pretrained(folder)
        tok.pad_token = None  # as many published ones are
        return Setup(model, tok, hparams, TEMPLATES, {**CHANGES.get(name, {}), **changes})

    return make


@pytest.fixture
def editor(setup):
    return lambda name, *args, **changes: EDITORS.get(name).begin(setup(name, *args, **changes))


def probes(requests):
    return [Probe(request.prompt, request.target) for request in requests]


def nll(one, requests):
    return sum(s.nll for s in score(one.model, one.tok, probes(requests)))


def expected_changes(one, name):
    """The parameters that an editor may touch."""
    if name == "GRACE":
        return {f"{one.place}.values"}
    if name == "WISE":
        return {f"{one.place}.new_weight"}
    if name == "LoRA":
        modules = one.settings.target_modules
        return {f"{module}.lora_{part}.default.weight" for module in modules for part in "AB"}
    if name == "ULTRAEDIT":
        return {f"{module}.weight" for module in one.settings.inner_params}
    parts = ("weight", "bias") if name == "FT" else ("weight",)
    modules = [one.settings.rewrite_module_tmp.format(layer) for layer in one.settings.layers]
    names = dict(one.model.named_parameters())
    return {f"{module}.{part}" for module in modules for part in parts if f"{module}.{part}" in names}


@pytest.mark.parametrize("kind", ["tiny-llama", "tied head", "tiny-gpt"])
@pytest.mark.parametrize("name", NAMES)
def test_each_edits_its_layers_and_nothing_else(editor, name, kind):
    where = {"folder": "tiny-gpt"} if kind == "tiny-gpt" else {"is_tied": kind == "tied head"}
    if (name, kind) == ("SPHERE", "tiny-gpt"):
        with pytest.raises(LayoutError, match=r"layer 1 has a Conv1D\. Leave SPHERE out"):
            editor(name, **where)
        return
    one = editor(name, **where)
    requests = parse_requests(REQUESTS[:2])
    before = {name: weight.detach().clone() for name, weight in one.model.named_parameters()}
    side, old, random, files = one.tok.padding_side, nll(one, requests), torch.get_rng_state(), os.listdir()
    one.edit(requests)
    assert torch.equal(torch.get_rng_state(), random)
    assert os.listdir() == files
    assert (one.tok.padding_side, one.tok.pad_token) == (side, None)
    after = dict(one.model.named_parameters())
    changed = {name for name, p in after.items() if name not in before or not torch.equal(p, before[name])}
    assert changed == expected_changes(one, name)
    assert nll(one, requests) < old
    assert one.describe().keys().isdisjoint({"stats_dir", "P_loc"})
    one.close()


@pytest.mark.parametrize("name", NAMES)
def test_one_that_was_broken_off_goes_on_alike(editor, name):
    """Two batches, and in a second process the second behind weights and memory of the first."""
    first, second = parse_requests(REQUESTS[:2]), parse_requests([REQUESTS[2], MORE])
    whole, again = editor(name), editor(name)
    whole.edit(first)
    memory = {key: tensor.clone() for key, tensor in whole.memory().items()}
    assert bool(memory) == (name in REMEMBERING)
    if name not in INSIDE:
        again.model.load_state_dict(whole.model.state_dict())
    assert again.remember(memory, 1)
    whole.edit(second)
    again.edit(second)
    after = dict(again.model.named_parameters())
    assert all(torch.equal(p, after[key]) for key, p in whole.model.named_parameters())
    asked = probes(first + second)
    assert score(whole.model, whole.tok, asked) == score(again.model, again.tok, asked)


@pytest.mark.parametrize("name", ["AlphaEdit", "ROME", "WISE"])
def test_two_in_one_process_know_nothing_of_each_other(editor, name):
    """EasyEdit keeps templates, moments and histories in its modules."""
    first, second = parse_requests(REQUESTS[:1]), parse_requests(REQUESTS[1:2])
    alone, between = editor(name), editor(name)
    other = editor(name, "tiny-qwen2")
    for requests in (first, second):
        alone.edit(requests)
    for requests in (first, second):
        between.edit(requests)
        other.edit(requests)
    after = dict(between.model.named_parameters())
    assert all(torch.equal(p, after[key]) for key, p in alone.model.named_parameters())


@pytest.mark.parametrize("name", ["GRACE", "WISE"])
def test_texts_are_scored_as_if_alone(editor, name):
    """EasyEdit's adapters look at one place, or decide, for a whole batch."""
    one = editor(name)
    requests = parse_requests([*REQUESTS, MORE])
    one.edit(requests[:2])
    asked = probes(requests) * 3 + [Probe("The river Oder and", "people"), Probe("Rain", "water")]
    together = score(one.model, one.tok, asked)
    for probe, found in zip(asked, together):
        (alone,) = score(one.model, one.tok, [probe])
        assert alone.nll == pytest.approx(found.nll, abs=1e-4)
    assert nll(one, requests[:2]) < nll(editor(name), requests[:2])
    twin = copy.deepcopy(one.model)
    assert score(twin, one.tok, asked) == together


def test_grace_says_the_answer_and_leaves_other_prompts_alone(editor):
    one, plain = editor("GRACE", eps=1e-3), editor("FT")
    requests = parse_requests([*REQUESTS, MORE])
    one.edit(requests[:2])
    found = evaluate(one.model, one.tok, requests[:2], show_progress=False)
    assert [record.rewrite_accuracy for record in found.records] == [1.0, 1.0]
    others = probes(requests[2:])
    assert [s.nll for s in score(one.model, one.tok, others)] == pytest.approx(
        [s.nll for s in score(plain.model, plain.tok, others)], abs=1e-5
    )


def test_eamet_finds_every_value_from_zero_on(editor):
    """The gradient of its cosine terms at a change of zero, 1e12, would stop Adam from the second fact on."""
    requests = parse_requests(REQUESTS[:2])

    def lost(change):
        one = editor("EAMET", delta_init="zero")
        change(one)
        before = score(one.model, one.tok, probes(requests))
        one.edit(requests)
        after = score(one.model, one.tok, probes(requests))
        return [old.nll - new.nll for old, new in zip(before, after)]

    theirs, ours = lost(lambda one: one.state.pop("eamet.compute_z")), lost(lambda one: None)
    assert ours[0] == pytest.approx(theirs[0], abs=0.5)
    assert ours[1] > 2 > theirs[1]


def test_ultraedit_edits_all_of_a_batch(editor):
    """It drops what is left over when a batch is cut into passes of its `batch_size_once`."""
    requests = parse_requests([*REQUESTS, MORE])[:3]
    two, one = editor("ULTRAEDIT", batch_size_once=2), editor("ULTRAEDIT", batch_size_once=1)
    two.edit(requests)
    one.edit(requests)
    assert all(map(torch.equal, two.model.parameters(), one.model.parameters()))
    assert two.settings.batch_size_once == 2


def test_without_easyedit_what_is_made_of_our_settings_is_checked(monkeypatch):
    monkeypatch.setattr("easyedit_rls.host.baselines.base.settings_fields", lambda *_: None)
    check, hparams = EDITORS.get("MEMIT").check, tiny_settings("llama")
    check({"v_lr": 0.1, "only_easyedit_knows": 1}, hparams)
    with pytest.raises(HyperParamsError, match=r"MEMIT: layers is 3\. Give a list\."):
        check({"layers": 3}, hparams)


def test_faults_name_what_there_is(editor, setup):
    with pytest.raises(HyperParamsError, match=r"ROME has no setting lamda; it has .*v_lr"):
        editor("ROME", lamda=1)
    with pytest.raises(HyperParamsError, match=r"EAMET: tau is 'soft'\. Give a number\."):
        editor("EAMET", tau="soft")
    with pytest.raises(HyperParamsError, match=r"WISE: replay is True\. Leave it out\."):
        editor("WISE", replay=True)
    with pytest.raises(HyperParamsError, match=r"CORE: layer_range is 0\. Give 1 or more\."):
        editor("CORE", layer_range=0)
    with pytest.raises(HyperParamsError, match=r"GRACE: replacement is 'replace_all'\. Give 'replace_last'"):
        editor("GRACE", replacement="replace_all")
    with pytest.raises(HyperParamsError, match=r"no editor 'MEMITT'\. Did you mean MEMIT\?"):
        EDITORS.get("MEMITT")


def test_every_editor_of_the_checkout_is_joined_or_refused_with_the_reason(easyeditor):
    from easyeditor.util.alg_dict import ALG_DICT

    theirs = set(ALG_DICT) - set(registered())
    assert theirs == set(NAMES) | set(EDITORS.refused())
    for name in EDITORS.refused():
        with pytest.raises(HyperParamsError, match=rf"^{name} .*(Take|Compare) .*\.$"):
            EDITORS.get(name)


def test_settings_are_those_of_easyedits_classes(easyeditor):
    """They are read from the source before anything is imported."""
    import dataclasses
    import importlib

    from easyedit_rls.host.find import settings_fields

    for name in NAMES:
        module, kind = EDITORS.get(name).settings_class
        known = getattr(importlib.import_module(f"easyeditor.models.{module}"), kind)
        assert settings_fields(module, kind) == {f.name for f in dataclasses.fields(known) if f.init}


def test_lists_may_be_given_where_easyedit_has_them(editor):
    assert editor("EAMET", mom2_update_weight=[3.0, 4.0]).settings.mom2_update_weight == [3.0, 4.0]
    assert editor("EAMET").settings.mom2_update_weight == [1.0, 1.0]
    assert editor("GRACE", inner_params=["model.layers.1.mlp.up_proj"]).place == "model.layers.1.mlp.up_proj"
    hparams = tiny_settings("llama")
    assert EDITORS.get("LoRA").defaults(hparams)["target_modules"] == [
        "model.layers.1.mlp.down_proj",
        "model.layers.2.mlp.down_proj",
    ]
