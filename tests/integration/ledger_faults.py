"""A program that kills editors in the middle of their work, and looks at what they left. Run by
`test_ledger_faults`.

It edits a tiny model in forked children. A child is killed by SIGKILL either from outside at a random moment,
or by itself at the n-th write, sync, rename, link or removal, before it or half-way through it. Then a new
editor takes the ledger: every change that was reported must be there, at most one more, and after the rest of
the stream the state must be bit for bit that of a run in peace. It stands on its own so that nothing but one
thread runs when it forks: tqdm gets a lock of its own process in place of one shared with the children, which
a child killed while it holds it would never give back, and no monitoring thread.

A killed process loses nothing that the system has taken, synced or not: only a power cut would show that a
sync is missing. So the syncs are counted, and died at, but the disk isn't waited for.
"""

import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from tqdm.std import tqdm
from transformers import PreTrainedTokenizerFast

from easyedit_rls import RLSEditor
from easyedit_rls._base import files
from easyedit_rls.ledger import journal, ledger, tidy
from easyedit_rls.ledger.reading import latest
from tests.conftest import tiny_llama, tiny_settings
from tests.helpers import same

CHILD_LIMIT_S = 300.0  # a child takes a second or two

FACTS = [
    {"prompt": "The river Oder", "subject": "Oder", "target_new": "people"},
    {"prompt": "Bakers know {}", "subject": "rye", "target_new": "well"},
    {"prompt": "{}", "subject": "Anna Maria Keller", "target_new": "water"},
]
STREAM = [
    lambda e: e.edit(FACTS[0]),
    lambda e: e.edit(FACTS[1:]),
    lambda e: e.edit({**FACTS[0], "target_new": "bread"}),  # supersedes
    lambda e: e.retract([2]),
    lambda e: e.edit(FACTS[1]),
    lambda e: e.rollback(),
    lambda e: e.amend(3, {**FACTS[2], "target_new": "slow"}),
    lambda e: e.edit({**FACTS[1], "importance": 2.0}),
]


class KillingOs:
    """Stands for `os` in the ledger's modules; counts what touches the disk, and dies at the n-th."""

    calls = ("open", "write", "fsync", "replace", "rename", "link", "truncate")

    def __init__(self, at, halfway):
        self.at, self.halfway, self.n = at, halfway, 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.calls:
            return real

        def call(*args, **kwargs):
            self.n += 1
            if self.n == self.at:
                if name == "write" and self.halfway:
                    real(args[0], bytes(args[1][: len(args[1]) // 2]))
                elif self.halfway:
                    real(*args, **kwargs)
                os.kill(os.getpid(), signal.SIGKILL)
            return None if name == "fsync" else real(*args, **kwargs)

        return call


def watch(killing):
    for module in (files, journal, ledger, tidy):
        if hasattr(module, "os"):
            module.os = killing


def editor(tok, folder):
    hp = tiny_settings("llama", checkpoint_every=3, v_num_grad_steps=2, context_templates=[])
    return RLSEditor(tiny_llama(), tok, hp, state_dir=folder)


def n_done(folder):
    """Changes in the ledger."""
    found = latest(folder)
    return 0 if found is None else sum(line.kind in ("entry", "rollback") for line in found.lines)


def go_on(one, folder, report):
    """Make the rest of the stream."""
    for i in range(n_done(folder), len(STREAM)):
        STREAM[i](one)
        report(i + 1)
    one.close()
    report(len(STREAM) + 1)
    return one


def outcome(one):
    state = {f"{layer}.{name}": t for layer, s in one.state.layers.items() for name, t in s.tensors().items()}
    return state | {str(layer): weight.snapshot() for layer, weight in one.layout.edited.items()}


def in_child(tok, folder, killing=None, delay_s=None):
    """Let a child work until it dies or is done; returns the changes it reported, and the seconds it took to
    its end, None if killed.
    """
    reader, writer = os.pipe()
    start = time.perf_counter()
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(CHILD_LIMIT_S, exit=True)
        try:
            watch(killing if killing is not None else KillingOs(0, False))
            go_on(editor(tok, folder), folder, lambda n: os.write(writer, f"{n}\n".encode()))
            os._exit(0)
        finally:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    ended = 0
    while delay_s is not None and ended == 0:
        if time.perf_counter() - start >= delay_s:
            os.kill(pid, signal.SIGKILL)
            break
        time.sleep(0.001)
        ended, status = os.waitpid(pid, os.WNOHANG)
    lasted_s = time.perf_counter() - start
    if ended == 0:
        _, status = os.waitpid(pid, 0)
    with open(reader) as stream:
        reported = [int(line) for line in stream if line.endswith("\n")]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError("a child failed by itself")
    return max(reported, default=0), None if os.WIFSIGNALED(status) else lasted_s


def examine(tok, folder, reported, expected, after_each):
    """What is wrong with a ledger that a killed child left; None for nothing."""
    done = n_done(folder)
    if not min(reported, len(STREAM)) <= done <= reported + 1:
        return f"{reported} changes were reported, {done} are there"
    resumed = editor(tok, folder)
    if done and not same(weights(resumed), after_each[done - 1]):
        return f"the weights are not those after change {done}"
    if not same(outcome(go_on(resumed, folder, lambda n: None)), expected):
        return "the final state is not that of a run in peace"
    return None


def weights(one):
    return {str(layer): weight.snapshot() for layer, weight in one.layout.edited.items()}


def main(tokenizer, scratch, n_random, shard, n_shards):
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    tok = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    scratch = Path(scratch)
    after_each = []
    peaceful = editor(tok, scratch / "peace")
    for step in STREAM:
        step(peaceful)
        after_each.append(weights(peaceful))
    peaceful.close()
    expected = outcome(peaceful)

    counting = KillingOs(0, False)
    watch(counting)
    start = time.perf_counter()
    go_on(editor(tok, scratch / "count"), scratch / "count", lambda n: None)
    whole_s = time.perf_counter() - start
    points = counting.n

    chance = random.Random(shard)
    injected = [(KillingOs(at, halfway), None) for at in range(1, points + 1) for halfway in (False, True)]
    trials = injected[shard::n_shards]
    problems, killed, in_the_middle = [], {"injected": 0, "random": 0}, 0
    while trials or killed["random"] < n_random:
        killing, delay_s = trials.pop() if trials else (None, chance.uniform(0, whole_s))
        folder = scratch / "trial"
        reported, lasted_s = in_child(tok, folder, killing, delay_s)
        if lasted_s is None:
            killed["random" if killing is None else "injected"] += 1
            in_the_middle += 0 < reported < len(STREAM)
        else:  # the run that was timed was a slow one, and later moments would all be too late
            whole_s = min(whole_s, lasted_s)
        problem = examine(tok, folder, reported, expected, after_each)
        if problem is not None:
            problems.append(
                f"{f'call {killing.at}, halfway {killing.halfway}' if killing else f'{delay_s} s'}: {problem}"
            )
        shutil.rmtree(folder)
    sys.stdout.write(
        json.dumps({"points": points, "killed": killed, "in_the_middle": in_the_middle, "problems": problems})
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
