"""The model that an adapter was made for, as its files tell it, beside the one that it is loaded on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.patterns.module_class import class_of

__all__ = ["origin_of", "other_model"]


def origin_of(settings: Any, base: Any) -> dict[str, str]:
    """The name and the class of the base that files were made for; what they don't say is left out."""
    fields = settings if isinstance(settings, Mapping) else {}
    mapping = fields.get("auto_mapping")
    kind = base.get("class") if isinstance(base, Mapping) else None
    if not kind and isinstance(mapping, Mapping):
        kind = mapping.get("base_model_class")
    names = {"name": fields.get("base_model_name_or_path"), "class": kind}
    return {name: text[:200] for name, text in names.items() if isinstance(text, str) and text}


def other_model(model: nn.Module, origin: Mapping[str, str]) -> list[SurgeryError]:
    """That files which do not fit were made for a model of another name or class; nothing where they don't say so."""
    name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    here = {"name": name, "class": class_of(model).__name__}
    if all(here[key] == text for key, text in origin.items()):
        return []
    saved_name, own = _called(origin), _called({key: text for key, text in here.items() if text})
    fix = "load it on the model that it was made for"
    return [SurgeryError(f"the adapter was made for {saved_name}", why=f"this model is {own}", fix=fix)]


def _called(of: Mapping[str, str]) -> str:
    name, kind = of.get("name"), of.get("class")
    return f"{name} (a {kind})" if name and kind else name or f"a {kind}"
