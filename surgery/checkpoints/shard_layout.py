"""Where each tensor lies in a safetensors file that is to be written, and the bytes of its header."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from surgery.adapter_files.tensor_files import DTYPES
from surgery.checkpoints.checkpoint_files import Shard
from surgery.errors import SurgeryError

__all__ = ["NewTensor", "ShardLayout", "code_of", "layout_like", "layout_of_head", "new_layout"]

_CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a file to write. `start`: its first byte in the file."""

    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class ShardLayout:
    """A file to write: the bytes before its data, its tensors, and its size."""

    head: bytes
    tensors: Mapping[str, NewTensor]
    size: int


def layout_like(shard: Shard) -> ShardLayout:
    """Returns the layout of a safetensors file that exists: the same header, byte for byte."""
    tensors = {
        key: NewTensor(place.code, place.shape, place.start, place.nbytes) for key, place in shard.tensors.items()
    }
    return _layout(shard.head, tensors)


def layout_of_head(head: bytes) -> ShardLayout:
    """Returns the layout that a header gives. Raises `SurgeryError` if it does not give one."""
    try:
        data = json.loads(head[8:])
        data.pop("__metadata__", None)
        spans = {key: entry["data_offsets"] for key, entry in data.items()}
        tensors = {
            key: NewTensor(
                entry["dtype"], tuple(entry["shape"]), len(head) + spans[key][0], spans[key][1] - spans[key][0]
            )
            for key, entry in data.items()
        }
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise SurgeryError("the header of a file is damaged", why=why) from None
    return _layout(head, tensors)


def _layout(head: bytes, tensors: Mapping[str, NewTensor]) -> ShardLayout:
    return ShardLayout(head, tensors, max((t.start + t.nbytes for t in tensors.values()), default=len(head)))


def new_layout(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], sizes: Mapping[str, int], metadata: Mapping[str, str]
) -> ShardLayout:
    """Returns a layout for tensors, each with its code of a dtype and its shape. The widest numbers come first.

    `sizes`: the bytes of tensors whose dtype torch does not have.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda item: -_width(item[1]))
    end, spans = 0, dict[str, tuple[int, int]]()
    for key, code, shape in order:
        nbytes = math.prod(shape) * DTYPES[code].itemsize if code in DTYPES else sizes[key]
        spans[key] = end, nbytes
        header[key] = {"dtype": code, "shape": list(shape), "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    placed = {key: NewTensor(code, shape, len(head) + spans[key][0], spans[key][1]) for key, code, shape in order}
    return ShardLayout(head, placed, len(head) + end)


def _width(code: str) -> int:
    return DTYPES[code].itemsize if code in DTYPES else 0


def code_of(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors files."""
    return _CODES[dtype]
