"""The ledger through `RLSEditor`: resume bit for bit, mismatches, taking back, superseding, forgetting, and
disks that fail.
"""

import copy
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from easyedit_rls import AnchorPairs, LedgerError, RequestError, RLSEditor, StateMismatchError, anchor_pairs
from easyedit_rls._base import files
from easyedit_rls.ledger import journal, ledger, tidy
from easyedit_rls.ledger.manifest import Manifest
from easyedit_rls.ledger.reading import journals, latest
from easyedit_rls.ledger.rebuild import rebuilt
from easyedit_rls.ledger.snapshot import read_history, read_manifest, read_moment, read_prior
from easyedit_rls.solvers.rls import RecursiveLeastSquares
from tests.conftest import FAMILIES, spoil, tiny_settings
from tests.helpers import FADING, edited_weights, same
from tests.tolerances import FLOAT32, WEIGHTS

FORGETTING = [{}, *FADING.values()]


def same_state(one, other):
    tensors = [
        {f"{layer}.{name}": t for layer, s in e.state.layers.items() for name, t in s.tensors().items()}
        for e in (one, other)
    ]
    return (
        same(*tensors)
        and same(edited_weights(one), edited_weights(other))
        and one.state.history.live == other.state.history.live
    )


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


def content(folder):
    """All files that count: not the second name of a head that was replaced."""
    files_of = {str(path.relative_to(folder)): path for path in Path(folder).rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files_of.items() if not name.endswith(".before")}


@pytest.fixture
def fresh(family, tok):
    """Makes an editor of the same unedited model, time and again."""

    def make(hp, state_dir=None, dtype=torch.float32, **how):
        return RLSEditor(FAMILIES[family]().to(dtype), tok, hp, state_dir=state_dir, **how)

    return make


@pytest.mark.parametrize("forgetting", FORGETTING)
@pytest.mark.parametrize("has_checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_batches_equal_two_a_new_process_and_one(
    fresh, requests, settings, tmp_path, forgetting, has_checkpoint, dtype
):
    hp = settings(**forgetting, context_templates=None, mom2_adjustment=False)
    straight = fresh(hp, dtype=dtype)
    for batch in (requests[:1], requests[1:3], requests[3:]):
        straight.edit(batch)

    first = fresh(hp, tmp_path / "state", dtype)
    first.edit(requests[:1])
    first.edit(requests[1:3])
    after_two = edited_weights(first)
    if has_checkpoint:
        first.close()
    else:
        first.state.ledger.close()  # as when the process is killed
    torch.manual_seed(1234)
    second = fresh(hp, tmp_path / "state", dtype)
    assert same(edited_weights(second), after_two)
    assert second.n_edits == 3
    assert second.edit(requests[3:]).batch == 3
    assert same_state(second, straight)
    assert second.state.templates == straight.state.templates


def test_no_value_is_optimized_again(fresh, requests, settings, tmp_path, monkeypatch):
    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests)
    for name in ("optimize_values", "make_priors", "templates_of", "LayerWalk"):
        monkeypatch.setattr(f"easyedit_rls.editors.rls.{name}", None)
    assert same_state(fresh(settings(), tmp_path), editor)


def test_every_kind_of_change_comes_back(fresh, requests, settings, tmp_path):
    """Superseded, retracted, rolled back, adopted: each new process has the state that the editors without a
    ledger have.
    """
    hp, alone = settings(checkpoint_every=3), None
    steps = [
        lambda e: e.edit(requests[:3]),
        lambda e: e.edit({**requests[0], "target_new": "slow water"}),
        lambda e: e.retract([2]),
        lambda e: e.edit(requests[3]),
        lambda e: e.rollback(),
        lambda e: e.edit({**requests[3], "importance": 2.5}),
        lambda e: e.amend(3, {**requests[2], "target_new": "birds"}),
        lambda e: e.adopt_weights(),
        lambda e: e.edit(requests[1]),
    ]
    alone = fresh(hp)
    for i, step in enumerate(steps):
        kept = fresh(hp, tmp_path)
        if i:
            assert same_state(kept, alone)
        step(kept)
        step(alone)
        assert same_state(kept, alone)
        if i % 2:
            kept.close()
        else:
            kept.state.ledger.close()
    assert [line.kind for line in latest(tmp_path).lines if line.kind not in ("checkpoint", "begin")] == [
        "entry"
    ] * 4 + ["rollback"] + ["entry"] * 4
    assert sorted(alone.state.history.live) == [4, 6, 7, 8]
    again = read_moment(latest(tmp_path), from_start=True)
    assert all(
        torch.equal(again.solutions[layer].weight, solution.weight)
        for layer, solution in alone.state.layers.items()
    )


def test_the_last_batch_can_be_rolled_back_in_a_new_process(fresh, requests, settings, tmp_path):
    first = fresh(settings(), tmp_path)
    first.edit(requests[:2])
    kept = edited_weights(first)
    first.edit(requests[2:])
    first.close()
    second = fresh(settings(), tmp_path)
    second.rollback()
    assert same(edited_weights(second), kept)
    second.state.ledger.close()
    third = fresh(settings(), tmp_path)
    assert same(edited_weights(third), kept)
    with pytest.raises(StateMismatchError, match="No batch"):
        third.rollback()


def test_a_batch_that_the_host_rolled_back_leaves_the_ledger(fresh, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests[:1])
    found = edited_weights(editor)
    editor.edit(requests[1:2])
    for layer, parameter in found.items():
        editor.layout.edited[layer].restore(parameter)
    editor.edit(requests[2:])
    assert [edit.request.subject for edit in read_history(latest(tmp_path)).live.values()] == [
        "Oder",
        "Mount Sainte-Victoire",
        "rye",
    ]
    assert [line.kind for line in latest(tmp_path).lines] == ["begin", "entry", "entry", "rollback", "entry"]
    editor.close()
    assert same(edited_weights(fresh(settings(), tmp_path)), edited_weights(editor))


@pytest.mark.parametrize("at", ["unedited", "earlier", "now"])
def test_a_saved_model_is_recognized(fresh, family, tok, requests, settings, tmp_path, at):
    editor = fresh(settings(), tmp_path / "state")
    if at == "unedited":
        editor.model.save_pretrained(tmp_path / "model")
    editor.edit(requests[:2])
    if at == "earlier":
        editor.model.save_pretrained(tmp_path / "model")
    editor.edit(requests[2:])
    if at == "now":
        editor.model.save_pretrained(tmp_path / "model")
    editor.close()
    model = type(editor.model).from_pretrained(tmp_path / "model")
    assert same_state(RLSEditor(model, tok, settings(), state_dir=tmp_path / "state"), editor)


def test_another_model_or_other_settings_are_refused_with_every_difference(
    fresh, family, tok, requests, settings, tmp_path
):
    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests[:1])
    before = content(tmp_path)

    def refused(model, hp, **how):
        found = {name: parameter.clone() for name, parameter in model.named_parameters()}
        with pytest.raises(StateMismatchError) as caught:
            RLSEditor(model, tok, hp, state_dir=tmp_path, **how)
        assert same(found, dict(model.named_parameters()))
        return str(caught.value)

    said = refused(FAMILIES[family](), settings(lambda_reg=0.3, mu_reg=2.0, **FADING[0.9]))
    for setting in (
        "lambda_reg: the ledger has 0.1, here it is 0.3",
        "mu_reg",
        "solver: the ledger has 'rls'",
    ):
        assert setting in said
    assert "fingerprint" not in said
    assert "edited weights" not in said
    said = refused(FAMILIES[family](), settings(layers=[1]), anchors=["An anchor"])
    assert "layers: the ledger has [1, 2], here it is [1]" in said
    assert "anchors: the ledger has 'moments', here it is 'prompts" in said
    other = FAMILIES[family]()
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.01)
        RLSEditor(other, tok, settings()).layout.edited[2].parameter.mul_(1.01)
    said = refused(other, settings(mom2_update_weight=3.0))
    for text in (
        "fingerprint of the weights that are not edited",
        "edited weights of layers [2]: neither",
        "mom2_update_weight",
    ):
        assert text in said
    said = refused(FAMILIES[family]().to(torch.bfloat16), settings())
    assert "dtype: the ledger has 'float32', here it is 'bfloat16'" in said
    stranger = next(name for name in FAMILIES if name != family)
    said = refused(FAMILIES[stranger](), tiny_settings(stranger))
    assert "architecture" in said
    assert "widths" in said or "parameters" in said
    assert content(tmp_path) == before
    assert same_state(
        fresh(settings(stats_dir="elsewhere", v_lr=0.1), tmp_path), editor
    )  # what doesn't define the objective may change


def test_a_second_writer_is_refused(fresh, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    for _ in range(2):
        with pytest.raises(LedgerError, match=r"held by another editor.*close\(\)"):
            fresh(settings(), tmp_path)
        editor.edit(requests)
    editor.close()
    for act in (
        lambda: editor.edit(requests),
        editor.reset,
        editor.adopt_weights,
        lambda: editor.retract(1),
        editor.rollback,
    ):
        with pytest.raises(LedgerError, match="was closed"):
            act()
    editor.close()
    assert fresh(settings(), tmp_path).n_edits == 4


def test_a_deep_copy_goes_its_own_way(fresh, tok, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests[:1])
    before = content(tmp_path)
    state = copy.deepcopy(editor.state)
    twin = RLSEditor(copy.deepcopy(editor.model), tok, settings(), state=state)
    twin.edit(requests[1:])
    twin.retract(1)
    assert content(tmp_path) == before
    assert editor.n_edits == 1
    with pytest.raises(StateMismatchError, match="not in the ledger"):
        RLSEditor(twin.model, tok, settings(), state=state, state_dir=tmp_path / "other")


def test_resetting_begins_a_new_journal(fresh, tok, requests, settings, tmp_path):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests[:2])
    editor.reset()
    editor.state.ledger.close()
    editor = RLSEditor(
        editor.model, tok, settings(), state_dir=tmp_path
    )  # the reset is on disk: nothing comes back
    assert editor.n_edits == 0
    base = copy.deepcopy(editor.model)
    editor.edit(requests[2:])
    editor.close()
    assert len(journals(tmp_path)) == 2
    assert same_state(RLSEditor(base, tok, settings(), state_dir=tmp_path), editor)


def test_the_same_prompt_again_supersedes(fresh, requests, settings):
    """As one change, and to rounding what retracting and editing give as two."""
    again = {**requests[0], "prompt": "The  river {} ", "target_new": "water"}
    one, two = fresh(settings()), fresh(settings())
    for editor in (one, two):
        editor.edit(requests)
    two.retract(1)
    assert two.edit(again).superseded == []
    report = one.edit(again)
    assert (report.superseded, [fact.edit_id for fact in report.facts], report.n_edits) == ([1], [5], 4)
    for layer, solution in one.state.layers.items():
        moved = (solution.weight - one.state.unedited[layer]).norm()
        assert float((solution.weight - two.state.layers[layer].weight).norm() / moved) < FLOAT32
    one.rollback()
    two.rollback()  # takes back the edit alone
    assert (one.n_edits, two.n_edits) == (4, 3)


def test_conflicts(fresh, requests, settings):
    other = {**requests[0], "target_new": "water"}
    keeping = fresh(settings(on_conflict="keep"))
    keeping.edit(requests)
    assert keeping.edit([other, requests[0]]).n_edits == 6
    strict = fresh(settings(on_conflict="error"))
    strict.edit(requests[:2])
    before = edited_weights(strict)
    with pytest.raises(RequestError, match="edited before, as edits 1"):
        strict.edit([other, requests[3]])
    assert same(edited_weights(strict), before)
    assert strict.amend(1, other).superseded == [1]  # what is amended is no conflict
    with pytest.raises(RequestError, match="edited before, as edits 3"):
        strict.amend(2, other)
    for editor in (strict, fresh(settings())):
        with pytest.raises(
            RequestError, match=r"Request 1: .*'water', but another request of this batch 'people'"
        ):
            editor.edit([requests[0], other])
    twice = fresh(settings())
    assert twice.edit([requests[0], requests[0]]).n_edits == 2  # the same target twice is no contradiction
    assert twice.edit(other).superseded == [1, 2]
    twice.rollback()
    assert twice.n_edits == 2
    assert twice.edit(other).superseded == [1, 2]


def test_another_subject_in_the_same_prompt_supersedes(fresh, settings):
    """Both answers used to be kept, and rehearsal edited the old one in again."""
    fact = {"prompt": "The slow river Oder", "subject": "Oder", "target_new": "people"}
    editor = fresh(settings(rehearsal=8))
    editor.edit(fact)
    report = editor.edit({**fact, "subject": "river Oder", "target_new": "water"})
    assert (report.superseded, report.rehearsed, report.n_edits) == ([1], [], 1)
    rehearsed = editor.rehearse()
    assert rehearsed is None or rehearsed.rehearsed == [2]
    strict = fresh(settings())
    with pytest.raises(
        RequestError, match=r"Request 1: .*'water', but another request of this batch 'people'"
    ):
        strict.edit([fact, {**fact, "subject": "The slow river Oder", "target_new": "water"}])
    assert (
        strict.edit([fact, {**fact, "prompt": "A slow river Oder", "target_new": "water"}]).n_edits == 2
    )  # the twin: another prompt


@pytest.mark.parametrize("forgetting", FORGETTING)
def test_retraction_and_amendment_equal_the_batch_solution(fresh, requests, settings, tmp_path, forgetting):
    """Judged in float64 from what the ledger holds: keys, targets, importances, factors."""
    hp = settings(**forgetting)
    editor = fresh(hp, tmp_path)
    for request in requests:
        editor.edit({**request, "importance": 0.7})
    editor.retract([4, 2])
    report = editor.amend(1, {**requests[0], "target_new": "water"})
    assert report.superseded == [1]
    assert sorted(editor.state.history.live) == [3, 5]
    for layer, solution in editor.state.layers.items():
        prior = read_prior(latest(tmp_path), layer)
        A = torch.linalg.inv(prior.solution.covariance().double())
        K, V, D = (tensor.double() for tensor in editor.state.history.tensors([3, 5], [layer])[layer])
        later = [entry.factors[layer] for entry in editor.state.history.entries if entry.kind == "edit"][3:]
        assert D.tolist() == pytest.approx([0.7 * math.prod(later), 1.0])
        W_0 = prior.unedited.double()
        exact = W_0 + torch.linalg.solve(A + K.T @ (D[:, None] * K), K.T @ (D[:, None] * (V - K @ W_0)))
        assert float((solution.weight - exact).norm() / (exact - W_0).norm()) < 10 * FLOAT32
        assert editor.layout.edited[layer].holds(solution.weight)


def test_settings_that_came_later_are_at_their_defaults_in_older_ledgers(fresh, requests, settings, tmp_path):
    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests[:1])
    manifest = read_manifest(latest(tmp_path))
    older = json.loads(manifest.encode())
    for name in ("keys", "nullspace_weight", "nullspace_threshold"):
        del older["objective"][name]
    read = Manifest.decode(json.dumps(older).encode(), "manifest.json")
    assert read.differences(manifest) == []
    del older["objective"]["mu_reg"]  # there from the first
    assert Manifest.decode(json.dumps(older).encode(), "manifest.json").differences(manifest) == [
        f"mu_reg: the ledger has None, here it is {settings().mu_reg!r}"
    ]


def test_unknown_numbers_are_refused(fresh, requests, settings):
    editor = fresh(settings())
    with pytest.raises(RequestError, match="no such edit: 1; 0 edits stand"):
        editor.retract(1)
    editor.edit(requests)
    before = edited_weights(editor)
    for act in (
        lambda: editor.retract([1, 9]),
        lambda: editor.retract([]),
        lambda: editor.amend(9, requests[0]),
    ):
        with pytest.raises(RequestError, match=r"no such edit.*4 edits stand, numbers 1 to 4"):
            act()
    with pytest.raises(RequestError, match="'subject'"):
        editor.amend(1, {"prompt": "x", "target_new": "y"})
    assert same(edited_weights(editor), before)


def test_an_amendment_that_fails_leaves_the_old_edit(fresh, requests, settings, tmp_path, monkeypatch):
    editor = fresh(settings(), tmp_path)
    editor.edit(requests)
    before, on_disk = edited_weights(editor), content(tmp_path)
    covariance = editor.state.layers[1].covariance()
    with monkeypatch.context() as patch:
        patch.setattr(
            "easyedit_rls.editors.rls.optimize_values", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            editor.amend(2, {**requests[1], "target_new": "bread"})
    assert same(edited_weights(editor), before)
    assert content(tmp_path) == on_disk
    assert torch.equal(editor.state.layers[1].covariance(), covariance)
    assert editor.amend(2, {**requests[1], "target_new": "bread"}).n_edits == 4


def test_importance_decides_how_well_an_edit_is_met(fresh, requests, settings):
    misses = []
    for importance in (0.1, 1.0, 10.0):
        report = fresh(settings()).edit({**requests[0], "importance": importance})
        misses.append(report.facts[0].miss)
    assert misses == sorted(misses, reverse=True)


def test_drift_is_mended_from_the_ledger(fresh, requests, settings, tmp_path, caplog):
    hp = settings()
    editor = fresh(hp, tmp_path)
    editor.edit(requests[:2])
    spoil(editor.state.layers[2])
    editor.edit(requests[2:])
    assert "Layer 2 has drifted" in caplog.text
    assert max(solution.drift() for solution in editor.state.layers.values()) < FLOAT32
    for layer, solution in editor.state.layers.items():
        exact = rebuilt(read_prior(latest(tmp_path), layer).beginning, solution, editor.state.history, layer)
        assert float((solution.weight - exact.weight).norm() / exact.weight.norm()) < FLOAT32
    editor.close()
    assert same_state(fresh(hp, tmp_path), editor)
    replayed = read_moment(latest(tmp_path), from_start=True)
    assert (
        torch.equal(replayed.solutions[2].weight, editor.state.layers[2].weight)
        or replayed.solutions[2].drift() < FLOAT32
    )


def test_without_a_ledger_drift_is_mended_too(fresh, requests, settings, caplog):
    one, other = fresh(settings()), fresh(settings())
    for editor in (one, other):
        editor.edit(requests[:2])
    spoil(one.state.layers[2])
    for editor in (one, other):
        editor.edit(requests[2:])
    assert "Layer 2 has drifted" in caplog.text
    assert one.state.layers[2].weight.dtype == torch.float64
    for layer, solution in one.state.layers.items():
        assert solution.drift() < FLOAT32
        torch.testing.assert_close(solution.weight.float(), other.state.layers[layer].weight, **WEIGHTS)


def test_anchors_with_values_of_their_own_come_back(fresh, tok, requests, settings, tmp_path):
    hp = settings()
    pairs = anchor_pairs(fresh(hp).model, tok, hp, ["Bread needs"])
    values = {
        layer: torch.randn(len(K_0), 32, generator=torch.Generator().manual_seed(layer))
        for layer, K_0 in pairs.keys.items()
    }
    anchors = AnchorPairs(pairs.keys, values)
    with fresh(hp, tmp_path, anchors=anchors) as editor:
        editor.edit(requests[:2])
    assert same_state(fresh(hp, tmp_path, anchors=anchors), editor)
    prior = read_prior(latest(tmp_path), 1)
    assert not torch.equal(prior.unedited, prior.solution.weight)
    assert prior.anchor_energy == pytest.approx(float(values[1].double().square().sum()))
    with pytest.raises(StateMismatchError, match="anchors: the ledger has 'pairs"):
        fresh(hp, tmp_path)


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


def test_entries_say_what_they_are(fresh, requests, settings, tmp_path):
    """A journal file explains itself: safetensors with the requests' text,
    time and version in its metadata.
    """
    from safetensors import safe_open

    with fresh(settings(), tmp_path) as editor:
        editor.edit(requests[3:])
        editor.edit(requests[:2])
    journal = latest(tmp_path)
    offset, stamp = journal.lines[2].record
    (tmp_path / "record").write_bytes(
        (journal.folder / "entries.bin").read_bytes()[offset : offset + stamp.n_bytes]
    )
    with safe_open(tmp_path / "record", "pt") as stored:
        entry = json.loads(stored.metadata()["entry"])
        assert {"importance", "K.1", "V.1", "K.2", "V.2"} == set(stored.keys())
        assert stored.get_tensor("K.1").shape == (2, editor.layout.edited[1].shape[0])
    assert [(edit["id"], edit["subject"], edit["target"]) for edit in entry["edits"]] == [
        (2, "Oder", "people"),
        (3, "Anna Maria Keller", "water"),
    ]
    assert entry["version"]
    assert entry["time"].startswith("20")


def stream_in_bfloat16(tok, requests, n_batches):
    """An edited model with the keys and targets of its stream, a batch a row."""
    hp = tiny_settings("llama", v_num_grad_steps=2, on_conflict="keep", mom2_update_weight=200.0)
    editor = RLSEditor(FAMILIES["llama"]().to(torch.bfloat16), tok, hp)
    editor.prepare()
    priors = {
        layer: (solution.covariance(), solution.weight.clone())
        for layer, solution in editor.state.layers.items()
    }
    targets = ["people", "water", "well", "slow leaves"]
    for i in range(n_batches):
        editor.edit({**requests[i % 4], "target_new": targets[(i // 4) % 4]})
    return editor, priors


def worst_ulps(editor, priors, layer):
    """Distance of the model's weight from the float64 batch solution's rounding, in units of the last place
    of bfloat16.

    Entries near zero are judged by the last place of 1e-4 of the largest: they are what float32 leaves of
    larger ones.
    """
    K, V, _ = (t.double() for t in editor.state.history.tensors(editor.state.history.live, [layer])[layer])
    C_0, W_0 = (tensor.double() for tensor in priors[layer])
    exact = (
        (W_0 + torch.linalg.solve(torch.linalg.inv(C_0) + K.T @ K, K.T @ (V - K @ W_0)))
        .to(torch.bfloat16)
        .double()
    )
    ulp = exact.abs().clamp(min=1e-4 * float(exact.abs().max())).log2().floor().exp2() * 2**-7
    return float(((editor.layout.edited[layer].oriented().double() - exact).abs() / ulp).max())


def test_five_hundred_batches_in_bfloat16_are_the_rounding_of_the_float32_run(tok, requests):
    editor, priors = stream_in_bfloat16(tok, requests, 500)
    for layer, weight in editor.layout.edited.items():
        C_0, W_0 = priors[layer]
        alone = RecursiveLeastSquares.assemble(
            C_0.clone(), W_0.clone(), torch.linalg.inv(C_0.double()), None, 0, "the float32 run"
        )
        for edit_id in editor.state.history.live:
            alone = alone.update(*editor.state.history.tensors([edit_id], [layer])[layer])
        assert torch.equal(weight.oriented(), alone.weight.to(torch.bfloat16))
        assert worst_ulps(editor, priors, layer) <= 1


def test_without_a_master_rounding_piles_up(tok, requests, monkeypatch):
    """The twin: as if each batch began from the rounded weights."""
    real = RecursiveLeastSquares.update

    def update(state, *args, **how):
        new = real(state, *args, **how)
        new.weight.copy_(new.weight.to(torch.bfloat16))
        return new

    monkeypatch.setattr(RecursiveLeastSquares, "update", update)
    monkeypatch.setattr(
        "easyedit_rls.ledger.change.WEIGHT_TOLERANCE", math.inf
    )  # it would be seen, and mended
    editor, priors = stream_in_bfloat16(tok, requests, 100)
    assert all(worst_ulps(editor, priors, layer) > 2 for layer in priors)
