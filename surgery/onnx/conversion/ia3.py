"""Converts PEFT's IA³: one trained factor for each feature."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from surgery.errors import SurgeryError
from surgery.onnx.conversion.converters import converter
from surgery.onnx.conversion.target_names import matches_target
from surgery.onnx.runtime.dtypes import widened

if TYPE_CHECKING:
    from surgery.onnx.conversion.conversion_state import Conversion

__all__ = ["convert_ia3"]


@converter("IA3")
def convert_ia3(conversion: Conversion) -> None:
    """Converts the factors, which scale a module's output or, in feedforward modules, its input."""
    checkpoint, remaining = conversion.checkpoint, conversion.remaining_tensors
    conversion.problems += checkpoint.unsupported_fields("feedforward_modules", "init_ia3_weights")
    for key in [key for key in remaining if key == "ia3_l" or key.endswith(".ia3_l")]:
        path, scale = key.removesuffix("ia3_l").removesuffix("."), widened(remaining.pop(key))
        with conversion.collecting_errors(path):
            rule = conversion.rule_of(path, "ia3")
            scales_input = _is_feedforward(checkpoint.config.get("feedforward_modules") or (), path)
            if scales_input != any(matches_target(name, path) for name in _names(rule.get("feedforward"))):
                sides = ("input", "output") if scales_input else ("output", "input")
                raise SurgeryError(f"the checkpoint scales the module's {sides[0]}, and the slot its {sides[1]}")
            conversion.add(path, "ia3", {"scale": scale.reshape(-1)})


def _is_feedforward(setting: Any, path: str) -> bool:
    """PEFT's test: an expression matches the whole path, or the path ends with a name, without a dot before it."""
    return re.fullmatch(setting, path) is not None if isinstance(setting, str) else any(map(path.endswith, setting))


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [name for name in value or () if isinstance(name, str)]
