"""Runs a comparison: a fresh process for each contender, one after the other or some at once; those that are
done are not run again.
"""

import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from easyedit_rls._base.progress import progress_bar
from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.compare.stream import REFUSED, RESULT
from easyedit_rls.editors.base import EDITORS
from easyedit_rls.errors import HostError, InputError, RLSEditError
from easyedit_rls.host.find import easyeditor_is_there

_LAST_LINES = 20


def find_waiting(folder: Path, contenders: Sequence[Contender]) -> list[Contender]:
    """The contenders that have no result yet.

    Args:
        folder: of the comparison.
        contenders: all.

    Raises:
        HyperParamsError: there is no editor of that name.
        HostError: one that has none needs EasyEdit, and it isn't there.
    """
    waiting = [contender for contender in contenders if not (folder / contender.folder / RESULT).is_file()]
    foreign = [contender.name for contender in waiting if EDITORS.get(contender.alg_name).needs_host]
    if foreign and not easyeditor_is_there():
        raise HostError(
            f"{', '.join(foreign)} need EasyEdit. "
            "git clone https://github.com/zjunlp/EasyEdit, "
            "install what its requirements.txt lists, and set EASYEDIT_HOME to its folder; "
            "or compare settings of RLSEdit with each other: alg_name=RLSEdit,RLSEdit--soft."
        )
    return waiting


def run_all(folder: Path, plan: Plan, show_progress: bool | None = None, jobs: int = 1) -> None:
    """Run every contender that has no result yet.

    Args:
        folder: where the plan is and the results go.
        plan: what to run.
        show_progress: None shows a bar with the time left on a terminal only; each batch's line is shown
            either way.
        jobs: contenders that run at once. More than one change nothing but times: an edit takes longer beside
            another's.

    Raises:
        HostError: a contender needs EasyEdit, and there is none; told before anything runs.
        InputError: a contender can't use what it was given.
        RLSEditError: it failed; with the end of what it printed. The others' results stay.
    """
    waiting = find_waiting(folder, plan.contenders)
    n_done = (len(plan.contenders) - len(waiting)) * plan.n_batches
    with progress_bar(len(plan.contenders) * plan.n_batches, "comparing", "batch", show_progress) as bar:
        bar.update(n_done)
        children: list[subprocess.Popen[str]] = []
        with ThreadPoolExecutor(jobs) as pool:
            runs = [pool.submit(_run_one, folder, plan, contender, bar, children) for contender in waiting]
            try:
                done, _ = wait(runs, return_when=FIRST_EXCEPTION)
                for run in done:
                    run.result()
            except BaseException:
                for run in runs:
                    run.cancel()
                for child in children:
                    child.kill()
                raise


def _run_one(
    folder: Path, plan: Plan, contender: Contender, bar: "tqdm[Any]", children: "list[subprocess.Popen[str]]"
) -> None:
    """A contender's process: all it prints goes into a log, what it says of itself is shown."""
    log = folder / f"{contender.folder}.log"
    command = [sys.executable, "-m", "easyedit_rls.compare.stream", str(folder), contender.name]
    last: deque[str] = deque(maxlen=_LAST_LINES)
    with (
        log.open("w", encoding="utf-8") as file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child,
    ):
        children.append(child)
        for line in child.stdout or ():
            file.write(line)
            file.flush()
            last.append(line)
            if line.startswith(f"{contender.name}: "):
                bar.write(line.rstrip())
            bar.update(line.startswith(f"{contender.name}: batch "))
    if child.returncode and last and last[-1].startswith(REFUSED):
        raise InputError(f"{contender.name}: {last[-1].removeprefix(REFUSED).strip()}")
    if child.returncode:
        raise RLSEditError(
            f"{contender.name} ended with status {child.returncode}; "
            f"{log} has all it printed, which ends:\n{''.join(last)}"
        )
