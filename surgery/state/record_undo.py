"""What a change of the rules may touch at a site or on a model, noted in a journal before it is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.arithmetic.batched_folds import Unfold, unfold_all
from surgery.arithmetic.exact_fold import Record, checksum, refold, unfold
from surgery.patterns.module_walk import RESERVED
from surgery.state.records import ModelState, site_state
from surgery.transaction.undo_log import Journal

__all__ = ["keep_fold", "keep_model", "keep_site", "take_out_fold", "take_out_folds"]

_set_class = object.__setattr__  # nn.Module's own looks for tensors first


def keep_site(journal: Journal, module: nn.Module, adapters: Iterable[str] = ()) -> None:
    """A module's class, record and children, and where it holds the tensors of these adapters."""
    journal.undo(_set_class, module, "__class__", module.__class__)
    journal.keep(module.__dict__, module._modules)
    held = module._modules.get(RESERVED)
    if held is not None:
        journal.keep(held._modules)
        for box in filter(None, (held._modules.get(name) for name in adapters)):
            journal.keep(box.__dict__, box._parameters, box._buffers, box._non_persistent_buffers_set)
    site = site_state(module)
    if site is not None:
        journal.keep(site.__dict__, site.applied, site.variants, site.classes)


def keep_model(journal: Journal, model: nn.Module, state: ModelState | None) -> None:
    """A model's record, and that it has one."""
    journal.keep(model.__dict__)
    if state is not None:
        named = (state.adapters, state.flags, state.places, state.standing, state.resting)
        journal.keep(state.__dict__, state.switched, state.ignored_on_save, state.moving, state.unlinked, *named)


def keep_fold(journal: Journal, weight: Tensor) -> Any:
    """What `fold` is to call before it writes to a weight: how to take the fold out is noted."""
    return lambda record: journal.undo(_unfolded, weight, record)


def _unfolded(weight: Tensor, record: Record) -> None:
    """Undo a fold that may not have been written, or not be undone for the first time."""
    if record.kind == "copy" and record.kept is None:
        return
    if record.kind != "record" or checksum(weight) == record.after:
        unfold(weight, record, check=False)


def take_out_fold(
    journal: Journal, weight: Tensor, record: Record, *, check: bool = True, where: str = "", verified: bool = False
) -> None:
    """`unfold`, with its undoing noted; a weight's bits are copied for that only where arithmetic can't give them."""
    intact = record.kind == "record" and (verified or checksum(weight) == record.after)
    if intact:
        journal.undo(refold, weight, record)
    else:
        note = partial(_put, weight, record, dict(record.__dict__), weight.data)
        journal.undo(note, None if record.swapped_for == weight.data_ptr() else weight.detach().clone())
    unfold(weight, record, check=check, where=where, verified=verified)


def take_out_folds(journal: Journal, taken: Sequence[tuple[Tensor, Record, str]], *, check: bool = True) -> None:
    """`take_out_fold` of each in its order, with `verified=check`; of small weights many at once."""
    alone, together = list[tuple[Tensor, Record, str]](), list[Unfold]()
    shared = Counter(weight.data_ptr() for weight, _, _ in taken) if check else Counter[int]()
    for weight, record, where in taken:
        if check and record.kind == "record" and shared[weight.data_ptr()] == 1:
            together.append(Unfold(weight, record, where, partial(journal.undo, refold, weight, record)))
        else:
            alone.append((weight, record, where))
    for weight, record, where in alone:
        take_out_fold(journal, weight, record, check=check, where=where, verified=check)
    unfold_all(together)


def _put(weight: Tensor, record: Record, was: dict[str, Any], memory: Tensor, bits: Tensor | None) -> None:
    record.__dict__.update(was)
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        if bits is not None:
            weight.copy_(bits)
        elif weight.data_ptr() != memory.data_ptr():
            weight.data = memory
