"""Compares two models position by position: attributes, tensors, and the classes of their modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.patterns.module_class import class_of

__all__ = ["Difference", "TensorDifference", "differences", "has_tensors", "plain_attributes", "same_class"]


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that only one of two modules has, or that has another shape.

    Attributes:
        name: the name in its module.
        first, second: the shapes; None where it is absent.
        persistent: whether it is a parameter or a buffer that state dicts hold.
    """

    name: str
    first: tuple[int, ...] | None
    second: tuple[int, ...] | None
    persistent: bool

    def __str__(self) -> str:
        first, second = ("absent" if shape is None else str(shape) for shape in (self.first, self.second))
        return f"{self.name} is {first}, and {second}"


@dataclass
class Difference:
    """What differs between two modules at corresponding positions.

    Attributes:
        path: the path of the module, below the compared one.
        attributes: plain attributes of other values, as name → (first, second).
        tensors: own tensors that only one has, or of another shape.
        modules: the two modules, if their classes are not the same or only one exists. What is below is not compared.
    """

    path: str
    attributes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    tensors: list[TensorDifference] = field(default_factory=list)
    modules: tuple[nn.Module | None, nn.Module | None] | None = None

    def __bool__(self) -> bool:
        return bool(self.attributes or self.tensors or self.modules)

    @property
    def has_tensors(self) -> bool:
        """Whether tensors differ, or a module that has tensors."""
        return bool(self.tensors) or any(module is not None and has_tensors(module) for module in self.modules or ())

    @property
    def missing(self) -> bool:
        """Whether only the second has some tensor or some module with tensors."""
        if self.modules is not None:
            first, second = self.modules
            return first is None and second is not None and has_tensors(second)
        return any(tensor.first is None for tensor in self.tensors)

    @property
    def extra(self) -> bool:
        """Whether only the first has some tensor or some module with tensors."""
        if self.modules is not None:
            first, second = self.modules
            return second is None and first is not None and has_tensors(first)
        return any(tensor.second is None for tensor in self.tensors)

    @property
    def kinds(self) -> tuple[str, str] | None:
        """The names of the two classes, if both modules exist and one has tensors."""
        if self.modules is None or None in self.modules or not self.has_tensors:
            return None
        first, second = self.modules
        return type(first).__name__, type(second).__name__


def differences(first: nn.Module, second: nn.Module, skipped: Collection[str] = ()) -> list[Difference]:
    """Return what differs between two modules. `skipped`: paths below them that are not compared."""
    return [difference for difference in _walk("", first, second, frozenset(skipped), set()) if difference]


def same_class(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules have the same class. `parametrize` makes a class for each module that it changes."""
    one, other = class_of(first), class_of(second)
    if one is other:
        return True
    return (one.__module__, one.__qualname__, one.__mro__[1:]) == (
        other.__module__,
        other.__qualname__,
        other.__mro__[1:],
    )


def has_tensors(module: nn.Module) -> bool:
    """Whether a module or one below it has parameters or buffers."""
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values: numbers, texts, and lists and mappings of these."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _OF_MODULES and name != "training" and _is_plain(value)
    }


def _walk(
    path: str, first: nn.Module, second: nn.Module, skipped: frozenset[str], visited: set[int]
) -> Iterator[Difference]:
    if id(first) in visited or path in skipped:
        return
    visited.add(id(first))
    if not same_class(first, second):
        yield Difference(path, modules=(first, second))
        return
    yield _compare(path, first, second)
    for name in dict.fromkeys((*first._modules, *second._modules)):
        below = f"{path}.{name}" if path else name
        one, other = first._modules.get(name), second._modules.get(name)
        if one is not None and other is not None:
            yield from _walk(below, one, other, skipped, visited)
        elif (one is not None or other is not None) and below not in skipped:
            yield Difference(below, modules=(one, other))


def _compare(path: str, first: nn.Module, second: nn.Module) -> Difference:
    difference = Difference(path)
    left, right = plain_attributes(first), plain_attributes(second)
    for name in left.keys() & right.keys():
        if left[name] != right[name]:
            difference.attributes[name] = left[name], right[name]
    shapes, others = _shapes(first), _shapes(second)
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            own = first if name in shapes else second
            persistent = name in own._parameters or name not in own._non_persistent_buffers_set
            difference.tensors.append(TensorDifference(name, shapes.get(name), others.get(name), persistent))
    return difference


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if type(value) is dict:
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))


_OF_MODULES = frozenset(nn.Module().__dict__)
