"""The size of random matrices that the sites of an adapter share: each site takes a corner of them."""

from __future__ import annotations

from typing import Any

__all__ = ["validate", "why_too_large"]


def validate(rule: Any) -> None:
    """Raises where a rule's projection_shape is not (out, in)."""
    shape = rule.projection_shape
    if shape is not None and not (len(tuple(shape)) == 2 and all(type(size) is int and size > 0 for size in shape)):
        raise rule.bad("projection_shape", "two whole numbers, (out, in), or None")


def why_too_large(rule: Any, sizes: tuple[int, ...]) -> str | None:
    """Why a site of these sizes has no corner of the matrices, or None."""
    shape = rule.projection_shape
    if shape is None or (sizes[0] <= shape[0] and sizes[1] <= shape[1]):
        return None
    return f"its weight of {sizes[0]} × {sizes[1]} is larger than projection_shape={tuple(shape)}"
