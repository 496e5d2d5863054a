"""Whether an adapter's tensors are what the slots of a file hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from surgery.errors import LoadError, SurgeryError, near_misses
from surgery.onnx.runtime.dtypes import describe_dtype, widened
from surgery.onnx.runtime.slot import Slot

__all__ = ["listed", "problems_of"]


def problems_of(
    slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray], *, empty: str, finite: bool = False
) -> list[SurgeryError]:
    """One error for each unknown name, each site of which a part is given, and each tensor that does not fit.

    `slots`: a file's, by name, and `empty`: how it has none of a rank, as in its `Manifest`; `finite`: that all numbers
    are is known, since they are those that were written.
    """
    problems = list(_unknown(slots, tensors))
    if len(tensors) != len(slots) or problems:
        problems += _halves(slots, tensors)
    sizes: dict[str, tuple[int, str]] = {}
    for name, slot in slots.items():
        if name in tensors:
            problems += _misfit(slot, tensors[name], sizes, empty, finite)
    if not tensors:
        problems.append(SurgeryError("the adapter has no tensors"))
    return problems


def listed(what: str, problems: list[SurgeryError], where: str | None = None) -> LoadError:
    """All of them as one error."""
    error = LoadError(problems)
    error.what, error.where = f"{what}: {error.what.split(',')[0]}", where
    if len(problems) == 1:
        only = problems[0]
        error.problems = [SurgeryError(f"{what}: {only.what}", where=only.where, why=only.why, fix=only.fix)]
    return error


def _unknown(slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray]) -> Iterator[SurgeryError]:
    for name in tensors:
        if name not in slots:
            why = near_misses(str(name), slots) or f"it has {len(slots)} others"
            yield SurgeryError(f"the file has no slot {name!r}", why=why)


def _halves(slots: Mapping[str, Slot], tensors: Mapping[str, np.ndarray]) -> Iterator[SurgeryError]:
    sites: dict[tuple[str, str], list[Slot]] = {}
    for slot in slots.values():
        sites.setdefault((slot.site, slot.rule), []).append(slot)
    for (site, _), wanted in sites.items():
        present = [slot.tensor for slot in wanted if slot.name in tensors]
        lacking = [slot.tensor for slot in wanted if slot.name not in tensors]
        if present and lacking:
            why = f"there is {', '.join(present)} and no {', '.join(lacking)}"
            yield SurgeryError("the adapter has a part of a site", where=site, why=why)


def _misfit(
    slot: Slot, tensor: np.ndarray, sizes: dict[str, tuple[int, str]], empty: str, finite: bool
) -> Iterator[SurgeryError]:
    if not isinstance(tensor, np.ndarray):
        yield SurgeryError("a tensor is no numpy array", where=slot.name, why=f"it is {type(tensor).__name__}")
        return
    kind = describe_dtype(tensor.dtype)
    if kind != slot.dtype:
        fix = f".astype({slot.dtype!r})" if slot.dtype != "bfloat16" else ".astype(ml_dtypes.bfloat16)"
        why = f"it is {kind}, and the slot {slot.dtype}"
        yield SurgeryError("a tensor has another dtype", where=slot.name, why=why, fix=fix)
        return
    at = slot.free[0] if slot.free else len(slot.shape)
    said = tensor.shape[:at] + (None,) * len(slot.free) + tensor.shape[at + 1 :]
    if said != slot.shape or tensor.ndim != len(slot.shape):
        why = f"it is {tensor.shape}, and the slot {_shape(slot)}"
        yield SurgeryError("a tensor has another shape", where=slot.name, why=why)
        return
    if slot.free:
        size = tensor.shape[at]
        if size == 0 and empty == "zeros1":
            yield SurgeryError(
                "a tensor is empty", where=slot.name, why='the file is for runtimes without such: "zeros1"'
            )
        known, first = sizes.setdefault(slot.dim or slot.name, (size, slot.name))
        if known != size:
            why = f"its rank is {size}, and that of {first} is {known}"
            yield SurgeryError("two tensors of a site have different ranks", where=slot.name, why=why)
    if not finite and tensor.dtype.kind in "fV" and not np.isfinite(widened(tensor)).all():
        yield SurgeryError("a tensor has numbers that are not finite", where=slot.name)


def _shape(slot: Slot) -> str:
    return "(" + ", ".join("any" if size is None else str(size) for size in slot.shape) + ")"
