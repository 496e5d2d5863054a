"""The table of docs/reference/engines.md, from the file of results."""

from __future__ import annotations

from tests.reports.interop.cases import CASES
from tests.reports.interop.engines import ENGINES
from tests.reports.interop.results import ResultsFile
from tests.support import ROOT

__all__ = ["BEGIN", "END", "PAGE", "tables", "write_page"]

PAGE = ROOT / "docs" / "reference" / "engines.md"
BEGIN, END = "<!-- made by make interop -->", "<!-- end of make interop -->"


def tables(results: ResultsFile) -> str:
    """One table for each kind of case: a row for each adapter, a column for each program."""
    lines: list[str] = []
    for name, versions in results.versions.items():
        lines.append(f"- {ENGINES[name].title}: {versions}")
    for kind in dict.fromkeys(case.kind for case in CASES):
        engines = [engine for engine in ENGINES.values() if kind in engine.kinds]
        titles = " | ".join(engine.title for engine in engines)
        lines += [
            "",
            f"| adapter | {titles} |",
            "|---" * (len(engines) + 1) + "|",
        ]
        for case in (case for case in CASES if case.kind == kind):
            found = [results.cells.get((engine.name, case.name)) for engine in engines]
            lines.append(f"| {case.name} | {' | '.join(str(cell) if cell else 'not run' for cell in found)} |")
    return "\n".join(lines)


def write_page(results: ResultsFile) -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{tables(results)}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
