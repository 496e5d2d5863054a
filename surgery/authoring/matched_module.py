"""`MatchedModule`: a child module of the site that a match has found."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from surgery.forward.parameter_view import find_tensor
from surgery.forward.tape import Tape

__all__ = ["MatchedModule"]


class Matching(Protocol):
    """The part of a `Site` that a `MatchedModule` uses."""

    module: nn.Module
    tape: Tape

    def tensor(self, name: str) -> Tensor: ...


class MatchedModule:
    """A module that a pattern's parameter stands for: `conv=module_of(nn.Conv2d)`.

    Its parameters and buffers are values, which stay connected to the model. Other attributes, such as `eps`, are those
    of the module. A call of it is a call of the module in the rewritten forward.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import Rule, Structure, apply_rules, module_of, rule
    >>> @rule("doc-twice")
    ... class TwiceRule(Rule):
    ...     def rewrite(self, site):
    ...         for match in site.find(Structure(lambda x, linear=module_of(nn.Linear): linear(x).relu())):
    ...             linear, x = match.bindings["linear"], match.bindings["x"]
    ...             site.replace(match.root, linear(linear(x)) + linear.bias)
    >>> class Layer(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.inner = nn.Linear(3, 3)
    ...     def forward(self, x):
    ...         return self.inner(x).relu()
    >>> layer, x = Layer(), torch.randn(2, 3)
    >>> _ = apply_rules(layer, TwiceRule(Layer), example_inputs=x)
    >>> torch.equal(layer(x), layer.inner(layer.inner(x)) + layer.inner.bias)
    True

    Attributes:
        path: Its path from the site.
        module: The module.
    """

    path: str
    module: nn.Module

    def __init__(self, site: Matching, path: str):
        self.__dict__.update(_site=site, path=path, module=site.module.get_submodule(path))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if find_tensor(self.module, name) is not None:
            return self._site.tensor(f"{self.path}.{name}")
        return getattr(self.module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a match does not set {name} on {self.path}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._site.tape.call("module", self.path, args, kwargs)

    def __repr__(self) -> str:
        return f"{type(self.module).__name__} at {self.path}"
