"""The functions that a traced graph calls: checks that a call decides as the traced call, and calls inside regions.

Pickled graphs import the functions by name, so their names must not change.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import TraceError
from surgery.forward import context_regions

__all__ = [
    "Region",
    "check_call",
    "check_parts",
    "check_settings",
    "context",
    "describe_structure",
    "differs",
    "in_region",
    "parts_of",
    "require",
    "same_settings",
    "setting_of",
    "structure_of",
]

_TRACE_AGAIN = "trace the module with this call as example_inputs"


def require(value: Any, expected: Any, where: str) -> None:
    """Raise `TraceError` if Python would decide differently on a value than in the traced call."""
    if differs(value, expected):
        shown = "a tensor" if isinstance(value, Tensor) else repr(value)
        raise TraceError(
            f"this graph is for calls where {expected!r} is decided, and this one gives {shown}",
            where=where,
            fix=_TRACE_AGAIN,
        )


def differs(value: Any, expected: Any) -> bool:
    """Whether a decision differs. Under torch.compile, this guards symbolic comparisons by their truth value."""
    if isinstance(value, Tensor):
        return True
    if expected is True:
        return not value
    return bool(value) if expected is False else value != expected


def same_settings(module: nn.Module, settings: tuple[tuple[tuple[Any, ...], Any], ...]) -> bool:
    """Whether a module has these settings, pairs of a path and a value."""
    try:
        return all(setting_of(module, path) == expected for path, expected in settings)
    except (AttributeError, LookupError):
        return False


def check_settings(module: nn.Module, settings: tuple[tuple[tuple[Any, ...], Any], ...]) -> None:
    """Raise `TraceError` if a setting that the forward read, such as `config.use_cache`, has changed since."""
    for path, expected in settings:
        setting = setting_of(module, path)
        if setting != expected:
            raise TraceError(
                f"{'.'.join(map(str, path))} was {expected!r} when the module was traced, and is {setting!r} now",
                fix="trace the module again",
            )


def setting_of(module: nn.Module, path: tuple[Any, ...]) -> Any:
    """Returns the value at a path of attributes and keys, starting from a module."""
    value: Any = module
    for part in path:
        keyed = type(value) in (dict, list, tuple)
        value = value[part] if keyed or not isinstance(part, str) else getattr(value, part)
    return value


def check_call(traced_context: tuple, structure: dict[str, Any], arguments: dict[str, Any]) -> None:
    """Raise `TraceError` if autocast or the structure of an argument differs from the traced call."""
    if context(len(traced_context) == 3) != traced_context:
        raise TraceError("this graph was traced under another autocast or gradient mode", fix=_TRACE_AGAIN)
    for name, value in arguments.items():
        present = structure_of(value)
        if present != structure[name]:
            raise TraceError(
                f"this graph is for calls with {name} as {describe_structure(structure[name])}; "
                f"here it is {describe_structure(present)}",
                fix=_TRACE_AGAIN,
            )


def check_parts(value: Any, parts: Any, where: str, deep: bool = False) -> None:
    """Raise `TraceError` if the parts of a result of an object or a child differ from those in the traced call."""
    present = parts_of(value, deep)
    if present != parts:
        raise TraceError(
            f"this graph is for calls where {describe_structure(parts)} is found, "
            f"and this one gives {describe_structure(present)}",
            where=where,
            fix=_TRACE_AGAIN,
        )


def parts_of(value: Any, deep: bool = False) -> tuple:
    """Returns the facts about a result on which Python may decide: types, ranks, None. Numbers are free.

    The items of lists and dicts, which can change later, count only if `deep`.
    """
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        return ("number",)
    if isinstance(value, tuple) and not isinstance(value, torch.Size) or deep and isinstance(value, list):
        return (type(value).__name__, *(parts_of(item, deep) for item in value))
    if deep and isinstance(value, dict):
        return (type(value).__name__, *((key, parts_of(item, deep)) for key, item in value.items()))
    return ("object", _name_of(type(value))) if isinstance(value, (dict, list)) else structure_of(value)


def structure_of(value: Any) -> Any:
    """Returns the facts about an argument on which a graph depends: None, plain values, ranks and dtypes."""
    if isinstance(value, Tensor):
        return ("tensor", value.dim(), str(value.dtype))
    if isinstance(value, torch.Size):
        return ("size", len(value))
    if type(value) in (tuple, list):
        return (type(value).__name__, *(structure_of(item) for item in value))
    if type(value) is dict:
        return ("dict", *((key, structure_of(item)) for key, item in value.items()))
    if value is None or isinstance(value, (bool, int, float, str)):
        return ("value", value)
    if isinstance(value, (torch.dtype, torch.device)):
        return ("value", str(value))
    return ("object", _name_of(type(value)))


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat)


def describe_structure(structure: Any) -> str:
    """Describes a result of `structure_of` or `parts_of` in an error."""
    kind, *rest = structure
    if kind == "value":
        return repr(rest[0])
    if kind == "object":
        return f"a {rest[0].removeprefix('builtins.')}"
    if not rest:
        return f"a {kind}"
    return f"a {kind} of rank {rest[0]} and {rest[1]}" if kind == "tensor" else f"a {kind} {tuple(rest)}"


# Regions ------------------------------------------------------------------------------------------------------

# The autocast dtypes on the CPU and on other devices (None: off), and whether gradients are on.
Region = tuple[Any, ...]


def context(gradients: bool) -> Region:
    """Returns the present autocast. `gradients`: also the gradient mode."""
    dtypes: list[str | None] = []
    for device in ("cpu", "cuda"):
        on = torch.is_autocast_enabled(device)
        dtypes.append(str(torch.get_autocast_dtype(device)) if on else None)
    return (*dtypes, torch.is_grad_enabled()) if gradients else tuple(dtypes)


def in_region(region: Region, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """Run a call that the forward makes inside its own torch.no_grad, torch.enable_grad or torch.autocast.

    `function`: a function, or the name of a method of the first argument.
    """
    autocast = tuple(
        [
            (device, "" if dtype is None else dtype.removeprefix("torch."))
            for device, dtype in zip(("cpu", "cuda"), region, strict=False)
            if (dtype is not None) != torch.is_autocast_enabled(device)
        ]
    )
    return context_regions.Region(region[2], autocast)(function, args, kwargs)
