"""Which modules a model says are its input embeddings and its output head."""

from __future__ import annotations

from torch import nn

__all__ = ["embeddings_of"]


def embeddings_of(model: nn.Module) -> list[nn.Module]:
    """A model's input embeddings and its head, as far as it says which they are."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, name)()
        except (AttributeError, NotImplementedError, TypeError):
            continue
        if isinstance(module, nn.Module) and getattr(module, "weight", None) is not None:
            found.append(module)
    return found
