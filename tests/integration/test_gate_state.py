"""A gated memory: state, ledger and model keep together, and gates can be saved, merged and taken off."""

import copy
import re
import shutil
import subprocess
import sys

import pytest
import torch

from easyedit_rls import (
    GateError,
    LayoutError,
    NumericalError,
    RLSEditor,
    StateMismatchError,
    load_edited,
    merge_gates,
    remove_gates,
    save_edited,
)
from easyedit_rls.cli.main import main
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_history
from easyedit_rls.model.gate import gate_of
from tests.conftest import FAMILIES
from tests.helpers import gate_tensors, same, tensors_of
from tests.tolerances import OTHER_THREADS

pytestmark = pytest.mark.usefixtures("few_ordinary_keys")


def test_the_model_comes_back_from_the_ledger_bit_for_bit(model, family, tok, requests, gated, tmp_path):
    hp = gated()
    straight = RLSEditor(model, tok, hp)
    for batch in (requests[:2], requests[2:]):
        straight.edit(batch)
    first = RLSEditor(FAMILIES[family](), tok, hp, state_dir=tmp_path)
    first.edit(requests[:2])
    first.close()
    again = RLSEditor(FAMILIES[family](), tok, hp, state_dir=tmp_path)
    assert same(gate_tensors(again), gate_tensors(first))
    again.edit(requests[2:])
    assert same(gate_tensors(again), gate_tensors(straight))
    before = gate_tensors(first)
    again.rollback()
    assert same(gate_tensors(again), before)
    again.close()


def test_it_comes_back_before_the_first_checkpoint(model, family, tok, requests, gated, tmp_path):
    """As after a crash: all there is are the prior and the batches; the gate's layer is in float64."""
    first = RLSEditor(model, tok, gated(), state_dir=tmp_path / "ledger")
    for batch in (requests[:2], requests[2:]):
        first.edit(batch)
    shutil.copytree(tmp_path / "ledger", tmp_path / "found")
    again = RLSEditor(FAMILIES[family](), tok, gated(), state_dir=tmp_path / "found")
    assert same(gate_tensors(again), gate_tensors(first))
    assert again.memory.gate == first.memory.gate
    again.close()
    first.close()


def test_edits_open_the_gate_for_themselves_up_to_a_share(model, tok, requests, gated, monkeypatch):
    """Ordinary leverages are 0, 0.001, … 1; one token in a hundred may be open, in need one in ten."""
    memory = RLSEditor(model, tok, gated(gate_share_most=0.1)).memory
    monkeypatch.setattr(memory, "_ordinary", lambda: torch.linspace(0, 1, 1001, dtype=torch.float64))

    def entry(*args):
        found = memory._entry(*args)
        return round(found.threshold, 4), found.edits, round(found.share, 4)

    assert entry(5, 0.995) == (0.99, 5, 0.01)
    assert entry(5, 0.9505) == (0.9505, 5, pytest.approx(0.05, abs=1e-3))
    assert entry(5, 0.2) == (0.9, 5, 0.1)
    memory.gate = memory._entry(10, 0.9505)
    assert memory.gate.threshold < 0.9505
    assert memory._entry(11, 0.97) is memory.gate  # nobody needs more
    assert entry(13, 0.97)[0] == pytest.approx(0.95, abs=2e-3)  # taken anew, with the share that was needed
    assert entry(11, 0.93)[0] == pytest.approx(0.93)
    memory.gate = memory._entry(11, 0.2)
    assert memory._entry(12, 0.1) is memory.gate  # as far as it may


def test_a_batch_that_fails_leaves_the_gate_as_it_was(model, tok, requests, gated, monkeypatch):
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    before, gate = gate_tensors(editor), editor.memory.gate

    def fail(*args):
        raise NumericalError("no")

    monkeypatch.setattr("easyedit_rls.editors.rls.find_said", fail)
    with pytest.raises(NumericalError):
        editor.edit(requests[2:])
    assert same(gate_tensors(editor), before)
    assert editor.memory.gate == gate


def test_weights_that_somebody_changed_are_noticed(model, tok, requests, gated):
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    projection = editor.layout.edited[1].module
    found = projection.weight.detach().clone()
    with torch.no_grad():
        projection.weight.mul_(1.5)
    with pytest.raises(StateMismatchError, match="weights of layers"):
        editor.edit(requests[2:])
    with torch.no_grad():
        projection.weight.copy_(found)
        gate_of(projection).weight.mul_(1.5)
    with pytest.raises(StateMismatchError, match=r"weights of layers \[1\]"):
        editor.edit(requests[2:])


def test_two_kinds_of_memory_do_not_meet(model, family, tok, requests, gated, settings, tmp_path):
    RLSEditor(model, tok, gated()).edit(requests[:2])
    with pytest.raises(LayoutError, match=r"edits behind gates at .*remove_gates"):
        RLSEditor(model, tok, settings())
    with pytest.raises(LayoutError, match=r"edits behind gates at .*the same layers"):
        RLSEditor(model, tok, gated(layers=[2]))
    with pytest.raises(StateMismatchError, match=r"gates with edits of another editor.*remove_gates"):
        RLSEditor(model, tok, gated())
    with pytest.raises(StateMismatchError, match=r"gates with edits of another editor"):
        RLSEditor(model, tok, gated(), state_dir=tmp_path)  # a new ledger
    remove_gates(model)
    RLSEditor(model, tok, gated(layers=[2]))  # closed gates give way
    assert RLSEditor(model, tok, settings()).edit(requests[:2]).n_edits == 2


def test_gates_come_off_without_a_trace(model, family, tok, requests, gated, logits):
    unedited = FAMILIES[family]()
    RLSEditor(model, tok, gated()).edit(requests)
    remove_gates(model)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in unedited.named_modules()]
    assert not any(module._forward_hooks for module in model.modules())
    assert same(tensors_of(model), tensors_of(unedited))
    remove_gates(model)  # nothing happens


def test_a_copy_goes_its_own_way(model, tok, requests, gated, logits):
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    prompt = requests[0]["prompt"].format(requests[0]["subject"])
    other, before = copy.deepcopy(model), logits(model, prompt)
    editor.retract([1, 2])
    assert torch.equal(logits(other, prompt), before)
    assert not torch.equal(logits(model, prompt), before)


def test_saved_gates_are_loaded_with_and_without_this_package(
    model, family, tok, requests, gated, logits, tmp_path
):
    RLSEditor(model, tok, gated()).edit(requests)
    save_edited(model, tmp_path / "edits")
    texts = [request["prompt"].format(request["subject"]) for request in requests] + ["Nothing of the kind"]
    fresh = FAMILIES[family]()
    load_edited(fresh, tmp_path / "edits")
    wanted = [logits(model, text) for text in texts]
    assert all(torch.equal(logits(fresh, text), given) for text, given in zip(texts, wanted))
    bare = FAMILIES[family]()
    moved = (wanted[0] - logits(bare, texts[0])).abs()
    tolerance = OTHER_THREADS["atol"] + OTHER_THREADS["rtol"] * wanted[0].abs()
    assert bool((moved > 10 * tolerance).any())  # what the new process is held to can tell them apart
    bare.save_pretrained(tmp_path / "model")
    torch.save(
        {"ids": [tok(text, return_tensors="pt").input_ids for text in texts], "wanted": wanted},
        tmp_path / "x",
    )
    script = f"""
import sys, torch
sys.modules["easyedit_rls"] = None
sys.path.insert(0, {str(tmp_path / "edits")!r})
from transformers import AutoModelForCausalLM
from gate import load_edited
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "model")!r}).eval()
load_edited(model, {str(tmp_path / "edits")!r})
x = torch.load({str(tmp_path / "x")!r})
with torch.no_grad():
    for ids, wanted in zip(x["ids"], x["wanted"]):
        torch.testing.assert_close(model(ids).logits, wanted, **{OTHER_THREADS!r})
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    with torch.no_grad():
        gate_of(
            RLSEditor(bare, tok, gated()).layout.edited[1].module
        ).weight.zero_()  # a gate that is there gives way
    load_edited(bare, tmp_path / "edits")
    assert torch.equal(logits(bare, texts[0]), wanted[0])
    with pytest.raises(GateError, match="was made with another model"):
        load_edited(FAMILIES[family]().bfloat16(), tmp_path / "edits")
    with pytest.raises(GateError, match="There is no"):
        load_edited(fresh, tmp_path)
    with pytest.raises(GateError, match="memory: gated"):
        save_edited(FAMILIES[family](), tmp_path)


def test_merged_gates_are_the_plain_weights(model, family, tok, requests, gated):
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests)
    edited = {layer: weight.parameter.clone() for layer, weight in editor.layout.edited.items()}
    merge_gates(model)
    assert all(
        torch.equal(weight.module.weight, edited[layer]) for layer, weight in editor.layout.edited.items()
    )
    assert not any(module._forward_hooks for module in model.modules())


def test_the_threshold_is_in_the_ledger_and_survives_compaction(
    model, family, tok, requests, gated, tmp_path
):
    with RLSEditor(model, tok, gated(), state_dir=tmp_path / "state") as editor:
        for request in requests:
            editor.edit(request)
        editor.retract([4])
        gate = editor.memory.gate
    assert gate is not None
    assert read_history(latest(tmp_path / "state")).gate == gate
    assert main(["state", "compact", str(tmp_path / "state")]) == 0
    assert read_history(latest(tmp_path / "state")).gate == gate
    with RLSEditor(FAMILIES[family](), tok, gated(), state_dir=tmp_path / "state") as again:
        assert again.memory.gate == gate
        assert same(gate_tensors(again), gate_tensors(editor))


def test_replay_keeps_the_gate_and_merge_leaves_it_out(
    model, family, tok, requests, gated, logits, tmp_path, capsys
):
    base = FAMILIES[family]()
    base.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    ledger = tmp_path / "state"
    with RLSEditor(model, tok, gated(), state_dir=ledger) as editor:
        editor.edit(requests)
    out, merged = tmp_path / "out", tmp_path / "merged"
    prompt = requests[0]["prompt"].format(requests[0]["subject"])
    assert main(["state", "replay", str(ledger), str(tmp_path / "base"), str(out)]) == 0
    assert "edits behind gates" in capsys.readouterr().out
    fresh = type(base).from_pretrained(out).eval()
    assert same(tensors_of(fresh), tensors_of(base))
    load_edited(fresh, out)
    assert torch.equal(logits(fresh, prompt), logits(model, prompt))
    assert main(["state", "replay", str(ledger), str(tmp_path / "base"), str(merged), "--merge"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"without their gates.*perplexity of ordinary text \d+\.\d+ -> \d+\.\d+", said)
    assert not (merged / "gates.safetensors").exists()
    plain = type(base).from_pretrained(merged).eval()
    for layer, weight in editor.layout.edited.items():
        name = weight.parameter_name
        assert torch.equal(plain.get_parameter(name), weight.parameter), layer
    assert main(["state", "show", str(ledger)]) == 0
    assert "behind gates: tokens with leverage above" in capsys.readouterr().out


def test_a_reset_closes_the_gate(model, family, tok, requests, gated, logits):
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    editor.reset()
    prompt = requests[0]["prompt"].format(requests[0]["subject"])
    assert torch.equal(logits(model, prompt), logits(FAMILIES[family](), prompt))
    editor.edit(requests[:2])
    other = FAMILIES[family]()
    RLSEditor(other, tok, gated()).edit(requests[:2])
    assert torch.equal(logits(model, prompt), logits(other, prompt))


def test_compaction_keeps_the_threshold_of_a_change_that_it_drops(
    model, family, tok, requests, gated, tmp_path
):
    """The last change that stands is a retraction, which nobody can take back any more."""
    with RLSEditor(model, tok, gated(), state_dir=tmp_path / "state") as editor:
        for request in requests[:3]:
            editor.edit(request)
        before = editor.memory.gate
        editor.retract([1])
        gate = editor.memory.gate
        assert gate != before
        editor.edit(requests[3])
        editor.rollback()
        assert editor.memory.gate == gate
    assert main(["state", "compact", str(tmp_path / "state")]) == 0
    assert read_history(latest(tmp_path / "state")).gate == gate


def test_the_gate_follows_weights_that_somebody_put_back(model, tok, requests, gated):
    """As EasyEdit does after an edit that shall not stay."""
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    before = gate_tensors(editor)
    editor.edit(requests[2:])
    for layer, weight in editor.layout.edited.items():
        weight.restore(before[str(layer)])
    editor.state.sync_with_weights(editor.memory)  # what every call begins with
    assert editor.n_edits == 2
    assert same(gate_tensors(editor), before)


def test_what_fails_puts_weights_and_decision_back(model, tok, requests, gated):
    """As a resume does that fails half-way."""
    editor = RLSEditor(model, tok, gated())
    editor.edit(requests[:2])
    before, gate = gate_tensors(editor), editor.memory.gate
    with pytest.raises(ZeroDivisionError), editor.memory.restored_if_it_fails():
        editor.edit(requests[2:])
        assert editor.memory.gate != gate
        raise ZeroDivisionError
    assert same(gate_tensors(editor), before)
    assert editor.memory.gate == gate
