"""Compares the base that an adapter's files name with the model on which it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.patterns.module_class import class_of

__all__ = ["origin_of", "other_model"]


def origin_of(settings: Any, base: Any) -> dict[str, str]:
    """Returns the name and the class of the base, as far as the files contain them."""
    fields = settings if isinstance(settings, Mapping) else {}
    mapping = fields.get("auto_mapping")
    kind = base.get("class") if isinstance(base, Mapping) else None
    if not kind and isinstance(mapping, Mapping):
        kind = mapping.get("base_model_class")
    names = {"name": fields.get("base_model_name_or_path"), "class": kind}
    return {name: text[:200] for name, text in names.items() if isinstance(text, str) and text}


def other_model(model: nn.Module, origin: Mapping[str, str]) -> list[SurgeryError]:
    """Returns an error if the files name another base. Used to explain files that do not fit."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    actual = {"name": name, "class": class_of(model).__name__}
    if all(actual[key] == text for key, text in origin.items()):
        return []
    saved_name, model_name = _describe(origin), _describe({key: text for key, text in actual.items() if text})
    fix = "load it on the model that it was made for"
    return [SurgeryError(f"the adapter was made for {saved_name}", why=f"this model is {model_name}", fix=fix)]


def _describe(origin: Mapping[str, str]) -> str:
    name, kind = origin.get("name"), origin.get("class")
    return f"{name} (a {kind})" if name and kind else name or f"a {kind}"
