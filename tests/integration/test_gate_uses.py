"""What people do with a model, with gates on it: each way gives what a whole pass, one text alone, gives."""

import copy
import importlib.util

import pytest
import torch
from torch.utils.data import DataLoader

from easyedit_rls import RLSEditor, load_edited, save_edited
from easyedit_rls.evaluation import edit_quality, evaluate
from easyedit_rls.model.gate import gate_of
from tests.conftest import FAMILIES, tiny_settings
from tests.tolerances import LOGITS

pytestmark = pytest.mark.usefixtures("few_ordinary_keys")

NEW = 8  # tokens that are generated


@pytest.fixture
def edited(model, family, tok, requests):
    RLSEditor(model, tok, tiny_settings(family, memory="gated", gate_share=0.01)).edit(requests)
    return model


@pytest.fixture
def texts(requests, demo_text):
    words = demo_text.split()
    prompts = [request["prompt"].format(request["subject"]) for request in requests]
    return [*prompts, *(" ".join(words[at : at + 7]) for at in range(0, 70, 7))]


def alone(model, tok, text):
    """Logits of a text, and which of its tokens are open."""
    with torch.no_grad():
        logits = model(**tok(text, return_tensors="pt")).logits[0]
    return logits, decision_of(model).open.flatten()


def decision_of(model):
    return next(module for module in model.modules() if type(module).__name__ == "Decision")


def test_some_tokens_are_open_and_most_are_not(edited, tok, texts):
    found = torch.cat([alone(edited, tok, text)[1] for text in texts])
    assert 0 < float(found.float().mean()) < 0.3


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_of_edited_and_unedited_texts(edited, tok, texts, side):
    given = copy.deepcopy(tok)
    given.padding_side, given.pad_token = side, given.eos_token or "<end>"
    batch = given(texts, return_tensors="pt", padding=True)
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = edited(**batch, position_ids=positions).logits
    for text, row, mask in zip(texts, logits, batch.attention_mask.bool()):
        torch.testing.assert_close(row[mask], alone(edited, tok, text)[0], rtol=0, atol=LOGITS)


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}])
def test_generation_with_a_cache_says_what_it_says_without(edited, tok, texts, how):
    for text in texts[:6]:
        ids = tok(text, return_tensors="pt")
        said = [
            edited.generate(
                **ids, max_new_tokens=NEW, do_sample=False, use_cache=cached, pad_token_id=0, **how
            )
            for cached in (True, False)
        ]
        assert torch.equal(*said)


def test_a_cached_token_is_judged_by_itself(edited, tok, texts):
    """The last token of a prompt alone, behind a cache of the others."""
    for text in texts[:6]:
        ids = tok(text, return_tensors="pt").input_ids
        logits, is_open = alone(edited, tok, text)
        with torch.no_grad():
            cache = edited(ids[:, :-1], use_cache=True).past_key_values
            last = edited(ids[:, -1:], past_key_values=cache).logits[0, -1]
        assert bool(decision_of(edited).open) == bool(is_open[-1])
        torch.testing.assert_close(last, logits[-1], rtol=0, atol=LOGITS)


def test_compiled(edited, tok, texts):
    """The whole model in one graph, without waiting for what is open."""
    compiled = torch.compile(edited, backend="eager", fullgraph=True, dynamic=True)
    for text in texts[:5]:
        wanted = alone(edited, tok, text)[0]
        with torch.no_grad():
            found = compiled(**tok(text, return_tensors="pt"), use_cache=False).logits[0]
        torch.testing.assert_close(found, wanted, rtol=0, atol=LOGITS)
    torch.compiler.reset()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_gate_keeps_its_digits(edited, tok, texts, dtype):
    wanted = [alone(edited, tok, text)[1] for text in texts]
    factors = decision_of(edited).factors.clone()
    low = copy.deepcopy(edited).to(dtype)
    assert torch.equal(decision_of(low).factors, factors)
    found = [alone(low, tok, text) for text in texts]
    assert all(bool(torch.isfinite(logits).all()) for logits, _ in found)
    agree = torch.cat([is_open == before for (_, is_open), before in zip(found, wanted)])
    assert float(agree.float().mean()) > 0.95
    projection = next(module for module in low.modules() if "_easyedit_rls_gate" in module._modules)
    assert gate_of(projection).weight.dtype == dtype


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
def test_spread_out_by_a_device_map(edited, tok, texts):
    from accelerate import dispatch_model

    wanted = [alone(edited, tok, text)[0] for text in texts]
    spread = dispatch_model(edited, {"": "cpu"}, force_hooks=True)
    assert all(torch.equal(alone(spread, tok, text)[0], logits) for text, logits in zip(texts, wanted))


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="PEFT is not installed")
def test_an_adapter_on_top(edited, tok, texts):
    from peft import LoraConfig, get_peft_model

    wanted = [alone(edited, tok, text)[0] for text in texts]
    name = next(name for name, module in edited.named_modules() if "_easyedit_rls_gate" in module._modules)
    adapted = get_peft_model(edited, LoraConfig(r=2, target_modules=[name], task_type="CAUSAL_LM"))
    assert all(torch.equal(alone(adapted, tok, text)[0], logits) for text, logits in zip(texts, wanted))


def test_trained_parameters_are_the_models_own(edited, family, tok):
    names = [name for name, parameter in edited.named_parameters() if parameter.requires_grad]
    assert names == [name for name, _ in FAMILIES[family]().named_parameters()]
    with pytest.warns(UserWarning, match=r"Save them with save_edited\(model, folder\)"):
        state = edited.state_dict()
    assert list(state) == list(FAMILIES[family]().state_dict())
    edited.load_state_dict(state)  # strictly


def test_saved_and_loaded_as_a_folder(edited, family, tok, texts, tmp_path):
    wanted = [alone(edited, tok, text)[0] for text in texts]
    with pytest.warns(UserWarning, match="stand behind gates"):
        edited.save_pretrained(tmp_path)
    save_edited(edited, tmp_path)
    fresh = type(edited).from_pretrained(tmp_path).eval()
    load_edited(fresh, tmp_path)
    assert all(torch.equal(alone(fresh, tok, text)[0], logits) for text, logits in zip(texts, wanted))


def test_evaluators_see_the_edits(edited, family, tok, requests):
    """Ours, which shares prefixes, and EasyEdit's figures; and a data loader's batches."""
    from easyedit_rls import parse_requests

    parsed = parse_requests(requests)
    scores = evaluate(edited, tok, parsed, show_progress=False)
    for request, record in zip(requests, scores.records):
        prompt, target = request["prompt"].format(request["subject"]), f" {request['target_new']}"
        ids = tok(prompt + target, return_tensors="pt").input_ids
        n = len(tok(prompt).input_ids)
        with torch.no_grad():
            said = edited(ids).logits[0, n - 1 : -1].argmax(-1)
        assert record.rewrite_accuracy == float(torch.equal(said, ids[0, n:]))
    before = evaluate(FAMILIES[family](), tok, parsed, show_progress=False).means()["rewrite_accuracy"]
    assert scores.means()["rewrite_accuracy"] > before
    batches = DataLoader([request["prompt"].format(request["subject"]) for request in requests], batch_size=2)
    assert all(torch.isfinite(alone(edited, tok, text)[0]).all() for batch in batches for text in batch)
    records = [{**request, "prompt": request["prompt"].format(request["subject"])} for request in requests]
    assert len(edit_quality(edited, tok, records)) == len(requests)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_checkpoints_are_those_without(model, tok, requests, gated, use_reentrant):
    """Training on top runs layers a second time, the upper ones first."""
    RLSEditor(model, tok, gated()).edit(requests)
    ids = tok(requests[0]["prompt"], return_tensors="pt").input_ids
    weight = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    found = []
    for with_checkpoints in (False, True):
        if with_checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.train()
        weight.requires_grad_(True)
        weight.grad = None
        model(ids, labels=ids, use_cache=False).loss.backward()
        found.append(weight.grad.clone())
    torch.testing.assert_close(*found)
