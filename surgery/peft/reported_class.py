"""The class that a façade reports as its own: the model's, and PEFT's where PEFT is imported."""

from __future__ import annotations

import os
import sys
from typing import Any
from weakref import WeakValueDictionary

__all__ = ["reported_class"]

# The model's class and PEFT's → the class that is both. A façade keeps the class that it reports alive.
_CLASSES: WeakValueDictionary[tuple[type, type], type] = WeakValueDictionary()


def reported_class(model_class: type, peft_name: str | None) -> type:
    """Returns the model's class, and where PEFT is imported a subclass of it and of PEFT's class of this name.

    `isinstance(model, peft.PeftModel)` asks an object's `__class__`. Code that asks this has imported PEFT, so PEFT is
    never imported here. Under accelerate's FSDP the class is the model's alone: accelerate would save what PEFT's
    functions find under PEFT's names, which is nothing.
    """
    theirs = getattr(sys.modules.get("peft"), peft_name, None) if peft_name and not _under_fsdp() else None
    if not isinstance(theirs, type) or issubclass(model_class, theirs):
        return model_class
    known = _CLASSES.get((model_class, theirs))
    if known is None:
        known = _CLASSES[model_class, theirs] = _both(model_class, theirs)
    return known


def _under_fsdp() -> bool:
    """Whether accelerate's FSDP is switched on: by its launcher, an Accelerator or the Trainer's arguments."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes", "on")


def _both(model_class: type, theirs: type) -> type:
    """Returns a class with the names and attributes of the model's, and equal to it. A call makes a plain model."""

    class Start:
        def __init_subclass__(cls) -> None:
            """Keeps the hooks of the model's class, which may register each subclass, from running."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return model_class(*args, **kwargs)

    def mro(cls: type) -> list[type]:
        """PEFT's classes after the model's: Python's own order fails, as the two order their mixins differently."""
        own = kind.mro(cls)
        return [*own[:-1], *(base for base in theirs.__mro__ if base not in own), object]

    def equal(cls: type, other: object) -> bool:
        return other is cls or other is model_class

    kind: type[type] = type(model_class)
    methods = {"mro": mro, "__eq__": equal, "__hash__": lambda cls: hash(model_class)}
    names = {name: getattr(model_class, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), methods)(model_class.__name__, (Start, model_class), names)
