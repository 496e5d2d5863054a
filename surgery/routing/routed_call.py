"""Protocols that the plans of `surgery.routing.site_plan` share: a plan's call, and the routing block that it reads."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from surgery.forward.own_forward import OwnForward
from surgery.routing.rows import RowOwners

__all__ = ["RoutedCall", "Routing", "bind_arguments"]


class RoutedCall(Protocol):
    """The function that a routed site runs instead of its forward."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any: ...


class Routing(Protocol):
    """The attributes of a `RoutingBlock` that plans read."""

    names: tuple[str, ...]
    rows: RowOwners
    alone: bool

    def size_of(self, module: nn.Module, value: Tensor) -> int: ...


def bind_arguments(own: OwnForward, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by parameter name, with defaults."""
    bound = own.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)
