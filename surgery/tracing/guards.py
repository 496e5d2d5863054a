"""What a traced graph checks as it runs: that this call decides as the traced one did. And how it calls in regions."""

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
    "differs",
    "in_region",
    "parts_of",
    "require",
    "same_settings",
    "setting_of",
    "structure_of",
    "structure_told",
]

_AGAIN = "trace the module with this call as example_inputs"


def require(found: Any, expected: Any, where: str) -> None:
    """Raise `TraceError` unless Python would decide at `where` as it did in the traced call."""
    if differs(found, expected):
        given = "a tensor" if isinstance(found, Tensor) else repr(found)
        raise TraceError(
            f"this graph is for calls where {expected!r} is decided, and this one gives {given}",
            where=where,
            fix=_AGAIN,
        )


def differs(found: Any, expected: Any) -> bool:
    """Whether a decision is another one. Symbolic comparisons, under torch.compile, are asked for their truth."""
    if isinstance(found, Tensor):
        return True
    if expected is True:
        return not found
    return bool(found) if expected is False else found != expected


def same_settings(module: nn.Module, held: tuple[tuple[tuple[Any, ...], Any], ...]) -> bool:
    """Whether a module's settings are those."""
    try:
        return all(setting_of(module, path) == expected for path, expected in held)
    except (AttributeError, LookupError):
        return False


def check_settings(module: nn.Module, held: tuple[tuple[tuple[Any, ...], Any], ...]) -> None:
    """Raise `TraceError` if a setting that the forward read was changed since: `training`, `config.use_cache`, …"""
    for path, expected in held:
        found = setting_of(module, path)
        if found != expected:
            raise TraceError(
                f"{'.'.join(map(str, path))} was {expected!r} when the module was traced, and is {found!r} now",
                fix="trace the module again",
            )


def setting_of(module: nn.Module, path: tuple[Any, ...]) -> Any:
    """What a module holds under a path of attributes and keys."""
    found: Any = module
    for part in path:
        keyed = type(found) in (dict, list, tuple)
        found = found[part] if keyed or not isinstance(part, str) else getattr(found, part)
    return found


def check_call(context_then: tuple, structure: dict[str, Any], given: dict[str, Any]) -> None:
    """Raise `TraceError` under another autocast, or for arguments of another structure, than in the traced call."""
    if context(len(context_then) == 3) != context_then:
        raise TraceError("this graph was traced under another autocast or gradient mode", fix=_AGAIN)
    for name, value in given.items():
        found = structure_of(value)
        if found != structure[name]:
            raise TraceError(
                f"this graph is for calls with {name} as {structure_told(structure[name])}; "
                f"here it is {structure_told(found)}",
                fix=_AGAIN,
            )


def check_parts(found: Any, parts: Any, where: str, deep: bool = False) -> None:
    """Raise `TraceError` unless an object or a child gave something of the same parts as in the traced call."""
    now = parts_of(found, deep)
    if now != parts:
        raise TraceError(
            f"this graph is for calls where {structure_told(parts)} is found, and this one gives {structure_told(now)}",
            where=where,
            fix=_AGAIN,
        )


def parts_of(value: Any, deep: bool = False) -> tuple:
    """What Python sees in a value that an object or a child gives: types, ranks, what is None; numbers are free.

    What can be changed later, a list or a dict, is looked into only if `deep`.
    """
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        return ("number",)
    if isinstance(value, tuple) and not isinstance(value, torch.Size) or deep and isinstance(value, list):
        return (type(value).__name__, *(parts_of(item, deep) for item in value))
    if deep and isinstance(value, dict):
        return (type(value).__name__, *((key, parts_of(item, deep)) for key, item in value.items()))
    return ("object", _name_of(type(value))) if isinstance(value, (dict, list)) else structure_of(value)


def structure_of(value: Any) -> Any:
    """What a graph depends on in an argument: which parts are None, plain values, ranks, dtypes."""
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


def structure_told(structure: Any) -> str:
    kind, *rest = structure
    if kind == "value":
        return repr(rest[0])
    if kind == "object":
        return f"a {rest[0].removeprefix('builtins.')}"
    if not rest:
        return f"a {kind}"
    return f"a {kind} of rank {rest[0]} and {rest[1]}" if kind == "tensor" else f"a {kind} {tuple(rest)}"


# Regions ------------------------------------------------------------------------------------------------------

# Under which autocast (on the CPU, on other devices), and with or without gradients.
Region = tuple[Any, ...]


def context(gradients: bool) -> Region:
    """The present autocast, and gradient mode where that matters."""
    found: list[Any] = []
    for device in ("cpu", "cuda"):
        on = torch.is_autocast_enabled(device)
        found.append(str(torch.get_autocast_dtype(device)) if on else None)
    return (*found, torch.is_grad_enabled()) if gradients else tuple(found)


def in_region(region: Region, function: Callable[..., Any] | str, *args: Any, **kwargs: Any) -> Any:
    """A call that the forward makes under its own torch.no_grad, torch.enable_grad or torch.autocast.

    A function, or the name of a method of the first argument.
    """
    autocast = tuple(
        [
            (device, "" if dtype is None else dtype.removeprefix("torch."))
            for device, dtype in zip(("cpu", "cuda"), region, strict=False)
            if (dtype is not None) != torch.is_autocast_enabled(device)
        ]
    )
    return context_regions.Region(region[2], autocast)(function, args, kwargs)
