"""Stand-ins for packages that PEFT's tests import: `attr`, `parameterized`, `datasets` and `diffusers`.

A test that needs a data set or a diffusion model is skipped, with either side.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import numpy
import pytest
from PIL import Image

__all__ = ["provide"]


class Skipping(type):
    """A class of a package that is not installed: using it skips the test."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        pytest.skip(f"{cls.__module__} is not installed")

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        pytest.skip(f"{cls.__module__} is not installed")


class Absent(ModuleType):
    """A module of a package that is not installed. Its names are classes, for imports and isinstance."""

    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Skipping(name, (), {"__module__": self.__name__})


def load_dataset(name: str, *options: Any, **named: Any) -> Any:
    """`datasets.load_dataset`: the one picture of "huggingface/cats-image" is a picture of noise."""
    if name != "huggingface/cats-image":
        pytest.skip(f"the data set {name} is not here")
    pixels = numpy.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=numpy.uint8)
    return {"test": {"image": [Image.fromarray(pixels)]}}


def expand(cases: Iterable[Any], **options: Any) -> Callable[[Callable[..., Any]], None]:
    """`parameterized.expand`: a method for each case, put beside the method that it decorates."""
    namespace = sys._getframe(1).f_locals

    def bind(function: Callable[..., Any], arguments: tuple[Any, ...], name: str) -> Callable[[Any], Any]:
        def test(self: Any) -> Any:
            return function(self, *arguments)

        test.__dict__.update(function.__dict__)  # pytest's marks
        test.__name__ = name
        return test

    def decorate(function: Callable[..., Any]) -> None:
        for number, case in enumerate(cases):
            arguments = tuple(case) if isinstance(case, tuple | list) else (case,)
            name = f"{function.__name__}_{number}"
            namespace[name] = bind(function, arguments, name)

    return decorate


class parameterized:  # noqa: N801
    expand = staticmethod(expand)


def provide() -> None:
    """Put a stand-in for each package that is not installed where imports find it."""
    names: dict[str, dict[str, Any]] = {
        "attr": {"dataclass": dataclasses.dataclass},
        "datasets": {"load_dataset": load_dataset},
        "diffusers": {},
        "parameterized": {"parameterized": parameterized},
    }
    for name, attributes in names.items():
        if name in sys.modules or importlib.util.find_spec(name):
            continue
        module = Absent(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(attributes)
        sys.modules[name] = module
