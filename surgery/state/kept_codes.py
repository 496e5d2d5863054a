"""The bits of packed weights from before a start or a merge wrote others, and the way back to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.corrections import INTEGERS, Corrections, Record, checksum
from surgery.errors import MergeError
from surgery.packed.packed_map import packed_by_name, stored_in, write_stored
from surgery.packed.packed_tensors import PackedTensors
from surgery.transaction.undo_log import Journal

__all__ = ["CodeRecord", "KeptCodes", "change_codes", "keep_bits"]


@dataclass(eq=False)
class CodeRecord:
    """The former bits of one stored tensor: the differences from the new bits, or a copy if that is smaller."""

    after: int
    kept: Tensor | None = None
    differences: Corrections | None = None

    @staticmethod
    def of(old: Tensor, new: Tensor, copy: bool) -> CodeRecord:
        after, old = checksum(new), old.contiguous()
        if not copy and old.numel() and not old.is_complex():
            differences = Corrections()
            bits = [tensor.contiguous().flatten().view(INTEGERS[old.element_size()]) for tensor in (old, new)]
            differences.add(0, *bits)
            differences.close()
            if differences.nbytes < old.numel() * old.element_size():
                return CodeRecord(after, differences=differences)
        return CodeRecord(after, kept=old.clone())

    @property
    def nbytes(self) -> int:
        if self.differences is not None:
            return self.differences.nbytes
        return self.kept.numel() * self.kept.element_size() if self.kept is not None else 0

    def old(self, new: Tensor) -> Tensor:
        """The former tensor, from the present one."""
        if self.kept is not None:
            return self.kept.to(new.device)
        restored = new.detach().contiguous().clone()
        if self.differences is not None:
            self.differences.apply(restored.view(-1))
        return restored

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None if self.kept is None else self.kept.cpu()}


@dataclass(eq=False)
class KeptCodes:
    """The former codes and scales of a module by name, and checksums of those that took their place."""

    codes: dict[str, CodeRecord] = field(default_factory=dict)

    @staticmethod
    def of(old: Mapping[str, Tensor], module: nn.Module, copy: bool) -> KeptCodes:
        """`old`: the former tensors. `copy`: whether to keep copies of them, and not differences."""
        now, packed = stored_in(module), packed_by_name(module).values()
        copy = copy or any(getattr(part, "rearranges", False) for part in packed)
        return KeptCodes({name: CodeRecord.of(tensor, now[name], copy) for name, tensor in old.items()})

    @property
    def nbytes(self) -> int:
        return sum(record.nbytes for record in self.codes.values())

    def changed(self, module: nn.Module, where: str) -> list[str]:
        """The names of the tensors that changed since."""
        now = self._stored(module, where)
        # A call may arrange codes anew, under other names (`Bits4Weight`). The kept ones stay the weight's.
        same = now.keys() == self.codes.keys()
        return [name for name, record in self.codes.items() if same and checksum(now[name]) != record.after]

    def check(self, module: nn.Module, where: str) -> None:
        """Raise `MergeError` if the codes changed since. Changes nothing."""
        if self.changed(module, where):
            raise MergeError(
                "the base's codes changed since a rule's start changed them",
                where=where,
                why="they were loaded or quantised anew in between",
                fix="load the base again, or pass check=False to write the former codes anyway",
            )

    def take_out(self, module: nn.Module, journal: Journal, where: str) -> None:
        """Write the former codes and scales back."""
        keep_bits(module, journal)
        write_stored(module, self._former(module, where))

    def as_plain(self, packed: PackedTensors, dtype: torch.dtype) -> Record:
        """The same record for a module that becomes plain with the dequantised numbers, in this dtype."""
        now, numbers = _bits(packed.module), packed.dequantise().to(dtype)
        try:
            write_stored(packed.module, self._former(packed.module, ""))
            kept = packed.dequantise().to(dtype)
        finally:
            write_stored(packed.module, now)
        return Record("copy", numbers.shape, dtype, checksum(numbers), kept=kept)

    def _former(self, module: nn.Module, where: str) -> dict[str, Tensor]:
        now = self._stored(module, where)
        if now.keys() == self.codes.keys():
            return {name: record.old(now[name]) for name, record in self.codes.items()}
        kept = {name: record.kept for name, record in self.codes.items() if record.kept is not None}
        if len(kept) < len(self.codes):
            raise MergeError(
                "the quantised weight can't be put back",
                where=where,
                why="its backend arranged the codes anew since, and the record holds differences alone",
                fix="load the base again, or merge with keep='copy'",
            )
        return kept

    def _stored(self, module: nn.Module, where: str) -> dict[str, Tensor]:
        stored = stored_in(module)
        if not stored:
            why = f"it is a {type(module).__name__}, which is not quantised any more"
            raise MergeError("the base's codes can't be written back", where=where, why=why, fix="load the base again")
        return stored


def change_codes(packed: PackedTensors, wanted: Tensor, journal: Journal) -> KeptCodes:
    """Quantise new values in the place of packed ones. Returns what gives the former bits back."""
    before = keep_bits(packed.module, journal)
    packed.write(packed.requantise(wanted))
    return KeptCodes.of(before, packed.module, False)


def keep_bits(module: nn.Module, journal: Journal) -> dict[str, Tensor]:
    """Note the codes and scales of a module before they change. Returns copies of them."""
    bits = _bits(module)
    journal.undo(write_stored, module, bits)
    return bits


def _bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in stored_in(module).items()}
