"""Figures of a comparison, each as PNG and SVG. Colors are Okabe and Ito's, told apart by color-blind
readers; markers differ too.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from easyedit_rls.compare.plan import Plan
from easyedit_rls.compare.results import METRICS, Run

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_SIZE = (4.4, 3.6)  # inches; one fills a phone's width, three stand side by side on a screen
_TERMS = {  # of the objective
    "edits": ("Σ dᵢ‖kᵢW − vᵢ‖²", "objective: what the edits still miss (RLSEdit's targets)"),
    "deviation": ("λ²‖W − W₀‖²", "objective: deviation from the unedited weights"),
    "anchors": ("μ²‖K₀W − K₀W₀‖²", "objective: change of what ordinary keys map to"),
}
_ENOUGH_TO_AGE = 50  # edits
_NUMBERS_UP_TO = 60  # cells of a heat map


def draw(plan: Plan, runs: Sequence[Run], folder: Path) -> dict[str, str]:
    """Draw everything there is to draw.

    Args:
        plan: what ran.
        runs: what was found.
        folder: where the files go.

    Returns:
        file name without its ending -> what the figure shows, in the order of the report.
    """
    drawn: dict[str, str] = {}
    for metric, label in METRICS.items():
        lines = {run.contender.name: _course(run, metric) for run in runs}
        if sum(len(points) for points in lines.values()) > len(runs):
            drawn |= _lines(
                lines, label, label, folder / metric, f"{label} over all records edited so far", (0, 1)
            )
    perplexity = {run.contender.name: _plain(run, lambda point: point.get("perplexity")) for run in runs}
    if any(perplexity.values()):
        drawn |= _lines(
            perplexity, "perplexity", "perplexity", folder / "perplexity", "perplexity on plain text", None
        )
    deviation = {
        run.contender.name: _plain(run, lambda point: max(point["deviation"].values(), default=0.0))
        for run in runs
    }
    drawn |= _lines(
        deviation,
        "deviation",
        "‖W − W₀‖ / ‖W₀‖",
        folder / "deviation",
        "largest change of a weight, relative to its norm",
        None,
    )
    fill = {
        run.contender.name: _plain(run, lambda point: max(point.get("fill", {}).values(), default=None))
        for run in runs
    }
    if any(fill.values()):
        drawn |= _lines(
            fill, "fill", "1 − tr(C A₀)/d_k", folder / "fill", "how full the fullest layer is", (0, 1)
        )
    for task, metric in {
        task: next(iter(found))
        for run in runs
        for task, found in run.before.get("abilities", {}).items()
        if found
    }.items():
        scores = {
            run.contender.name: _plain(
                run,
                lambda point, task=task, metric=metric: point.get("abilities", {}).get(task, {}).get(metric),
            )
            for run in runs
        }
        drawn |= _lines(
            scores, task, metric, folder / f"ability-{task}", f"{task}, {metric}, by lm-eval", None
        )
    for term, (label, what) in _TERMS.items():
        terms = {
            run.contender.name: _plain(run, lambda point, term=term: point.get("objective", {}).get(term))
            for run in runs
        }
        if any(value for points in terms.values() for _, value in points):
            drawn |= _lines(terms, term, label, folder / f"objective-{term}", what, None)
    seconds = {
        run.contender.name: [
            (min((t + 1) * plan.batch, plan.count), s) for t, s in enumerate(run.last["seconds_per_edit"])
        ]
        for run in runs
    }
    drawn |= _lines(
        seconds,
        "time",
        "seconds an edit",
        folder / "seconds",
        "seconds an edit, each batch",
        None,
        scale="log",
    )
    ages = {run.contender.name: run.by_age() for run in runs}
    if plan.count >= _ENOUGH_TO_AGE:
        drawn |= _lines(
            ages,
            "rewrite accuracy by age",
            "rewrite accuracy at the end",
            folder / "age",
            "rewrite accuracy at the end, by how many edits were made later",
            (0, 1),
            edits="edits made later",
        )
    for run in runs:
        drawn |= _heat_map(plan, run, folder / f"retention-{run.contender.folder}")
    return drawn


def _course(run: Run, metric: str) -> list[tuple[int, float]]:
    points = []
    for checkpoint in run.checkpoints:
        known = [record[metric] for record in checkpoint["records"] if record.get(metric) is not None]
        if known:
            points.append((checkpoint["n_edits"], fmean(known)))
    return points


def _plain(run: Run, of: Any) -> list[tuple[int, float]]:
    points = [
        (0, of(run.before)),
        *((checkpoint["n_edits"], of(checkpoint)) for checkpoint in run.checkpoints),
    ]
    return [(n, value) for n, value in points if value is not None]


def _lines(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    title: str,
    label: str,
    path: Path,
    what: str,
    limits: tuple[float, float] | None,
    scale: str = "linear",
    edits: str = "edits",
) -> dict[str, str]:
    figure = _figure()
    axes = figure.subplots()
    for number, (name, points) in enumerate(lines.items()):
        if points:
            style = {"color": _COLOURS[number % len(_COLOURS)], "marker": _MARKERS[number % len(_MARKERS)]}
            axes.plot(*zip(*points), label=name, markersize=5, linewidth=1.6, **style)
    axes.set(title=title, xlabel=edits, ylabel=label, yscale=scale)
    if limits is not None:
        axes.set_ylim(limits[0] - 0.02, limits[1] + 0.02)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return _save(figure, path, what)


def _heat_map(plan: Plan, run: Run, path: Path) -> dict[str, str]:
    table = run.retention(plan.batch)
    n_rows = max(map(len, table))
    grid = [[row[batch] if batch < len(row) else float("nan") for row in table] for batch in range(n_rows)]
    figure = _figure()
    axes = figure.subplots()
    image = axes.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if n_rows * len(table) <= _NUMBERS_UP_TO:
        for batch, row in enumerate(grid):
            for at, value in enumerate(row):
                if value == value:
                    axes.text(
                        at,
                        batch,
                        f"{value:.2f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color="black" if value > 0.5 else "white",
                    )
    axes.set_xticks(range(len(table)), [str(checkpoint["n_edits"]) for checkpoint in run.checkpoints])
    axes.set_yticks(range(n_rows), [str(batch + 1) for batch in range(n_rows)])
    axes.set(title=run.contender.name, xlabel="measured after so many edits", ylabel="batch of edits")
    figure.colorbar(image, ax=axes, label="rewrite accuracy")
    return _save(figure, path, f"{run.contender.name}: how each batch of edits fares as later ones arrive")


def _figure() -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path, what: str) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".png"), dpi=150)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    return {path.name: what}
