"""Finds a model's input embeddings and output head."""

from __future__ import annotations

from torch import nn

__all__ = ["embeddings_of"]


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """Returns the modules of `get_input_embeddings` and `get_output_embeddings`, where they have a weight."""
    modules = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(module, nn.Module) and getattr(module, "weight", None) is not None:
            modules.append(module)
    return modules
