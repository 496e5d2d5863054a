"""`make onnx-families`: export a model of each of transformers' families with LoRA in slots, and write the page.

Each family has its own process; a row reports a process that runs too long or dies.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support import ROOT

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402  # what it reads of the environment is set first

from surgery import apply_rules, export_onnx  # noqa: E402
from tests.support.families import FAMILIES  # noqa: E402
from tests.support.family_runs import rule_for  # noqa: E402

PAGE = ROOT / "docs/reference/onnx-families.md"
MARK = "<!-- made by make onnx-families -->\n"
HEAD = ["family", "sites", "moves outputs by", "comparisons", "largest difference", "note"]
PATIENCE = 240  # seconds


def line(name: str) -> list[str]:
    """A family's row: two adapters on all of its linear layers, in slots, compared at two sizes."""
    torch.manual_seed(0)
    try:
        model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
        inputs.pop("future_values", None)  # labels
        for adapter, rank in (("a", 2), ("b", 3)):
            apply_rules(model, [rule_for(name, model).replace(rank=rank, init="random")], adapter=adapter)
        with tempfile.TemporaryDirectory() as folder:
            report = export_onnx(model, Path(folder) / "m.onnx", inputs, adapters="slots")
    except Exception as error:
        return [name, "", "", "", "✗", _describe(error)]
    parity: Any = report.parity
    own = [comparison for comparison in parity.compared if not comparison.edge]  # those are among the notices
    most = max(comparison.difference for comparison in own)
    notes = "; ".join([*report.notices, *parity.notices])
    sites, moved = len(report.manifest["sites"]), min(parity.moved.values())
    return [name, str(sites), f"{moved:.1e}", str(len(own)), f"{most:.1e}", notes.replace("|", "\\|")]


def _describe(error: Exception) -> str:
    why = getattr(error, "why", None) or ""
    where = f" ({error.where})" if getattr(error, "where", None) else ""  # type: ignore[attr-defined]
    text = f"{str(error).splitlines()[0]}{where}: {why}"
    return " ".join(text.split()).replace("|", "\\|")[:230]


def _send(name: str, results: Any) -> None:
    results.put(line(name))


def apart(names: Sequence[str], jobs: int) -> Any:
    """Yield the rows as they finish, with this number of processes at a time."""
    context: Any = multiprocessing.get_context("fork")
    waiting, running = list(names), list[tuple[str, Any, Any, float]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            name, results = waiting.pop(0), context.Queue()
            process = context.Process(target=_send, args=(name, results))
            process.start()
            running.append((name, process, results, time.monotonic()))
        time.sleep(0.1)
        for process_state in list(running):
            name, process, results, started = process_state
            row = _row(name, process, results, started)
            if row is not None:
                running.remove(process_state)
                yield row


def _row(name: str, process: Any, results: Any, started: float) -> list[str] | None:
    try:
        row = results.get_nowait()
    except queue.Empty:
        if process.is_alive() and time.monotonic() - started < PATIENCE:
            return None
        alive = process.is_alive()
        process.kill()
        why = f"not ready after {PATIENCE} s" if alive else f"its process ended with {process.exitcode}"
        row = [name, "", "", "", "✗", why]
    process.join()
    return row


def write_page(rows_by_name: dict[str, list[str]]) -> None:
    """The page's table with these rows replaced."""
    text = PAGE.read_text(encoding="utf-8")
    before, _, table = text.partition(MARK)
    old = [[cell.strip() for cell in row.strip("| \n").split(" | ")] for row in table.splitlines() if " | " in row]
    rows = {row[0]: row for row in old if row[0] in FAMILIES} | rows_by_name
    ordered = [[*rows[name], *[""] * (len(HEAD) - len(rows[name]))] for name in FAMILIES if name in rows]
    equal = sum(row[HEAD.index("largest difference")] != "✗" for row in ordered)
    lines = [f"{equal} of {len(ordered)} families are exported, and equal.", ""]
    lines += [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *(f"| {' | '.join(row)} |" for row in ordered)]
    PAGE.write_text(before + MARK + "\n".join(lines) + "\n", encoding="utf-8")


def main(names: Sequence[str]) -> int:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    line("bert")  # what is imported here, each process has
    rows_by_name: dict[str, list[str]] = {}
    for row in apart([name for name in FAMILIES if not names or name in names], int(os.environ.get("JOBS", "2"))):
        rows_by_name[row[0]] = row
        print(" | ".join(row), flush=True)
        write_page(rows_by_name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
