"""The demo's figures for people: a table, a Markdown report and a plot."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from easyedit_rls._base.heat_map import draw_heat_map

LABELS = {
    "efficacy": "Efficacy: P(new) > P(true)",
    "rewrite_accuracy": "Rewrite accuracy: new answer is the argmax",
    "generalization": "Generalization: P(new) > P(true) on paraphrases",
    "paraphrase_accuracy": "Paraphrase accuracy: argmax",
    "specificity": "Specificity: P(true) > P(new) on neighbors",
    "neighborhood_accuracy": "Neighborhood accuracy: argmax",
    "perplexity": "Perplexity on plain text",
}
_PLOTTED = ("rewrite_accuracy", "generalization", "paraphrase_accuracy")


def rows(summary: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The table's rows: name, before, after."""
    before, after = summary["before"], summary["after"]
    table = [(label, _number(before[key]), _number(after[key])) for key, label in LABELS.items()]
    first = _number(summary["first_batch_after"]["rewrite_accuracy"])
    return [
        *table,
        ("Rewrite accuracy of the first batch", "", first),
        ("Seconds an edit", "", f"{summary['seconds_per_edit']:.2f}"),
    ]


def show(summary: dict[str, Any], console: Console) -> None:
    """Print completions and the table."""
    texts = Table("Prompt", "New fact", "Before", "After", title="Greedy completions")
    for entry in summary["completions"]:
        texts.add_row(entry["prompt"], entry["target"], entry["before"], entry["after"])
    console.print(texts)
    figures = Table("", "Before", "After", title=f"{summary['n_edits']} edits, measured after the last batch")
    for row in rows(summary):
        figures.add_row(*row)
    console.print(figures)
    console.print(
        f"Editing and evaluation took {summary['seconds_editing_and_evaluation']:.0f} s, "
        f"preparation {summary['seconds_prepare']:.0f} s."
    )


def markdown(summary: dict[str, Any]) -> str:
    """The report as Markdown text."""
    lines = [
        "# Demo: editing SmolLM2-135M with RLSEdit",
        "",
        f"{summary['n_edits']} facts in {len(summary['batches'])} sequential batches; "
        "every figure is measured over all facts after the last batch.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows(summary)),
        "",
        f"Editing and evaluation took {summary['seconds_editing_and_evaluation']:.0f} s "
        f"on {summary['machine']['threads']} threads; "
        f"the one-time preparation (context templates, second moments) {summary['seconds_prepare']:.0f} s.",
        "",
        "## How each batch fares as later ones arrive",
        "",
        "![Retention of each batch](retention.png)",
        "",
        "## Completions",
        "",
        "| prompt | new fact | before | after |",
        "|---|---|---|---|",
        *(
            f"| {_cell(e['prompt'])} | {_cell(e['target'])} | {_cell(e['before'])} | {_cell(e['after'])} |"
            for e in summary["completions"]
        ),
        "",
        "## Edited layers at the end",
        "",
        "| layer | change of the weight, relative to its norm | drift of the covariance |",
        "|---|---|---|",
        *(
            f"| {layer['layer']} | {layer['deviation']:.3f} | {layer['drift']:.1e} |"
            for layer in summary["batches"][-1]["layers"]
        ),
        "",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
        + ". All settings are in summary.json.",
        "",
    ]
    return "\n".join(lines)


def plot_retention(retention: Sequence[Sequence[dict[str, float]]], path: Path) -> None:
    """Heat maps: a row each edited batch, a column each point in time.

    Args:
        retention: figures of batches 1..t after batch t, for each t.
        path: the PNG file to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(retention)
    figure = Figure(figsize=(1.6 + 3.4 * len(_PLOTTED), 1.4 + 0.6 * n), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(_PLOTTED), sharey=True, squeeze=False)[0]
    for panel, key in zip(panels, _PLOTTED):
        grid = [[retention[t][b][key] if b <= t else math.nan for t in range(n)] for b in range(n)]
        image = draw_heat_map(panel, grid)
        panel.set_title(LABELS[key].partition(":")[0])
        panel.set_xlabel("measured after batch")
        panel.set_xticks(range(n), [str(t + 1) for t in range(n)])
        panel.set_yticks(range(n), [str(b + 1) for b in range(n)])
    panels[0].set_ylabel("batch of edits")
    figure.colorbar(image, ax=list(panels), label="share of facts")
    figure.savefig(path, dpi=120)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}" if value > 1.5 else f"{value:.3f}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
