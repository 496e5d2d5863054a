"""Checks paths that a user typed."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError, near_misses

__all__ = ["existing", "read_text", "size_of"]


def existing(path: Path) -> Path:
    """Returns the path. Raises `SurgeryError` with similar names if nothing is there."""
    if path.exists():
        return path
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    missing = path.absolute().relative_to(folder).parts[0]
    files = folder.iterdir() if folder.is_dir() else ()
    names = sorted(file.name for file in files if not file.name.startswith("."))
    near = near_misses(missing, names)
    listed = f"{folder} holds {', '.join(names[:8])}{', …' if len(names) > 8 else ''}" if names else None
    fix = "name a file or folder here; commands ask no hub, so download a repository first"
    raise SurgeryError(f"{path} does not exist", why=near or listed, fix=fix)


def read_text(file: Path) -> str:
    """Returns the text of a file. Raises `SurgeryError` if it is not a file of text in UTF-8."""
    if existing(file).is_dir():
        raise SurgeryError(f"{file} is a folder", fix="name a file in it")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SurgeryError(f"{file} is not a text in UTF-8", why=str(error)) from None


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
