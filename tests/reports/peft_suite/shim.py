"""`peft` as the façade's copy of the tests sees it: the names of `surgery.peft`, under each path where PEFT has them.

A name that the façade does not have is a placeholder. While tests are collected, a placeholder takes part in lists of
parameters. In a test, calling it raises `Missing`, and every other use is noted, so that a failure can be traced to it.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import peft

import surgery.peft
from tests.reports.peft_suite import SHIM

# Functions and classes of PEFT that do not look at adapters: the tests get the real ones.
SHARED = frozenset("infer_device _get_submodules init_empty_weights skip_init_on_device IncrementalPCA".split())


class Missing(NotImplementedError):
    """A test used a name that `surgery.peft` does not have."""


class State:
    """What the placeholders know of the test that runs."""

    def __init__(self) -> None:
        self.running = False
        self.uses: set[str] = set()

    @contextmanager
    def test(self) -> Iterator[set[str]]:
        """While a test runs: yields the names of placeholders that it uses."""
        self.running, self.uses = True, set()
        try:
            yield self.uses
        finally:
            self.running = False


STATE = State()


def _is_prompt_config(config: Any) -> bool:
    return getattr(config, "is_prompt_learning", False) is True


class Placeholder(type):
    """The class of placeholders for PEFT's classes."""

    real: Any
    label: str

    def __instancecheck__(cls, instance: Any) -> bool:
        STATE.uses.add(cls.label)
        if cls.__name__ == "PromptLearningConfig":
            return _is_prompt_config(type(instance))
        return type.__instancecheck__(cls, instance)

    def __subclasscheck__(cls, subclass: Any) -> bool:
        STATE.uses.add(cls.label)
        if cls.__name__ == "PromptLearningConfig":
            return _is_prompt_config(subclass)
        real = getattr(subclass, "real", None)
        return inspect.isclass(real) and issubclass(real, cls.real)

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if STATE.running:
            raise Missing(cls.label)
        return type.__call__(cls)

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if STATE.running:
            raise Missing(f"{cls.label}.{name}")
        return getattr(cls.real, name)


def _placeholder(label: str, name: str, real: Any) -> Any:
    if inspect.isclass(real) and issubclass(real, BaseException):
        base = UserWarning if issubclass(real, Warning) else Exception
        return type(name, (base,), {"label": label})
    if inspect.isclass(real):
        attributes = {"label": label, "real": real, "is_prompt_learning": issubclass(real, peft.PromptLearningConfig)}
        if dataclasses.is_dataclass(real):  # tests choose configurations by their fields
            attributes["__signature__"] = inspect.signature(real)
        return Placeholder(name, (), {**attributes, "__module__": SHIM})

    def missing(*args: Any, **kwargs: Any) -> Any:
        raise Missing(label)

    missing.__name__ = name
    return missing


_PLACEHOLDERS: dict[str, Any] = {}


def _look_up(module: str, name: str) -> Any:
    """What a module of PEFT has under a name: the façade's, if it has the name."""
    if name.startswith("__") and name != "__version__":
        raise AttributeError(name)
    real = getattr(importlib.import_module(module), name)
    if inspect.ismodule(real):
        return importlib.import_module(SHIM + real.__name__[4:]) if real.__name__.startswith("peft.") else real
    if name in surgery.peft.__all__:
        return getattr(surgery.peft, name)
    if module == "peft.import_utils" or name in SHARED or not callable(real):
        return real
    label = f"peft.{name}" if hasattr(peft, name) else f"{module}.{name}"
    if label not in _PLACEHOLDERS:
        _PLACEHOLDERS[label] = _placeholder(label, name, real)
    return _PLACEHOLDERS[label]


class Shim(ModuleType):
    """A module of PEFT, or PEFT itself."""

    def __getattr__(self, name: str) -> Any:
        return _look_up("peft" + self.__name__[len(SHIM) :], name)


class Finder(MetaPathFinder, Loader):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname.partition(".")[0] != SHIM:
            return None
        try:
            real = importlib.import_module("peft" + fullname[len(SHIM) :])
        except ImportError:
            return None
        return ModuleSpec(fullname, self, is_package=hasattr(real, "__path__"))

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Shim(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def provide() -> None:
    """Make the shim importable."""
    sys.meta_path.insert(0, Finder())
