"""Runs a program on the cases that have no cell yet, one process for each base, and compares."""

from __future__ import annotations

import json
import math
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from surgery import SurgeryError
from tests.reports.interop.adapter_case import NONE, AdapterCase
from tests.reports.interop.engines import Engine
from tests.reports.interop.environments import python_of, reason_absent, versions
from tests.reports.interop.reference import NEW_TOKENS, Exported, LiveCase
from tests.reports.interop.results import Cell, ResultsFile

__all__ = ["run_engine"]


def run_engine(engine: Engine, cases: Sequence[AdapterCase], results: ResultsFile) -> None:
    cases = [case for case in cases if case.kind in engine.kinds and (engine.name, case.name) not in results.cells]
    if reason := reason_absent(engine):  # this is not kept in the file: a later run may find the program
        for case in cases:
            print(f"{engine.name:12} {case.name:32} skipped: {reason}", flush=True)
        return
    results.add_versions(engine.name, versions(engine))
    for base in dict.fromkeys(case.base for case in cases):
        chosen = [case for case in cases if case.base == base]
        if base not in engine.bases:
            for case in chosen:
                results.add(Cell(engine.name, case.name, "skipped", f"the program is not run on {base}"))
            continue
        with tempfile.TemporaryDirectory() as folder:
            _Round(engine, base, Path(folder), results).run(chosen)


def live_case(case: AdapterCase) -> LiveCase:
    if case.kind == "pipeline":
        from tests.reports.interop.pipelines import LivePipeline

        return LivePipeline(case)
    return LiveCase(case)


class _Round:
    """The cases of one base in one process of the program; another one for what is left if it dies."""

    def __init__(self, engine: Engine, base: str, folder: Path, results: ResultsFile):
        self.engine, self.base, self.folder, self.results = engine, base, folder, results
        self.waiting: dict[str, tuple[Exported, list[dict[str, Any]], LiveCase]] = {}

    def run(self, cases: Sequence[AdapterCase]) -> None:
        for case in cases:
            self._prepare(case)
        if not self.waiting:
            return
        try:
            base = self._base()
        except SurgeryError as error:  # a program that has no file of the base is not asked
            for name in list(self.waiting):
                self._cell(name, "skipped", error.what)
            return
        while self.waiting:
            lines, ending = self._start(base)
            for line in lines:
                self._judge(line)
            if self.waiting and not lines:  # died at the first of them
                self._cell(next(iter(self.waiting)), "wrong", f"the program died: {ending}")

    def _cell(self, name: str, outcome: str, words: str) -> None:
        self.waiting.pop(name, None)
        self.results.add(Cell(self.engine.name, name, outcome, words))

    def _prepare(self, case: AdapterCase) -> None:
        if any(step.rows for step in case.steps) and not self.engine.routes:
            return self._cell(case.name, "skipped", "the program has one adapter for all rows")
        try:
            live = live_case(case)
            answers = live.answers(list(case.steps))
            if doubt := live.reasons_to_doubt(answers):
                return self._cell(case.name, "wrong", f"the case proves nothing: {doubt}")
            exported = live.exported(self.engine, self.folder / f"case{len(list(self.folder.iterdir()))}")
        except Exception as error:
            return self._cell(case.name, "wrong", f"here: {type(error).__name__}: {error}".splitlines()[0])
        if exported.refused:
            return self._cell(case.name, "refused", exported.refused)
        self.waiting[case.name] = exported, answers, live

    def _base(self) -> Path:
        live = next(iter(self.waiting.values()))[2]
        return live.write_base(self.base, self.folder / "base", self.engine.base_format)

    def _start(self, base: Path) -> tuple[list[dict[str, Any]], str]:
        job, output = self.folder / "job.json", self.folder / "output.jsonl"
        output.unlink(missing_ok=True)
        cases = [
            {"name": name, "adapters": e.files, "steps": [step.to_json() for step in e.steps]}
            for name, (e, _, _) in self.waiting.items()
        ]
        (live,) = [live for _, _, live in list(self.waiting.values())[:1]]
        words = {"base": str(base), "settings": dict(self.engine.settings), "prompts": live.prompts(), "cases": cases}
        job.write_text(json.dumps({**words, "new_tokens": NEW_TOKENS, "vocabulary": live.vocabulary}))
        log = self.folder / "log.txt"
        with log.open("w") as file:
            code = subprocess.run(
                [python_of(self.engine), str(self.engine.script), str(job), str(output)],
                env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **self.engine.variables},
                stdout=file,
                stderr=subprocess.STDOUT,
            ).returncode
        lines = output.read_text().splitlines() if output.exists() else []
        last = (log.read_text(errors="replace").strip().splitlines() or ["no words"])[-1]
        return [json.loads(line) for line in lines], f"exit status {code}: {last}"

    def _judge(self, line: dict[str, Any]) -> None:
        name = line["case"]
        exported, expected, live = self.waiting[name]
        if "error" in line:
            return self._cell(name, "wrong", line["error"].splitlines()[0])
        (base,) = live.answers([NONE])
        tolerance, rounding = self.engine.rounding.get(name, (max(self.engine.tolerance, live.case.tolerance), ""))
        fault, faulty = self.engine.base_faults.get(name, ""), False
        differences = []
        for number, (step, actual, wanted) in enumerate(zip(exported.steps, line["steps"], expected, strict=True)):
            where = "+".join(step.active) or ("rows" if step.rows else "none")
            for row in range(len(wanted["values"])):
                difference, same = compare_row(row, actual, wanted)
                right = (same or bool(rounding)) and difference <= tolerance
                if fault and not step.active and not (step.rows and step.rows[row]):
                    faulty = faulty or not right
                    continue
                differences.append(difference)
                if not right:
                    change, unchanged = compare_row(row, actual, base)
                    silent = step != NONE and unchanged and change <= tolerance
                    words = "silent no-op" if silent else f"off by {difference:.1e}"
                    return self._cell(name, "wrong", f"{words} at step {number + 1} ({where}), prompt {row + 1}")
        if fault and not faulty:
            return self._cell(name, "wrong", "the program gives the base's answers, contrary to `base_faults`")
        notes = "".join(f"; {note}" for note in dict.fromkeys(filter(None, [*exported.notes, rounding, fault])))
        told = f"{max(differences):.0e}" if any("values" in answer for answer in line["steps"]) else "tokens"
        self._cell(name, "equal", told + notes)


def compare_row(row: int, actual: dict[str, Any], wanted: dict[str, Any]) -> tuple[float, bool]:
    """The largest difference of the values of one prompt, and whether its tokens are the same."""
    difference = 0.0
    if "values" in actual:
        difference = largest_difference(actual["values"][row], wanted["values"][row])
    return difference, "tokens" not in actual or actual["tokens"][row] == wanted["tokens"][row]


def largest_difference(actual: list[float], wanted: list[float]) -> float:
    """Infinite if the sizes differ or a number is not finite."""
    if len(actual) != len(wanted):
        return float("inf")
    differences = [abs(a - b) for a, b in zip(actual, wanted, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else float("inf")
