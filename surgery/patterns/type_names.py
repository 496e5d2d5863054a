"""Names of module classes in targets: what was meant by one that is written as a module's name, or misspelt."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from surgery.errors import near_misses
from surgery.patterns.pattern import Pattern, qualified_name, type_named

__all__ = ["type_hint"]


def type_hint(target: str | Pattern, modules: Iterable[nn.Module]) -> str | None:
    """How a target that fits nothing is written as a type, where it names one; else None.

    >>> from torch import nn
    >>> from surgery.patterns.type_names import type_hint
    >>> type_hint("Linear", [nn.Linear(2, 2)])
    "'Linear' is a type, not the name of a module: write Pattern.type('torch.nn.Linear')"
    """
    named = type_named(target)
    word = named or target
    if not isinstance(word, str) or word.startswith("re:"):
        return None
    classes = {cls for module in modules for cls in type(module).__mro__ if issubclass(cls, nn.Module)}
    public = {_public_name(cls): cls for cls in classes if cls is not nn.Module}
    last = word.rpartition(".")[2]
    exact = [name for name, cls in public.items() if word in (name, qualified_name(cls))]
    same = exact or sorted(name for name, cls in public.items() if cls.__name__ == last) or _torch_class(word)
    if named is None:
        if not same:
            return None
        return f"{word!r} is a type, not the name of a module: write {_written(same)}"
    if exact:
        return None
    if same:
        return f"a type is compared by its qualified name: write {_written(same)}"
    return near_misses(named, public)


def _written(names: Iterable[str]) -> str:
    return " or ".join(f"Pattern.type({name!r})" for name in list(names)[:3])


def _torch_class(word: str) -> list[str]:
    """The name of a class of torch.nn that no module of the model has."""
    head, _, last = word.rpartition(".")
    found = getattr(nn, last, None) if head in ("", "nn", "torch.nn") else None
    return [f"torch.nn.{last}"] if isinstance(found, type) and issubclass(found, nn.Module) else []


def _public_name(cls: type) -> str:
    """`torch.nn.Linear` for `torch.nn.modules.linear.Linear`: the shortest name that gives the class back."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
            return f"{module}.{cls.__qualname__}"
    return qualified_name(cls)
