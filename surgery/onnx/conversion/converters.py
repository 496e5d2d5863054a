"""The converters of PEFT methods by `peft_type`, as PEFT's configurations name the methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError, near_misses

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["Converter", "converter", "converter_for"]

Converter = Callable[["Conversion"], None]
_converters: dict[str, Converter] = {}


def converter(*peft_types: str) -> Callable[[Converter], Converter]:
    """Register a function that moves the checkpoint's tensors of these methods into the slots of a file.

    Raises `SurgeryError` if another function is registered for one of the methods.
    """

    def register(function: Converter) -> Converter:
        for peft_type in peft_types:
            other = _converters.get(peft_type, function)
            if _qualified_name(other) != _qualified_name(function):
                what = f"PEFT's {peft_type!r} already has the converter {_qualified_name(other)}"
                raise SurgeryError(what, where=_qualified_name(function), fix="register only one converter per method")
        _converters.update(dict.fromkeys(peft_types, function))
        return function

    return register


def converter_for(peft_type: str) -> Converter:
    """Returns the converter of a method. Raises `SurgeryError`, which lists the registered methods."""
    if peft_type in _converters:
        return _converters[peft_type]
    spelling = near_misses(peft_type[:60], _converters)
    why = f"converters are registered for {', '.join(sorted(_converters))}" + (f"; {spelling}" if spelling else "")
    fix = "load_adapter and export_adapter, with the model"
    raise SurgeryError(f"PEFT's {peft_type[:60]!r} can't be converted", why=why, fix=fix)


def _qualified_name(function: Converter) -> str:
    return f"{function.__module__}.{function.__qualname__}"
