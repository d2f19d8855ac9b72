"""EasyEdit's own editors, driven for comparisons."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from easyedit_rls import HostError, HyperParamsError, RLSEditHyperParams, evaluate, parse_requests
from easyedit_rls.data.requests import Probe
from easyedit_rls.evaluation.scores import score
from easyedit_rls.host.builtin import BUILTIN, EasyEditBaseline
from tests.host.test_parity import REQUESTS

CHANGES = {"FT": {"lr": 5e-2}, "ULTRAEDIT": {"lr": 3e-2}, "AlphaEdit": {"nullspace_threshold": 1e3}}
TEMPLATES = ["The weather was fine. "]


@pytest.fixture
def editor(easyeditor, model_folder, demo_text, tmp_path, is_tied):
    from tests.host.conftest import host_settings

    (tmp_path / "text.txt").write_text(demo_text, encoding="utf-8")
    text = {"mom2_dataset": str(tmp_path / "text.txt"), "mom2_update_weight": 1.0, "v_num_grad_steps": 15}
    hparams = RLSEditHyperParams.from_dict({**host_settings(easyeditor, "tiny-llama").to_dict(), **text})
    model = AutoModelForCausalLM.from_pretrained("tiny-llama", dtype=torch.float32).eval()
    if is_tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    tok = AutoTokenizer.from_pretrained("tiny-llama")
    tok.pad_token = None  # as many published ones are
    return lambda name, **changes: EasyEditBaseline(
        name, model, tok, hparams, TEMPLATES, {**CHANGES.get(name, {}), **changes}, False
    )


@pytest.fixture
def is_tied(request):
    """Whether the head's weight is the embedding's: MEMIT then finds no weight of the head's name."""
    return getattr(request, "param", False)


@pytest.mark.parametrize("is_tied", [False, True], ids=["head", "tied head"], indirect=True)
@pytest.mark.parametrize("alg_name", BUILTIN)
def test_each_edits_its_layers_and_nothing_else(editor, alg_name):
    one = editor(alg_name)
    side, requests = one.tok.padding_side, parse_requests(REQUESTS)
    before = {name: weight.detach().clone() for name, weight in one.model.named_parameters()}
    probes = [Probe(request.prompt, request.target) for request in requests]
    old = score(one.model, one.tok, probes)
    one.edit(requests)
    changed = {name for name, weight in one.model.named_parameters() if not torch.equal(weight, before[name])}
    layers = (
        one.settings.inner_params
        if alg_name == "ULTRAEDIT"
        else [one.settings.rewrite_module_tmp.format(n) for n in one.settings.layers]
    )
    assert changed == {f"{layer}.weight" for layer in layers}
    assert (one.tok.padding_side, one.tok.pad_token) == (side, None)
    assert sum(s.nll for s in score(one.model, one.tok, probes)) < sum(s.nll for s in old)


def test_a_second_one_starts_anew(editor):
    """AlphaEdit keeps its history in the module."""
    from easyeditor.models.alphaedit import AlphaEdit_main

    requests = parse_requests(REQUESTS)
    editor("AlphaEdit").edit(requests[:1])
    assert AlphaEdit_main.cache_c_new
    second = editor("AlphaEdit")
    assert not AlphaEdit_main.cache_c_new
    assert AlphaEdit_main.CONTEXT_TEMPLATES_CACHE == [["{}"], ["The weather was fine. {}"]]
    assert evaluate(second.model, second.tok, requests, show_progress=False).records


def test_faults_name_what_there_is(editor):
    with pytest.raises(HostError, match=r"known: RLSEdit, AlphaEdit, MEMIT"):
        editor("GRACE")
    with pytest.raises(HyperParamsError, match=r"ROME has no setting lamda; it has .*v_lr"):
        editor("ROME", lamda=1)
