"""`Member`: one adapter's view of a site while a batch is routed, for `Rule.routed`."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.site import Site
from surgery.forward.own_forward import OwnForward
from surgery.patterns.module_walk import RESERVED

__all__ = ["Member"]


class RowIndices(Protocol):
    """The rows of one adapter in a batch."""

    def of(self, size: int, device: torch.device) -> Tensor:
        """The indices of the rows in a dimension of this size."""
        ...


class Member(Site):
    """One adapter's view of a site, as `Rule.routed` gets it. Its tensors are the adapter's; the rest is shared.

    Attributes:
        rule: The adapter's rule.
        rows: At a call, `rows.of(size, device)` returns the indices of the adapter's rows in a dimension of this size.
    """

    def __init__(
        self, rule: Declaration, module: nn.Module, path: str, adapter: str, own: OwnForward, facts: dict[str, Any]
    ):
        super().__init__(module, path, adapter, rule.label, own, facts=facts)
        self.rule = rule

    @property
    def rows(self) -> RowIndices:
        return cast(RowIndices, self._value("rows", self.adapter))

    def _value(self, kind: str, key: str) -> Tensor:
        if kind == "param":  # all adapters share the tape, so the name contains the adapter
            kind, key = "state", f"{RESERVED}.{self.adapter}.{key}"
        return super()._value(kind, key)
