"""One contender's run, in a process of its own: ``python -m easyedit_rls.compare.stream FOLDER NAME``.

Edits the stream batch by batch and measures at each checkpoint the records so far, or a sample of them. What
it finds goes to ``FOLDER/<contender>/checkpoint-<edits>.json``, and at the end ``result.json`` says that it
is whole. A run that was broken off goes on behind its last whole batch. The unedited model is measured by
the first contender, for all of them.
"""

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from easyedit_rls._base.files import read_text, write_file
from easyedit_rls.compare.asked import asked, asked_probe
from easyedit_rls.compare.objective import Objective
from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.compare.progress import PROGRESS, Progress, changed_weights, write_progress
from easyedit_rls.compare.versions import versions
from easyedit_rls.config.hparams import RLSEditHyperParams
from easyedit_rls.data.records import EditRecord
from easyedit_rls.editors.base import EDITORS, Editor, Setup
from easyedit_rls.editors.compared import RLSEdit
from easyedit_rls.errors import InputError
from easyedit_rls.evaluation import (
    abilities,
    add_locality,
    answers,
    edit_quality,
    evaluate,
    first_tokens,
    fluency,
    generate,
    other_questions,
    perplexity,
    unchanged,
)
from easyedit_rls.model.load import load_model
from easyedit_rls.solvers.fill import Gauge

RESULT = "result.json"
REFUSED = "refused: "  # a run ends with such a line, and status 2, where what it was given can't be used
UNEDITED = "unedited.json"
_FLUENT_TOKENS = 100  # ROME's


def run_contender(folder: Path, plan: Plan, contender: Contender) -> None:
    """Edit and measure; writes into the contender's own folder, and goes on from what is there."""
    if not _run(folder, plan, contender):
        shutil.rmtree(folder / contender.folder)
        _run(folder, plan, contender)


def _run(folder: Path, plan: Plan, contender: Contender) -> bool:
    """Whether it ran; not if the editor can't go on from what is there."""
    place = folder / contender.folder
    progress = Progress.read(place)
    if progress is None:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    records = plan.records()
    model, tok = load_model(plan.model, plan.dtype, plan.device, trust_remote_code=plan.trust_remote_code)
    scale = _Measure(plan, model, tok, records)
    with FileLock(folder / f"{UNEDITED}.lock"):
        if not (folder / UNEDITED).is_file():
            n_records = len(plan.ever_measured)
            _say(f"{contender.name}: measures the unedited model on {n_records} records, for all editors")
            _write(folder / UNEDITED, scale.unedited())
    before = json.loads((folder / UNEDITED).read_text(encoding="utf-8"))
    scale.take_as_before(before["quality"], before["figures"])
    _write(place / checkpoint_name(0), before["figures"])
    cls = EDITORS.get(contender.alg_name)
    hparams = RLSEditHyperParams.from_dict(dict(plan.hparams))
    editor = cls.begin(Setup(model, tok, hparams, plan.templates, contender.settings, place))
    _say(f"{contender.name}: settings {json.dumps(editor.describe(), default=str)}")
    if progress is not None and not (
        progress.restore(editor.model) and editor.remember(progress.memory, len(progress.seconds))
    ):  # it keeps something else than weights, or was killed between the ledger's writing and our own
        editor.close()
        return False
    seconds = [] if progress is None else progress.seconds
    for number in range(1, plan.n_batches + 1):
        is_new = number > len(seconds)
        if is_new:
            batch = records[(number - 1) * plan.batch : number * plan.batch]
            begun = time.perf_counter()
            editor.edit([record.request for record in batch])
            seconds.append((time.perf_counter() - begun) / len(batch))
            write_progress(place, editor.model, scale.weights, editor.memory(), seconds)
        line = (
            f"{contender.name}: batch {number} of {plan.n_batches}, "
            f"{seconds[number - 1]:.2f} s/edit{'' if is_new else ', done before'}"
        )
        n_edits = min(number * plan.batch, len(records))
        if plan.is_checkpoint(number) and not (place / checkpoint_name(n_edits)).is_file():
            found = scale.now(n_edits, is_last=number == plan.n_batches, editor=editor)
            _write(place / checkpoint_name(n_edits), {**found, "seconds_per_edit": seconds})
            accuracy = _mean(found["records"], "rewrite_accuracy")
            line += f", rewrite accuracy {accuracy:.3f} over {len(found['records'])}"
        _say(line)
    result = {
        "name": contender.name,
        "settings": editor.describe(),
        "versions": versions(cls.needs_host),
        "threads": torch.get_num_threads(),
    }
    _write(place / RESULT, result)
    editor.close()
    (place / PROGRESS).unlink()
    return True


def checkpoint_name(n_edits: int) -> str:
    """The file of a checkpoint; names sort as the numbers do."""
    return f"checkpoint-{n_edits:06d}.json"


class _Measure:
    """What is measured at each checkpoint, against the unedited model."""

    def __init__(
        self, plan: Plan, model: PreTrainedModel, tok: PreTrainedTokenizerBase, records: Sequence[EditRecord]
    ) -> None:
        self._plan, self._model, self._tok, self._records = plan, model, tok, records
        self._text = read_text(plan.text) if plan.text else None
        self.weights: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in model.named_parameters()
        }
        self._objective = Objective(model, tok, RLSEditHyperParams.from_dict(dict(plan.hparams)))
        self._gauge = Gauge()
        self._questions = other_questions(records, plan.relations) if plan.relations else []
        # Of the unedited model, by position: EasyEdit's figures, and the first tokens behind the questions
        self._quality: dict[int, Mapping[str, Any]] = {}
        self._tokens: dict[int, Sequence[int]] | None = None

    def take_as_before(self, quality: Sequence[Mapping[str, Any]], figures: Mapping[str, Any]) -> None:
        """What was found of the unedited model: EasyEdit's figures, which its locality is taken against, and
        the records' figures.
        """
        self._quality = dict(zip(figures["positions"], quality))
        if self._questions:
            tokens = [record["other_tokens"] for record in figures["records"]]
            self._tokens = dict(zip(figures["positions"], tokens))

    def unedited(self) -> dict[str, Any]:
        """The same before the first edit, on all records that will be measured: figures, and what locality
        is taken against.
        """
        positions = self._plan.ever_measured
        quality = self._easyedit(self._model, [self._records[position] for position in positions])
        self._quality = dict(zip(positions, quality))
        return {"quality": quality, "figures": self._figures(positions, len(self._records), is_last=True)}

    def now(self, n_edits: int, is_last: bool, editor: Editor) -> dict[str, Any]:
        """Figures of the records so far, or of a sample, and of the editor's model as a whole. Every prompt
        is asked behind what the editor puts in front of it.
        """
        return self._figures(self._plan.measured(n_edits), n_edits, is_last, editor)

    def _figures(
        self, positions: Sequence[int], n_edits: int, is_last: bool, editor: Editor | None = None
    ) -> dict[str, Any]:
        """The same of the records at these positions, and of the unedited model if there is no editor."""
        model = self._model if editor is None else editor.model
        records = [self._records[position] for position in positions]
        if editor is not None:
            records = [asked(record, editor.in_front) for record in records]
        counterfact = evaluate(
            model, self._tok, [record.request for record in records], show_progress=False
        ).records
        quality = self._easyedit(model, records)
        add_locality([self._quality[position] for position in positions], quality)
        found = [{**asdict(scores), **_easyedit(figures)} for scores, figures in zip(counterfact, quality)]
        terms = self._objective.terms(model, editor.rls if isinstance(editor, RLSEdit) else None)
        result: dict[str, Any] = {"n_edits": n_edits, "deviation": self._deviation(model), "objective": terms}
        result["fill"] = self._fill(editor)
        if self._text is not None:
            result["perplexity"] = perplexity(model, self._tok, self._text, show_progress=False)
        if is_last and self._plan.answers:
            probes = [
                record.request.probe(record.request.prompt, record.request.target) for record in records
            ]
            for figures, answer in zip(
                found, answers(model, self._tok, probes, [probe.answer for probe in probes])
            ):
                figures |= {
                    "answer": answer.text,
                    "exact": float(answer.is_exact),
                    "contained": float(answer.is_contained),
                }
        if is_last and self._questions:
            for figures, more in zip(found, self._other_relations(positions, model, editor)):
                figures |= more
        if is_last and self._plan.fluency:
            prompts = [record.generation_prompts[0] for record in records if record.generation_prompts][
                : self._plan.fluency
            ]
            result["fluency"] = (
                fluency(generate(model, self._tok, prompts, max_new_tokens=_FLUENT_TOKENS, top_k=5))
                if prompts
                else None
            )
        if self._plan.has_tasks(-(-n_edits // self._plan.batch)):
            plan, tok = self._plan, self._tok
            result["abilities"] = abilities(
                model, tok, plan.tasks, limit=plan.tasks_limit, folder=plan.tasks_folder, data=plan.tasks_data
            )
        return {**result, "positions": list(positions), "records": found}

    def _easyedit(self, model: PreTrainedModel, records: Sequence[EditRecord]) -> list[dict[str, Any]]:
        """EasyEdit's own figures."""
        return edit_quality(
            model, self._tok, [record.easyedit for record in records], chat_template=self._plan.is_chat
        )

    def _other_relations(
        self, positions: Sequence[int], model: PreTrainedModel, editor: Editor | None
    ) -> list[dict[str, Any]]:
        """Of these records: what is said first to the questions, and how much of it is as before."""
        questions = [self._questions[position] for position in positions]
        if editor is not None:
            questions = [[asked_probe(probe, editor.in_front) for probe in probes] for probes in questions]
        tokens = first_tokens(model, self._tok, questions, show_progress=False)
        before = tokens if self._tokens is None else [self._tokens[position] for position in positions]
        shares = unchanged(before, tokens)
        return [{"other_tokens": said, "other_relations": share} for said, share in zip(tokens, shares)]

    def _deviation(self, model: PreTrainedModel) -> dict[str, float]:
        """‖W − W_0‖/‖W_0‖ of each weight that has changed; weights that the editor added have none."""
        pairs = {
            name: (weight.float(), self.weights[name].float())
            for name, weight in changed_weights(model, self.weights).items()
        }
        return {name: float((W - W_0).norm() / W_0.norm()) for name, (W, W_0) in pairs.items()}

    def _fill(self, editor: Editor | None) -> dict[str, float]:
        """How full each layer is, for rules that have such a memory."""
        if not isinstance(editor, RLSEdit):
            return {}
        now = editor.rls.state.now
        fills = {layer: self._gauge.read(one, now.beginnings, layer) for layer, one in now.solutions.items()}
        return {str(layer): fill for layer, fill in fills.items() if fill is not None}


def _easyedit(figures: Mapping[str, Any]) -> dict[str, float | None]:
    """EasyEdit's figures of one record as one number each."""
    sections = {
        name: [x for key, part in figures[name].items() if key.endswith("_acc") for x in part]
        for name in ("locality", "portability")
    }
    found: dict[str, float | None] = {
        name: fmean(figures[name]) if name in figures else None for name in ("rewrite_acc", "rephrase_acc")
    }
    return found | {name: fmean(values) if values else None for name, values in sections.items()}


def _mean(records: Sequence[Mapping[str, Any]], name: str) -> float:
    return fmean(record[name] for record in records)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_file(path, json.dumps(content, ensure_ascii=False, default=str).encode())


if __name__ == "__main__":
    FOLDER = Path(sys.argv[1])
    PLAN = Plan.load(FOLDER)
    try:
        run_contender(FOLDER, PLAN, PLAN.contender(sys.argv[2]))
    except InputError as exc:
        _say(REFUSED + " ".join(str(exc).split()))
        sys.exit(2)
