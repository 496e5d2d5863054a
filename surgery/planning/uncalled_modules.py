"""Finds modules whose forward no code calls, because their owner reads their parameters on every branch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from types import FunctionType

from torch import nn

from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule
from surgery.planning.read_search import ReadSearch

__all__ = ["never_called"]


def never_called(model: nn.Module, paths: Iterable[str]) -> bool:
    """Whether the code of the modules above a module, at all its paths, never calls it nor passes it on.

    >>> from torch import nn
    >>> from surgery.planning.uncalled_modules import never_called
    >>> class Reads(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = nn.Linear(2, 2)
    ...     def forward(self, x):
    ...         return x @ self.inner.weight if self.training else x * self.inner.weight.sum()
    >>> never_called(Reads(), ["inner"]), never_called(nn.Sequential(nn.Linear(2, 2)), ["0"])
    (True, False)

    All methods of the direct parent that are in the same file as its forward are read; of other modules, the forward.
    False if code can't be read, or accesses children by names that are not in its source.
    """
    modules = dict(base_modules(model))
    paths_by_id = {id(module): path for path, module in modules.items()}
    for path in paths:
        target, parts = submodule(model, path), path.split(".")
        owners = {above: submodule(model, above) for above in (".".join(parts[:n]) for n in range(len(parts)))}
        for above, owner in owners.items():
            # The code that loops over a container is above the container.
            if isinstance(owner, (nn.ModuleList, nn.ModuleDict)):
                continue
            search = ReadSearch(paths_by_id, above, owner, target)
            for method in _methods(owner, above == ".".join(parts[:-1])):
                search.read(method)
            if id(target) in search.ran or not search.unsure.isdisjoint(map(id, owners.values())):
                return False
    return True


def _methods(module: nn.Module, all_of_them: bool) -> Iterable[FunctionType]:
    cls = getattr(type(module), "_surgery_base", type(module))
    forward = inspect.unwrap(cls.forward)
    if not isinstance(forward, FunctionType):
        return []
    attributes = {name: value for base in reversed(cls.__mro__) for name, value in vars(base).items()}
    methods = [value for name, value in attributes.items() if isinstance(value, FunctionType) and name not in _ASIDE]
    near = [
        value for value in methods if value.__module__ == forward.__module__ and not value.__name__.startswith("__")
    ]
    return [forward, *(near if all_of_them else [])]


# Methods that set up a module and do not run it.
_ASIDE = frozenset({"forward", "extra_repr", "reset_parameters", "init_weights", "_init_weights", "_reset_parameters"})
