"""Environments of the programs: `.venv-<engine>` beside the project's own.

    python -m tests.reports.interop.environments [engine …]

An environment is made again when its requirement file or the version of torch changed. If it can't be installed, the
reason is kept in `.venv-<engine>/skipped.txt`, and the table skips the program with this reason.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.reports.interop.engines import ENGINES, Engine
from tests.support import ROOT

__all__ = ["install", "python_of", "reason_absent", "versions"]


def python_of(engine: Engine) -> str:
    return str(engine.environment / "bin" / "python") if engine.own_environment else sys.executable


def torch_pin() -> str:
    """torch as constraints.txt pins it. A range may choose a build for GPUs, of gigabytes."""
    (line,) = re.findall(r"^torch==\S+", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    return line


def install(engine: Engine) -> str:
    """Set the environment up. Returns the reason if that fails, and "" otherwise."""
    if not engine.own_environment:
        return ""
    stamp, skipped = engine.environment / "installed.txt", engine.environment / "skipped.txt"
    if stamp.exists() and stamp.read_text() == _stamp(engine):
        return ""
    shutil.rmtree(engine.environment, ignore_errors=True)
    print(f"Setting up {engine.environment.name}: {engine.title}", flush=True)
    pip = [python_of(engine), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands: list[Sequence[str]] = [
        [sys.executable, "-m", "venv", str(engine.environment)],
        *([[*pip, "install", torch_pin()]] if engine.torch else []),
        [*pip, "install", *([torch_pin()] if engine.torch else []), "-r", str(engine.requirements)],
        *([[*pip, "uninstall", "--yes", *engine.uninstall]] if engine.uninstall else []),
    ]
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["it does not install"]
            engine.environment.mkdir(exist_ok=True)
            skipped.write_text(errors[-1].removeprefix("ERROR: "))
            return errors[-1]
    stamp.write_text(_stamp(engine))
    return ""


def _stamp(engine: Engine) -> str:
    text = engine.requirements.read_text(encoding="utf-8") + (torch_pin() if engine.torch else "")
    return hashlib.sha256(text.encode()).hexdigest()


def reason_absent(engine: Engine) -> str:
    """Why the program can't be run here; "" if it can."""
    skipped = engine.environment / "skipped.txt"
    if engine.source and not os.environ.get(engine.source):
        return f"{engine.source} names no checkout of {engine.title}"
    if skipped.exists():
        return skipped.read_text().strip()
    return "" if Path(python_of(engine)).exists() else f"{engine.environment.name} is not set up: run make interop"


def versions(engine: Engine) -> str:
    code = "import importlib.metadata as m, sys; print(*(f'{p} {m.version(p)}' for p in sys.argv[1:]), sep=', ')"
    done = subprocess.run([python_of(engine), "-c", code, *engine.packages], capture_output=True, text=True, check=True)
    return re.sub(r"\+\w+", "", done.stdout.strip())


def main() -> int:
    for name in sys.argv[1:] or ENGINES:
        if reason := install(ENGINES[name]):
            print(f"{name} is skipped: {reason}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
