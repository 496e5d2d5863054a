"""The façade's errors: `SurgeryError`s that are also the builtin errors that PEFT raises."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from surgery.errors import LoadError, MatchError, RuleError, SurgeryError, SurgeryWarning

__all__ = [
    "NoMatchingPeftModuleError",
    "PeftError",
    "PeftRuntimeWarning",
    "PeftWarning",
    "as_builtin",
    "invalid",
    "pefts_errors",
    "size_errors",
]

PeftWarning = SurgeryWarning  # every warning of the façade is one
_BUILTIN = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, AssertionError)


class PeftRuntimeWarning(SurgeryWarning, RuntimeWarning):
    """A warning that is a RuntimeWarning in PEFT."""


class PeftError(SurgeryError):
    """The base class of the errors that have a class of their own in PEFT."""


class NoMatchingPeftModuleError(PeftError, MatchError, ValueError):
    """The configuration's targets match no module of the model."""


@functools.cache
def _both(kind: type[SurgeryError], builtin: type[Exception]) -> type[SurgeryError]:
    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__reduce__": _reduce}
    return type(kind.__name__, (kind, builtin), names)


def _reduce(error: Any) -> tuple[Any, ...]:
    kind, builtin = type(error).__bases__
    return _rebuild, (kind, builtin, dict(error.__dict__))


def _rebuild(kind: type[SurgeryError], builtin: type[Exception], state: dict[str, Any]) -> SurgeryError:
    both = _both(kind, builtin)
    error = both.__new__(both, state["what"])  # type: ignore[call-arg]
    error.__dict__.update(state)
    return error


def as_builtin(error: SurgeryError, builtin: type[Exception] = ValueError) -> SurgeryError:
    """Return the error as one that `except ValueError` (or another builtin error) catches, too.

    >>> error = as_builtin(SurgeryError("there is no adapter 'b'"), KeyError)
    >>> isinstance(error, KeyError), str(error)
    (True, "there is no adapter 'b'")
    """
    if isinstance(error, _BUILTIN):
        return error
    return _rebuild(type(error), builtin, dict(error.__dict__)).with_traceback(error.__traceback__)


def invalid(what: str, *, why: str | None = None, fix: str | None = None) -> SurgeryError:
    """Return the error for a configuration that PEFT refuses with a ValueError."""
    return as_builtin(RuleError(what, why=why, fix=fix))


@contextmanager
def pefts_errors(builtin: type[Exception] = ValueError) -> Iterator[None]:
    """Within the block, raises the engine's errors as errors that are also PEFT's builtin ones."""
    try:
        yield
    except SurgeryError as error:
        same = as_builtin(error, builtin)
        if same is error:
            raise
        raise same from error.__cause__


@contextmanager
def size_errors() -> Iterator[None]:
    """Within the block, tensors of other sizes are a RuntimeError, too, as those of `load_state_dict` are."""
    try:
        yield
    except LoadError as error:
        other = [problem for problem in error.problems if "which does not give the" in problem.what]
        if not other:
            raise
        for problem in other:
            problem.what = f"size mismatch for {problem.what}"
            problem.fix = "use the model that it was made for; ignore_mismatched_sizes=True passes over such tensors"
        error.what = other[0].what if len(error.problems) == 1 else f"{error.what}: {other[0].what}"
        raise as_builtin(error, RuntimeError) from error.__cause__
