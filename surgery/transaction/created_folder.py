"""Creates a folder for results, and removes it after an error. Checks before the work that a folder can be made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from surgery.errors import SurgeryError

__all__ = ["check_folder_above", "check_new_folder", "created_folder"]


@contextlib.contextmanager
def created_folder(folder: str | Path) -> Iterator[Path]:
    """Creates a folder, and those above it that are absent. An error in the block removes those that are empty again.

    >>> import tempfile
    >>> above = Path(tempfile.mkdtemp())
    >>> with contextlib.suppress(OSError), created_folder(above / "a" / "b") as folder:
    ...     raise OSError
    >>> list(above.iterdir())
    []
    """
    folder = Path(folder)
    absent = [place for place in (folder.absolute(), *folder.absolute().parents) if not place.exists()]
    done = False
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
        done = True
    finally:
        for place in () if done else absent:
            with contextlib.suppress(OSError):  # it holds files, or another program removed it
                place.rmdir()


def check_new_folder(out: Path) -> None:
    """Raises `SurgeryError` unless a folder can be made here: nothing is there, or an empty folder."""
    check_folder_above(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fix = "name another folder, or remove this one first"
        raise SurgeryError(f"{out} exists already", why="results are written into a new folder", fix=fix)


def check_folder_above(out: Path) -> None:
    """Raises `SurgeryError` if no file can be made here: before the work, not after it."""
    above = next(parent for parent in out.resolve().parents if parent.exists())
    if not above.is_dir():
        raise SurgeryError(f"{out} can't be written", why=f"{above} is a file", fix="name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise SurgeryError(f"{out} can't be written", why=f"you may not write into {above}", fix="name another place")
