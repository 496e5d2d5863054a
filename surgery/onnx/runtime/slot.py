"""One tensor of an exported file that adapters bring."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Slot"]


@dataclass(frozen=True)
class Slot:
    """One tensor that adapters bring: `shape` has None for the axes of `free`, whose size, a rank, is the adapter's.

    `dim`: sizes of one name are the same. `default`, what it is without an adapter: "empty" (of rank 0, or of one of
    zeros), "zeros", "ones", or "base", the base's own numbers, which stand in the file alone.
    """

    name: str
    site: str
    module: str
    rule: str
    tensor: str
    shape: tuple[int | None, ...]
    free: tuple[int, ...]
    dim: str | None
    dtype: str
    default: str
