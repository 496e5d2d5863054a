"""`surgery unmerge`: the files of a base from a checkpoint that was merged with records."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from surgery.commands.answer import Answer, size_text
from surgery.commands.options import Workers
from surgery.commands.paths import existing, size_of

__all__ = ["unmerge"]


def unmerge(
    merged: Annotated[
        Path,
        typer.Argument(metavar="MERGED", help="A folder that `surgery merge --keep-record` wrote.", show_default=False),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; new or empty.")],
    workers: Workers = 1,
) -> Answer:
    """Restore the files of the base from a merged checkpoint, bit for bit.

    The SHA-256 of each file is compared with that of the base's file.

        surgery unmerge merged --out base
    """
    from surgery import unmerge_files

    report = unmerge_files(existing(merged), out, workers=workers, progress=True)
    size = size_of(out)
    data = {"out": str(out), "shards": dict(report.shards), "reused": list(report.reused)}
    data |= {"files": sorted(file.name for file in out.iterdir()), "nbytes": size}
    lines = [f"{digest}  {name}" for name, digest in report.shards.items()]
    return Answer(data, [*lines, f"{out}: {len(lines)} weight files have the bits of the base's, {size_text(size)}"])
