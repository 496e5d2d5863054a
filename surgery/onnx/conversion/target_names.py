"""Matches module paths against the targets of a rule, as a manifest or a configuration lists them."""

from __future__ import annotations

import re

__all__ = ["matches_target"]


def matches_target(target: str, path: str) -> bool:
    """Whether the path is the target or ends with it at a dot. After `re:`, an expression for the whole path."""
    if target.startswith("re:"):
        return re.fullmatch(target.removeprefix("re:"), path) is not None
    return target != "" and (path == target or path.endswith(f".{target}"))
