"""The packages of the engine as a picture: `python -m tests.reports.rooms` draws it in docs/explanation/design.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from tests.support import ROOT

PAGE = ROOT / "docs" / "explanation" / "design.md"
PICTURE = ROOT / "docs" / "assets" / "packages.svg"
WIDTH, MARGIN, BOX, STEP = 760, 30, (136, 32), (156, 68)
STYLE = (
    "text{font:13px Helvetica,Arial,'Liberation Sans',system-ui,sans-serif;text-anchor:middle;fill:#1f2328}"
    ".box{fill:#f4f6f8;stroke:#6e7781}.arrow{fill:none;stroke:#6e7781;stroke-width:1.3}.tip{fill:#6e7781}"
    "@media (prefers-color-scheme:dark){text{fill:#e6edf3}.box{fill:#1c2330;stroke:#8b949e}"
    ".arrow{stroke:#8b949e}.tip{fill:#8b949e}}"
)


def files() -> list[Path]:
    """The files of the engine and of the rule library, each once."""
    return sorted({file.resolve() for folder in ("surgery", "rules") for file in (ROOT / folder).rglob("*.py")})


def _homes() -> dict[str, str]:
    """The module that each public name of `surgery` comes from, by its stub."""
    stub = ast.parse((ROOT / "surgery" / "__init__.pyi").read_text(encoding="utf-8"))
    nodes = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"surgery.{node.module}" for node in nodes for alias in node.names}


HOMES = _homes()


def imports(file: Path) -> Iterator[Path]:
    """The files of the project that a file imports from; imports for types and in functions count, too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
            if node.module == "surgery":
                names += [HOMES.get(alias.name, "") for alias in node.names]
        else:
            continue
        places = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names)
        yield from (place.resolve() for place in places if place.is_file() and place.resolve() != file)


def package(file: Path) -> str | None:
    """The package of a file, as the picture names it; None for a package's list of public names."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    if parts[-1] == "__init__":
        return None
    return parts[0] if parts[0] == "rules" else parts[1]


def arrows() -> nx.DiGraph:
    """The imports between packages."""
    graph: nx.DiGraph = nx.DiGraph()
    for file in files():
        source = package(file)
        for other in imports(file):
            target = package(other)
            if source and target and source != target:
                graph.add_edge(source, target)
    return graph


def reduced() -> nx.DiGraph:
    """The imports without those that others imply, and without files that everything may import."""
    graph = arrows()
    graph.remove_nodes_from([*(file.stem for file in (ROOT / "surgery").glob("*.py")), "transaction"])
    return nx.transitive_reduction(graph)


def places(graph: nx.DiGraph) -> dict[str, tuple[float, float]]:
    """Where each package stands: below all that import it, near the middle of those."""
    levels: dict[str, int] = {}
    for name in nx.lexicographical_topological_sort(graph):
        levels[name] = max((levels[other] + 1 for other in graph.predecessors(name)), default=0)
    spots: dict[str, tuple[float, float]] = {}
    for level in range(max(levels.values()) + 1):
        names = [name for name in sorted(levels) if levels[name] == level]
        wishes = {name: [spots[other][0] for other in graph.predecessors(name) if other in spots] for name in names}
        names.sort(key=lambda name: (sum(wishes[name]) / len(wishes[name]) if wishes[name] else 0, name))
        for number, name in enumerate(names):
            x = (WIDTH / 2) + (number - (len(names) - 1) / 2) * STEP[0]
            spots[name] = (x, MARGIN + level * STEP[1])
    return spots


def picture() -> str:
    """The packages as an SVG, top down; an arrow says "imports"."""
    graph = reduced()
    spots = places(graph)
    height = max(y for _, y in spots.values()) + MARGIN + BOX[1] / 2
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:g}" viewBox="0 0 {WIDTH} {height:g}"'
        ' role="img" aria-label="The packages and their imports">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 8 4 0 8z"/></marker></defs>',
    ]
    for source, target in sorted(graph.edges):
        (x1, y1), (x2, y2) = spots[source], spots[target]
        y1, y2 = y1 + BOX[1] / 2, y2 - BOX[1] / 2
        bend = (y2 - y1) / 2
        curve = f"M{x1:g} {y1:g}C{x1:g} {y1 + bend:g} {x2:g} {y2 - bend:g} {x2:g} {y2:g}"
        parts.append(f'<path class="arrow" marker-end="url(#tip)" d="{curve}"/>')
    for name, (x, y) in spots.items():
        corner = f'x="{x - BOX[0] / 2:g}" y="{y - BOX[1] / 2:g}"'
        parts.append(f'<rect class="box" {corner} width="{BOX[0]}" height="{BOX[1]}" rx="6"/>')
        parts.append(f'<text x="{x:g}" y="{y + 5:g}">{name}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    PICTURE.write_text(picture(), encoding="utf-8")
