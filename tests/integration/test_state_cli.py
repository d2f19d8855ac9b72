"""``easyedit-rls state``: every command on a real ledger of a tiny model."""

import copy
import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from easyedit_rls import RLSEditor
from easyedit_rls.cli.main import main
from easyedit_rls.ledger.ledger import Ledger
from easyedit_rls.ledger.reading import journals, latest
from easyedit_rls.ledger.snapshot import read_history
from tests.conftest import FAMILIES
from tests.helpers import same
from tests.tolerances import ADAPTER, DRIFT, FLOAT32, REBUILT


@pytest.fixture
def ledger(model, tok, requests, settings, tmp_path):
    """A ledger with one superseded, one retracted and one rolled-back edit; the unedited model and the edited
    one beside it.
    """
    model.save_pretrained(tmp_path / "base")
    tok.save_pretrained(tmp_path / "base")
    editor = RLSEditor(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tok,
        settings(checkpoint_every=2), state_dir=tmp_path / "state")  # fmt: skip
    editor.edit(requests[:3])
    editor.edit({**requests[0], "target_new": "water", "case_id": "7"})
    editor.retract(2)
    editor.edit(requests[3])
    editor.rollback()
    editor.close()
    editor.model.save_pretrained(tmp_path / "edited")
    return tmp_path / "state"


def run(capsys, *arguments):
    status = main(["state", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def parameters(folder):
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def test_show(ledger, capsys):
    status, out, _ = run(capsys, "show", ledger, "--json")
    shown = json.loads(out)
    assert status == 0
    assert (shown["edits"], shown["edits_ever_made"], shown["batches"]) == (2, 5, 2)
    assert shown["bytes_on_disk"] == sum(path.stat().st_size for path in ledger.rglob("*") if path.is_file())
    assert [layer["layer"] for layer in shown["layers"]] == [1, 2]
    assert all(0 < layer["deviation"] < 10 and layer["drift"] < DRIFT for layer in shown["layers"])
    assert "2 edits in 2 batches" in run(capsys, "show", ledger)[1]


def test_the_terms_are_those_of_the_objective(ledger, capsys, model, tok, settings):
    """Against the sums written out, with the second moments the prior was made of."""
    from easyedit_rls.anchors.cache import moments

    shown = json.loads(run(capsys, "show", ledger, "--json")[1])["layers"]
    hp, history = settings(), read_history(latest(ledger))
    edited, base = parameters(ledger.parent / "edited"), parameters(ledger.parent / "base")
    gram = moments(model, tok, hp)
    for figures in shown:
        layer = figures["layer"]
        weight = RLSEditor(model, tok, hp).layout.edited[layer]
        W, W_0 = (p[weight.parameter_name].detach().double() for p in (edited, base))
        W, W_0 = (W.T, W_0.T) if weight._is_transposed else (W, W_0)
        K, V, D = (tensor.double() for tensor in history.tensors(history.live, [layer])[layer])
        text = hp.mom2_update_weight * gram[layer].mean.double()
        assert figures["edits_term"] == pytest.approx(
            float((D[:, None] * (K @ W - V) ** 2).sum()), rel=FLOAT32
        )
        assert figures["deviation_term"] == pytest.approx(
            hp.lambda_reg**2 * float(((W - W_0) ** 2).sum()), rel=FLOAT32
        )
        assert figures["anchor_term"] == pytest.approx(
            hp.mu_reg**2 * float(((W - W_0) * (text @ (W - W_0))).sum()), rel=1e-2
        )


def test_log(ledger, capsys):
    status, out, _ = run(capsys, "log", ledger, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [(row["id"], row["status"]) for row in rows if "id" in row] == [
        (1, "superseded"),
        (2, "retracted"),
        (3, "stands"),
        (4, "stands"),
        (5, "rolled back"),
    ]
    assert [(row["kind"], row["edits"]) for row in rows if "id" not in row] == [
        ("supersede", [1]),
        ("retract", [2]),
        ("rollback", [5]),
    ]
    assert (rows[4]["target_new"], rows[4]["case_id"]) == ("water", "7")
    text = run(capsys, "log", ledger)[1].splitlines()
    assert len(text) == len(rows)
    assert text[0].endswith("s     1  The river Oder -> people")


def test_verify_finds_damage_and_names_it(ledger, capsys):
    status, out, _ = run(capsys, "verify", ledger)
    assert status == 0
    assert "0 damaged" in out
    assert out.count("yes") == 4
    prior = latest(ledger).folder / "prior-layer-1.safetensors"
    prior.write_bytes(prior.read_bytes()[:-3])
    for options in ([], ["--files-only"]):
        status, out, _ = run(capsys, "verify", ledger, *options)
        assert status == 1
        assert "prior-layer-1.safetensors" in out


def test_verify_tells_a_state_that_left_the_batch_solution(ledger, capsys, tok, settings):
    editor = RLSEditor(
        AutoModelForCausalLM.from_pretrained(ledger.parent / "base"), tok, settings(), state_dir=ledger
    )
    editor.state.layers[1].weight.add_(0.1)
    editor.state.checkpoint(0)
    editor.state.ledger.close()
    status, out, _ = run(capsys, "verify", ledger)
    assert status == 1
    assert "left the batch solution" in out


def test_replay_makes_the_edited_model(ledger, capsys, tmp_path):
    for options in ([], ["--from-start"]):
        status, out, _ = run(capsys, "replay", ledger, tmp_path / "base", tmp_path / "replayed", *options)
        assert status == 0
        assert "2 edits written" in out
        assert same(parameters(tmp_path / "replayed"), parameters(tmp_path / "edited"))
        shutil.rmtree(tmp_path / "replayed")
    status, _, err = run(capsys, "replay", ledger, tmp_path / "edited", tmp_path / "out")
    assert status == 1
    assert "weights of layers [1, 2] are not the unedited ones" in err
    status, _, err = run(capsys, "replay", ledger, tmp_path / "nowhere", tmp_path / "out")
    assert status == 2
    assert "There is no folder" in err
    assert not (tmp_path / "out").exists()


def test_replay_refuses_another_model(ledger, capsys, tmp_path, family, tok):
    other = FAMILIES[family]()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    tok.save_pretrained(tmp_path / "other")
    stranger = FAMILIES[next(name for name in FAMILIES if name != family)]()
    stranger.save_pretrained(tmp_path / "stranger")
    tok.save_pretrained(tmp_path / "stranger")
    assert "fingerprint" in run(capsys, "replay", ledger, tmp_path / "other", tmp_path / "out")[2]
    assert "has no weight" in run(capsys, "replay", ledger, tmp_path / "stranger", tmp_path / "out")[2]


def test_retract_without_a_model(ledger, capsys, tok, settings, tmp_path):
    status, out, _ = run(capsys, "retract", ledger, 4)
    assert status == 0
    assert "retracted 4: The river Oder -> water" in out
    status, _, err = run(capsys, "retract", ledger, 4, 9)
    assert status == 2
    assert "no such edit: 4, 9; 1 edits stand" in err
    editor = RLSEditor(
        AutoModelForCausalLM.from_pretrained(tmp_path / "edited"), tok, settings(), state_dir=ledger
    )  # of an earlier batch
    assert editor.n_edits == 1
    editor.rollback()
    assert sorted(editor.state.history.live) == [3, 4]
    edited = parameters(tmp_path / "edited")
    assert all(torch.equal(edited[w.parameter_name], w.parameter) for w in editor.layout.edited.values())


def test_an_adapter_does_what_the_edit_does(ledger, capsys, tmp_path, tok):
    status, out, _ = run(capsys, "export", ledger, "--lora", tmp_path / "adapter")
    assert status == 0
    assert "rank" in out
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    edited = AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    ids = torch.tensor([tok("The river Oder")["input_ids"]])
    with torch.no_grad():
        wanted, unedited = edited(ids).logits, base(ids).logits
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
        assert float((adapted(ids).logits - wanted).norm() / (wanted - unedited).norm()) < ADAPTER
    merged = dict(adapted.merge_and_unload().named_parameters())
    for name, parameter in edited.named_parameters():
        torch.testing.assert_close(merged[name], parameter, **REBUILT)


def test_an_adapter_of_too_small_a_rank_says_its_error(ledger, capsys, tmp_path):
    out = run(capsys, "export", ledger, "--lora", tmp_path / "adapter", "--rank", 1)[1]
    errors = [float(word) for word in out.split() if word.count("e-0") == 1 or word.startswith("0.")]
    assert "rank 1" in out
    assert errors
    assert max(errors) > ADAPTER


def test_an_adapter_larger_than_the_weights_is_refused(model, tok, settings, capsys, tmp_path):
    with RLSEditor(model, tok, settings(v_num_grad_steps=3), state_dir=tmp_path / "state") as editor:
        words = [f"number{i}" for i in range(24)]
        editor.edit(
            [
                {"prompt": f"The {word} is", "subject": word, "target_new": words[-i]}
                for i, word in enumerate(words, 1)
            ]
        )
    status, _, err = run(capsys, "export", tmp_path / "state", "--lora", tmp_path / "adapter")
    assert status == 1
    assert "larger than the weights" in err
    assert "--rank" in err
    assert not (tmp_path / "adapter").exists()


def test_compact_keeps_every_bit_of_the_state(ledger, capsys, tok, settings, requests, tmp_path):
    before = RLSEditor(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tok, settings(), state_dir=ledger
    )
    before.state.ledger.close()
    status, out, _ = run(capsys, "compact", ledger)
    assert status == 0
    assert "before" in out
    assert len(journals(ledger)) == 1
    assert [line.kind for line in latest(ledger).lines] == ["begin", "entry", "entry", "checkpoint"]
    assert "0 damaged" in run(capsys, "verify", ledger)[1]
    after = RLSEditor(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tok, settings(), state_dir=ledger
    )
    for layer, solution in before.state.layers.items():
        assert torch.equal(solution.weight, after.state.layers[layer].weight)
        assert torch.equal(solution.covariance(), after.state.layers[layer].covariance())
    report = after.edit(requests[3])
    assert report.facts[0].edit_id == 6  # numbers are never used twice
    after.retract([3, 4])
    assert sorted(after.state.history.live) == [6]
    after.close()
    assert "NO" not in run(capsys, "verify", ledger)[1]


def test_a_forgetting_state_survives_compaction(tok, model, settings, requests, capsys, tmp_path):
    hp = settings(solver="forgetting", solver_settings={"factor": 0.8})
    editor = RLSEditor(model, tok, hp, state_dir=tmp_path / "state")
    for request in requests:
        editor.edit(request)
    editor.retract([2])
    left = editor.state.history.tensors([1], [1])[1][2]
    editor.close()
    assert run(capsys, "compact", tmp_path / "state")[0] == 0
    history = read_history(latest(tmp_path / "state"))
    assert torch.equal(history.tensors([1], [1])[1][2], left)  # faded by the batch that is empty now, too
    assert float(left) == pytest.approx(0.8**3, rel=FLOAT32)


def test_a_held_ledger_and_no_ledger(ledger, capsys, tmp_path):
    held = Ledger(ledger)
    for command in (["retract", ledger, 3], ["compact", ledger]):
        assert "held by another editor" in run(capsys, *command)[2]
    assert run(capsys, "show", ledger)[0] == 0  # reading needs no lock
    held.close()
    for command in (["show"], ["log"], ["verify"], ["retract", 1], ["compact"]):
        status, _, err = run(capsys, command[0], tmp_path / "nothing", *command[1:])
        assert status == 1
        assert "holds no ledger" in err
    assert not (tmp_path / "nothing").exists()


def test_help_says_what_is_read_and_written(capsys):
    for command in ("show", "log", "verify", "retract", "replay", "export", "compact"):
        with pytest.raises(SystemExit) as ended:
            main(["state", command, "--help"])
        assert ended.value.code == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "Reads the ledger" in said
        assert "write" in said
    with pytest.raises(SystemExit) as ended:
        main(["state"])
    assert ended.value.code == 2


def test_the_unedited_model_is_not_overwritten(ledger, capsys):
    base = ledger.parent / "base"
    before = {path: path.read_bytes() for path in base.iterdir()}
    status, _, err = run(capsys, "replay", ledger, base, base)
    assert status == 1
    assert "the unedited model would be lost" in err
    assert {path: path.read_bytes() for path in base.iterdir()} == before


@pytest.mark.parametrize("command", ["replay", "export"])
def test_nothing_is_written_into_the_ledger(ledger, capsys, command):
    inside = ledger / "journal-0001" / "out"
    arguments = [ledger.parent / "base", inside] if command == "replay" else ["--lora", inside, "--rank", 1]
    status, _, err = run(capsys, command, ledger, *arguments)
    assert status == 1
    assert "lies within the ledger" in err
    assert not inside.exists()


def test_texts_do_not_steer_the_terminal(tok, model, settings, tmp_path, capsys):
    folder = tmp_path / "[/b] \x1b[31m"
    with RLSEditor(model, tok, settings(), state_dir=folder) as editor:
        editor.edit({"prompt": "The river \x1b[31mOder", "subject": "Oder", "target_new": "people"})
    for command in ("show", "log", "verify"):
        status, out, _ = run(capsys, command, folder)
        assert status == 0
        assert command == "show" or "\x1b" not in out
    assert "\\x1b[31mOder" in run(capsys, "log", folder)[1]


def test_what_somebody_put_into_the_ledger_is_set_aside(ledger, capsys, tok, settings, requests):
    journal = latest(ledger).folder
    (journal / "notes").mkdir()
    (journal / "notes" / "mine.txt").write_text("keep")
    (journal / "adapter.bin").write_text("keep too")
    assert "has no place here, set aside by the next editor" in run(capsys, "verify", ledger)[1]
    editor = RLSEditor(AutoModelForCausalLM.from_pretrained(ledger.parent / "base"), tok,
        settings(checkpoint_every=2), state_dir=ledger)  # fmt: skip
    assert (journal / "adapter.bin").exists()  # before the first event nothing is moved
    editor.edit(requests[3])
    editor.close()
    kept = {path.name: path.read_text() for path in (ledger / "set-aside").rglob("*") if path.is_file()}
    assert kept == {"mine.txt": "keep", "adapter.bin": "keep too"}
    assert run(capsys, "verify", ledger)[0] == 0


def test_an_index_from_a_backup_loses_nothing(ledger, capsys, tok, settings, requests):
    """What lies behind it is set aside, the newer entries with it."""
    journal = latest(ledger).folder
    old = {name: (journal / name).read_bytes() for name in ("head.json", "index.jsonl")}
    how = settings(checkpoint_every=100)
    with RLSEditor(
        AutoModelForCausalLM.from_pretrained(ledger.parent / "base"), tok, how, state_dir=ledger
    ) as editor:
        editor.edit(requests[3])
    newer = (journal / "entries.bin").read_bytes()
    for name, content in old.items():
        (journal / name).write_bytes(content)
    with RLSEditor(
        AutoModelForCausalLM.from_pretrained(ledger.parent / "base"), tok, how, state_dir=ledger
    ) as editor:
        editor.edit(requests[1])
    kept = {path.name: path.read_bytes() for path in (ledger / "set-aside").rglob("*") if path.is_file()}
    tail = next(content for name, content in kept.items() if name.startswith("entries.bin"))
    assert newer.endswith(tail)
    assert any(name.startswith("checkpoint") for name in kept)


@pytest.mark.parametrize("n", [1, 2])
def test_the_last_change_can_be_rolled_back_after_compaction(
    tok, model, settings, requests, capsys, tmp_path, n
):
    """It is a retraction here, whose edit compaction would drop."""
    unedited = copy.deepcopy(model)
    editor = RLSEditor(model, tok, settings(), state_dir=tmp_path)
    for request in requests[:n]:
        editor.edit(request)
    before = {layer: weight.snapshot() for layer, weight in editor.layout.edited.items()}
    editor.retract(1)
    after = {layer: weight.snapshot() for layer, weight in editor.layout.edited.items()}
    editor.close()
    assert run(capsys, "compact", tmp_path)[0] == 0
    for start in (unedited, copy.deepcopy(model)):  # the saved model is known by its fingerprint
        again = RLSEditor(start, tok, settings(), state_dir=tmp_path)
        assert all(
            torch.equal(weight.snapshot(), after[layer]) for layer, weight in again.layout.edited.items()
        )
        again.state.ledger.close()
    again = RLSEditor(copy.deepcopy(unedited), tok, settings(), state_dir=tmp_path)
    again.rollback()
    assert list(again.state.history.live) == list(range(1, n + 1))
    assert all(torch.equal(weight.snapshot(), before[layer]) for layer, weight in again.layout.edited.items())
    again.edit(requests[3])
    again.close()
    assert run(capsys, "verify", tmp_path)[0] == 0
