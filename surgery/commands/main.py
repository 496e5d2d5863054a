"""The entry point of the command `surgery`. Imports typer and rich only when it runs."""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from importlib.util import find_spec
from types import FrameType

from surgery.commands.exit_codes import ERROR, INTERRUPTED

__all__ = ["main"]


def main() -> None:
    """Run the command with the arguments of the process, and exit with its code."""
    if absent := [name for name in ("typer", "rich") if find_spec(name) is None]:
        print(f"the command surgery needs {' and '.join(absent)}: pip install 'model-surgery[cli]'", file=sys.stderr)
        sys.exit(ERROR)
    signal.signal(signal.SIGTERM, _end)
    _set_up_libraries()
    try:
        from surgery.commands.app import app

        app(prog_name="surgery")
    except KeyboardInterrupt:  # outside a command, which says so itself
        sys.exit(INTERRUPTED)


def _set_up_libraries() -> None:
    """Sets up streams and what transformers prints.

    Streams escape letters that their encoding lacks. transformers logs errors alone, draws bars on a terminal alone,
    and asks no hub. The user's settings stay.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):  # what they log when transformers imports them says nothing here
        logging.getLogger(name).setLevel(logging.ERROR)


def _end(number: int, frame: FrameType | None) -> None:
    """Ends as an error does, so that temporary files are removed."""
    sys.exit(128 + number)
