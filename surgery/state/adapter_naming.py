"""Looks up adapters by name, and checks names of new adapters."""

from __future__ import annotations

import keyword
from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery.errors import SurgeryError, near_misses
from surgery.state.records import ModelState

__all__ = ["adapter_names", "name_problem"]


def adapter_names(state: ModelState, adapter: str | Sequence[str] | None) -> list[str]:
    """Returns the adapters for a name, several names or None (all). Raises `SurgeryError` for an unknown name."""
    if adapter is None:
        return list(state.adapters)
    names = [adapter] if isinstance(adapter, str) else list(adapter)
    for name in names:
        if name not in state.adapters:
            raise SurgeryError(
                f"there is no adapter {name!r}",
                why=near_misses(str(name), state.adapters) or f"the model's adapters: {', '.join(state.adapters)}",
            )
    return names


def name_problem(state: ModelState | None, adapter: Any) -> SurgeryError | None:
    """Returns an error if a new adapter can't have this name, or None."""
    if not isinstance(adapter, str) or not adapter or "." in adapter or hasattr(nn.Module(), adapter):
        why = "its tensors are named <site>.adapters.<adapter>.<name>"
        fix = "a word without dots that nn.Module does not use"
        return SurgeryError(f"{adapter!r} can't name an adapter", why=why, fix=fix)
    if keyword.iskeyword(adapter) or not adapter.isprintable() or set(adapter) & set('"\\'):
        why = "it stands in generated code, where keywords, quotes and unprintable characters mean something"
        return SurgeryError(f"{adapter!r} can't name an adapter", why=why, fix="another word")
    if state is not None and adapter in state.adapters:
        fix = "choose another name, or remove(model, name) first"
        return SurgeryError(f"there is an adapter {adapter!r} already", fix=fix)
    return None
