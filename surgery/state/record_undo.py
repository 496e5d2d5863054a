"""Notes in the undo log everything that a verb may change at a site or on a model, before the change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
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

_set_class = object.__setattr__  # faster than nn.Module's own, which looks for tensors first


def keep_site(journal: Journal, module: nn.Module, adapters: Iterable[str] = ()) -> None:
    """Note a module's class, record and children, and its tensors of these adapters."""
    journal.undo(_set_class, module, "__class__", module.__class__)
    journal.keep(module.__dict__, module._modules)
    containers = module._modules.get(RESERVED)
    if containers is not None:
        journal.keep(containers._modules)
        for box in filter(None, (containers._modules.get(name) for name in adapters)):
            journal.keep(box.__dict__, box._parameters, box._buffers, box._non_persistent_buffers_set)
    site = site_state(module)
    if site is not None:
        journal.keep(site.__dict__, site.applied, site.variants, site.classes)


def keep_model(journal: Journal, model: nn.Module, state: ModelState | None) -> None:
    """Note a model's record and its `__dict__`."""
    journal.keep(model.__dict__)
    if state is not None:
        named = (state.adapters, state.flags, state.places, state.standing, state.resting, state.peft_fields)
        lists = (state.switched, state.ignored_on_save, state.moving, state.unlinked, state.structure)
        journal.keep(state.__dict__, *lists, *named)


def keep_fold(journal: Journal, weight: Tensor) -> Callable[[Record], None]:
    """Returns a callback for `fold`, which notes the inverse of the fold before the weight changes."""
    return lambda record: journal.undo(_undo_fold, weight, record)


def _undo_fold(weight: Tensor, record: Record) -> None:
    """Undo a fold that may be unwritten or already undone."""
    if record.kind == "copy" and record.kept is None:
        return
    if record.kind != "record" or checksum(weight) == record.after:
        unfold(weight, record, check=False)


def take_out_fold(
    journal: Journal, weight: Tensor, record: Record, *, check: bool = True, where: str = "", verified: bool = False
) -> None:
    """Unfold a weight and note the inverse. The bits are copied only if arithmetic can't restore them."""
    intact = record.kind == "record" and record.nearest and (verified or checksum(weight) == record.after)
    if intact:
        journal.undo(refold, weight, record)
    else:
        note = partial(_restore, weight, record, dict(record.__dict__), weight.data)
        journal.undo(note, None if record.swapped_for == weight.data_ptr() else weight.detach().clone())
    unfold(weight, record, check=check, where=where, verified=verified)


def take_out_folds(journal: Journal, taken: Sequence[tuple[Tensor, Record, str]], *, check: bool = True) -> None:
    """Call `take_out_fold` for each in order, with `verified=check`; small weights are batched."""
    single, batch = list[tuple[Tensor, Record, str]](), list[Unfold]()
    shared = Counter(weight.data_ptr() for weight, _, _ in taken) if check else Counter[int]()
    for weight, record, where in taken:
        if check and record.kind == "record" and record.nearest and shared[weight.data_ptr()] == 1:
            batch.append(Unfold(weight, record, where, partial(journal.undo, refold, weight, record)))
        else:
            single.append((weight, record, where))
    for weight, record, where in single:
        take_out_fold(journal, weight, record, check=check, where=where, verified=check)
    unfold_all(batch)


def _restore(weight: Tensor, record: Record, fields: dict[str, Any], memory: Tensor, bits: Tensor | None) -> None:
    record.__dict__.update(fields)
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        if bits is not None:
            weight.copy_(bits)
        elif weight.data_ptr() != memory.data_ptr():
            weight.data = memory
