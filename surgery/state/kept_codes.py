"""The bits of a packed weight from before a rule's start changed it, and the way back to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import Record, checksum
from surgery.errors import MergeError
from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from surgery.transaction.undo_log import Journal

__all__ = ["KeptCodes", "change_codes"]


@dataclass(eq=False)
class KeptCodes:
    """Codes and scales as they were, by name, and checksums of what a rule's start wrote in their place."""

    before: dict[str, Tensor]
    after: dict[str, int]

    @property
    def nbytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in self.before.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "before": {name: tensor.cpu() for name, tensor in self.before.items()}}

    def check(self, module: nn.Module, where: str) -> None:
        """Raise `MergeError` if the codes changed since. Changes nothing."""
        packed = self._packed(module, where)
        present = {name: checksum(tensor) for name, tensor in packed.tensors().items()}
        # A call may arrange codes anew, under other names (`Bits4Weight`). The kept ones stay the weight's.
        if present.keys() == self.after.keys() and present != self.after:
            raise MergeError(
                "the base's codes changed since a rule's start changed them",
                where=where,
                why="they were loaded or quantised anew in between",
                fix="load the base again, or pass check=False to write the former codes anyway",
            )

    def take_out(self, module: nn.Module, journal: Journal, where: str) -> None:
        """Write the former codes and scales back."""
        packed = self._packed(module, where)
        journal.undo(packed.write, _bits(packed))
        packed.write(self.before)

    def as_plain(self, packed: PackedWeight, dtype: torch.dtype) -> Record:
        """The same record for a module that becomes a plain Linear of the dequantised weight, in this dtype."""
        now, weight = _bits(packed), packed.dequantise().to(dtype)
        try:
            packed.write(self.before)
            kept = packed.dequantise().to(dtype)
        finally:
            packed.write(now)
        return Record("copy", weight.shape, dtype, checksum(weight), kept=kept)

    def _packed(self, module: nn.Module, where: str) -> PackedWeight:
        packed = packed_weight_of(module)
        if packed is None:
            why = f"it is a {type(module).__name__}, which is not quantised any more"
            raise MergeError("the base's codes can't be written back", where=where, why=why, fix="load the base again")
        return packed


def change_codes(packed: PackedWeight, wanted: Tensor, journal: Journal) -> KeptCodes:
    """Quantise new values in the place of a packed weight. Returns what gives the former bits back."""
    before, new = _bits(packed), packed.requantise(wanted)
    journal.undo(packed.write, before)
    packed.write(new)
    return KeptCodes(before, {name: checksum(tensor) for name, tensor in packed.tensors().items()})


def _bits(packed: PackedWeight) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in packed.tensors().items()}
