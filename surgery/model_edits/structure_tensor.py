"""`StructureTensor`: a tensor of the model that a structural rule made, so it belongs to the rule's adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError

__all__ = ["StructureTensor"]


@dataclass(eq=False)
class StructureTensor:
    """A parameter or buffer, or rows of one. Adapter files have its values, and load onto a base without it.

    It is plain data and refers to the tensor by its owner, so copies, pickles and `load_state_dict(assign=True)` keep
    it true.

    Args:
        key: its name in files: the path in the model when the rule was applied.
        owner: the module that has the tensor.
        name: the name in the module.
        shape, dtype: those of the stored values.
        start: the first stored row; None: the whole tensor.
        trainable: whether the parameter trains while the adapter is live and the base is frozen.
    """

    key: str
    owner: nn.Module
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int | None = None
    trainable: bool = False

    @property
    def whole(self) -> Tensor:
        """The tensor of the model, with the rows of the base."""
        tensor: Any = self.owner._parameters.get(self.name, self.owner._buffers.get(self.name))
        return tensor

    def values(self, whole: Tensor | None = None) -> Tensor:
        """The stored part of the tensor. It shares the tensor's memory. `whole`: the tensor in a state dict."""
        tensor = (self.whole if whole is None else whole).detach()
        start = self.start or 0
        part = tensor[start : start + self.shape[0]] if self.shape else tensor  # a later rule may have added rows
        if tuple(part.shape) != self.shape:
            raise SurgeryError(
                f"{self.key} has other sizes than the adapter made it with",
                why=f"it is {tuple(tensor.shape)}, and the adapter's part was {self.shape}",
                fix="remove the rule that changed the size since",
            )
        return part
