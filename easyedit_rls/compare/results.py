"""From the contenders' checkpoints to tables: means with intervals, retention, differences between
contenders.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from easyedit_rls.compare.plan import Contender, Plan
from easyedit_rls.compare.stream import RESULT
from easyedit_rls.errors import RLSEditError

METRICS = {  # name -> what tables call it
    "rewrite_accuracy": "rewrite accuracy",
    "paraphrase_accuracy": "paraphrase accuracy",
    "neighborhood_accuracy": "neighborhood accuracy",
    "efficacy": "efficacy (ES)",
    "generalization": "generalization (PS)",
    "specificity": "specificity (NS)",
    "exact": "generated answer exact",
    "contained": "generated answer contained",
    "rewrite_acc": "EasyEdit rewrite_acc",
    "rephrase_acc": "EasyEdit rephrase_acc",
    "locality": "EasyEdit locality",
    "portability": "EasyEdit portability",
    "other_relations": "other relations as before",
}
_LEVEL = 0.95
_RESAMPLES = 9_999


@dataclass(frozen=True)
class Estimate:
    """A mean over records with its bootstrap interval (percentiles; Efron 1979) at 95 %."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Run:
    """What one contender's run found.

    Attributes:
        contender: which.
        settings: its whole settings.
        before: checkpoint of the unedited model, on all records that are measured.
        checkpoints: in order of edits; each with n_edits, positions (of the records, in the stream), records,
            deviation, fill, perplexity, seconds_per_edit.
        versions: see `versions.versions`.
    """

    contender: Contender
    settings: Mapping[str, Any]
    before: Mapping[str, Any]
    checkpoints: Sequence[Mapping[str, Any]]
    versions: Mapping[str, str | None]

    @property
    def last(self) -> Mapping[str, Any]:
        """The checkpoint after the last edit."""
        return self.checkpoints[-1]

    def column(self, metric: str, first: int = 0, end: int | None = None) -> list[float | None]:
        """A metric of the records that are measured at the end, of those from `first` up to `end`."""
        return [
            record.get(metric)
            for position, record in zip(self.last["positions"], self.last["records"])
            if first <= position and (end is None or position < end)
        ]

    def retention(self, batch: int, metric: str = "rewrite_accuracy") -> list[list[float]]:
        """For each checkpoint: the metric's mean over each batch of edits so far; NaN where no record of the
        batch was measured.
        """
        table = []
        for checkpoint in self.checkpoints:
            values: list[list[float]] = [[] for _ in range(-(-checkpoint["n_edits"] // batch))]
            for position, record in zip(checkpoint["positions"], checkpoint["records"]):
                values[position // batch].append(record[metric])
            table.append([fmean(some) if some else float("nan") for some in values])
        return table

    def by_age(self, n_bins: int = 10, metric: str = "rewrite_accuracy") -> list[tuple[float, float]]:
        """The metric at the end against how many edits were made later: the means of both over parts of the
        stream of equal length.
        """
        n_edits, bins = self.last["n_edits"], [[] for _ in range(n_bins)]  # type: ignore[var-annotated]
        for position, record in zip(self.last["positions"], self.last["records"]):
            bins[position * n_bins // n_edits].append((n_edits - 1 - position, record[metric]))
        return [tuple(map(fmean, zip(*some))) for some in reversed(bins) if some]  # type: ignore[misc]


def load_runs(folder: Path, plan: Plan) -> list[Run]:
    """Read the results of all contenders.

    Raises:
        RLSEditError: one has none.
    """
    runs = []
    for contender in plan.contenders:
        place = folder / contender.folder
        if not (place / RESULT).is_file():
            raise RLSEditError(
                f"{contender.name} has no result in {place}. "
                "Run the comparison again; it goes on where it stopped."
            )
        head = json.loads((place / RESULT).read_text(encoding="utf-8"))
        before, *checkpoints = (
            json.loads(path.read_text(encoding="utf-8")) for path in sorted(place.glob("checkpoint-*.json"))
        )
        runs.append(Run(contender, head["settings"], before, checkpoints, head["versions"]))
    return runs


def estimate(values: Sequence[float | None], seed: int = 0) -> Estimate | None:
    """Mean and interval over the records that have a value; None where none has."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    if known.min() == known.max():
        return Estimate(float(known[0]), float(known[0]), float(known[0]))
    from scipy.stats import bootstrap

    found = bootstrap(
        (known,),
        np.mean,
        confidence_level=_LEVEL,
        n_resamples=_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return Estimate(
        float(known.mean()), float(found.confidence_interval.low), float(found.confidence_interval.high)
    )


def difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> Estimate | None:
    """Mean difference on the same records, with the interval of the paired bootstrap: not 0 where the
    interval leaves it out.
    """
    return estimate([None if a is None or b is None else a - b for a, b in zip(ours, theirs, strict=True)])


def summary(plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """All figures, for results.json."""
    kept = min(100, plan.count)
    result: dict[str, Any] = {
        "plan": asdict(plan),
        "unedited": _whole(_same_records(runs[0].before, runs[0].last), plan, None),
        "contenders": {},
        "differences": {},
    }
    for run in runs:
        figures = _whole(run.last, plan, kept)
        figures |= {
            "seconds_per_edit": float(np.median(run.last["seconds_per_edit"])),
            "settings": run.settings,
            "versions": run.versions,
        }
        result["contenders"][run.contender.name] = {**figures, "checkpoints": run.checkpoints}
    for run in runs[1:]:
        names = f"{runs[0].contender.name} − {run.contender.name}"
        pairs = {metric: difference(runs[0].column(metric), run.column(metric)) for metric in METRICS}
        result["differences"][names] = {
            metric: asdict(found) for metric, found in pairs.items() if found is not None
        }
    return result


def without_records(result: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of `summary` without each record's, and files by their names alone: small enough to keep,
    and to show to others.
    """
    plan = {**result["plan"]}
    for name in ("model", "data", "text", "tasks_folder", "tasks_data"):
        plan[name] = None if plan[name] is None else Path(plan[name]).name
    plan["hparams"] = {**plan["hparams"], "model_name": Path(plan["hparams"]["model_name"]).name}
    contenders = {}
    for name, figures in result["contenders"].items():
        settings = {**figures["settings"]}
        if "model_name" in settings:
            settings["model_name"] = Path(settings["model_name"]).name
        points = [_means(checkpoint) for checkpoint in figures["checkpoints"]]
        contenders[name] = {**figures, "settings": settings, "checkpoints": points}
    return {**result, "plan": plan, "contenders": contenders}


def _means(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with the means over its records."""
    found = {name: value for name, value in checkpoint.items() if name not in ("records", "positions")}
    for metric in METRICS:
        known = [record[metric] for record in checkpoint["records"] if record.get(metric) is not None]
        if known:
            found[metric] = fmean(known)
    return {**found, "n_records": len(checkpoint["records"])}


def _same_records(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint with no more records than another has."""
    wanted = set(after["positions"])
    pairs = [pair for pair in zip(before["positions"], before["records"]) if pair[0] in wanted]
    return {**before, "positions": [pair[0] for pair in pairs], "records": [pair[1] for pair in pairs]}


def _whole(checkpoint: Mapping[str, Any], plan: Plan, kept: int | None) -> dict[str, Any]:
    columns = {metric: [record.get(metric) for record in checkpoint["records"]] for metric in METRICS}
    found = {metric: estimate(values) for metric, values in columns.items()}
    figures: dict[str, Any] = {metric: asdict(value) for metric, value in found.items() if value is not None}
    if kept is not None:
        pairs = zip(checkpoint["positions"], columns["rewrite_accuracy"])
        retained = estimate([value for position, value in pairs if position < kept])
        figures["retention"] = {"first": kept, **(asdict(retained) if retained else {})}
    figures |= {
        name: checkpoint[name] for name in ("perplexity", "fluency") if checkpoint.get(name) is not None
    }
    figures |= {
        f"objective_{term}": value
        for term, value in checkpoint.get("objective", {}).items()
        if value is not None
    }
    figures |= {
        f"{task}: {name}": value
        for task, found in checkpoint.get("abilities", {}).items()
        for name, value in found.items()
    }
    figures |= {"fill": max(checkpoint["fill"].values())} if checkpoint.get("fill") else {}
    deviation = checkpoint["deviation"].values()
    return figures | {"deviation": max(deviation) if deviation else 0.0}


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a figure each, with a column for the unedited model and for each contender."""
    everyone = {"unedited": result["unedited"], **result["contenders"]}
    kept = next(iter(result["contenders"].values()))["retention"]["first"]
    intervals = {**METRICS, "retention": f"rewrite accuracy of the first {kept}"}
    numbers = {
        "perplexity": ("perplexity", 2),
        "fluency": ("fluency, bits", 2),
        "deviation": ("largest ‖W − W₀‖/‖W₀‖", 3),
        "fill": ("fullest layer, 0 to 1", 3),
        "objective_edits": ("objective: Σ dᵢ‖kᵢW − vᵢ‖²", 1),
        "objective_anchors": ("objective: μ²‖K₀W − K₀W₀‖²", 1),
        "seconds_per_edit": ("seconds an edit, median", 2),
    }
    abilities = {name: (name, 3) for figures in everyone.values() for name in figures if ": " in name}
    rows = [
        [label, *(_interval(figures.get(name)) for figures in everyone.values())]
        for name, label in intervals.items()
    ]
    rows += [
        [label, *(_number(figures.get(name), digits) for figures in everyone.values())]
        for name, (label, digits) in {**numbers, **abilities}.items()
    ]
    return ["", *everyone], [row for row in rows if any(row[1:])]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def comma_separated(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as CSV."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([header, *rows])
    return file.getvalue()


def _interval(found: Mapping[str, float] | None) -> str:
    return (
        f"{found['mean']:.3f} ({found['low']:.3f}–{found['high']:.3f})" if found and "mean" in found else ""
    )


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
