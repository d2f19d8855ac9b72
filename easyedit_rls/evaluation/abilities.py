"""General abilities by EleutherAI's lm-evaluation-harness (``pip install 'easyedit-rls[lm-eval]'``)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.arguments import listed
from easyedit_rls._base.files import user_path
from easyedit_rls.errors import HyperParamsError, RLSEditError
from easyedit_rls.evaluation.local_tasks import is_local, local_tasks
from easyedit_rls.model.hooks import undisturbed


def abilities(
    model: PreTrainedModel,
    tok: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    folder: str | Path | None = None,
    data: str | Path | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, float]]:
    """Run tasks of the harness on a model as it is.

    The caller's random numbers are left as they were; the harness draws its few-shot examples from seeds of
    its own.

    Args:
        model: edited or not.
        tok: its tokenizer.
        tasks: names of tasks or groups, e.g. ``["mmlu", "hellaswag"]``.
        limit: documents a task, None for all.
        folder: where to look for tasks of one's own (YAML files) besides the harness's.
        data: folder with files that were published for known tasks (`local_tasks`), which are read from there
            then, and not downloaded.
        batch_size: requests in one pass.

    Returns:
        task -> metric -> value; the filter's name follows the metric's where it isn't 'none'.

    Raises:
        RLSEditError: the harness is not installed.
        ArgumentError: one task was given instead of a list.
        HyperParamsError: there is no task of that name.
        DataError: a file is missing in `data`, or can't be read.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as exc:
        raise RLSEditError(
            "General abilities need lm-eval. Install it: pip install 'easyedit-rls[lm-eval]'."
        ) from exc
    manager = TaskManager(include_path=None if folder is None else str(user_path(folder)))
    tasks = listed(tasks, "tasks", "names")
    local = [] if data is None else [task for task in tasks if is_local(task)]
    unknown = sorted(set(tasks) - set(manager.all_tasks) - set(local))
    if unknown:
        raise HyperParamsError(
            f"lm-eval has no task {', '.join(unknown)}. "
            "`lm_eval ls tasks` lists them; name the folder of your own, or that of the published files."
        )
    made: list[Any] = [task for task in tasks if task not in local]
    made += local_tasks(local, user_path(data)) if data is not None else []
    with torch.random.fork_rng(), undisturbed(model):
        wrapped = HFLM(pretrained=model, tokenizer=tok, batch_size=batch_size)
        found = lm_eval.simple_evaluate(
            model=wrapped, tasks=made, limit=limit, task_manager=manager, bootstrap_iters=0
        )
    results: dict[str, dict[str, Any]] = found["results"]
    return {
        task: {
            name.removesuffix(",none"): float(value)
            for name, value in figures.items()
            if isinstance(value, (int, float))
            and "stderr" not in name
            and name not in ("sample_len", "sample_count")
        }
        for task, figures in results.items()
    }
