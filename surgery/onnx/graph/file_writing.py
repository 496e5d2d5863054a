"""An ONNX file is written whole or not at all: beside its place, looked at there, and then renamed."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from surgery.errors import SurgeryError
from surgery.onnx.runtime.default_inputs import DEFAULTS

__all__ = ["MANIFEST", "SIDECAR", "size_of", "write_model"]

MANIFEST = "surgery.manifest"  # among the file's metadata
SIDECAR = ".manifest.json"
LARGE = 3 << 29  # bytes of weights from which they are kept beside the graph: protobuf ends at 2 GiB
ALONE = 1024  # bytes of a tensor from which it goes there


@contextlib.contextmanager
def write_model(
    model: ir.Model, path: Path, manifest: Mapping[str, Any], external_data: bool | int | None
) -> Iterator[Path]:
    """Yields the file in a temporary place; at the end of the block the file moves to its path, or nothing does.

    `external_data`: whether weights go into a file beside it, `<name>.data`; a number: if there are as many bytes.
    """
    if path.is_dir():
        raise SurgeryError(f"{path} is a folder", fix='name a file: "model.onnx"')
    text = json.dumps(manifest, sort_keys=True)
    model.metadata_props[MANIFEST] = text
    nbytes = sum(_nbytes(value) for graph in model.graphs() for value in graph.initializers.values())
    limit = LARGE if external_data is None else external_data
    beside = limit if isinstance(limit, bool) else nbytes >= limit
    with _as_surgery_error(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=".surgery-", dir=path.parent))
    try:
        file, data = place / path.name, f"{path.name}.data"
        side = file.with_name(path.name + SIDECAR)
        with _as_surgery_error(path):
            ir.save(model, str(file), external_data=data if beside else None, size_threshold_bytes=ALONE)
            side.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield file
        parts = [place / data, place / f"{path.name}{DEFAULTS}", side, file]  # the graph last: it is what is opened
        with _as_surgery_error(path):
            for part in parts:
                if part.exists():
                    _synced(part)
                    os.replace(part, path.parent / part.name)
                else:
                    (path.parent / part.name).unlink(missing_ok=True)  # of an older file of this name
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _as_surgery_error(path: Path) -> Iterator[None]:
    """Turns errors of the disk or of protobuf into `SurgeryError`."""
    try:
        yield
    except ValueError as error:
        fix = "external_data=True keeps the weights in a file beside it"
        raise SurgeryError("the graph can't be written", where=str(path), why=str(error)[:300], fix=fix) from error
    except OSError as error:
        why = error.strerror or str(error)
        fix = _REMEDIES.get(error.errno or 0, "name a place that can be written to")
        raise SurgeryError("the file can't be written", where=str(path), why=why, fix=fix) from error


_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or name a place on another",
    errno.EDQUOT: "free space of your quota, or name a place on another disk",
    errno.EFBIG: "that disk or process allows no file so large: name another place; external_data=True keeps the "
    "weights in a file of their own",
}


def size_of(path: Path) -> int:
    """Bytes of a file and of the weights beside it."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def _nbytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _synced(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
