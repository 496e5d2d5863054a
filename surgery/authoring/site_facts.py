"""What is known of a site, whether its rule is being recorded or is live: the module, its path, its sizes."""

from __future__ import annotations

import itertools

import torch
from torch import nn

from surgery.errors import SiteError

__all__ = ["LEFT_OUT", "MARK", "THROUGH", "SiteFacts"]

# Names of facts that the engine itself keeps with a site (`Site.fact`).
MARK = "mark"  # an adapter's own word, which copies of it don't share
THROUGH = "through"  # a rule looks into functions from registries
LEFT_OUT = "left out"  # kinds of operations inside its matches that a rule leaves out, and was told of


class SiteFacts:
    """What a rule knows of a site in either form: the module, its path and its sizes."""

    def __init__(self, module: nn.Module, path: str, adapter: str):
        self.module, self.path, self.adapter = module, path, adapter

    @property
    def base_class(self) -> type[nn.Module]:
        """The module's own class, whether or not it is rewritten at present."""
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
        """The dtype of tensors made here by shape: the module's own, or float32 for half and quantised ones.

        Complex for a complex module.
        """
        own = (tensor for tensor in self.module._parameters.values() if tensor is not None)
        first = next(itertools.chain(own, self.module.parameters()), None)
        return first.dtype if first is not None and first.dtype in _WIDE else torch.float32

    def _size(self, *names: str) -> int:
        for name in names:
            found = getattr(self.module, name, None)
            if type(found) is int:
                return found
        shape = getattr(self.module, "normalized_shape", None)
        if shape:
            return int(shape[-1])
        weight = self.module._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            return weight.shape[0]
        raise SiteError(
            f"{type(self.module).__name__} does not say how many features it has",
            where=self.path,
            why=f"it has none of {', '.join(names)}",
            fix="take the size from site.module, or target a module that has it",
        )


_WIDE = (torch.float32, torch.float64, torch.complex64, torch.complex128)
