"""`LiveSite`: a site with the rule's tensors, for `initialise`, `merged` and other hooks that compute with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from surgery.authoring.site_facts import SiteFacts
from surgery.authoring.site_module import Make, filled_module
from surgery.errors import SiteError
from surgery.forward.parameter_view import find_tensor
from surgery.packed.packed_map import packed_by_name
from surgery.packed.packed_parameters import is_packed

__all__ = ["LiveSite", "Tensors"]

Tensors = Mapping[str, Tensor]


class LiveSite(SiteFacts):
    """One module with the rule's tensors, as `Rule.initialise`, `Rule.merged` and other hooks get it.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import Rule, apply_rules, rule
    >>> @rule("doc-centre")
    ... class CentreRule(Rule):
    ...     def initialise(self, site):
    ...         site.params["centre"].copy_(site.weight.mean(1))
    ...     def rewrite(self, site):
    ...         return site.output - site.param("centre", (site.out_features,))
    >>> model = apply_rules(nn.Linear(3, 2), CentreRule(nn.Linear))
    >>> torch.equal(model.adapters.default.centre, model.weight.mean(1))
    True

    Attributes:
        params: The adapter's tensors at this site, by name.
        notes: A list of texts for `Rule.swapped`: what was rounded or left out.
        changed: For `Rule.slotted`: how the rule's initialisation changed the base's parameters, by name.
    """

    def __init__(
        self, module: nn.Module, path: str, adapter: str, params: Tensors, source: Callable[[str, bool], Tensor]
    ):
        super().__init__(module, path, adapter)
        self.params = params
        self.notes: list[str] = []
        self.changed: dict[str, Any] = {}
        self._source = source

    @property
    def weight(self) -> Tensor:
        """The module's weight, with the changes that earlier rules folded into it; dequantised, if it is quantised."""
        return self.tensor("weight")

    @property
    def bias(self) -> Tensor:
        """The module's bias, with the changes that earlier rules folded into it."""
        return self.tensor("bias")

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter or buffer by name, with earlier folds. Raises `SiteError` for an unknown name."""
        if (dense := self._dequantised(name, False)) is not None:
            return dense
        if find_tensor(self.module, name) is None:
            raise SiteError(f"{type(self.module).__name__} has no tensor {name!r}", where=self.path)
        return self._source(name, False)

    def base(self, name: str) -> Tensor:
        """Returns a parameter as it was before any merge; dequantised, if it is quantised."""
        dense = self._dequantised(name, True)
        return self._source(name, True) if dense is None else dense

    def _dequantised(self, name: str, base: bool) -> Tensor | None:
        """The dequantised tensor, while the module is quantised and no earlier fold has made the tensor plain."""
        if (packed := packed_by_name(self.module).get(name)) is None:
            return None
        stored = find_tensor(self.module, name)
        if stored is not None and not is_packed(self._source(name, base)):
            return None
        return packed.dequantise()

    def submodule(self, name: str, make: Make) -> nn.Module:
        """Returns the module that `rewrite` declared by `Site.submodule(name, make)`, as an ordinary module.

        It has the adapter's own tensors.
        """
        return filled_module(name, make, self.params)

    def folded(self, name: str) -> bool:
        """Whether an earlier rule was folded into a parameter."""
        return self._source(name, False) is not self._source(name, True)
