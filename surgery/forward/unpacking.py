"""Finds how many values a line of a rewrite unpacks."""

from __future__ import annotations

import dis
from types import FrameType
from typing import Any

__all__ = ["count_unpacked", "unpack"]


def unpack(value: Any, count: int) -> tuple:
    """Returns the items of a value that a rewrite unpacks into this many names."""
    items = tuple(value)
    if len(items) != count:
        raise ValueError(f"a rewrite unpacks {count} values, and there are {len(items)}")
    return items


def count_unpacked(frame: FrameType) -> int | None:
    """Returns the number of names into which the frame's current instruction unpacks a value; None if it does not."""
    code, at = frame.f_code.co_code, frame.f_lasti
    if dis.opname[code[at]] != "UNPACK_SEQUENCE":
        return None
    count, place = code[at + 1], at - 2
    for shift in (8, 16, 24):
        if place < 0 or code[place] != dis.EXTENDED_ARG:
            break
        count, place = count | code[place + 1] << shift, place - 2
    return count
