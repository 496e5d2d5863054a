"""`make peft-suite`: see the package."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from tests.reports.peft_suite import OUT, SIDES, classes, hub, page, report, run, source


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reports.peft_suite", description=__doc__)
    parser.add_argument("--source", type=Path, help="a folder with PEFT's source of the installed version")
    parser.add_argument("--files", nargs="*", help="only these files of tests, such as test_config.py")
    parser.add_argument("--every", type=int, default=6, help="of each function and configuration, about each nth test")
    parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
    parser.add_argument(
        "--again", nargs="?", const="".join(classes.KINDS), default="", metavar="CLASSES",
        help="run what failed with the façade again, or only what is of some classes, such as cde",
    )  # fmt: skip
    parser.add_argument("--seconds", type=int, default=120, help="the limit of one test")
    parser.add_argument("--jobs", type=int, default=1, help="files that run at the same time")
    parser.add_argument("--page", action="store_true", help="write the table into docs/reference/peft-suite.md")
    options = parser.parse_args()
    if options.source is not None:
        source.check(options.source)
        source.copy(options.source)
    if not (OUT / "base").is_dir():
        raise SystemExit("name a folder with PEFT's source: make peft-suite PEFT_SOURCE=…")
    if not (hub.HOME / "hub").is_dir():
        command = [sys.executable, "-m", "tests.reports.peft_suite.build"]
        subprocess.run(command, check=True, env={**os.environ, "HF_HOME": str(hub.HOME)})
    names = options.files or run.files()
    if options.again:
        chosen = {
            test
            for test, line in run.results("facade").items()
            if line["outcome"] == "failed"
            and run.file_of(test) in names
            and classes.classify(test, line).kind in options.again
        }
        run.forget("facade", lambda line: line["id"] in chosen)
    run.forget_absent()
    run.run_all(names, options.every, options.seconds, options.jobs, options.sides)
    print(report.failures())
    if options.page:
        page.write()


if __name__ == "__main__":
    main()
