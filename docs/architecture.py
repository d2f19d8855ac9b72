"""Draw docs/architecture.png: the package's folders, top to bottom in the order that imports keep to, and who
imports whom.

All import `_base` and `errors`, so arrows to these are left out.

python docs/architecture.py
"""

import re
from collections import Counter
from pathlib import Path

import grimp
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch

PACKAGE = "easyedit_rls"
HERE = Path(__file__).parent


def layers() -> list[list[str]]:
    """The folders of each level, as pyproject.toml orders them; those that may not import each other share
    one.
    """
    text = (HERE.parent / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^layers = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert block is not None
    rows = re.findall(r'"([^"]+)"', block[1])
    return [[name.strip().removeprefix(f"{PACKAGE}.") for name in row.split("|")] for row in rows]


def imports(folders: list[str]) -> Counter[tuple[str, str]]:
    """(importer, imported) -> how many modules of the one import how many of the other, each pair counted
    once.
    """
    graph = grimp.build_graph(PACKAGE)
    counts: Counter[tuple[str, str]] = Counter()
    for module in graph.modules:
        parts = module.split(".")
        if len(parts) < 2 or parts[1] not in folders:
            continue
        for other in graph.find_modules_directly_imported_by(module):
            names = other.split(".")
            if len(names) > 1 and names[1] in folders and names[1] != parts[1]:
                counts[parts[1], names[1]] += 1
    return counts


def main() -> None:
    levels = layers()
    places = {
        name: (x - (len(row) - 1) / 2, -y) for y, row in enumerate(levels) for x, name in enumerate(row)
    }
    counts = imports(list(places))
    figure, axes = plt.subplots(figsize=(7, 10))
    for (importer, imported), count in counts.items():
        if imported in ("_base", "errors"):
            continue
        (x, y), (to_x, to_y) = places[importer], places[imported]
        far = y - to_y
        side = 1 if (hash_of(importer) + hash_of(imported)) % 2 else -1
        bend = 0.0 if far == 1 else side * min(0.75, 0.25 + 0.05 * far)
        arrow = FancyArrowPatch(
            (x, y),
            (to_x, to_y),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=9,
            linewidth=0.4 + 0.12 * min(count, 20),
            color="#9aa7b5" if far > 1 else "#4a6b8a",
            shrinkA=16,
            shrinkB=16,
            zorder=1,
        )
        axes.add_patch(arrow)
    for name, (x, y) in places.items():
        box = {"boxstyle": "round,pad=0.45", "facecolor": "#eef3f8", "edgecolor": "#4a6b8a"}
        axes.text(x, y, name, ha="center", va="center", fontsize=11, bbox=box, zorder=2)
    axes.set_xlim(-3.2, 3.2)
    axes.set_ylim(-len(levels) + 0.4, 0.6)
    axes.axis("off")
    figure.savefig(HERE / "architecture.png", dpi=110, bbox_inches="tight")


def hash_of(name: str) -> int:
    """A number that is the same in every run."""
    return sum(map(ord, name))


if __name__ == "__main__":
    main()
