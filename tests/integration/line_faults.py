"""Faults at single lines of the package: a change is then there everywhere or nowhere. Run by
`test_line_faults`, or whole by hand:

    python -m tests.integration.line_faults --tok TOKENIZER --shard 0/2 > faults.json

After two good batches one operation is made, with an exception at one line of the package's code: an
interrupt, a signal that became an exception, memory or disk that ran out, a disk that fails. Each line is
struck by each of these the first time that it is reached, and by a signal the last time. Then weights, memory
and ledger must be those before the operation or those after it, all alike; what can be rolled back is, bit
for bit; and a new editor finds in the ledger what the old one left.
"""

import argparse
import copy
import json
import logging
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

import easyedit_rls
from easyedit_rls import RLSEditor
from easyedit_rls.ledger import change
from easyedit_rls.ledger.compact import compact
from easyedit_rls.ledger.ledger import Ledger
from easyedit_rls.ledger.reading import latest
from easyedit_rls.ledger.snapshot import read_moment
from tests.conftest import tiny_llama, tiny_settings

PACKAGE = str(Path(easyedit_rls.__file__).parent)

FACTS = [
    {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"},
    {"prompt": "Bakers know rye", "subject": "rye", "target_new": "well"},
    {"prompt": "Anna Maria Keller", "subject": "Anna Maria Keller", "target_new": "water"},
]


class Terminated(BaseException):
    """What a server makes of SIGTERM."""


FAULTS = {
    "SIGINT": KeyboardInterrupt,
    "SIGTERM": Terminated,
    "memory": lambda: torch.OutOfMemoryError("out of memory"),
    "disk full": lambda: OSError(28, "No space left on device"),
    "disk fails": lambda: OSError(5, "Input/output error"),
}


def adopt(editor):
    for weight in editor.layout.edited.values():
        weight.parameter.data.mul_(1.01)
    editor.adopt_weights()


def rebuild(editor):
    """An edit that finds all layers drifted."""
    tolerance, change.DRIFT_TOLERANCE = change.DRIFT_TOLERANCE, -1.0
    try:
        editor.edit(FACTS[2])
    finally:
        change.DRIFT_TOLERANCE = tolerance


OPERATIONS = {
    "edit": lambda e: e.edit(FACTS[2]),
    "supersede": lambda e: e.edit({**FACTS[0], "target_new": "bread"}),
    "amend": lambda e: e.amend(2, {**FACTS[1], "target_new": "slow"}),
    "retract": lambda e: e.retract([1]),
    "rollback": lambda e: e.rollback(),
    "adopt": adopt,
    "reset": lambda e: e.reset(),
    "rebuild": rebuild,
}
FINAL = ("rollback", "adopt", "reset")


class Trial:
    """One editor with two good batches, ready for an operation."""

    number = 0

    def __init__(self, prepared, folder, checkpoint_every):
        self.folder = folder
        shutil.copytree(prepared.folder, folder)
        self.editor = RLSEditor(
            copy.deepcopy(prepared.model), prepared.tok, settings(checkpoint_every), state_dir=folder
        )
        assert self.editor.n_edits == 2

    def end(self):
        self.editor.state.ledger.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def settings(checkpoint_every):
    return tiny_settings("llama", v_num_grad_steps=2, context_templates=[], checkpoint_every=checkpoint_every)


class Prepared:
    """Two good batches, and how things stood after each."""

    def __init__(self, tok, scratch):
        self.tok, self.folder, self.model = tok, scratch / "prepared", tiny_llama()
        editor = RLSEditor(tiny_llama(), tok, settings(100), state_dir=self.folder)
        editor.edit(FACTS[0])
        self.after_one = picture(editor)
        editor.edit(FACTS[1])
        self.after_two = picture(editor)
        editor.state.ledger.close()


def picture(editor):
    """Weights, memory, and whether they agree."""
    state, edited = editor.state, editor.layout.edited
    assert all(edited[layer].holds(state.now.weight(layer)) for layer in state.layers), (
        "weights and memory are apart"
    )
    return {str(layer): weight.snapshot() for layer, weight in edited.items()}, memory(state.now)


def memory(moment):
    tensors = {f"W {layer}": solution.weight for layer, solution in moment.solutions.items()}
    tensors |= {f"C {layer}": solution.covariance() for layer, solution in moment.solutions.items()}
    return list(moment.history.live), moment.history.n_batches, tensors


def same(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return (
        len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, (tuple, list))
        else one == other
    )


def lines_of(act):
    """Every line of the package that an operation reaches, with how often."""
    seen = Counter()

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            seen[frame.f_code.co_filename, frame.f_lineno] += 1
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return seen


def struck(act, where, time_of, fault):
    """Run an operation with a fault at a line, the n-th time it is reached;
    returns whether it came through.
    """
    seen = [0]

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line" and (frame.f_code.co_filename, frame.f_lineno) == where:
            seen[0] += 1
            if seen[0] == time_of:
                sys.settrace(None)
                raise fault()
        return trace

    sys.settrace(trace)
    try:
        act()
    except BaseException:  # noqa: BLE001  # not kept: its traceback would hold on to locks
        return True
    finally:
        sys.settrace(None)
    return False


def examine(trial, name, prepared, after):
    """What is wrong after an operation that was struck; returns where the change is."""
    editor, disk = trial.editor, trial.folder
    now = picture(editor)
    adopted_by_hand = name == "adopt" and not same(now[0], prepared.after_two[0])
    nowhere = same(now[1], prepared.after_two[1]) and same(now[0], prepared.after_two[0])
    everywhere = same(now, after)
    assert nowhere or everywhere, f"half done (adopted {adopted_by_hand})"
    if editor.state.layers:
        assert same(memory(read_moment(latest(disk))), memory(editor.state.now)), (
            "the ledger says something else"
        )
    if nowhere and not everywhere:
        editor.rollback()
        assert same(picture(editor), prepared.after_one), "the second good batch can't be rolled back"
    elif name not in FINAL:
        editor.rollback()
        assert same(picture(editor), prepared.after_two), "the change can't be rolled back"
    Trial.number += 1
    if Trial.number % 4 == 0:  # and on it goes; not each time, since that takes half of the time
        editor.edit(FACTS[2])
    goes_on = picture(editor)
    editor.state.ledger.close()
    if name not in ("adopt", "reset"):
        again = RLSEditor(copy.deepcopy(prepared.model), prepared.tok, editor.hparams, state_dir=disk)
        assert same(picture(again), goes_on), "a new editor finds something else"
        again.state.ledger.close()
    return "everywhere" if everywhere and not nowhere else "nowhere"


def try_adopt(trial, where, time_of, fault):
    """As `adopt`, but weights that were not adopted are put back by whoever wrote them."""
    found = {layer: weight.snapshot() for layer, weight in trial.editor.layout.edited.items()}
    for weight in trial.editor.layout.edited.values():
        weight.parameter.data.mul_(1.01)
    problem = struck(trial.editor.adopt_weights, where, time_of, fault)
    if not trial.editor.state.history.is_adopted:
        for layer, snapshot in found.items():
            trial.editor.layout.edited[layer].restore(snapshot)
    return problem


def strike_compaction(prepared, folder, where, time_of, fault):
    """Compaction changes nothing that is remembered, and what it leaves can be rolled back."""
    shutil.copytree(prepared.folder, folder)
    problem = struck(lambda: compact_there(folder), where, time_of, fault)
    assert same(memory(read_moment(latest(folder))), prepared.after_two[1]), "compaction changed the state"
    editor = RLSEditor(copy.deepcopy(prepared.model), prepared.tok, settings(100), state_dir=folder)
    editor.rollback()
    assert same(picture(editor), prepared.after_one), "after compaction the last batch can't be rolled back"
    editor.close()
    shutil.rmtree(folder)
    return problem


def compact_there(folder):
    ledger = Ledger(folder)
    try:
        journal = ledger.open()
        compact(ledger, journal, read_moment(journal))
    finally:
        ledger.close()


def strike(prepared, name, after, where, time_of, fault, folder):
    """One fault; returns where the change is, and whether the fault came through."""
    if name == "compact":
        return "nowhere", strike_compaction(prepared, folder, where, time_of, fault)
    trial = Trial(prepared, folder, _checkpoints(name))
    try:
        if name == "adopt":
            came_through = try_adopt(trial, where, time_of, fault)
        else:
            came_through = struck(lambda: OPERATIONS[name](trial.editor), where, time_of, fault)
        return examine(trial, name, prepared, after), came_through
    finally:
        trial.end()


def reach(prepared, name, folder):
    """The lines that an operation reaches, and how things stand after it."""
    if name == "compact":
        shutil.copytree(prepared.folder, folder)
        lines = lines_of(lambda: compact_there(folder))
        shutil.rmtree(folder)
        return lines, None
    trial = Trial(prepared, folder, _checkpoints(name))
    lines = lines_of(lambda: OPERATIONS[name](trial.editor))
    after = picture(trial.editor)
    trial.end()
    return lines, after


def _checkpoints(name):
    return 1 if name in ("edit", "retract") else 100  # a checkpoint before some


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tok", required=True, help="folder of a tokenizer for the tiny model")
    parser.add_argument("--stride", type=int, default=1, help="strike every n-th point only")
    parser.add_argument("--shard", default="0/1", help="which of how many processes this is")
    parser.add_argument("--operations", nargs="*", default=[*OPERATIONS, "compact"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable()
    scratch = Path(tempfile.mkdtemp(prefix="faults-"))
    prepared = Prepared(PreTrainedTokenizerFast.from_pretrained(options.tok), scratch)
    shard, n_shards = map(int, options.shard.split("/"))
    counts, problems, start, step = {}, [], time.perf_counter(), n_shards * options.stride
    for name in options.operations:
        lines, after = reach(prepared, name, scratch / "count")
        tally = counts[name] = Counter(lines=len(lines))
        for where, time_of, kind in _points(lines)[shard::step]:
            try:
                place, came_through = strike(
                    prepared, name, after, where, time_of, FAULTS[kind], scratch / "trial"
                )
                tally[place] += 1
                tally["came through"] += came_through
            except (AssertionError, RuntimeError, KeyError, ValueError, OSError) as exc:
                at = f"{Path(where[0]).relative_to(PACKAGE)}:{where[1]}"
                problems.append(f"{name}, {kind} at {at}, time {time_of}: {type(exc).__name__} {exc}"[:300])
                shutil.rmtree(scratch / "trial", ignore_errors=True)
            tally["faults"] += 1
        sys.stderr.write(
            f"{name}: {dict(tally)}, {len(problems)} problems, {time.perf_counter() - start:.0f} s\n"
        )
    shutil.rmtree(scratch)
    sys.stdout.write(json.dumps({"counts": counts, "problems": problems}, indent=1) + "\n")


def _points(lines):
    """Each line with each fault, the first time that it is reached, and with one the last time."""
    first = [(where, 1, kind) for where in lines for kind in FAULTS]
    return sorted(first + [(where, n, "SIGTERM") for where, n in lines.items() if n > 1])


if __name__ == "__main__":
    main()
