"""Writes a command's result whole or not at all: into a temporary place, then renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.transaction.created_folder import check_folder_above, check_new_folder

__all__ = ["check_new_file", "check_new_folder", "new_files", "new_folder"]


def check_new_file(out: Path, overwrite: bool) -> None:
    """Raises `SurgeryError` if the file is a folder, or exists and may not be replaced."""
    check_folder_above(out)
    if out.is_dir():
        raise SurgeryError(f"{out} is a folder", fix="name a file")
    if out.exists() and not overwrite:
        raise SurgeryError(f"{out} exists already", fix="--overwrite replaces it; or name another file")


@contextlib.contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yields a temporary folder beside `out`. After the block it is `out`; after an error nothing is left."""
    check_new_folder(out)
    out = out.resolve()  # a link to an empty folder stays a link
    with _temporary(out) as place:
        yield place
        with _uninterrupted():
            if out.exists():
                out.rmdir()  # it is empty
            os.rename(place, out)


@contextlib.contextmanager
def new_files(out: Path, overwrite: bool) -> Iterator[Path]:
    """Yields a temporary folder beside `out`. After the block its files are beside `out`, and `out` comes last."""
    check_new_file(out, overwrite)
    with _temporary(out) as place:
        yield place
        with _uninterrupted():
            for file in sorted(place.iterdir(), key=lambda file: file.name == out.name):
                os.replace(file, out.parent / file.name)


@contextlib.contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A new folder beside `out`, and the folders above it; those that were made here are removed after an error."""
    parents = [parent for parent in out.absolute().parents if not parent.exists()]
    place = out.absolute().parent / f".{out.name}.surgery-{os.urandom(4).hex()}"
    done = False
    try:
        place.mkdir(parents=True)
        yield place
        done = True
    finally:
        with _uninterrupted():
            shutil.rmtree(place, ignore_errors=True)
            for parent in parents if not done else ():
                with contextlib.suppress(OSError):  # another program has put something there
                    parent.rmdir()


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C and SIGTERM wait until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda *call: waiting.append(call))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number, frame in waiting[:1]:
        if callable(handler := handlers[signal.Signals(number)]):
            handler(number, frame)
