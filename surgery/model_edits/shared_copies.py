"""Gives copies of layers that share weights tensors of their own: a checkpoint of transformers can't tie them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from surgery.patterns.module_walk import base_modules
from surgery.transaction.undo_log import Journal

__all__ = ["separate_copies"]


def separate_copies(root: nn.Module, copies: Sequence[tuple[nn.Module, nn.Module]], journal: Journal) -> None:
    """Replace the tensors that a copy of a part of a model shares with that part by copies of these tensors.

    Tensors that are also elsewhere in the model stay shared, because its class ties them. So do ties inside a copy.
    """
    parts = {id(inner) for pair in copies for part in pair for _, inner in base_modules(part)}
    elsewhere = {id(t) for _, inner in base_modules(root) if id(inner) not in parts for t, *_ in _tensors(inner)}
    shared = [
        (copied, {id(t) for _, inner in base_modules(part) for t, *_ in _tensors(inner)}) for part, copied in copies
    ]
    for copied, ids in shared:
        separate: dict[int, Tensor] = {}
        for _, inner in base_modules(copied):
            for tensor, table, name in list(_tensors(inner)):
                if id(tensor) not in ids or id(tensor) in elsewhere:
                    continue
                if id(tensor) not in separate:
                    separate[id(tensor)] = _clone(tensor)
                journal.keep(table)
                table[name] = separate[id(tensor)]


def _tensors(module: nn.Module) -> Iterator[tuple[Tensor, dict, str]]:
    for table in (module._parameters, module._buffers):
        for name, tensor in table.items():
            if tensor is not None:
                yield tensor, table, name


def _clone(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone(memory_format=torch.preserve_format)
    return nn.Parameter(copied, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copied
