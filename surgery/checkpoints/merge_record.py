"""Writes the records of folds into a file of bytes beside their description as plain data, and reads them again."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.arithmetic.corrections import Corrections, Record
from surgery.arithmetic.low_rank import LowRank
from surgery.errors import SurgeryError

__all__ = ["EARLIER", "FOLDER", "LIST", "RecordWriter", "read_record"]

FOLDER, LIST = "merge_record", "record.json"
EARLIER = "earlier"  # the folder inside with the records of a base that is a merge itself
FORMAT, VERSION = "model-surgery merge record", 1
_KINDS = ("record", "copy", "rows")


class RecordWriter:
    """Appends records to a file. Threads may share it. `nbytes`: the size so far."""

    def __init__(self, path: Path):
        self.path, self.nbytes = path, 0
        self._lock = threading.Lock()
        path.write_bytes(b"")

    def write(self, record: Record) -> dict[str, Any]:
        """Appends a record, and returns its description."""
        parts: dict[str, bytes | Tensor] = {}
        facts: dict[str, Any] = {"kind": record.kind, "shape": list(record.shape), "dtype": _name(record.dtype)}
        facts |= {"after": str(record.after), "before": None if record.before is None else str(record.before)}
        parts |= {name: t for name in ("index", "kept") if (t := getattr(record, name)) is not None}
        if record.change is not None:
            change = record.change
            parts |= {"B": change.B, "A": change.A}
            facts["groups"] = change.groups
            if isinstance(change.scale, Tensor):
                parts["scale"] = change.scale
            else:
                facts["scale"] = float(change.scale).hex()
            if change.gain is not None:
                parts["gain"] = change.gain
        if record.corrections is not None:
            corrections = record.corrections
            facts["chunks"] = [
                [base, list(header), plain, len(data)] for base, header, plain, data in corrections.chunks
            ]
            parts["chunks"] = b"".join(data for *_, data in corrections.chunks)
            if corrections.nan_positions:
                parts |= {
                    "nan_positions": torch.cat(corrections.nan_positions),
                    "nan_bits": torch.cat(corrections.nan_bits),
                }
        with self._lock, open(self.path, "ab") as file:
            facts["parts"] = {}
            for name, part in parts.items():
                data = part if isinstance(part, bytes) else _bytes_of(part)
                kind = [] if isinstance(part, bytes) else [_name(part.dtype), list(part.shape)]
                facts["parts"][name] = [self.nbytes, len(data), *kind]
                file.write(data)
                self.nbytes += len(data)
        return facts


def read_record(path: Path, facts: Mapping[str, Any]) -> Record:
    """Reads a record. Raises `SurgeryError` if the file or the description is damaged."""
    try:
        return _read(path, facts)
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError, RuntimeError, OSError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise SurgeryError(f"{path.name} is damaged", where=str(path.parent), why=why) from None


def _read(path: Path, facts: Mapping[str, Any]) -> Record:
    if facts["kind"] not in _KINDS:
        raise ValueError(f"unknown kind {facts['kind']!r}")
    parts: dict[str, Tensor] = {}
    size = path.stat().st_size
    with open(path, "rb") as file:
        for name, (start, length, *kind) in facts["parts"].items():
            if not 0 <= start <= start + length <= size:
                raise ValueError("it was cut off")
            file.seek(start)
            data = bytearray(file.read(length))
            tensor = torch.frombuffer(data, dtype=torch.uint8) if length else torch.empty(0, dtype=torch.uint8)
            parts[name] = tensor.view(_dtype(kind[0])).view(kind[1]) if kind else tensor
    shape, dtype = torch.Size(facts["shape"]), _dtype(facts["dtype"])
    before = None if facts["before"] is None else int(facts["before"])
    record = Record(facts["kind"], shape, dtype, int(facts["after"]), before)
    record.index, record.kept = parts.get("index"), parts.get("kept")
    if "B" in parts:
        scale = parts["scale"] if "scale" in parts else float.fromhex(facts["scale"])
        record.change = LowRank(parts["B"], parts["A"], scale, int(facts["groups"]), parts.get("gain"))
    if "chunks" in facts:
        corrections, data, at = Corrections(), parts["chunks"].numpy().tobytes(), 0
        for base, header, plain, length in facts["chunks"]:
            pairs = tuple((int(a), int(b)) for a, b in header)
            corrections.chunks.append((int(base), pairs, int(plain), data[at : at + length]))
            at += length
        if "nan_positions" in parts:
            corrections.nan_positions, corrections.nan_bits = [parts["nan_positions"]], [parts["nan_bits"]]
        record.corrections = corrections
    if record.kind == "record" and (record.change is None or record.corrections is None):
        raise ValueError("a record has neither factors nor corrections")
    return record


def _bytes_of(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().resolve_conj().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"unknown dtype {name!r}")
    return dtype
