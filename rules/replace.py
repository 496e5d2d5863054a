"""Another module's computation in a module's place: a GELU for a ReLU, an RMSNorm for a LayerNorm."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import Rule, RuleError, Site, call_own, rule


@rule("replace")
class ReplaceRule(Rule):
    """The module's output is what another module makes of its input.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from rules import ReplaceRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> _ = apply_rules(model, [ReplaceRule(nn.ReLU, by="torch.nn.LeakyReLU", kwargs={"negative_slope": 0.5})])
    >>> model[1](torch.tensor([-1.0, 1.0])), type(model[1]).__name__
    (tensor([-0.5000,  1.0000]), 'ReLU')

    `by`: the qualified name of an nn.Module class (or the class), made with `kwargs`: plain data. Or a module, whose
    tensors are copied; such a rule can't be written. `inherit`: tensors start as those of the module that has the
    same name and shape. The other module's tensors are the adapter's, with `_` for a dot, in the dtype of LoRA's.
    `trainable`: whether its parameters train; None, the default, keeps the `requires_grad` that each of them has.

    For modules with one input, and replacements whose forward is straight PyTorch: one that branches on values, or
    remembers something between calls, is a problem of the plan.
    """

    by: Any = None
    kwargs: Mapping[str, Any] | None = None
    inherit: bool = False
    trainable: bool | None = None

    exclusive = imports = True
    why_not_merged = "it puts another computation in the module's place, which its weights can't hold"

    def validate(self) -> None:
        if isinstance(self.by, type) and issubclass(self.by, nn.Module):
            object.__setattr__(self, "by", f"{self.by.__module__}.{self.by.__qualname__}")
        if isinstance(self.by, nn.Module):
            if self.kwargs:
                raise self.bad("kwargs", "for a module that is made already")
        elif not isinstance(self.by, str) or not all(part.isidentifier() for part in self.by.split(".")):
            raise self.bad("by", "the qualified name of a class of nn.Module, or a module")
        if self.trainable not in (None, True, False):
            raise self.bad("trainable", "true, false or None")
        if not isinstance(self.kwargs, (Mapping, type(None))):
            raise self.bad("kwargs", "a mapping")

    def check(self, module: nn.Module, path: str) -> str | None:
        # Only now: reading a rule imports nothing.
        found = isinstance(self.by, nn.Module) or _class(self.by) is not None
        return None if found else f"{self.by} is no class of nn.Module that can be imported"

    def make(self) -> nn.Module:
        """The other module, anew."""
        if isinstance(self.by, nn.Module):
            return copy.deepcopy(self.by)
        try:
            return _class(self.by)(**dict(self.kwargs or {}))  # type: ignore[misc]  # there, says check
        except TypeError as error:
            raise RuleError(f"{self.by} can't be made", why=str(error), fix="correct kwargs") from None

    def rewrite(self, site: Site) -> Tensor:
        with torch.device("meta"):  # its shapes alone: planning draws no random numbers
            other = self.make()
        real = functools.cache(self.make)
        base = {**dict(site.module.named_parameters()), **dict(site.module.named_buffers())}

        def fill(tensor: Tensor, name: str) -> None:
            own = base.get(name)
            inherited = self.inherit and own is not None and own.shape == tensor.shape
            tensor.copy_(own if inherited else _tensors(real())[name])  # type: ignore[arg-type]

        held = {}
        for name, tensor in _tensors(other).items():
            dtype = site.dtype if tensor.is_floating_point() else tensor.dtype
            start = functools.partial(fill, name=name)
            trained = tensor.requires_grad if self.trainable is None else self.trainable
            trained = trained and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
            word = name.replace(".", "_")
            word = word if word.isidentifier() else f"_{word}"  # a Sequential's begin with a number
            held[name] = site.param(word, tensor.shape, start, dtype=dtype, trainable=trained)
        for inner in other.modules():
            inner.__dict__["training"] = site.training  # the flag as it is at each call
        x = site.input
        floating = next((held[name] for name, tensor in _tensors(other).items() if tensor.is_floating_point()), None)
        output = call_own(other, x if floating is None else site.apply(_in_dtype_of, x, floating), **held)
        # Cast here, an output needs nothing of the module's own, which is then not run.
        return output if isinstance(site.module, nn.Embedding) else output.to(x.dtype)


def _in_dtype_of(x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype) if x.is_floating_point() else x


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _class(name: str) -> type[nn.Module] | None:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) and issubclass(found, nn.Module) else None
