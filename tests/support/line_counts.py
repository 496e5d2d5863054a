"""Counts executed lines of the engine."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import surgery
from surgery import rules

__all__ = ["OURS", "lines_of"]


OURS = tuple(f"{Path(package.__file__).parent}/" for package in (surgery, rules))  # type: ignore[arg-type]


def lines_of(work: Callable[[], Any]) -> int:
    """The number of lines of the engine and of rules that a call executes."""
    count = 0

    def inside(frame: Any, event: str, argument: Any) -> Any:
        nonlocal count
        count += event == "line"
        return inside

    before = sys.gettrace()
    gc.collect()
    gc.disable()  # finalisers are not part of a verb
    sys.settrace(lambda frame, *_: inside if frame.f_code.co_filename.startswith(OURS) else None)
    try:
        work()
    finally:
        sys.settrace(before)
        gc.enable()
    return count
