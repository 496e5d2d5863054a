"""The reports of `merge_files` and `unmerge_files`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from surgery.results import Report

__all__ = ["FileMergeReport", "FileUnmergeReport"]


@dataclass(frozen=True)
class FileMergeReport(Report):
    """The result of `merge_files`.

    Attributes:
        folder: The folder of the merged checkpoint.
        adapters: The names of the merged adapters.
        sites: The number of sites.
        shards: The names of the weight files.
        reused: The weight files that an earlier run, which was stopped, had finished.
        nbytes: The bytes of the records that `unmerge_files` reads; 0 without `keep_record`.
        base: The SHA-256 of each of the base's files, with `keep_record`.
        left_out: Files of the base's folder that were not copied: weights in other formats.
        loaded: What `load_adapter` reports of each adapter.
    """

    folder: Path
    adapters: tuple[str, ...]
    sites: int
    shards: tuple[str, ...]
    reused: tuple[str, ...] = ()
    nbytes: int = 0
    base: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    loaded: tuple[Any, ...] = ()

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each weight file: its name, whether it was reused, and the SHA-256 of the base's file."""
        return [{"shard": name, "reused": name in self.reused, "base": self.base.get(name)} for name in self.shards]

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: merged {', '.join(self.adapters)} at {self.sites} sites, {len(self.shards)} weight files"
        ]
        if self.reused:
            lines.append(f"{len(self.reused)} files were finished by an earlier run")
        if self.base:
            lines.append(f"keeps {self.nbytes:,} bytes to unmerge")
        if self.left_out:
            lines.append(f"not copied: {', '.join(self.left_out)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class FileUnmergeReport(Report):
    """The result of `unmerge_files`.

    Attributes:
        folder: The folder of the base checkpoint.
        shards: The SHA-256 of each weight file, which is that of the base's own file.
        reused: The weight files that an earlier run, which was stopped, had finished.
        left_out: Files that were not copied: weights in other formats, and the records.
    """

    folder: Path
    shards: Mapping[str, str]
    reused: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each weight file: its name and its SHA-256."""
        return [{"shard": name, "sha256": digest} for name, digest in self.shards.items()]

    def __str__(self) -> str:
        return f"{self.folder}: {len(self.shards)} weight files have the bits of the base's"
