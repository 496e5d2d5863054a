"""Code in a process of its own, forked from a process that has imported what takes seconds: torch, transformers, …"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from tests.support import ROOT


class Forks:
    """A process that imports `modules` once and runs code in children of itself."""

    def __init__(self, modules: Sequence[str], paths: Sequence[Path] = ()) -> None:
        words = f"from tests.support.forking import serve; serve({list(modules)!r})"
        path = os.pathsep.join(filter(None, [str(ROOT), *map(str, paths), os.environ.get("PYTHONPATH", "")]))
        settings = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
        self.process = subprocess.Popen(
            [sys.executable, "-c", words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True,
            env={**os.environ, **settings},
        )  # fmt: skip
        atexit.register(self.close)

    def run(self, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run `code` in `folder`, as `python -c` does in a new process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with tempfile.TemporaryDirectory() as directory:
            output_files = [Path(directory, name) for name in ("stdout", "stderr")]
            job = {"code": code, "folder": str(folder), "said": [str(file) for file in output_files]}
            print(json.dumps(job), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            return subprocess.CompletedProcess(
                code, status, *(file.read_text(encoding="utf-8") for file in output_files)
            )

    def close(self) -> None:
        self.process.communicate()


def serve(modules: Sequence[str]) -> None:
    """Import the modules that are installed; then run each line of the input, a job, in a child."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            try:
                importlib.import_module(name)
            except ImportError:  # the code that needs it says so
                pass
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _run(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def _run(job: dict[str, Any]) -> NoReturn:
    status = 1
    try:
        for number, file in enumerate(job["said"], 1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(job["folder"])
        sys.argv, subprocess.run = ["-c"], _forked
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        exec(compile(job["code"], "<string>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else int(left.code is not None)
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            stream.flush()
        os._exit(status)


_new_process = subprocess.run


def _forked(words: Sequence[str], *, check: bool = False, **how: Any) -> Any:
    """`subprocess.run` of a Python file, in a child of this process."""
    if words[0] != sys.executable or how:
        return _new_process(words, check=check, **how)
    if sys.stdout is not None:
        sys.stdout.flush()
    child = os.fork()
    if not child:
        status = 1
        try:
            sys.argv = list(words[1:])
            runpy.run_path(words[1], run_name="__main__")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in filter(None, (sys.stdout, sys.stderr)):
                stream.flush()
            os._exit(status)
    done = subprocess.CompletedProcess(words, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    if check:
        done.check_returncode()
    return done
