"""The table of docs/reference/engines.md, from the file of results."""

from __future__ import annotations

from tests.reports.interop.cases import CASES
from tests.reports.interop.engines import ENGINES
from tests.reports.interop.results import ResultsFile
from tests.support import ROOT

__all__ = ["BEGIN", "END", "PAGE", "tables", "write_page"]

PAGE = ROOT / "docs" / "reference" / "engines.md"
BEGIN, END = "<!-- made by make interop -->", "<!-- end of make interop -->"


def tables(results: ResultsFile, page: str = "") -> str:
    """One table for each kind of case: a row for each adapter, a column for each program.

    `page`: the tables as they are; cells and versions that the results do not have stay.
    """
    kept, versions = _cells(page), {**_versions(page)}
    versions |= {ENGINES[name].title: text for name, text in results.versions.items()}
    lines = [f"- {engine.title}: {versions[engine.title]}" for engine in ENGINES.values() if engine.title in versions]
    for kind in dict.fromkeys(case.kind for case in CASES):
        engines = [engine for engine in ENGINES.values() if kind in engine.kinds]
        titles = " | ".join(engine.title for engine in engines)
        lines += [
            "",
            f"| adapter | {titles} |",
            "|---" * (len(engines) + 1) + "|",
        ]
        for case in (case for case in CASES if case.kind == kind):
            found = [
                str(results.cells.get((engine.name, case.name)) or kept.get((engine.title, case.name), "not run"))
                for engine in engines
            ]
            lines.append(f"| {case.name} | {' | '.join(found)} |")
    return "\n".join(lines)


def _versions(page: str) -> dict[str, str]:
    lines = (line.removeprefix("- ").partition(": ") for line in page.splitlines() if line.startswith("- "))
    return {title: versions for title, _, versions in lines}


def _cells(page: str) -> dict[tuple[str, str], str]:
    """The cells of a page's tables, by the program's title and the case's name."""
    cells: dict[tuple[str, str], str] = {}
    titles: list[str] = []
    for line in page.splitlines():
        row = [text.strip() for text in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if row and row[0] == "adapter":
            titles = row[1:]
        elif row:
            cells |= {(title, row[0]): text for title, text in zip(titles, row[1:], strict=True)}
    return cells


def write_page(results: ResultsFile) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    made, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(results, made)}\n{END}{after}", encoding="utf-8")
