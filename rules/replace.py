"""Another module's computation instead of a module's own: a GELU for a ReLU, an RMSNorm for a LayerNorm."""

from __future__ import annotations

import copy
import importlib
import types
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from surgery import Rule, RuleError, Site, SiteModule, TraceError, rule
from surgery.rules._shared.arguments import Arguments, arguments_for


@rule("replace")
class ReplaceRule(Rule):
    """Replaces a module's output by the output of another module.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import ReplaceRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> _ = apply_rules(model, [ReplaceRule(nn.ReLU, by="torch.nn.LeakyReLU", kwargs={"negative_slope": 0.5})])
    >>> model[1](torch.tensor([-1.0, 1.0])), type(model[1]).__name__
    (tensor([-0.5000,  1.0000]), 'ReLU')

    The other module's tensors belong to the adapter, with `_` for a dot in their names, and have the dtype of LoRA's.
    The other module receives the site's first argument first. Further arguments go to parameters of the same name, or
    by position to parameters without a default. Arguments without a matching parameter are not passed. The rule can't
    be merged.

    Args:
        by: qualified name of an nn.Module class, or the class. Or a module, whose tensors are copied; a function that
            returns a module; or a class that has no importable name: such a rule can't be saved.
        kwargs: plain data, the arguments that make the class; default None.
        inherit: tensors start as the site's tensors of the same name and shape; default False.
        trainable: whether the parameters train; default None: each keeps its `requires_grad`.
        opaque: default None: record the other module's operations where its forward is straight-line code, and
            otherwise call the module itself at run time (branches, loops, several outputs, buffers that it writes).
            True: always call the module. False: never; a `TraceError` names the line that can't be recorded.
        inputs: parameter of the other module → argument of the site (None: the parameter's default); default None.

    Raises:
        RuleError: a field is out of range, or `kwargs` do not fit the class.
        SiteError: an argument is ambiguous, or a needed one is missing.
        TraceError: with `opaque=False`, a line that can't be recorded. Always: a forward that sets attributes on its
            module, which would be lost. (Register buffers instead.)
    """

    by: str | type[nn.Module] | nn.Module | Callable[[], nn.Module] | None = None
    kwargs: Mapping[str, Any] | None = None
    inherit: bool = False
    trainable: bool | None = None
    opaque: bool | None = None
    inputs: Mapping[str, str | None] | None = None

    exclusive = imports = True
    why_not_merged = "it puts another computation in the module's place, which its weights can't hold"

    def validate(self) -> None:
        if isinstance(self.by, type) and issubclass(self.by, nn.Module):
            name = f"{self.by.__module__}.{self.by.__qualname__}"
            if _class(name) is self.by:
                object.__setattr__(self, "by", name)
        elif isinstance(self.by, nn.Module):
            if self.kwargs:
                raise self.bad("kwargs", "for a module that is made already")
        elif isinstance(self.by, str):
            if not all(part.isidentifier() for part in self.by.split(".")):
                raise self.bad("by", "the qualified name of a class of nn.Module, or a module")
        elif not isinstance(self.by, types.FunctionType):
            raise self.bad("by", "the qualified name of a class of nn.Module, or a module")
        for field in ("trainable", "opaque"):
            if getattr(self, field) not in (None, True, False):
                raise self.bad(field, "true, false or None")
        for field in ("kwargs", "inputs"):
            if not isinstance(getattr(self, field), (Mapping, type(None))):
                raise self.bad(field, "a mapping")

    def check(self, module: nn.Module, path: str) -> str | None:
        # Only now: reading a rule imports nothing.
        importable = not isinstance(self.by, str) or _class(self.by) is not None
        return None if importable else f"{self.by} is not an importable class of nn.Module"

    def alike(self, path: str) -> Any:
        return None if self.inherit else ()

    def make(self) -> nn.Module:
        """Returns a new other module."""
        if isinstance(self.by, nn.Module):
            return copy.deepcopy(self.by)
        maker: Any = _class(self.by) if isinstance(self.by, str) else self.by  # there, says check
        try:
            return maker(**dict(self.kwargs or {}))
        except TypeError as error:
            raise RuleError(f"{self._class_name} can't be made", why=str(error), fix="correct kwargs") from None

    @property
    def _class_name(self) -> str:
        return self.by if isinstance(self.by, str) else getattr(self.by, "__qualname__", type(self.by).__name__)

    def rewrite(self, site: Site) -> Tensor | None:
        base = {**dict(site.module.named_parameters()), **dict(site.module.named_buffers())}
        make = self.by if isinstance(self.by, nn.Module) else self.make
        other = site.submodule("", make, trainable=self.trainable, inherit=base if self.inherit else None)
        arguments = arguments_for(site, other.kind, self.inputs, self.label)
        if self.opaque is False or (self.opaque is None and other.straight and arguments.exact):
            try:
                return _inlined(site, other, arguments)
            except TraceError:
                if self.opaque is False:
                    raise
        floating = (name for name, tensor in base.items() if tensor.is_floating_point())
        like = next((site.tensor(name) for name in floating), None)
        return other.called(arguments.positional, arguments.named, arguments.more, arguments.extra, like)


def _inlined(site: Site, other: SiteModule, arguments: Arguments) -> Any:
    x = site.input
    like = other.floating
    args, kwargs = arguments.positional, arguments.named
    if like is not None:
        args = tuple([site.apply(_in_dtype_of, value, like) for value in args])
        kwargs = {name: site.apply(_in_dtype_of, value, like) for name, value in kwargs.items()}
    output = other.inlined(*args, **kwargs)
    # Cast here, an output needs nothing of the module's own, which is then not run.
    if isinstance(site.module, nn.Embedding):
        return output
    return tree_map(lambda leaf: leaf.to(x.dtype) if hasattr(leaf, "to") else leaf, output)


def _in_dtype_of(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x


def _class(name: str) -> type[nn.Module] | None:
    module, _, attribute = name.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return None
    return kind if isinstance(kind, type) and issubclass(kind, nn.Module) else None
