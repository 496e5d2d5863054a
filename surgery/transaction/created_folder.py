"""Creates a folder for results, and removes it after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

__all__ = ["created_folder"]


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
