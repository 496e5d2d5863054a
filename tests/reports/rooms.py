"""The packages of the engine as a picture: `python -m tests.reports.rooms` draws it in docs/explanation/design.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from tests.support import ROOT

PAGE = ROOT / "docs" / "explanation" / "design.md"
BEGIN, END = "<!-- the packages, drawn by tests/reports/rooms.py -->\n", "<!-- end of the packages -->\n"


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


def picture() -> str:
    """The packages as a Mermaid flowchart, top down; an arrow that others imply is left out."""
    graph = arrows()
    graph.remove_nodes_from([*(file.stem for file in (ROOT / "surgery").glob("*.py")), "transaction"])
    lines = ["```mermaid", "flowchart TD"]
    lines += [f"    {source} --> {target}" for source, target in sorted(nx.transitive_reduction(graph).edges)]
    return "\n".join([*lines, "```", ""])


def drawn(page: str) -> str:
    """The page with the current picture."""
    head, rest = page.split(BEGIN)
    return head + BEGIN + picture() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
