"""The state of one conversion: a PEFT checkpoint, and the slots of an exported file."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.onnx.conversion.checkpoint import Checkpoint
from surgery.onnx.conversion.initializers import Weights
from surgery.onnx.runtime.dtypes import dtype_of
from surgery.onnx.runtime.manifest import Manifest
from surgery.onnx.runtime.slot import Slot

__all__ = ["Conversion"]


class Conversion:
    """One conversion: the checkpoint's remaining tensors, the arrays of the slots filled so far, and the problems."""

    def __init__(self, manifest: Manifest, checkpoint: Checkpoint, path: Path):
        self.manifest, self.checkpoint, self.path = manifest, checkpoint, path
        self.remaining_tensors = dict(checkpoint.tensors)
        self.arrays: dict[str, np.ndarray] = {}
        self.problems: list[SurgeryError] = []
        self.embeddings: set[str] = set()  # paths whose LoRA keys say `embedding`

    @cached_property
    def weights(self) -> Weights:
        return Weights(self.path)

    @contextlib.contextmanager
    def collecting_errors(self, where: str) -> Iterator[None]:
        """Adds an error of the block to the problems."""
        try:
            yield
        except SurgeryError as error:
            error.where = error.where or where
            self.problems.append(error)
        except Exception as error:  # a file may have any fields and tensors
            why = f"{type(error).__name__}: {error}"[:300]
            self.problems.append(SurgeryError("the checkpoint can't be read", where=where, why=why))

    def manifest_slots(self, path: str, rule: str) -> Mapping[str, Slot]:
        return {slot.tensor: slot for slot in self.manifest.groups.get((path, rule), ())}

    def slots(self, path: str, rule: str) -> Mapping[str, Slot]:
        """Returns a site's slots by tensor name. Raises `SurgeryError` if the file has no such site."""
        slots = self.manifest_slots(path, rule)
        if not slots:
            sites = [site for site, kind in self.manifest.groups if kind == rule]
            why = f"it has {len(sites)}, such as {sites[0]}" if sites else "it has no such slots"
            fix = "export it with an adapter that is also on this module"
            raise SurgeryError(f"the file has no {rule} slot for a module", where=path, why=why, fix=fix)
        return slots

    def site_of(self, path: str, rule: str) -> Mapping[str, Any]:
        self.slots(path, rule)
        return next(entry for entry in self.manifest.sites if (entry["site"], entry["rule"]) == (path, rule))

    def rule_of(self, path: str, rule: str) -> Mapping[str, Any]:
        """Returns the fields of the rule that made the site's slots."""
        index = self.site_of(path, rule).get("by")
        rules = self.manifest.rules
        data = rules[index] if isinstance(index, int) and 0 <= index < len(rules) else {}
        return data if isinstance(data, Mapping) else {}

    def add(self, path: str, rule: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Fills slots of a site, converted to the slots' dtypes."""
        slots = self.slots(path, rule)
        if unknown := [name for name in tensors if name not in slots]:
            why = f"its slot has {', '.join(slots)}"
            fix = "export it with such an adapter on the model"
            raise SurgeryError(f"the file has no place for {', '.join(unknown)}", where=path, why=why, fix=fix)
        for name, tensor in tensors.items():
            with np.errstate(over="ignore"):  # an overflow gives infinity, which `Manifest.check` refuses
                self.arrays[slots[name].name] = np.ascontiguousarray(tensor.astype(dtype_of(slots[name].dtype)))

    def complete(self) -> None:
        """Fills the remaining slots of the adapter's sites with their defaults, such as a gain of ones."""
        for slots in self.manifest.groups.values():
            if any(slot.name in self.arrays for slot in slots):
                for slot in slots:
                    if slot.name not in self.arrays and slot.default != "empty":
                        with self.collecting_errors(slot.name):
                            default = self.manifest.default(slot)
                            self.arrays[slot.name] = self.weights.stored(slot.name) if default is None else default
