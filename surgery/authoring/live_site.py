"""`LiveSite`: a site with the rule's tensors in place, for `initialise`, `merged` and what else computes with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.authoring.site_facts import SiteFacts
from surgery.errors import SiteError
from surgery.forward.parameter_view import find_tensor

__all__ = ["LiveSite", "Tensors"]

Tensors = Mapping[str, Tensor]


class LiveSite(SiteFacts):
    """One module with the rule's tensors in place, for `Rule.initialise` and `Rule.merged`.

    `params` holds the adapter's tensors by name; `weight`, `bias` and `tensor(name)` are the module's own, with
    what was folded in before; `base(name)` is a parameter as it was before any merging; `notes` is for `swapped`.
    """

    def __init__(
        self, module: nn.Module, path: str, adapter: str, params: Tensors, source: Callable[[str, bool], Tensor]
    ):
        super().__init__(module, path, adapter)
        self.params = params
        self.notes: list[str] = []  # what `Rule.swapped` has to tell
        self.changed: dict[str, Any] = {}  # for `Rule.slotted`: how the rule's start changed the base's parameters
        self._source = source

    @property
    def weight(self) -> Tensor:
        return self.tensor("weight")

    @property
    def bias(self) -> Tensor:
        return self.tensor("bias")

    def tensor(self, name: str) -> Tensor:
        if find_tensor(self.module, name) is None:
            raise SiteError(f"{type(self.module).__name__} has no tensor {name!r}", where=self.path)
        return self._source(name, False)

    def base(self, name: str) -> Tensor:
        return self._source(name, True)

    def folded(self, name: str) -> bool:
        """Whether something was folded into a parameter before this rule's turn."""
        return self._source(name, False) is not self._source(name, True)
