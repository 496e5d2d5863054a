"""`DeclaredTensors`: the parameters, buffers and modules that a rule declares at a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.site_facts import SiteFacts
from surgery.authoring.site_module import SiteModule, site_module
from surgery.complex_numbers import filled_by_reals, is_number
from surgery.errors import SiteError
from surgery.forward.offloaded_weights import initial_copy
from surgery.forward.tape import Tape

__all__ = ["DeclaredTensors", "ParamSpec"]

Fill = Callable[[Tensor], Any]


@dataclass(frozen=True)
class ParamSpec:
    """A tensor that a rule declares at a site. Applying the plan creates it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Fill
    trainable: bool
    buffer: bool
    tied: Tensor | None = None  # sites of a rule with the same tensor here share one parameter

    def tie(self, rule: Declaration) -> tuple[int, str, int] | None:
        """Returns a key that is equal for sites that share this tensor; None if it is not shared."""
        return None if self.tied is None else (id(rule), self.name, id(self.tied))


class DeclaredTensors(SiteFacts):
    """The base class of `Site` for declarations of tensors. `specs` has the declared tensors by name."""

    label: str
    tape: Tape
    specs: dict[str, ParamSpec]

    @property
    def training(self) -> Tensor:
        raise NotImplementedError

    def _value(self, kind: str, key: str) -> Tensor:
        raise NotImplementedError

    def param(
        self,
        name: str,
        value: Tensor | Sequence[int],
        init: float | Fill = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
        trainable: bool = True,
        tied: Tensor | None = None,
    ) -> Tensor:
        """Declare a parameter of the adapter, named `<site>.adapters.<adapter>.<name>`.

        >>> from torch import nn
        >>> from surgery import Rule, apply_rules, rule
        >>> @rule("doc-scale")
        ... class ScaleRule(Rule):
        ...     def rewrite(self, site):
        ...         return site.output * site.param("scale", (site.out_features,), init=1.0)
        >>> apply_rules(nn.Linear(3, 2), ScaleRule(nn.Linear)).adapters.default.scale
        Parameter containing:
        tensor([1., 1.], requires_grad=True)

        Args:
            name: A Python identifier.
            value: The initial tensor, or the shape.
            init: For a shape: a number, or a function that fills a tensor in place (`nn.init.xavier_uniform_`). It
                fills the real part of complex tensors, as in PEFT. Default 0.
            dtype: The dtype. Default None: the initial tensor's dtype; for a shape the module's dtype, or float32 if
                that is half precision or quantised (PEFT's autocast_adapter_dtype).
            trainable: Whether the parameter trains. Default True.
            tied: Sites of this rule with the same tensor here share one parameter. Default None.

        Returns:
            The parameter as a value. Applying the plan creates it on the module's device.

        Raises:
            SiteError: The name or the shape is invalid, or the name is in use.
        """
        return self._declare(name, value, init, dtype, trainable, buffer=False, tied=tied)

    def buffer(
        self,
        name: str,
        value: Tensor | Sequence[int],
        init: float | Fill = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> Tensor:
        """Declare a tensor of the adapter that is saved and not trained, such as a running mean. See `param`."""
        return self._declare(name, value, init, dtype, False, buffer=True)

    def submodule(
        self,
        name: str,
        make: Callable[[], nn.Module] | nn.Module,
        *,
        trainable: bool | None = None,
        inherit: Mapping[str, Tensor] | None = None,
    ) -> SiteModule:
        """Declare a module of the adapter and return it for calls with values: `mlp = site.submodule("mlp", make)`.

        The module's forward may branch, loop, and have several inputs and outputs. It computes in the dtype of its
        tensors, and its result has the dtype of its first input.

        Args:
            name: The prefix of its tensors: a tensor `up.weight` becomes the adapter's `<name>_up_weight`.
            make: A function or class that creates the module (`lambda: nn.Sequential(…)`), so that planning draws no
                random numbers; or a module, which is copied.
            trainable: Whether its parameters train. Default None: as their `requires_grad` says.
            inherit: Initial tensors by their names in the module. Tensors of another shape are ignored.
        """
        return site_module(self, name, make, trainable, inherit)

    def _declare(
        self, name: str, value: Any, init: Any, dtype: Any, trainable: bool, buffer: bool, tied: Tensor | None = None
    ) -> Tensor:
        """Add a tensor to `specs`; return its value."""
        if not name.isidentifier() or hasattr(nn.Module, name) or name in _RESERVED_NAMES:
            raise SiteError(f"{name!r} can't name a tensor", where=self.path, fix="use a plain identifier")
        if name in self.specs:
            raise SiteError(f"{self.label} declares the tensor {name!r} twice", where=self.path)
        if isinstance(value, Tensor):
            shape, tensor_dtype = tuple(value.shape), value.dtype
            fill: Fill = initial_copy(self.module, value)
        else:
            shape, tensor_dtype = tuple(int(size) for size in value), self.dtype
            fill = filled_by_reals(init) if callable(init) else _constant(float(init))
        if any(size < 0 for size in shape):
            raise SiteError(f"the tensor {name!r} can't have the shape {shape}", where=self.path)
        if dtype is not None:
            tensor_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        trained = trainable and is_number(tensor_dtype)
        self.specs[name] = ParamSpec(name, shape, tensor_dtype, fill, trained, buffer, tied)
        return self._value("param", name)


def _constant(value: float) -> Fill:
    return lambda tensor: tensor.fill_(value)


_RESERVED_NAMES = frozenset(nn.Module().__dict__)
