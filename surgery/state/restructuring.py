"""`Restructuring`: the record of a structural rule on a model, with the modules that it set aside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.model_edits.structure_tensor import StructureTensor
from surgery.model_edits.table_edit import TableEdit
from surgery.patterns.module_walk import base_modules

__all__ = ["Restructuring", "set_aside_modules", "structure_keys"]


@dataclass(eq=False)
class Restructuring:
    """One structural rule on a model.

    `edits`: its changes in order. `copies`: (part, copy) pairs. `unplain`: why no plain class can hold the model.
    `tensors`: what it made; adapter files have their values.
    `flags`: `requires_grad` of parameters that it set aside while the base was frozen, from before the freeze.
    `place`: device and dtype of the model then, because modules that are set aside do not move with it.
    `training`: the mode of the model then. `configs`: configurations, their copies, and the copies' fields then.
    """

    adapter: str
    rule: Rule
    edits: list[TableEdit] = field(default_factory=list)
    copies: list[tuple[nn.Module, nn.Module]] = field(default_factory=list)
    steps: list[tuple[str, str, str]] = field(default_factory=list)
    unplain: list[str] = field(default_factory=list)
    flags: list[tuple[nn.Parameter, bool]] = field(default_factory=list)
    place: tuple[torch.device, torch.dtype] | None = None
    training: bool | None = None
    tensors: list[StructureTensor] = field(default_factory=list)
    configs: list[tuple[Any, Any, dict[str, Any]]] = field(default_factory=list)

    @property
    def exchanged(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """The parameters and buffers that others took the place of: (owner, name, before, after)."""
        return [
            (edit.owner, name, edit.before[name], edit.after[name])
            for edit in self.edits
            if edit.table in ("_parameters", "_buffers")
            for name in edit.before.keys() & edit.after.keys()
            if edit.before[name] is not None and edit.after[name] is not None
        ]

    @property
    def resized(self) -> list[tuple[nn.Module, str, Tensor, Tensor]]:
        """Those of `exchanged` that have another shape since. Their common entries have the same values."""
        return [item for item in self.exchanged if item[2].shape != item[3].shape]

    @property
    def keys(self) -> set[tuple[int, str, str]]:
        """What the edits change: (owner, table, key)."""
        return {key for edit in self.edits for key in edit.keys}

    def tensors_of(self, side: str) -> list[Tensor]:
        """The parameters and buffers in the edited tables, `before` or `after`."""
        tensors: dict[int, Tensor] = {}
        for edit in self.edits:
            for value in getattr(edit, side).values():
                for tensor in _tensors(value):
                    tensors[id(tensor)] = tensor
        return list(tensors.values())

    @property
    def removed(self) -> list[Tensor]:
        """The tensors of modules that the edits take out of the model."""
        staying = {id(tensor) for module in self.modules_of("after") for tensor in _tensors(module)}
        before = [tensor for module in self.modules_of("before") for tensor in _tensors(module)]
        return [tensor for tensor in before if id(tensor) not in staying]

    @property
    def set_aside(self) -> list[nn.Module]:
        """The modules that the edits take out, with those below them."""
        staying = {id(below) for below in _below(self.modules_of("after"))}
        return [below for below in _below(self.modules_of("before")) if id(below) not in staying]

    def modules_of(self, side: str) -> list[nn.Module]:
        """The modules in the edited tables of children, `before` or `after`."""
        values = [value for edit in self.edits if edit.table == "_modules" for value in getattr(edit, side).values()]
        return list({id(value): value for value in values if value is not None}.values())


def _below(modules: Sequence[nn.Module]) -> list[nn.Module]:
    return [below for module in modules for _, below in base_modules(module)]


def structure_keys(records: Sequence[Restructuring]) -> Iterator[tuple[str, StructureTensor]]:
    """The tensors that an adapter's structural rules made, by their names in files: `structure.0.lm_head.weight`."""
    for index, record in enumerate(records):
        for tensor in record.tensors:
            yield f"structure.{index}.{tensor.key}", tensor


def set_aside_modules(root: nn.Module, structure: Sequence[Restructuring]) -> Iterator[nn.Module]:
    """Yield the modules that structural rules took out of a model, with those below them, each once."""
    seen = {id(module) for _, module in base_modules(root)}
    for restructuring in structure:
        for module in restructuring.modules_of("before"):
            for _, below in base_modules(module):
                if id(below) not in seen:
                    seen.add(id(below))
                    yield below


def place_of(root: nn.Module) -> tuple[torch.device, torch.dtype] | None:
    """The device and the dtype of a model's first parameter of floating point."""
    for parameter in root.parameters():
        if parameter.is_floating_point():
            return parameter.device, parameter.dtype
    return None


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, nn.Module):
        return [*value.parameters(), *value.buffers()]
    return [value] if isinstance(value, Tensor) else []
