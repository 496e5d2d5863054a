"""`LayerConfig`: a configuration that builds lists of layers in a new order, or why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.model_edits.model_differences import Difference

__all__ = ["LayerConfig", "NoLayerConfig", "blocks"]


@dataclass(frozen=True)
class LayerConfig:
    """A configuration that builds lists of layers in a new order, and the models of the old and of the new one.

    Attributes:
        config: the changed copy. It has the same sub-configurations at the same places.
        fields: the changed fields, for messages.
        before, after: the models of the two configurations, on the meta device.
        lists: the paths of the lists that have their new length.
        score: how far `after` is from the wanted model: (differences outside of the lists, layers with other tensors,
            attributes with other values). All 0: not at all.
    """

    config: Any
    fields: tuple[str, ...]
    before: nn.Module
    after: nn.Module
    lists: tuple[str, ...]
    score: tuple[int, int, int] = (0, 0, 0)


@dataclass(frozen=True)
class NoLayerConfig:
    """Why no configuration builds the lists so.

    Attributes:
        why: the reason.
        lists: all lists that the same field describes, if that is the reason.
        final: whether the model would not work without such a configuration.
    """

    why: str
    lists: tuple[str, ...] = ()
    final: bool = False


def blocks(difference: Difference) -> bool:
    """Whether a difference outside of the lists keeps the changed configuration from holding the model's tensors."""
    if difference.modules is not None:
        first, second = difference.modules
        kept = first is not None and (any(True for _ in first.parameters()) or bool(first.state_dict()))
        return kept or second is not None and difference.has_tensors
    return any(tensor.persistent or tensor.second is not None for tensor in difference.tensors)
