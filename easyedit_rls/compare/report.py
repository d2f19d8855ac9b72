"""What a comparison leaves behind: results.json, table.md, table.csv, figures, and one report.html that needs
no network.
"""

import html
import importlib.resources
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from easyedit_rls.compare.figures import draw
from easyedit_rls.compare.plan import Plan
from easyedit_rls.compare.results import (
    METRICS,
    comma_separated,
    load_runs,
    markdown,
    summary,
    table,
    without_records,
)

_NOTES = (
    (
        "Means over the records edited, with bootstrap 95 % intervals; "
        "every figure is taken after the last edit."
    ),
    (
        "Answers are judged under teacher forcing, "
        "but for the generated ones, which are decoded greedily until they end."
    ),
    "EasyEdit's figures are by its own rule (token accuracy), locality as agreement with the unedited model.",
)
_OF_RELATIONS = (
    "Other relations: up to {} questions about each edited subject that no edit says anything of; "
    "the share to which the first token is the unedited model's."
)


def write_report(folder: Path, plan: Plan) -> dict[str, Any]:
    """Write everything from the contenders' results; returns what results.json holds.

    Raises:
        RLSEditError: a contender has no result.
    """
    runs = load_runs(folder, plan)
    result = summary(plan, runs)
    _write(folder / "results.json", json.dumps(result, indent=1, ensure_ascii=False, default=str) + "\n")
    short = json.dumps(without_records(result), indent=1, ensure_ascii=False, default=str)
    _write(folder / "summary.json", short + "\n")
    header, rows = table(result)
    _write(folder / "table.md", markdown(header, rows))
    _write(folder / "table.csv", comma_separated(header, rows))
    figures = draw(plan, runs, folder / "figures")
    page = Template(
        importlib.resources.files("easyedit_rls.data").joinpath("report.html").read_text(encoding="utf-8")
    )
    _write(
        folder / "report.html",
        page.substitute(
            title=f"{plan.count} edits, {len(plan.contenders)} editors",
            summary=html.escape(
                f"{Path(plan.model).name}, "
                f"records {plan.first} to {plan.first + plan.count - 1} of {Path(plan.data).name}, "
                f"batches of {plan.batch}, the same order, templates and evaluation for all."
            ),
            notes="".join(f"<li>{html.escape(note)}</li>" for note in _notes(plan)),
            table=_table(header, rows),
            differences=_differences(result["differences"]),
            figures="".join(
                _figure(folder / "figures" / f"{name}.svg", what) for name, what in figures.items()
            ),
            settings=html.escape(
                json.dumps(
                    {name: c["settings"] for name, c in result["contenders"].items()}, indent=1, default=str
                )
            ),
        ),
    )
    return result


def _notes(plan: Plan) -> list[str]:
    return [*_NOTES, *([_OF_RELATIONS.format(plan.relations)] if plan.relations else [])]


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells that say what they are, so that a narrow screen can show each as a list."""
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in header)
    body = "".join(
        f"<tr><th scope='row'>{html.escape(row[0])}</th>"
        + "".join(
            f"<td data-label='{html.escape(name, quote=True)}'>{html.escape(cell) or '–'}</td>"
            for name, cell in zip(header[1:], row[1:])
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _differences(differences: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Paired differences; those whose interval leaves out 0 stand out."""
    rows = []
    for metric, label in METRICS.items():
        cells = [_change(found.get(metric)) for found in differences.values()]
        rows += [[label, *cells]] if any(cells) else []
    return _table(["", *differences], rows) if rows else "<p>There is one editor only.</p>"


def _change(found: Mapping[str, float] | None) -> str:
    if found is None:
        return ""
    is_clear = found["low"] > 0 or found["high"] < 0
    return f"{found['mean']:+.3f} ({found['low']:+.3f} to {found['high']:+.3f}){' *' if is_clear else ''}"


def _figure(path: Path, what: str) -> str:
    """An SVG inside the page. Its ids get the file's name in front: within a page they must differ."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'(\bid="|"#|url\(#)', lambda match: f"{match[1]}{path.stem}-", svg)
    return f"<figure>{svg}<figcaption>{html.escape(what)}</figcaption></figure>"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
