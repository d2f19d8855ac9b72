"""Two writers, however they meet: one is refused, and no edit that was reported is lost. And readers beside a
writer.
"""

import itertools
import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch

from easyedit_rls import LedgerError, RLSEditor
from easyedit_rls.cli.main import main
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_history, read_moment
from tests.conftest import REPOSITORY, tiny_llama, tiny_settings

READS = int(os.environ.get("EASYEDIT_RLS_READS", "60"))  # commands beside a writer

FACTS = [
    {"prompt": f"{before} {subject}", "subject": subject, "target_new": target}
    for before, subject in (
        ("The river", "Oder"),
        ("Bakers know", "rye"),
        ("Some say", "Anna"),
        ("The old town", "Brno"),
    )
    for target in ("people", "water")
]


def make_editor(tok, folder, **changes):
    hp = tiny_settings("llama", v_num_grad_steps=2, context_templates=[], **changes)
    return RLSEditor(tiny_llama(), tok, hp, state_dir=folder)


def edited(folder):
    return [edit.request.target for edit in read_history(latest(folder)).live.values()]


@pytest.fixture
def editor(tok, tmp_path):
    editor = make_editor(tok, tmp_path / "state")
    editor.edit(FACTS[0])
    yield editor
    editor.state.ledger.close()


def goes_on(editor, tok, folder):
    """The editor that stayed can write, and what it reported is there."""
    before = len(edited(folder))
    editor.edit(FACTS[2])
    assert len(edited(folder)) == before + 1
    stored = read_moment(latest(folder))
    assert all(
        torch.equal(solution.weight, stored.solutions[layer].weight)
        for layer, solution in editor.state.layers.items()
    )


def test_in_one_process(editor, tok, tmp_path):
    with pytest.raises(LedgerError, match="held by another editor"):
        make_editor(tok, tmp_path / "state")
    goes_on(editor, tok, tmp_path / "state")


def test_under_another_name(editor, tok, tmp_path):
    (tmp_path / "alias").symlink_to(tmp_path / "state")
    with pytest.raises(LedgerError, match="held by another editor"):
        make_editor(tok, tmp_path / "alias")
    goes_on(editor, tok, tmp_path / "state")


@pytest.mark.parametrize("command", [["compact"], ["retract", "1"]])
def test_in_another_process(editor, tok, tmp_path, command):
    state = str(tmp_path / "state")
    done = subprocess.run([sys.executable, "-m", "easyedit_rls.cli.main", "state", command[0], state,
        *command[1:]], cwd=REPOSITORY, capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "held by another editor" in done.stderr
    goes_on(editor, tok, tmp_path / "state")


def test_the_lock_file_was_removed(editor, tok, tmp_path):
    (tmp_path / "state" / "ledger.lock").unlink()
    other = make_editor(tok, tmp_path / "state")
    before = {layer: weight.snapshot() for layer, weight in editor.layout.edited.items()}
    with pytest.raises(LedgerError, match="was taken away"):
        editor.edit(FACTS[2])
    assert all(
        torch.equal(before[layer], weight.snapshot()) for layer, weight in editor.layout.edited.items()
    )
    goes_on(other, tok, tmp_path / "state")
    with pytest.raises(LedgerError, match="was taken away"):
        editor.rollback()
    assert edited(tmp_path / "state") == ["people", "people"]
    other.close()


def test_the_lock_file_was_replaced(editor, tok, tmp_path):
    lock = tmp_path / "state" / "ledger.lock"
    shutil.copy(lock, tmp_path / "copy")
    (tmp_path / "copy").replace(lock)
    with pytest.raises(LedgerError, match="was taken away"):
        editor.edit(FACTS[2])
    assert edited(tmp_path / "state") == ["people"]


def test_the_folder_was_replaced(editor, tok, tmp_path):
    shutil.move(tmp_path / "state", tmp_path / "moved")
    other = make_editor(tok, tmp_path / "state")
    other.edit(FACTS[1])
    with pytest.raises(LedgerError, match="was taken away"):
        editor.edit(FACTS[2])
    assert (edited(tmp_path / "moved"), edited(tmp_path / "state")) == (["people"], ["water"])
    other.close()


def test_somebody_wrote_without_the_lock(editor, tok, tmp_path):
    """As another package, or a copy that was put back, would."""
    copy = make_editor(tok, shutil.copytree(tmp_path / "state", tmp_path / "copy"))
    copy.edit(FACTS[4])
    copy.state.ledger.close()
    for name in ("index.jsonl", "entries.bin", "head.json"):
        shutil.copy(tmp_path / "copy" / "journal-0001" / name, tmp_path / "state" / "journal-0001" / name)
    with pytest.raises(LedgerError, match="written by somebody else"):
        editor.edit(FACTS[2])
    assert len(edited(tmp_path / "state")) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")
def test_a_forked_process(editor, tok, tmp_path):
    """The child can't write, and its end does not let the parent's lock go."""
    reader, writer = os.pipe()
    torch.set_num_threads(1)
    pid = os.fork()
    if pid == 0:
        said = b"nothing"
        try:
            editor.edit(FACTS[2])
        except LedgerError as exc:
            said = str(exc).encode()
        finally:
            os.write(writer, said)
            editor.state.ledger.close()
            del editor.state.ledger._lock  # what the end of the process does
            os._exit(0)
    os.waitpid(pid, 0)
    os.close(writer)
    with open(reader) as stream:
        assert f"belongs to process {os.getpid()}" in stream.read()
    with pytest.raises(LedgerError, match="held by another editor"):
        make_editor(tok, tmp_path / "state")
    goes_on(editor, tok, tmp_path / "state")


def test_threads_that_share_an_editor_take_turns(editor, tok, tmp_path):
    failed = []

    def work(facts):
        try:
            for fact in facts:
                editor.edit(fact)
        except Exception as exc:  # noqa: BLE001  # told by the main thread
            failed.append(exc)

    threads = [threading.Thread(target=work, args=(FACTS[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert editor.state.history.n_batches == 9
    assert editor.n_edits == 4  # two answers to each question
    assert read_history(latest(tmp_path / "state")).live == editor.state.history.live


def test_readers_beside_a_writer(tok, tmp_path, capsys):
    """Commands in a thread of their own, while every edit is a checkpoint and journals are compacted; none
    fails.
    """
    state, is_done, statuses = tmp_path / "state", threading.Event(), []
    editor = make_editor(tok, state, checkpoint_every=1)
    editor.edit(FACTS[0])

    def read():
        commands = (
            ["show", state, "--json"],
            ["log", state],
            ["verify", state],
            ["verify", state, "--files-only"],
        )
        while not is_done.is_set():
            for command in commands:
                statuses.append(main(["state", *map(str, command)]))

    thread = threading.Thread(target=read)
    thread.start()
    for i in itertools.count():
        if len(statuses) >= READS:
            break
        editor.edit(FACTS[i % len(FACTS)])
        if i % 10 == 9:
            editor.close()
            assert main(["state", "compact", str(state)]) == 0
            editor = RLSEditor(editor.model, tok, editor.hparams, state_dir=state)
    is_done.set()
    thread.join()
    editor.close()
    assert set(statuses) == {0}, capsys.readouterr().err


def test_what_somebody_else_wrote_is_not_undone(editor, tok, tmp_path, monkeypatch):
    """A change that failed and could not be put back, then another writer, then a change:
    the other's stands.
    """
    state = tmp_path / "state"
    with monkeypatch.context() as patch:
        real = editor.state.ledger.__class__.record
        patch.setattr(editor.state.ledger.__class__, "put_back", lambda *_: None)
        patch.setattr(
            editor.state.ledger.__class__,
            "record",
            lambda *args: real(*args) and (_ for _ in ()).throw(KeyboardInterrupt),
        )
        with pytest.raises(KeyboardInterrupt):
            editor.edit(FACTS[2])
    editor.state.ledger._lock.release()
    other = make_editor(tok, state)
    other.edit(FACTS[4])
    reported = edited(state)
    with pytest.raises(LedgerError):
        editor.edit(FACTS[6])
    assert edited(state) == reported
    other.close()
