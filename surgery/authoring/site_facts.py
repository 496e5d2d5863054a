"""`SiteFacts`: the module, path and sizes of a site, shared by `Site` and `LiveSite`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from surgery.errors import SiteError
from surgery.packed.packed_weight import packed_weight_of
from surgery.tracing.depth import Depth

__all__ = ["INLINED", "LEFT_OUT", "MARK", "THROUGH", "UNCALLED", "SiteFacts", "depth_of"]

# Names of facts that the engine itself stores with a site (`Site.fact`).
MARK = "mark"  # a word that identifies the adapter; copies of the adapter get another word
THROUGH = "through"  # whether a rule looks into functions from registries
INLINED = "inlined"  # the paths of the children whose operations a rule sees
UNCALLED = "uncalled"  # the paths of the modules that the site no longer calls
LEFT_OUT = "left out"  # kinds of operations that a rule drops from its matches and has been warned about


def depth_of(facts: Iterable[Mapping[str, Any]]) -> Depth:
    """Returns the depth of the graph that all rules of a site use, from their facts."""
    leaves, inlined = True, frozenset[str]()
    for known in facts:
        leaves = leaves and THROUGH not in known
        inlined |= frozenset(known.get(INLINED, ()))
    return Depth(leaves, inlined)


class SiteFacts:
    """The base class of `Site` and `LiveSite`: the module, its path in the model, and its sizes.

    Attributes:
        module: The module.
        path: Its dotted path in the model; empty for the model itself.
        adapter: The name of the adapter.
    """

    def __init__(self, module: nn.Module, path: str, adapter: str):
        self.module, self.path, self.adapter = module, path, adapter

    @property
    def base_class(self) -> type[nn.Module]:
        """The module's own class, also while the module is rewritten."""
        return getattr(self.module, "_surgery_base", type(self.module))

    @property
    def out_features(self) -> int:
        """The size of the output's feature dimension (channels, for a convolution)."""
        return self._size(
            "out_features", "out_channels", "embedding_dim", "num_features", "num_channels", "nf", "embed_dim"
        )

    @property
    def in_features(self) -> int:
        """The size of the input's feature dimension (channels, for a convolution; tokens, for an embedding)."""
        return self._size(
            "in_features", "in_channels", "num_embeddings", "num_features", "num_channels", "nx", "embed_dim"
        )

    @property
    def dtype(self) -> torch.dtype:
        """The default dtype of the adapter's tensors: the module's dtype, or float32 for half and quantised modules.

        A complex module gives a complex dtype.
        """
        own = (tensor for tensor in self.module._parameters.values() if tensor is not None)
        first = next(itertools.chain(own, self.module.parameters()), None)
        return first.dtype if first is not None and first.dtype in _WIDE else torch.float32

    def _size(self, *names: str) -> int:
        """The first of these attributes that is a number, else the size of the weight of a norm."""
        for name in names:
            size = getattr(self.module, name, None)
            if type(size) is int:
                return size
        shape = getattr(self.module, "normalized_shape", None)
        if shape:
            return int(shape[-1])
        packed = packed_weight_of(self.module)
        if packed is not None:
            return packed.shape["in_features" in names]
        weight = self.module._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            return weight.shape[0]
        raise SiteError(
            f"the number of features of a {type(self.module).__name__} is unknown",
            where=self.path,
            why=f"it does not have any of {', '.join(names)}",
            fix="take the size from site.module, or target a module with such an attribute",
        )


_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
