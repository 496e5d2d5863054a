"""Suggests the intended type for a target that names a class like a module, or misspells it."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn

from surgery.errors import near_misses, qualified_name
from surgery.patterns.pattern import Pattern, type_named

__all__ = ["type_hint"]


def type_hint(target: str | Pattern, modules: Iterable[nn.Module]) -> str | None:
    """Suggest how to write a target as a type, if a target that matches nothing names a class; else None.

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
        return f"{word!r} is a type, not the name of a module: write {_format(same)}"
    if exact:
        return None
    if same:
        return f"a type is compared by its qualified name: write {_format(same)}"
    return near_misses(named, public)


def _format(names: Iterable[str]) -> str:
    return " or ".join(f"Pattern.type({name!r})" for name in list(names)[:3])


def _torch_class(word: str) -> list[str]:
    """Returns the public name of a class of torch.nn, for classes that the model does not use."""
    head, _, last = word.rpartition(".")
    cls = getattr(nn, last, None) if head in ("", "nn", "torch.nn") else None
    return [f"torch.nn.{last}"] if isinstance(cls, type) and issubclass(cls, nn.Module) else []


def _public_name(cls: type) -> str:
    """Returns the shortest importable name: `torch.nn.Linear` for `torch.nn.modules.linear.Linear`."""
    parts = cls.__module__.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        if getattr(sys.modules.get(module), cls.__qualname__, None) is cls:
            return f"{module}.{cls.__qualname__}"
    return qualified_name(cls)
