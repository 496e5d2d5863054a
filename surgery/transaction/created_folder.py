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
    """Raises `SurgeryError` unless a folder can be made here: nothing is there, or an empty folder.

    The result replaces an empty folder, which must not be a place that can't be replaced.
    """
    check_folder_above(out)
    if not out.exists():
        return
    if not out.is_dir() or any(out.iterdir()):
        fix = "name another folder, or remove this one first"
        raise SurgeryError(f"{out} exists already", why="results are written into a new folder", fix=fix)
    if os.path.ismount(out) or out.resolve() == Path.cwd():
        what = "the working folder" if out.resolve() == Path.cwd() else "where a disk is mounted"
        fix = f"name a new folder inside it, such as {out / 'merged'}"
        raise SurgeryError(f"{out} can't be replaced by the result", why=f"it is {what}", fix=fix)


def check_folder_above(out: Path) -> None:
    """Raises `SurgeryError` if no file can be made here: before the work, not after it."""
    fix = "name another place"
    try:
        above = next(parent for parent in out.resolve().parents if parent.exists())
        out.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a link to itself, a name that is too long, a null byte
        raise SurgeryError(f"{str(out)!r} can't be written", why=str(error), fix=fix) from None
    if not above.is_dir():
        raise SurgeryError(f"{out} can't be written", why=f"{above} is a file", fix=fix)
    if not os.access(above, os.W_OK | os.X_OK):
        raise SurgeryError(f"{out} can't be written", why=f"you may not write into {above}", fix=fix)
