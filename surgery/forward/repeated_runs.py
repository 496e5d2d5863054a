"""A forward that a rule runs more than once in a call: right only where the runs share nothing that one writes.

A cache has one place for each layer and token. A second run of the layer puts its keys there, too: every later step
then sees twice as many tokens, or the second run's alone. That is noticed at the first write, and taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.forward.parameter_view import base_forward

__all__ = ["Runs", "left_out", "refusal", "repeated", "repeated_method", "repeated_module", "writes"]


class Runs:
    """How many runs of one site's forward are still to come in a call."""

    def __init__(self, total: int):
        self.total = self.left = total


def repeated(runs: Runs, module: nn.Module, tensors: Mapping[str, Any], *given: Any) -> Any:
    """`base_forward(module, tensors, *given)`, one of the runs; an error where it writes and another one follows."""
    return _run(runs, module, given, lambda: base_forward(module, tensors, *given))


def repeated_module(runs: Runs, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A module in the forward that a rule runs once more."""
    return _run(runs, module, (args, kwargs), lambda: module(*args, **kwargs))


def repeated_method(runs: Runs, module: nn.Module, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A method of an object that the forward is given, such as a cache."""
    return _run(runs, module, (args, kwargs), lambda: getattr(args[0], name)(*args[1:], **kwargs))


def left_out(module: nn.Module, *given: Any) -> None:
    """An error where a forward that no edit runs any more would write what tells a cache's length.

    transformers reads it off the first layer of each kind; other layers may be left out, and attention to an encoder.
    """
    if any(isinstance(part, Mapping) and part.get("key_value_states") is not None for part in given):
        return
    for value in (value for part in given for value in _values(part) if hasattr(value, "get_seq_length")):
        kinds = list(getattr(value, "is_sliding", ()))
        for index in {i for inner in module.modules() if type(i := getattr(inner, "layer_idx", None)) is int}:
            if index < len(kinds) and kinds.index(kinds[index]) == index or index == 0:
                base = getattr(module, "_surgery_base", type(module))
                raise SiteError(
                    f"a rule leaves out the forward of this {base.__name__}, and the call has a cache",
                    why=f"a {type(value).__name__} is as long as its layer {index}, which nothing is written to now",
                    fix="call the model without a cache (use_cache=False), or leave out another layer",
                )


def _run(runs: Runs, module: nn.Module, given: tuple, call: Callable[[], Any]) -> Any:
    runs.left -= 1
    if torch.compiler.is_compiling():
        if any(hasattr(value, "get_seq_length") for part in given for value in _values(part)):
            raise refusal(module, runs.total, "a cache")
        return call()
    if not runs.left:
        return call()
    before = _Before(module, given)
    output = call()
    if (written := before.written()) is not None:
        raise refusal(module, runs.total, written, before.put_back())
    return output


def writes(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """What the module's own forward writes to, of a call's arguments and its own buffers; they are then as before."""
    base: Any = getattr(module, "_surgery_base", type(module))
    before = _Before(module, (args, kwargs))
    try:
        base.forward(module, *args, **kwargs)
        return before.written()
    finally:
        before.put_back()


def refusal(module: nn.Module, total: int, what: str, left: str = "", where: str = "") -> SiteError:
    base = getattr(module, "_surgery_base", type(module))
    return SiteError(
        f"rules run this {base.__name__} {total} times in one call, and it writes to {what}",
        where=where,
        why="the runs would write to the same place, and later calls would see both, or the last one alone",
        fix="call the model without a cache (use_cache=False)" + (f"; {left}: make a new one" if left else ""),
    )


class _Before:
    """What the arguments of a call, and buffers, hold before it: to see what is written, and to take it back."""

    def __init__(self, module: nn.Module, given: tuple):
        self.held: list[tuple[Any, Any, Any]] = []  # what holds things, those things, the argument that it is in
        self.tensors: list[tuple[Tensor, Tensor, int | None, Any]] = []  # with a copy, its version, the argument
        self.caches: list[Any] = []
        seen: set[int] = set()
        for part in given:
            for value in _values(part):
                if not isinstance(value, Tensor):
                    self._note(value, value, seen)
        if not module.training:  # in training, statistics are counted at each run, as torch does
            for name, buffer in module.named_buffers():
                if not name.startswith("adapters."):
                    self._note(buffer, "buffer", seen)

    def _note(self, value: Any, owner: Any, seen: set[int]) -> None:
        if id(value) in seen or isinstance(value, _PLAIN):
            return
        seen.add(id(value))
        if isinstance(value, Tensor):
            version = None if value.is_inference() else value._version
            self.tensors.append((value, value.detach().clone(), version, owner))
            return
        if hasattr(value, "get_seq_length") and hasattr(value, "layers"):
            self.caches.append(value)
        if isinstance(value, (list, dict)):
            self.held.append((value, value.copy(), owner))
        elif isinstance(own := getattr(value, "__dict__", None), dict):
            self.held.append((own, dict(own), owner))
            value = own
        elif not isinstance(value, (tuple, set, frozenset)):
            return
        for item in list(_values(value)):
            self._note(item, owner, seen)

    def written(self) -> str | None:
        """What was written to, in words; None: nothing."""
        changed = [owner for held, copy, owner in self.held if _ids(held) != _ids(copy)]
        changed += [owner for tensor, copy, version, owner in self.tensors if _differs(tensor, copy, version)]
        if not changed:
            return None
        return f"a {changed[0]} of its own" if isinstance(changed[0], str) else f"a {type(changed[0]).__name__}"

    def put_back(self) -> str:
        """Make all as it was, and take from a cache what its other layers were given in the same call.

        Returns what can't be taken back, in words.
        """
        touched = {id(held) for held, copy, _ in self.held if _ids(held) != _ids(copy)}
        for held, copy, _ in self.held:
            if isinstance(held, list):
                held[:] = copy
            else:
                held.clear()
                held.update(copy)
        with torch.no_grad():
            for tensor, copy, version, _ in self.tensors:
                if _differs(tensor, copy, version):
                    tensor.copy_(copy)
                    touched.add(id(tensor))
        return "".join(filter(None, [_shortened(cache, touched) for cache in self.caches]))


def _shortened(cache: Any, touched: set[int]) -> str:
    """Take out of a cache's layers what is longer than the layer that was written to and put back."""
    layers = [layer for layer in cache.layers if hasattr(layer, "__dict__")]
    own = [layer for layer in layers if touched & {id(vars(layer)), *map(id, vars(layer).values())}]
    length = int(own[0].get_seq_length()) if own and hasattr(own[0], "get_seq_length") else 0
    left = 0
    for layer in layers:
        more = int(layer.get_seq_length()) - length if hasattr(layer, "get_seq_length") else int(not length)
        if more <= 0:
            continue
        try:
            layer.reset() if not length else layer.crop(-more)
        except (AttributeError, RuntimeError, ValueError):
            left += 1
    return f"{left} other layers of its cache hold this call's tokens" if left else ""


def _ids(container: list[Any] | dict[Any, Any]) -> Any:
    items = container.items() if isinstance(container, dict) else enumerate(container)
    return {key: id(value) for key, value in items if not isinstance(value, _PLAIN)}


def _differs(tensor: Tensor, copy: Tensor, version: int | None) -> bool:
    return not torch.equal(tensor, copy) if version is None else tensor._version != version


def _values(part: Any) -> Iterator[Any]:
    yield from (
        part.values() if isinstance(part, Mapping) else part if isinstance(part, (list, tuple, set, frozenset)) else ()
    )


_PLAIN = (
    str,
    bytes,
    bool,
    int,
    float,
    complex,
    type(None),
    type,
    nn.Module,
    torch.dtype,
    torch.device,
    FunctionType,
    partial,
)
