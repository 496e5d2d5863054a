"""Checks that an adapter's tensors fit the slots of a file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from surgery.errors import LoadError, SurgeryError, near_misses
from surgery.onnx.runtime.dtypes import describe_dtype, widened
from surgery.onnx.runtime.slot import Slot

__all__ = ["listed", "problems_of"]

EARLIER = "export a checkpoint from before its numbers grew without limit"
EXPORT = "export the adapter for this file: export_adapter(model, name, onnx_path, out_path)"


def problems_of(
    slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray], *, empty: str, finite: bool = False
) -> list[SurgeryError]:
    """Returns one error for each unknown name, each incomplete site, and each tensor that does not fit.

    `slots`: the file's slots by name; `empty`: as in `Manifest`; `finite`: skip the search for NaN and infinity.
    """
    problems = list(_unknown(slots, tensors))
    if len(tensors) != len(slots) or problems:
        problems += _incomplete_sites(slots, tensors)
    sizes: dict[str, tuple[int, str]] = {}
    for name, slot in slots.items():
        if name in tensors:
            problems += _misfit(slot, tensors[name], sizes, empty, finite)
    if not tensors:
        problems.append(SurgeryError("the adapter has no tensors", fix=EXPORT))
    return problems


def listed(what: str, problems: list[SurgeryError], where: str | None = None) -> LoadError:
    """Returns one error that lists all problems."""
    error = LoadError(problems)
    error.what, error.where = f"{what}: {error.what.split(',')[0]}", where
    if len(problems) == 1:
        only = problems[0]
        error.problems = [SurgeryError(f"{what}: {only.what}", where=only.where, why=only.why, fix=only.fix)]
    return error


def _unknown(slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray]) -> Iterator[SurgeryError]:
    for name in tensors:
        if name not in slots:
            why = near_misses(str(name), slots) or f"it has {len(slots)} slots"
            yield SurgeryError(f"the file has no slot {name!r}", why=why, fix=EXPORT)


def _incomplete_sites(slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray]) -> Iterator[SurgeryError]:
    sites: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots.values():
        sites.setdefault((slot.site, slot.rule), []).append(slot)
    for (site, _), site_slots in sites.items():
        present = [slot.tensor for slot in site_slots if slot.name in tensors]
        missing = [slot.tensor for slot in site_slots if slot.name not in tensors]
        if present and missing:
            why = f"it has {', '.join(present)}, and lacks {', '.join(missing)}"
            yield SurgeryError("the adapter has only a part of a site's tensors", where=site, why=why, fix=EXPORT)


def _misfit(
    slot: Slot, tensor: np.ndarray, sizes: dict[str, tuple[int, str]], empty: str, finite: bool
) -> Iterator[SurgeryError]:
    if not isinstance(tensor, np.ndarray):
        yield SurgeryError("a tensor is not a numpy array", where=slot.name, why=f"it is {type(tensor).__name__}")
        return
    kind = describe_dtype(tensor.dtype)
    if kind != slot.dtype:
        fix = f".astype({slot.dtype!r})" if slot.dtype != "bfloat16" else ".astype(ml_dtypes.bfloat16)"
        why = f"it is {kind}, and the slot {slot.dtype}"
        yield SurgeryError("a tensor has another dtype", where=slot.name, why=why, fix=fix)
        return
    free_axis = slot.free[0] if slot.free else len(slot.shape)
    shape = tensor.shape[:free_axis] + (None,) * len(slot.free) + tensor.shape[free_axis + 1 :]
    if shape != slot.shape or tensor.ndim != len(slot.shape):
        why = f"it is {tensor.shape}, and the slot {_shape(slot)}"
        yield SurgeryError("a tensor has another shape", where=slot.name, why=why, fix=EXPORT)
        return
    if slot.free:
        size = tensor.shape[free_axis]
        if size == 0 and empty == "zeros1":
            yield SurgeryError(
                "a tensor is empty",
                where=slot.name,
                why='the file is for runtimes without empty tensors: "zeros1"',
                fix=EXPORT,
            )
        rank, first = sizes.setdefault(slot.dim or slot.name, (size, slot.name))
        if rank != size:
            why = f"its rank is {size}, and that of {first} is {rank}"
            yield SurgeryError("two tensors of a site have different ranks", where=slot.name, why=why, fix=EXPORT)
    if not finite and tensor.dtype.kind in "fV" and not np.isfinite(widened(tensor)).all():
        yield SurgeryError("a tensor has numbers that are not finite", where=slot.name, fix=EARLIER)


def _shape(slot: Slot) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in slot.shape) + ")"
