"""Writes an ONNX file atomically: into a temporary folder, then renames it after the comparison."""

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
from surgery.transaction.created_folder import created_folder

__all__ = ["MANIFEST", "SIDECAR", "size_of", "write_model"]

MANIFEST = "surgery.manifest"  # the key in the file's metadata
SIDECAR = ".manifest.json"
LARGE = 3 << 29  # from so many bytes on, weights are in a separate file: protobuf's limit is 2 GiB
SEPARATE = 1024  # from so many bytes on, a tensor is in the separate file


@contextlib.contextmanager
def write_model(
    model: ir.Model, path: Path, manifest: Mapping[str, Any], external_data: bool | int | None
) -> Iterator[Path]:
    """Yields the file in a temporary folder. After the block, the file and its companions move to their paths.

    `external_data`: whether weights go into a separate file, `<name>.data`; a number: from so many bytes on.
    """
    if path.is_dir():
        raise SurgeryError(f"{path} is a folder", fix='name a file: "model.onnx"')
    text = json.dumps(manifest, sort_keys=True)
    model.metadata_props[MANIFEST] = text
    nbytes = sum(_nbytes(value) for graph in model.graphs() for value in graph.initializers.values())
    limit = LARGE if external_data is None else external_data
    separate = limit if isinstance(limit, bool) else nbytes >= limit
    with _temporary_beside(path) as temporary:
        file, data = temporary / path.name, f"{path.name}.data"
        sidecar = file.with_name(path.name + SIDECAR)
        with _as_surgery_error(path):
            ir.save(model, str(file), external_data=data if separate else None, size_threshold_bytes=SEPARATE)
            sidecar.write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        yield file
        parts = [
            temporary / data,
            temporary / f"{path.name}{DEFAULTS}",
            sidecar,
            file,
        ]  # the graph last, because readers open it
        with _as_surgery_error(path):
            for part in parts:
                if part.exists():
                    _flush(part)
                    os.replace(part, path.parent / part.name)
                else:
                    (path.parent / part.name).unlink(missing_ok=True)  # remove that of an older file


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A temporary folder in the file's folder, which is created. After an error, neither is left."""
    with contextlib.ExitStack() as stack:
        with _as_surgery_error(path):
            stack.enter_context(created_folder(path.parent))
            temporary = Path(tempfile.mkdtemp(prefix=".surgery-", dir=path.parent))
        stack.callback(shutil.rmtree, temporary, ignore_errors=True)
        yield temporary


@contextlib.contextmanager
def _as_surgery_error(path: Path) -> Iterator[None]:
    """Turns errors of the disk or of protobuf into `SurgeryError`."""
    try:
        yield
    except ValueError as error:
        fix = "external_data=True writes the weights into a separate file"
        raise SurgeryError("the graph can't be written", where=str(path), why=str(error)[:300], fix=fix) from error
    except OSError as error:
        why = error.strerror or str(error)
        fix = _REMEDIES.get(error.errno or 0, "choose a folder that can be written to")
        raise SurgeryError("the file can't be written", where=str(path), why=why, fix=fix) from error


_REMEDIES = {
    errno.ENOSPC: "free space on that disk, or choose another disk",
    errno.EDQUOT: "free space of your quota, or choose another disk",
    errno.EFBIG: "that disk or process allows no file so large: choose another disk; external_data=True writes the "
    "weights into a separate file",
}


def size_of(path: Path) -> int:
    """Returns the bytes of a file and of its separate weights."""
    return sum(file.stat().st_size for file in (path, path.with_name(f"{path.name}.data")) if file.exists())


def _nbytes(value: ir.Value) -> int:
    return value.const_value.nbytes if value.const_value is not None else 0


def _flush(file: Path) -> None:
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
