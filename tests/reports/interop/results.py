"""Cells of the table in a file of JSON lines, which a later run continues."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Cell", "ResultsFile"]


@dataclass(frozen=True)
class Cell:
    """What one program did with one case: "equal", "refused", "skipped" or "wrong", and the words for it."""

    engine: str
    case: str
    outcome: str
    words: str

    def __str__(self) -> str:
        mark = {"equal": "✔ ", "refused": "refused: ", "skipped": "skipped: ", "wrong": "✘ "}[self.outcome]
        return mark + self.words.replace("|", "/")


class ResultsFile:
    def __init__(self, path: Path):
        self.path = path
        self.cells: dict[tuple[str, str], Cell] = {}
        self.versions: dict[str, str] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            self._take(json.loads(line))

    def _take(self, line: dict[str, str]) -> None:
        if "versions" in line:
            self.versions[line["engine"]] = line["versions"]
        else:
            cell = Cell(**line)
            self.cells[cell.engine, cell.case] = cell

    def add(self, cell: Cell) -> None:
        self._append(asdict(cell))
        print(f"{cell.engine:12} {cell.case:32} {cell}", flush=True)

    def add_versions(self, engine: str, versions: str) -> None:
        if self.versions.get(engine) != versions:
            self._append({"engine": engine, "versions": versions})

    def _append(self, line: dict[str, str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        self._take(line)
