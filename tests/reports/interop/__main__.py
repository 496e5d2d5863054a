"""`make interop`: adapters in other programs, beside the live model, into docs/reference/engines.md.

    python -m tests.reports.interop [case …] [--only ENGINE] [--results FILE]

Each cell is appended to the file of results. A later run with the same file skips the cells that it has. The page is
written from the file; names of cases or `--only` run a part and leave the other cells as the file has them.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path

import torch
import transformers

from tests.reports.interop.cases import CASES
from tests.reports.interop.engines import ENGINES
from tests.reports.interop.page import write_page
from tests.reports.interop.results import ResultsFile
from tests.reports.interop.runner import run_engine
from tests.support import ROOT


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="parts of names of cases")
    parser.add_argument("--only", action="append", choices=ENGINES, help="an engine; may be said several times")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "interop.jsonl")
    parser.add_argument("--no-page", action="store_true", help="do not write the page")
    words = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    transformers.utils.logging.disable_progress_bar()
    cases = [case for case in CASES if not words.cases or any(part in case.name for part in words.cases)]
    results = ResultsFile(words.results)
    for name in words.only or ENGINES:
        run_engine(ENGINES[name], cases, results)
    if not words.no_page:
        write_page(results)
    return int(any(cell.outcome == "wrong" for cell in results.cells.values()))


if __name__ == "__main__":
    raise SystemExit(main())
