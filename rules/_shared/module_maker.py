"""The module that a rule puts into a model: made by a class, by a function or by the qualified name of one of them."""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery import Rule, RuleError

__all__ = ["ModuleMaker", "cast_like"]

# What makes a module: a name, a class, a module to copy, or a function.
By = str | type[nn.Module] | nn.Module | Callable[..., nn.Module] | None


class ModuleMaker(Rule):
    """Fields of rules that put another module into a model. See `ReplaceRule`."""

    by: By
    kwargs: Mapping[str, Any] | None
    trainable: bool | None
    opaque: bool | None

    def validate(self) -> None:
        by = self.by
        if isinstance(by, nn.Module):
            if self.kwargs:
                raise self.bad("kwargs", "for a module that is made already")
        elif isinstance(by, str):
            if not all(part.isidentifier() for part in by.split(".")):
                raise self.bad("by", _ONE_OF)
        elif isinstance(by, types.FunctionType) or (isinstance(by, type) and issubclass(by, nn.Module)):
            name = f"{by.__module__}.{by.__qualname__}"
            if _import(name) is by:
                object.__setattr__(self, "by", name)
        else:
            raise self.bad("by", _ONE_OF)
        for field in ("trainable", "opaque"):
            if getattr(self, field) not in (None, True, False):
                raise self.bad(field, "true, false or None")
        if not isinstance(self.kwargs, (Mapping, type(None))):
            raise self.bad("kwargs", "a mapping")

    def check(self, module: nn.Module, path: str) -> str | None:
        # Only now: reading a rule imports nothing.
        importable = not isinstance(self.by, str) or _import(self.by) is not None
        return None if importable else f"{self.by} is not an importable class of nn.Module, or a function"

    def make(self) -> nn.Module:
        """Returns a new other module."""
        if isinstance(self.by, nn.Module):
            return copy.deepcopy(self.by)
        maker: Any = _import(self.by) if isinstance(self.by, str) else self.by  # there, says check
        try:
            module = maker(**dict(self.kwargs or {}))
        except TypeError as error:
            raise RuleError(f"{self._maker_name} can't be made", why=str(error), fix="correct kwargs") from None
        if not isinstance(module, nn.Module):
            fix = "name a class of nn.Module, or a function that returns a module"
            raise RuleError(f"{self._maker_name} returns a {type(module).__name__}", fix=fix)
        return module

    @property
    def source(self) -> nn.Module | Callable[[], nn.Module]:
        """For `Site.submodule`: the module, or the function that makes it."""
        return self.by if isinstance(self.by, nn.Module) else self.make

    @property
    def _maker_name(self) -> str:
        return self.by if isinstance(self.by, str) else getattr(self.by, "__qualname__", type(self.by).__name__)


def cast_like(x: Any, like: Tensor) -> Any:
    """Returns a floating-point tensor in the dtype of another one; any other value as it is."""
    return x.to(like.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _import(name: str) -> Any:
    """The class of nn.Module, or the function, of this qualified name; None if there is none."""
    module, _, attribute = name.rpartition(".")
    try:
        maker = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return None
    is_class = isinstance(maker, type) and issubclass(maker, nn.Module)
    return maker if is_class or isinstance(maker, types.FunctionType) else None


_ONE_OF = "the qualified name of a class of nn.Module or of a function that returns a module, or a module"
