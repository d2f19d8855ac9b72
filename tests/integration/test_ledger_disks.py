"""A disk that fails, and Ctrl-C while the ledger is written, leave weights and ledger as they were."""

import os
import shutil
import signal

import pytest

from easyedit_rls import LedgerError
from easyedit_rls._base import files
from easyedit_rls.ledger import journal, ledger, tidy
from easyedit_rls.ledger.reading import latest
from tests.helpers import content, edited_weights, same, same_state


def same_solution(one, other):
    """As `same_state`, whether the last change was folded in or not."""
    covariances = [
        {layer: solution.covariance() for layer, solution in e.state.layers.items()} for e in (one, other)
    ]
    return (
        same(*covariances)
        and same(edited_weights(one), edited_weights(other))
        and one.state.history.live == other.state.history.live
    )


class FailingOs:
    """Stands for `os` in the ledger's modules: the n-th write, sync or rename fails as a full or read-only
    disk does.
    """

    calls = ("write", "fsync", "replace", "rename", "open")

    def __init__(self, at, error):
        self.at, self.error, self.n = at, error, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.calls:
            return real

        def call(*args, **kwargs):
            self.n += 1
            if self.at and (
                self.n == self.at or (self.n > self.at and self.error.errno == 28 and name == "write")
            ):  # a full disk stays full
                if name == "write":
                    real(args[0], bytes(args[1][: len(args[1]) // 2]))
                raise self.error
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("family", ["llama"])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), OSError(30, "Read-only file system")]
)
@pytest.mark.parametrize("history", [0, 2])
def test_a_disk_that_fails_leaves_weights_and_ledger_as_before(
    fresh, requests, settings, tmp_path, monkeypatch, error, history
):
    """At every single write, sync, rename and open of a batch,
    and of the checkpoint that is due before it.
    """
    hp = settings(checkpoint_every=2, v_num_grad_steps=3)

    def prepared(folder):
        editor = fresh(hp, folder)
        for request in requests[:history]:
            editor.edit(request)
        return editor

    def edit_with(editor, failing):
        with monkeypatch.context() as patch:
            for module in (files, journal, ledger, tidy):
                patch.setattr(module, "os", failing)
            editor.edit(requests[2:])

    counting = FailingOs(0, error)
    edit_with(prepared(tmp_path / "whole"), counting)
    assert counting.n > 15
    for at in range(1, counting.n + 1):
        folder = tmp_path / str(at)
        editor = prepared(folder)
        before, on_disk, n_edits = edited_weights(editor), content(folder), editor.n_edits
        with pytest.raises(LedgerError, match=error.strerror):
            edit_with(editor, FailingOs(at, error))
        assert same(edited_weights(editor), before)
        assert editor.n_edits == n_edits
        if (
            history and latest(folder).lines[-1].kind == "checkpoint"
        ):  # the checkpoint went well, the batch did not
            assert same_solution(fresh(hp, shutil.copytree(folder, tmp_path / f"{at} copied")), editor)
        else:
            assert content(folder) == on_disk
        assert editor.edit(requests[2:]).n_edits == n_edits + 2  # and when the disk is mended, on it goes
        editor.close()
        assert same_state(fresh(hp, folder), editor)


class InterruptingOs(FailingOs):
    """Ctrl-C at the n-th write, sync or rename."""

    def __getattr__(self, name):
        real = getattr(os, name)

        def call(*args, **kwargs):
            self.n += 1
            if self.n == self.at:
                os.kill(os.getpid(), signal.SIGINT)
            return real(*args, **kwargs)

        return call if name in self.calls else real


@pytest.mark.parametrize("family", ["llama"])
def test_an_interrupt_while_the_ledger_is_written_takes_the_batch_back(
    fresh, requests, settings, tmp_path, monkeypatch
):
    hp = settings(v_num_grad_steps=3)
    for at in range(1, 40):
        folder = tmp_path / str(at)
        editor = fresh(hp, folder)
        for request in requests[: at % 2]:  # the first batch begins a journal, the second goes on
            editor.edit(request)
        before, n_edits = edited_weights(editor), editor.n_edits
        interrupting = InterruptingOs(at, None)
        with monkeypatch.context() as patch:
            for module in (files, journal, ledger, tidy):
                patch.setattr(module, "os", interrupting)
            try:
                editor.edit(requests[2:])
                is_interrupted = False
            except KeyboardInterrupt:
                is_interrupted = True
        assert is_interrupted == (interrupting.n >= at)
        if is_interrupted:
            assert same(edited_weights(editor), before)
            assert editor.n_edits == n_edits
        editor.state.ledger.close()
        again = fresh(hp, folder)
        assert again.n_edits == editor.n_edits
        assert same(edited_weights(again), edited_weights(editor))
        again.edit(requests[1])
        assert same(edited_weights(again), edited_weights(editor)) is False
        again.close()
        if not is_interrupted and at % 2 == 0:
            assert at > 12
            break


@pytest.mark.skipif(
    os.name == "nt" or os.geteuid() == 0, reason="permissions don't bind this user: root writes anywhere"
)
def test_a_read_only_folder_is_said(fresh, settings, tmp_path):
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(LedgerError, match=r"can't be written.*permissions"):
            fresh(settings(), tmp_path / "state")
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_that_can_not_be_made_is_said(fresh, settings, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(LedgerError, match="can't be written"):
        fresh(settings(), tmp_path / "file" / "state")
