"""Builds the plain model of a configuration on the meta device, and compares two such models position by position.

A model whose layers were dropped or repeated is meant to be the model that its class builds from a configuration with
that number of layers. So a model of the old configuration and a model of the new one say which attributes depend on a
layer's position: the index that caches use, a scale that grows with the depth.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules

__all__ = ["Difference", "build_plain", "configured", "differences"]


def configured(root: nn.Module, path: str) -> str | None:
    """Return the path of the outermost module around a path that a configuration describes; None without one."""
    for above in _prefixes(path):
        module = root.get_submodule(above)
        if hasattr(getattr(module, "config", None), "to_dict") and hasattr(type(module), "config_class"):
            return above
    return None


def build_plain(module: nn.Module, config: Any) -> nn.Module | None:
    """Return a model of the same class from a configuration, without weights; None if the class does not take it."""
    try:
        with _quiet(), torch.device("meta"), torch.random.fork_rng(devices=[]):
            return class_of(module)(copy.deepcopy(config)).train(module.training)
    except Exception:  # whatever the class raises for a configuration that it does not take
        return None


@dataclass
class Difference:
    """What differs between two modules at corresponding positions.

    Attributes:
        path: the path of the module, below the compared one.
        attributes: plain attributes of other values, as name → (first, second).
        tensors: own tensors that only one has, or of another shape, as texts.
        kinds: the two classes, if they are not the same.
    """

    path: str
    attributes: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    tensors: list[str] = field(default_factory=list)
    kinds: tuple[str, str] | None = None

    def __bool__(self) -> bool:
        return bool(self.attributes or self.tensors or self.kinds)


def differences(first: nn.Module, second: nn.Module, skipped: str | None = None) -> list[Difference]:
    """Return what differs between two modules. `skipped`: a path below them that is not compared."""

    def included(path: str) -> bool:
        return skipped is None or not (path == skipped or path.startswith(f"{skipped}."))

    left = {path: module for path, module in base_modules(first) if included(path)}
    right = {path: module for path, module in base_modules(second) if included(path)}
    found = [_compare(path, module, right[path]) for path, module in left.items() if path in right]
    for path in left.keys() ^ right.keys():
        only = left.get(path) or right[path]
        found.append(Difference(path, tensors=[f"only one has this {type(only).__name__}"]))
    return [difference for difference in found if difference]


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that are plain values: numbers, texts, and lists of these."""
    return {
        name: value
        for name, value in module.__dict__.items()
        if name not in _OF_MODULES and name != "training" and _is_plain(value)
    }


def _compare(path: str, first: nn.Module, second: nn.Module) -> Difference:
    difference = Difference(path)
    if class_of(first) is not class_of(second):
        difference.kinds = class_of(first).__name__, class_of(second).__name__
    left, right = plain_attributes(first), plain_attributes(second)
    for name in left.keys() & right.keys():
        if left[name] != right[name]:
            difference.attributes[name] = left[name], right[name]
    shapes, others = _shapes(first), _shapes(second)
    for name in sorted(shapes.keys() | others.keys()):
        if shapes.get(name) != others.get(name):
            difference.tensors.append(f"{name} is {_said(shapes.get(name))}, and {_said(others.get(name))}")
    return difference


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    }


def _said(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _prefixes(path: str) -> Iterator[str]:
    names = path.split(".") if path else []
    for depth in range(len(names) + 1):
        yield ".".join(names[:depth])


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


_OF_MODULES = frozenset(nn.Module().__dict__)
