"""The description of a slot: a tensor of an exported file that adapters supply."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Slot"]


@dataclass(frozen=True)
class Slot:
    """A tensor of an exported file that adapters supply.

    Attributes:
        name: `<site>.adapters.<slot>.<tensor>`.
        site: path of the module.
        module: name of the module's class.
        rule: kind of the slot's rule.
        tensor: name of the tensor in the rule.
        shape: sizes; None for the axes of `free`, whose size, a rank, is the adapter's.
        free: axes of any size.
        dim: sizes with one name are equal.
        dtype: name of the dtype.
        default: value without an adapter: "empty" (of rank 0, or of rank 1 and zero), "zeros", "ones", or "base", the
            base's own numbers, which only the file has.
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
