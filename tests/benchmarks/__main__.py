"""`python -m tests.benchmarks`: measure, print the table, and write docs/explanation/benchmarks.md after a full run."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402

from tests.benchmarks import exported, files, growth, lines, report, several  # noqa: E402
from tests.benchmarks.lines import Row  # noqa: E402
from tests.benchmarks.timing import Setting  # noqa: E402

LINES = {**lines.LINES, **several.LINES, **exported.LINES, **growth.LINES, "files": files.files}


def main() -> None:
    arguments = _arguments()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("tests.benchmarks: this machine has no CUDA device; leave --device out to measure on the CPU")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    quick = arguments.quick
    files.MEGABYTES = arguments.megabytes
    setting = Setting(arguments.device, 3 if quick else arguments.rounds, 0.0 if quick else 0.02, quick)
    names = arguments.only or list(LINES)
    rows: list[Row] = []
    print(report.machine(setting) + "\n", flush=True)
    for name in names:
        for row in LINES[name](setting):
            rows.append(row)
            print(report.line(row), flush=True)
    print("\n" + report.shown(rows, setting))
    if not quick and not arguments.only:
        print(f"\nwritten to {report.write(rows, setting)}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--device", default="cpu", help="cpu (one thread), or cuda")
    parser.add_argument("--only", action="append", choices=list(LINES), help="one line; may be given several times")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved runs of each measurement (15)")
    parser.add_argument("--megabytes", type=int, default=files.MEGABYTES, help="the checkpoint of the line files (512)")
    parser.add_argument("--quick", action="store_true", help="few runs on small work: that it runs, not how fast")
    return parser.parse_args()


if __name__ == "__main__":
    main()
