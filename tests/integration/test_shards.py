"""A gated memory that is full goes on in a new shard, and stays one memory: ledger, retraction, roll-back."""

import copy
import shutil

import pytest
import torch

from easyedit_rls import NumericalError, RLSEditor, load_edited, merge_gates, remove_gates, save_edited
from easyedit_rls.cli.main import main
from easyedit_rls.data.requests import EditRequest
from easyedit_rls.ledger import compact as compaction
from easyedit_rls.ledger.history import Edit, Entry, History
from easyedit_rls.ledger.moment import Moment
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_moment
from easyedit_rls.model.gate import CLOSED, gate_of
from easyedit_rls.model.gated_weight import find_decision
from easyedit_rls.model.weights import EditedWeight
from easyedit_rls.solvers.batch import batch_solution
from tests.conftest import FAMILIES
from tests.helpers import gate_tensors, same, tensors_of
from tests.tolerances import GATE_SUMMED_ANEW

pytestmark = pytest.mark.usefixtures("few_ordinary_keys")


def behind(editor: RLSEditor) -> dict[str, torch.Tensor]:
    """Copies of all that stands behind an editor's gates."""
    full = {
        f"{layer}.{number}": W.clone()
        for layer, weight in editor.layout.edited.items()
        for number, W in enumerate(gate_of(weight.module).full)
    }
    return {**gate_tensors(editor), **full}


def full_of(editor: RLSEditor, number: int) -> dict[str, torch.Tensor]:
    """Copies of one full shard's weights."""
    return {name.split(".")[0]: W for name, W in behind(editor).items() if name.endswith(f".{number}")}


@pytest.fixture
def sharded(gated):
    """Settings with which each batch fills a shard."""

    def make(**changes):
        return gated(gate_fill=1e-4, **changes)

    return make


@pytest.fixture
def editor(model, tok, requests, sharded):
    """Three shards: two edits, one, one."""
    editor = RLSEditor(model, tok, sharded())
    for batch in (requests[:2], requests[2:3], requests[3:]):
        editor.edit(batch)
    return editor


def shard_seen(editor: RLSEditor, tok, request: dict) -> int:
    """The shard that the subject's last token of a prompt sees, from 1; 0 for none."""
    prompt = request["prompt"].replace("{}", request["subject"])
    text = prompt[: prompt.index(request["subject"]) + len(request["subject"])]
    with torch.no_grad():
        editor.model(**tok(text, return_tensors="pt"))
    return int(find_decision(editor.layout).open.flatten()[-1])


def test_edits_are_found_in_their_own_shard(editor, tok, requests):
    assert [shard_seen(editor, tok, request) for request in requests] == [1, 1, 2, 3]
    assert [shard.n_edits for shard in editor.state.now.shards] == [2, 1]
    assert [entry.shard for entry in editor.state.history.entries] == [0, 1, 2]


def test_a_shard_is_what_a_memory_of_its_edits_alone_is(editor, family, tok, requests, sharded, logits):
    """The first one bit for bit; and where a prompt opens the same, it has the same logits."""
    alone = RLSEditor(FAMILIES[family](), tok, sharded())
    alone.edit(requests[:2])
    for layer, weight in alone.layout.edited.items():
        assert torch.equal(editor.state.now.shards[0].weights[layer], alone.state.now.weight(layer).float())
        assert torch.equal(gate_of(editor.layout.edited[layer].module).full[0], weight.parameter)
    find_decision(alone.layout).threshold = find_decision(editor.layout).threshold
    text = requests[0]["prompt"]
    found, wanted = logits(editor.model, text), logits(alone.model, text)
    opened = find_decision(editor.layout).open.flatten(), find_decision(alone.layout).open.flatten()
    if torch.equal(*opened):
        assert torch.equal(found, wanted)
    assert not torch.equal(found, logits(FAMILIES[family](), text))


def test_one_full_enough_is_kept_to(model, tok, requests, gated):
    editor = RLSEditor(model, tok, gated(gate_fill=1.0))
    for request in requests:
        editor.edit([request])
    assert editor.state.now.shards == ()
    assert find_decision(editor.layout).newest == 1


def test_rules_that_keep_their_past_otherwise_have_one(model, tok, requests, sharded):
    editor = RLSEditor(model, tok, sharded(solver="forgetting", solver_settings={"factor": 0.9}))
    for request in requests:
        editor.edit([request])
    assert editor.state.now.shards == ()


@pytest.mark.parametrize("is_closed", [True, False])
def test_they_come_back_from_the_ledger(model, family, tok, requests, sharded, tmp_path, is_closed):
    straight = RLSEditor(FAMILIES[family](), tok, sharded())
    first = RLSEditor(model, tok, sharded(), state_dir=tmp_path / "a")
    for batch in (requests[:2], requests[2:3]):
        first.edit(batch)
        straight.edit(batch)
    if is_closed:
        first.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    again = RLSEditor(FAMILIES[family](), tok, sharded(), state_dir=tmp_path / "b")
    assert same(behind(again), behind(straight))
    for one in (again, straight):
        one.edit(requests[3:])
    assert same(behind(again), behind(straight))
    again.rollback()
    assert [one.n_edits for one in again.state.now.shards] == [2, 1]  # the newest is empty now, and stays
    assert all(same(full_of(again, number), full_of(straight, number)) for number in (0, 1))
    again.close()
    journal = latest(tmp_path / "b")
    for from_start in (True, False):
        moment = read_moment(journal, from_start=from_start)
        assert [shard.n_edits for shard in moment.shards] == [2, 1]
        assert moment.history.in_shard(1) == [3]
    first.close()


def test_an_edit_is_taken_out_of_a_full_shard(editor, model, family, tok, requests, logits):
    before = behind(editor)
    report = editor.retract([1])
    assert report.n_edits == 3
    shard, now = editor.state.now.shards[0], editor.state.now
    assert shard.n_edits == 1
    for layer in editor.hparams.layers:
        part = [p[layer] for p in now.history.standing([layer], [2])]
        A, _, W = batch_solution(now.beginnings[layer], part, layer, torch.device("cpu"))
        torch.testing.assert_close(shard.weights[layer].double(), W, **GATE_SUMMED_ANEW)
        if layer == min(editor.hparams.layers):
            torch.testing.assert_close(shard.information, A)
    assert shard_seen(editor, tok, requests[1]) == 1
    assert all(torch.equal(W, before[f"{layer}.1"]) for layer, W in full_of(editor, 1).items())
    editor.rollback()
    assert same(behind(editor), before)
    editor.retract([1, 2, 3, 4])
    unedited = FAMILIES[family]()
    for request in requests:
        text = request["prompt"].replace("{}", request["subject"])
        assert torch.equal(logits(editor.model, text), logits(unedited, text))


def test_what_was_taken_out_stays_out(model, family, tok, requests, sharded, tmp_path, capsys):
    """After a resume, a compaction, and a roll-back behind each."""
    first = RLSEditor(model, tok, sharded(), state_dir=tmp_path / "a")
    for batch in (requests[:2], requests[2:3], requests[3:]):
        first.edit(batch)
    whole = behind(first)
    first.retract([1])
    wanted = behind(first)
    first.close()
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert main(["state", "compact", str(tmp_path / "b")]) == 0
    for folder in ("a", "b"):
        again = RLSEditor(FAMILIES[family](), tok, sharded(), state_dir=tmp_path / folder)
        assert same(behind(again), wanted)
        again.rollback()
        assert same(behind(again), whole)
        again.retract([1])
        assert same(behind(again), wanted)
        again.close()
    assert main(["state", "verify", str(tmp_path / "b")]) == 0
    assert main(["state", "show", str(tmp_path / "b")]) == 0
    assert "3 shards" in capsys.readouterr().out


def test_the_same_prompt_again_takes_the_old_edit_out_of_its_shard(editor, tok, requests):
    editor.edit([{**requests[0], "target_new": "winter"}])
    assert sorted(editor.state.history.live) == [2, 3, 4, 5]
    assert editor.state.now.shards[0].n_edits == 1
    assert shard_seen(editor, tok, requests[0]) == 4


def test_a_batch_that_fails_changes_nothing(model, family, tok, requests, sharded, failing, tmp_path):
    editor = RLSEditor(model, tok, sharded(), state_dir=tmp_path)
    editor.edit(requests[:2])
    before = behind(editor)
    failing(editor, [{**requests[0], "target_new": "winter"}])  # takes one out of the full shard
    assert [shard.n_edits for shard in editor.state.now.shards] == [2]
    for layer in editor.hparams.layers:
        assert torch.equal(gate_of(editor.layout.edited[layer].module).full[0], before[str(layer)])
    assert shard_seen(editor, tok, requests[0]) == 1
    editor.close()
    again = RLSEditor(FAMILIES[family](), tok, sharded(), state_dir=tmp_path)
    assert same(behind(again), behind(editor))
    again.close()


def test_saved_loaded_merged_and_taken_off(editor, family, tok, requests, tmp_path, logits):
    save_edited(editor.model, tmp_path / "edits")
    loaded = FAMILIES[family]()
    load_edited(loaded, tmp_path / "edits")
    for request in requests:
        text = request["prompt"].replace("{}", request["subject"])
        assert torch.equal(logits(loaded, text), logits(editor.model, text))
    layer = max(editor.hparams.layers)
    moment = copy.deepcopy(editor.state.now)
    merge_gates(loaded)
    name = editor.layout.edited[layer].parameter_name.removesuffix(".weight")
    W = EditedWeight(loaded.get_submodule(name), name).read()
    torch.testing.assert_close(W.double(), moment.merged(layer), **GATE_SUMMED_ANEW)
    remove_gates(editor.model)
    assert same(tensors_of(editor.model), tensors_of(FAMILIES[family]()))


def test_half_precision_and_compiled_passes_see_the_same_shards(editor, tok, requests, logits):
    texts = [request["prompt"].replace("{}", request["subject"]) for request in requests]
    plain = [logits(editor.model, text) for text in texts]
    compiled = torch.compile(editor.model, backend="eager", fullgraph=True)
    for text, wanted in zip(texts, plain):
        torch.testing.assert_close(logits(compiled, text), wanted)
    low = copy.deepcopy(editor.model).bfloat16()
    for text, wanted in zip(texts, plain):
        torch.testing.assert_close(logits(low, text).float(), wanted, atol=0.1, rtol=0.1)


def test_of_two_shards_that_know_a_subject_the_newest_counts(model, tok, sharded):
    """The subject begins both prompts, so that both have one key."""
    about = {"prompt": "{} has", "subject": "Anna Maria Keller", "target_new": "water"}
    editor = RLSEditor(model, tok, sharded())
    editor.edit([about])
    report = editor.edit([{**about, "prompt": "{} likes", "target_new": "people"}])
    assert len(editor.state.now.shards) == 1
    assert shard_seen(editor, tok, about) == 2
    assert [fact.is_open for fact in report.facts] == [True]
    assert report.facts[0].miss < 0.9


def test_a_key_that_goes_to_another_shard_is_told(model, tok, requests, sharded, monkeypatch):
    editor = RLSEditor(model, tok, sharded())
    editor.edit(requests[:1])
    monkeypatch.setattr("easyedit_rls.model.gate._ALIKE", -1.0)  # nothing goes anywhere
    assert not editor.edit(requests[1:2]).facts[0].is_open


@pytest.fixture
def failing(monkeypatch):
    """An edit that fails when its weights are written."""

    def fail(*args):
        raise NumericalError("no")

    def edit(editor, requests):
        with monkeypatch.context() as patched:
            patched.setattr("easyedit_rls.editors.rls.find_said", fail)
            with pytest.raises(NumericalError, match="no"):
                editor.edit(requests)

    return edit


@pytest.mark.parametrize("resumes", [True, False])
def test_the_batch_before_one_that_failed_can_be_rolled_back(
    model, family, tok, requests, sharded, failing, tmp_path, resumes
):
    editor = RLSEditor(model, tok, sharded(checkpoint_every=1), state_dir=tmp_path / "a")
    editor.edit(requests[:1])
    before = behind(editor)
    editor.edit(requests[1:2])
    failing(editor, requests[2:])  # after a shard was begun for it
    assert len(editor.state.now.shards) == 2
    if resumes:
        editor.close()
        editor = RLSEditor(FAMILIES[family](), tok, sharded(checkpoint_every=1), state_dir=tmp_path / "a")
    editor.rollback()
    assert [shard.n_edits for shard in editor.state.now.shards] == [1]
    for layer in editor.hparams.layers:
        assert torch.equal(gate_of(editor.layout.edited[layer].module).full[0], before[str(layer)])
    editor.edit(requests[2:3])
    wanted = behind(editor)
    editor.close()
    for from_start in (True, False):
        moment = read_moment(latest(tmp_path / "a"), from_start=from_start)
        assert [shard.n_edits for shard in moment.shards] == [1]
    again = RLSEditor(FAMILIES[family](), tok, sharded(checkpoint_every=1), state_dir=tmp_path / "a")
    assert same(behind(again), wanted)
    again.close()


def test_weights_that_are_put_back_across_a_new_shard_roll_back(model, tok, requests, sharded):
    """As EasyEdit does behind an edit that shall not stay."""
    editor = RLSEditor(model, tok, sharded())
    editor.edit(requests[:2])
    found = {layer: weight.snapshot() for layer, weight in editor.layout.edited.items()}
    editor.edit(requests[2:3])
    for layer, weight in editor.layout.edited.items():
        weight.restore(found[layer])
    editor.edit(requests[3:])
    assert sorted(edit.request.subject for edit in editor.state.history.live.values()) == sorted(
        request["subject"] for request in (*requests[:2], *requests[3:])
    )


def test_a_failed_beginning_leaves_loaded_shards_alone(
    editor, family, tok, requests, sharded, tmp_path, logits, monkeypatch
):
    save_edited(editor.model, tmp_path / "edits")
    loaded = FAMILIES[family]()
    load_edited(loaded, tmp_path / "edits")
    texts = [request["prompt"].replace("{}", request["subject"]) for request in requests]
    wanted = [logits(loaded, text) for text in texts]
    assert all(torch.equal(one, logits(editor.model, text)) for one, text in zip(wanted, texts))

    def fail(*args):
        raise NumericalError("no")

    first = RLSEditor(FAMILIES[family](), tok, sharded(), state_dir=tmp_path / "ledger")
    for batch in (requests[:2], requests[2:3], requests[3:]):
        first.edit(batch)
    first.close()
    monkeypatch.setattr("easyedit_rls.editors.gated.GatedMemory.show", fail)
    with pytest.raises(NumericalError):
        RLSEditor(loaded, tok, sharded(), state_dir=tmp_path / "ledger")
    assert all(torch.equal(one, logits(loaded, text)) for one, text in zip(wanted, texts))


def test_adopted_weights_are_not_lost(editor):
    """A full shard can't be summed anew then."""
    editor.adopt_weights()
    before = behind(editor)
    with pytest.raises(NumericalError, match=r"adopted, so shard 1, which is full"):
        editor.retract([1])
    assert same(behind(editor), before)
    assert editor.retract([4]).n_edits == 3


def test_no_shard_is_begun_behind_an_empty_one(model, tok, requests, gated, failing):
    editor = RLSEditor(model, tok, gated(gate_fill=1e-15))
    editor.edit(requests[:2])
    for _ in range(3):
        failing(editor, requests[2:])
    assert [shard.n_edits for shard in editor.state.now.shards] == [2]


def test_without_edits_the_gate_is_closed(editor):
    editor.retract([1, 2, 3, 4])
    assert find_decision(editor.layout).threshold == CLOSED


def test_what_has_drifted_is_mended_before_a_shard_is_full(model, tok, requests, sharded, monkeypatch):
    editor = RLSEditor(model, tok, sharded())
    editor.edit(requests[:2])
    monkeypatch.setattr("easyedit_rls.ledger.change.DRIFT_TOLERANCE", -1.0)
    editor.edit(requests[2:])
    now, layer = editor.state.now, max(editor.hparams.layers)
    part = [p[layer] for p in now.history.standing([layer], [1, 2])]
    _, _, W = batch_solution(now.beginnings[layer], part, layer, torch.device("cpu"))
    assert torch.equal(now.shards[0].weights[layer], W.float())


def test_compaction_keeps_to_a_shard_what_was_summed_anew_in_it():
    """Edit 2 is gone, and the entry that summed layer 1 anew; the next shard begins from the prior."""

    def edit(number):
        return (Edit(number, EditRequest("", f"{number}", "", "x"), 0),)

    entries = (
        Entry("edit", edit(1)),
        Entry("edit", edit(2), rebuilt=(1,)),
        Entry("retract", removed=(2,)),
        Entry("edit", edit(3), shard=1),
    )
    kept = [entry for entry, _ in compaction._standing(Moment(history=History().plus(*entries)))]
    assert [(entry.edits[0].edit_id, entry.rebuilt) for entry in kept] == [(1, ()), (3, ())]
