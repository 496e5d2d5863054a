"""Checks forwards that a rule runs more than once in a call: no run may write to something that the next run reads.

A KV cache has one entry for each layer and token. A second run of a layer adds a second entry, and later calls then see
the keys twice, or only those of the second run. The check finds the first write, undoes it and raises an error.
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

__all__ = [
    "RunCount",
    "check_skipped_forward",
    "find_write",
    "repeat_forward",
    "repeat_method",
    "repeat_module",
    "repeated_write_error",
]


class RunCount:
    """Counts the runs of one site's forward in a call: the total, and how many are left."""

    def __init__(self, total: int):
        self.total = self.remaining = total


def repeat_forward(runs: RunCount, module: nn.Module, tensors: Mapping[str, Any], *arguments: Any) -> Any:
    """Call `base_forward`, as one of several runs. Raises `SiteError` if it writes and another run follows."""
    return _run(runs, module, arguments, lambda: base_forward(module, tensors, *arguments))


def repeat_module(runs: RunCount, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Call a module inside the forward, as one of several runs."""
    return _run(runs, module, (args, kwargs), lambda: module(*args, **kwargs))


def repeat_method(runs: RunCount, module: nn.Module, name: str, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Call a method of one of the forward's arguments, such as a cache, as one of several runs."""
    return _run(runs, module, (args, kwargs), lambda: getattr(args[0], name)(*args[1:], **kwargs))


def check_skipped_forward(module: nn.Module, *arguments: Any) -> None:
    """Raise `SiteError` if a skipped forward would write the layer that gives a cache its length.

    transformers reads the length from the first layer of each kind. A rule may skip other layers, and cross-attention.
    """
    if any(isinstance(part, Mapping) and part.get("key_value_states") is not None for part in arguments):
        return
    for value in (value for part in arguments for value in _values(part) if hasattr(value, "get_seq_length")):
        kinds = list(getattr(value, "is_sliding", ()))
        for index in {i for inner in module.modules() if type(i := getattr(inner, "layer_idx", None)) is int}:
            if index < len(kinds) and kinds.index(kinds[index]) == index or index == 0:
                base = getattr(module, "_surgery_base", type(module))
                raise SiteError(
                    f"a rule leaves out the forward of this {base.__name__}, and the call has a cache",
                    why=f"a {type(value).__name__} is as long as its layer {index}, which nothing is written to now",
                    fix="call the model without a cache (use_cache=False), or leave out another layer",
                )


def _run(runs: RunCount, module: nn.Module, arguments: tuple, call: Callable[[], Any]) -> Any:
    runs.remaining -= 1
    if torch.compiler.is_compiling():
        if any(hasattr(value, "get_seq_length") for part in arguments for value in _values(part)):
            raise repeated_write_error(module, runs.total, "a cache")
        return call()
    if not runs.remaining:
        return call()
    before = _Snapshot(module, arguments)
    output = call()
    if (place := before.find_write()) is not None:
        raise repeated_write_error(module, runs.total, place, before.restore())
    return output


def find_write(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> str | None:
    """Run the module's own forward once. Returns the argument or buffer that it writes to, or None, and restores it."""
    base: Any = getattr(module, "_surgery_base", type(module))
    before = _Snapshot(module, (args, kwargs))
    try:
        base.forward(module, *args, **kwargs)
        return before.find_write()
    finally:
        before.restore()


def repeated_write_error(module: nn.Module, total: int, place: str, remains: str = "", where: str = "") -> SiteError:
    """Returns the error for a repeated forward that writes to a place. `remains`: writes that could not be undone."""
    base = getattr(module, "_surgery_base", type(module))
    return SiteError(
        f"rules run this {base.__name__} {total} times in one call, and it writes to {place}",
        where=where,
        why="the runs would write to the same place, and later calls would see both, or the last one alone",
        fix="call the model without a cache (use_cache=False)" + (f"; {remains}: make a new one" if remains else ""),
    )


class _Snapshot:
    """Copies of a call's arguments and of the module's buffers before the call, to find and undo writes."""

    def __init__(self, module: nn.Module, arguments: tuple):
        self.containers: list[tuple[Any, Any, Any]] = []  # a container, its copy, the argument that contains it
        self.tensors: list[tuple[Tensor, Tensor, int | None, Any]] = []  # a tensor, its copy, version and argument
        self.caches: list[Any] = []
        visited: set[int] = set()
        for part in arguments:
            for value in _values(part):
                if not isinstance(value, Tensor):
                    self._add(value, value, visited)
        if not module.training:  # in training, each run updates the statistics, as in torch
            for name, buffer in module.named_buffers():
                if not name.startswith("adapters."):
                    self._add(buffer, "buffer", visited)

    def _add(self, value: Any, owner: Any, visited: set[int]) -> None:
        if id(value) in visited or isinstance(value, _PLAIN):
            return
        visited.add(id(value))
        if isinstance(value, Tensor):
            version = None if value.is_inference() else value._version
            self.tensors.append((value, value.detach().clone(), version, owner))
            return
        if hasattr(value, "get_seq_length") and hasattr(value, "layers"):
            self.caches.append(value)
        if isinstance(value, (list, dict)):
            self.containers.append((value, value.copy(), owner))
        elif isinstance(attributes := getattr(value, "__dict__", None), dict):
            self.containers.append((attributes, dict(attributes), owner))
            value = attributes
        elif not isinstance(value, (tuple, set, frozenset)):
            return
        for item in list(_values(value)):
            self._add(item, owner, visited)

    def find_write(self) -> str | None:
        """Describes the first argument or buffer that has changed; None if there is none."""
        changed = [owner for container, copy, owner in self.containers if _ids(container) != _ids(copy)]
        changed += [owner for tensor, copy, version, owner in self.tensors if _differs(tensor, copy, version)]
        if not changed:
            return None
        return f"a {changed[0]} of its own" if isinstance(changed[0], str) else f"a {type(changed[0]).__name__}"

    def restore(self) -> str:
        """Undo all writes, and cut the tokens of the same call from the cache's other layers.

        Returns a description of the writes that can't be undone, or "".
        """
        restored = {id(container) for container, copy, _ in self.containers if _ids(container) != _ids(copy)}
        for container, copy, _ in self.containers:
            if isinstance(container, list):
                container[:] = copy
            else:
                container.clear()
                container.update(copy)
        with torch.no_grad():
            for tensor, copy, version, _ in self.tensors:
                if _differs(tensor, copy, version):
                    tensor.copy_(copy)
                    restored.add(id(tensor))
        return "".join(filter(None, [_crop_cache(cache, restored) for cache in self.caches]))


def _crop_cache(cache: Any, restored: set[int]) -> str:
    """Cut each layer of a cache to the length of the restored layer. Returns the failures as text, or ""."""
    layers = [layer for layer in cache.layers if hasattr(layer, "__dict__")]
    own_layers = [layer for layer in layers if restored & {id(vars(layer)), *map(id, vars(layer).values())}]
    length = int(own_layers[0].get_seq_length()) if own_layers and hasattr(own_layers[0], "get_seq_length") else 0
    failures = 0
    for layer in layers:
        excess = int(layer.get_seq_length()) - length if hasattr(layer, "get_seq_length") else int(not length)
        if excess <= 0:
            continue
        try:
            layer.reset() if not length else layer.crop(-excess)
        except (AttributeError, RuntimeError, ValueError):
            failures += 1
    return f"{failures} other layers of its cache hold this call's tokens" if failures else ""


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
