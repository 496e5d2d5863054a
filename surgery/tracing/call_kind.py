"""Kinds of calls: what the graph of a forward is for. A kind can be compared, and told by a function made for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.tracing.guards import context, structure_of, structure_told

__all__ = ["difference", "kind_of_call", "kind_told", "predicate_of_kind"]


def kind_of_call(module: nn.Module, given: tuple) -> tuple:
    """The module's mode, autocast and gradients, which arguments are None, their ranks and dtypes."""
    return (module.training, *context(True), *[structure_of(value) for value in given])


def kind_told(kind: tuple) -> str:
    """The mode of a kind of call in words: "training, with gradients"."""
    training, cpu, cuda, gradients, *_ = kind
    words = ["training" if training else "evaluation", "with gradients" if gradients else "without gradients"]
    words += [f"autocast {dtype.removeprefix('torch.')} on {device}" for device, dtype in (("cpu", cpu), ("cuda", cuda))
              if dtype is not None]  # fmt: skip
    return ", ".join(words)


def difference(kind: tuple, known: Iterable[tuple], names: Sequence[str]) -> str:
    """In what a kind of call differs from the nearest of those that are known; "" where one is equal or none is there.

    `names`: those of the arguments.
    """
    told = [_differences(kind, other, names) for other in known]
    return "; ".join(min(told, key=len, default=[]))


def _differences(kind: tuple, known: tuple, names: Sequence[str]) -> list[str]:
    facts = [("mode", _MODES), ("autocast on cpu", _autocast), ("autocast on cuda", _autocast), ("gradients", _SWITCH)]
    found = []
    for (name, told), now, before in zip(facts, kind, known, strict=False):
        if now != before:
            found.append(f"{name}: {told(now)}, known: {told(before)}")
    for name, now, before in zip(names, kind[len(facts) :], known[len(facts) :], strict=False):
        if now != before:
            found.append(f"argument {name}: {structure_told(now)}, known: {structure_told(before)}")
    return found


_MODES: Callable[[Any], str] = {True: "training", False: "evaluation"}.__getitem__
_SWITCH: Callable[[Any], str] = {True: "on", False: "off"}.__getitem__


def _autocast(dtype: Any) -> str:
    return "off" if dtype is None else str(dtype).removeprefix("torch.")


def predicate_of_kind(module: nn.Module, given: tuple, settings: Iterable[tuple[tuple, Any]]) -> Callable[..., bool]:
    """A function that says of `(module, *arguments)` whether a call is of the kind of this one, in a few microseconds.

    It also asks for the module's settings, pairs of a path and a value.
    """
    space: dict[str, Any] = {"Tensor": Tensor, "torch": torch}
    tests = [f"module.training is {module.training}", f"torch.is_grad_enabled() is {torch.is_grad_enabled()}"]
    for device in ("cpu", "cuda"):
        on = torch.is_autocast_enabled(device)
        tests.append(f"torch.is_autocast_enabled({device!r}) is {on}")
        if on:
            tests.append(f"torch.get_autocast_dtype({device!r}) is {torch.get_autocast_dtype(device)}")
    for path, value in settings:
        if path != ("training",):
            tests += _equal(_place("module", module, path), value, space)
    names = [f"value_{index}" for index in range(len(given))]
    for name, value in zip(names, given, strict=True):
        tests += _alike(name, value, space)
    exec(f"def fits(module, {', '.join(names)}):\n    return {' and '.join(tests)}", space)
    return space["fits"]


def _place(name: str, found: Any, path: tuple) -> str:
    for part in path:
        keyed = type(found) in (dict, list, tuple) or not isinstance(part, str)
        name += f"[{part!r}]" if keyed else f".{part}"
        found = found[part] if keyed else getattr(found, part)
    return name


def _alike(name: str, value: Any, space: dict[str, Any]) -> Iterator[str]:
    """What `structure_of` would find equal."""
    if isinstance(value, Tensor):
        yield f"isinstance({name}, Tensor) and {name}.dim() == {value.dim()} and {name}.dtype is {value.dtype}"
    elif isinstance(value, torch.Size):
        yield f"type({name}) is torch.Size and len({name}) == {len(value)}"
    elif type(value) in (tuple, list):
        yield f"type({name}) is {type(value).__name__} and len({name}) == {len(value)}"
        for index, item in enumerate(value):
            yield from _alike(f"{name}[{index}]", item, space)
    elif type(value) is dict:
        yield f"type({name}) is dict and tuple({name}) == {_kept(tuple(value), space)}"
        for key, item in value.items():
            yield from _alike(f"{name}[{_kept(key, space)}]", item, space)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        yield from _equal(name, value, space)
    else:
        yield f"type({name}) is {_kept(type(value), space)}"


def _equal(name: str, value: Any, space: dict[str, Any]) -> Iterator[str]:
    yield f"{name} is {value}" if value is None or isinstance(value, bool) else f"{name} == {_kept(value, space)}"


def _kept(value: Any, space: dict[str, Any]) -> str:
    if type(value) in (int, str):
        return repr(value)
    name = f"kept_{len(space)}"
    space[name] = value
    return name
