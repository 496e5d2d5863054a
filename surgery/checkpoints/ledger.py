"""The ledger of an unfinished checkpoint: what is written, so that a run after a kill goes on where it stopped.

The work lies in a hidden folder beside the result: the ledger, and a folder with the files, which is renamed at the
end. A line of the ledger is written when its shard is complete on the disk.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from surgery.checkpoints.shard_writing import sync_folder
from surgery.errors import SurgeryError
from surgery.transaction.created_folder import check_new_folder, created_folder

__all__ = ["Ledger", "open_ledger"]

_NAME, _FILES, _LOCK = "ledger.jsonl", "files", "lock"


class Ledger:
    """The folder of an unfinished result. `files`: where its files lie. `done`: the lines of finished shards."""

    def __init__(self, place: Path, out: Path):
        self.place, self.out, self.files = place, out, place / _FILES
        self.done: dict[str, dict[str, Any]] = {}

    def start(self, job: Any) -> None:
        """Goes on with the same job, or begins anew for another job."""
        lines = self._lines()
        if not (lines and lines[0] == {"job": job} and self.files.is_dir()):
            shutil.rmtree(self.files, ignore_errors=True)
            self.files.mkdir()
            lines = []
            with open(self.place / _NAME, "w", encoding="utf-8") as file:
                _append(file, {"job": job})
            sync_folder(self.place)
        else:  # rewritten, so that a line that was cut off does not spoil the next one
            temporary = self.place / f"{_NAME}.new"
            with open(temporary, "w", encoding="utf-8") as file:
                for line in lines:
                    _append(file, line)
            os.replace(temporary, self.place / _NAME)
        self.done = {line["shard"]: line for line in lines[1:] if isinstance(line, dict) and "shard" in line}

    def add(self, line: dict[str, Any]) -> None:
        """Notes a finished shard."""
        sync_folder(self.files)
        with open(self.place / _NAME, "a", encoding="utf-8") as file:
            _append(file, line)
        self.done[line["shard"]] = line

    def finish(self) -> None:
        """Makes the files the result, at once, and removes the rest."""
        sync_folder(self.files)
        try:
            if self.out.exists():
                self.out.rmdir()  # it is empty
            os.rename(self.files, self.out)
            sync_folder(self.out.parent)
        finally:
            if not self.files.exists():
                shutil.rmtree(self.place, ignore_errors=True)

    def _lines(self) -> list[Any]:
        """The lines that are complete. A kill may have cut off the last one."""
        lines: list[Any] = []
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            for text in (self.place / _NAME).read_text(encoding="utf-8").splitlines():
                try:
                    lines.append(json.loads(text))
                except ValueError:
                    break
        return lines


def _append(file: Any, line: Any) -> None:
    file.write(json.dumps(line, separators=(",", ":")) + "\n")
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def open_ledger(out: Path) -> Iterator[Ledger]:
    """Yields the ledger of a result, for this process alone.

    After a `SurgeryError` nothing is left, because the next run would raise it again. After a kill, Ctrl-C or an error
    of the system, the unfinished folder stays for the next run.

    Raises:
        SurgeryError: another process writes the same result, or the disk is full or fails.
    """
    out = out.resolve()  # a link to an empty folder stays a link
    place = out.parent / f".{out.name}.unfinished"
    try:
        with created_folder(out.parent), created_folder(place), _locked(place, out):
            try:
                check_new_folder(out)  # another process may have finished it
                yield Ledger(place, out)
            except SurgeryError:
                shutil.rmtree(place, ignore_errors=True)
                raise
    except OSError as error:
        fix = "free space or mend the cause, and call it again with the same arguments: it goes on where it stopped"
        raise SurgeryError(f"{out} could not be written", why=str(error), fix=fix) from error


@contextlib.contextmanager
def _locked(place: Path, out: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(place / _LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.stat(place / _LOCK).st_ino == os.fstat(file.fileno()).st_ino
        except OSError:
            current = False
        if not current:  # it is locked, or the other process has just finished and removed the file
            fix = "wait for it, or name another folder"
            raise SurgeryError("another process writes this result", where=str(out), fix=fix)
        yield
