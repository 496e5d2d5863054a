"""Several adapters at one site, each for rows of its own: how a rule that is routed as a whole sees them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.site import Site
from surgery.forward.own_forward import OwnForward
from surgery.patterns.module_walk import RESERVED

__all__ = ["Member"]


class Member(Site):
    """The site as one adapter's rule sees it while a batch is routed: its tensors are its own, the rest is shared.

    `rows.of(size, device)` gives, at a call, the indices of the adapter's rows in a dimension of this size.
    """

    def __init__(
        self, rule: Declaration, module: nn.Module, path: str, adapter: str, own: OwnForward, facts: dict[str, Any]
    ):
        super().__init__(module, path, adapter, rule.label, own, facts=facts)
        self.rule = rule

    @property
    def rows(self) -> Any:
        return self._value("rows", self.adapter)

    def _value(self, kind: str, key: str) -> Tensor:
        if kind == "param":  # named by its adapter: the tape is that of all
            kind, key = "state", f"{RESERVED}.{self.adapter}.{key}"
        return super()._value(kind, key)
