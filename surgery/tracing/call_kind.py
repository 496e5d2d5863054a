"""Kinds of calls: a graph of a forward is valid for one kind. Kinds can be compared, described and tested fast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.tracing.guards import context, describe_structure, structure_of

__all__ = ["describe_difference", "describe_kind", "kind_of_call", "predicate_of_kind"]


def kind_of_call(module: nn.Module, arguments: tuple) -> tuple:
    """Returns a call's kind: the module's mode, autocast, gradients, and the structure of the arguments."""
    return (module.training, *context(True), *[structure_of(value) for value in arguments])


def describe_kind(kind: tuple) -> str:
    """Describes the modes of a kind of call: "training, with gradients"."""
    training, cpu, cuda, gradients, *_ = kind
    words = ["training" if training else "evaluation", "with gradients" if gradients else "without gradients"]
    words += [f"autocast {dtype.removeprefix('torch.')} on {device}" for device, dtype in (("cpu", cpu), ("cuda", cuda))
              if dtype is not None]  # fmt: skip
    return ", ".join(words)


def describe_difference(kind: tuple, known_kinds: Iterable[tuple], names: Sequence[str]) -> str:
    """Describes how a kind of call differs from the nearest known kind; "" if one is equal or none is known.

    `names`: the names of the arguments.
    """
    differences = [_differences(kind, known_kind, names) for known_kind in known_kinds]
    return "; ".join(min(differences, key=len, default=[]))


def _differences(kind: tuple, known_kind: tuple, names: Sequence[str]) -> list[str]:
    facts = [("mode", _MODES), ("autocast on cpu", _autocast), ("autocast on cuda", _autocast), ("gradients", _SWITCH)]
    differences = []
    for (name, describe), now, before in zip(facts, kind, known_kind, strict=False):
        if now != before:
            differences.append(f"{name}: {describe(now)}, known: {describe(before)}")
    for name, now, before in zip(names, kind[len(facts) :], known_kind[len(facts) :], strict=False):
        if now != before:
            differences.append(f"argument {name}: {describe_structure(now)}, known: {describe_structure(before)}")
    return differences


_MODES: Callable[[Any], str] = {True: "training", False: "evaluation"}.__getitem__
_SWITCH: Callable[[Any], str] = {True: "on", False: "off"}.__getitem__


def _autocast(dtype: Any) -> str:
    return "off" if dtype is None else str(dtype).removeprefix("torch.")


def predicate_of_kind(
    module: nn.Module, arguments: tuple, settings: Iterable[tuple[tuple, Any]]
) -> Callable[..., bool]:
    """Returns a function of `(module, *arguments)`: whether a call has the same kind. It takes a few microseconds.

    The function also tests the module's settings, pairs of a path and a value.
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
            tests += _equality_test(_access_code("module", module, path), value, space)
    names = [f"value_{index}" for index in range(len(arguments))]
    for name, value in zip(names, arguments, strict=True):
        tests += _structure_tests(name, value, space)
    exec(f"def fits(module, {', '.join(names)}):\n    return {' and '.join(tests)}", space)
    return space["fits"]


def _access_code(name: str, value: Any, path: tuple) -> str:
    """Returns code that reads the value at a path of attributes and keys."""
    for part in path:
        keyed = type(value) in (dict, list, tuple) or not isinstance(part, str)
        if keyed:
            name += f"[{part!r}]"
        else:  # the children of a list have numbers as names
            name = f"{name}.{part}" if part.isidentifier() else f"getattr({name}, {part!r})"
        value = value[part] if keyed else getattr(value, part)
    return name


def _structure_tests(name: str, value: Any, space: dict[str, Any]) -> Iterator[str]:
    """Yields code for tests that accept a value exactly if `structure_of` gives an equal result."""
    if isinstance(value, Tensor):
        yield f"isinstance({name}, Tensor) and {name}.dim() == {value.dim()} and {name}.dtype is {value.dtype}"
    elif isinstance(value, torch.Size):
        yield f"type({name}) is torch.Size and len({name}) == {len(value)}"
    elif type(value) in (tuple, list):
        yield f"type({name}) is {type(value).__name__} and len({name}) == {len(value)}"
        for index, item in enumerate(value):
            yield from _structure_tests(f"{name}[{index}]", item, space)
    elif type(value) is dict:
        yield f"type({name}) is dict and tuple({name}) == {_literal(tuple(value), space)}"
        for key, item in value.items():
            yield from _structure_tests(f"{name}[{_literal(key, space)}]", item, space)
    elif value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        yield from _equality_test(name, value, space)
    else:
        yield f"type({name}) is {_literal(type(value), space)}"


def _equality_test(name: str, value: Any, space: dict[str, Any]) -> Iterator[str]:
    yield f"{name} is {value}" if value is None or isinstance(value, bool) else f"{name} == {_literal(value, space)}"


def _literal(value: Any, space: dict[str, Any]) -> str:
    """Returns code for a value: its literal, or the name under which it is put into `space`."""
    if type(value) in (int, str):
        return repr(value)
    name = f"constant_{len(space)}"
    space[name] = value
    return name
