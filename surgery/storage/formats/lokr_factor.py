"""The fields of LoKr that its tensors show: how the sizes of a module were divided between the two factors."""

from __future__ import annotations

from typing import Any

from surgery.errors import SurgeryError
from surgery.storage.formats.contents import Change

__all__ = ["lokr_fields"]


def lokr_fields(change: Change, size: tuple[int, ...] | None = None) -> dict[str, Any]:
    """PEFT's `decompose_both` and `decompose_factor` for the tensors of one LoKr.

    `size`: the shape of the module's weight, (out, in, *kernel), if it is known.
    """
    tensors = change.tensors
    first = (
        tensors["lokr_w1"].shape
        if "lokr_w1" in tensors
        else (tensors["lokr_w1_a"].shape[0], tensors["lokr_w1_b"].shape[1])
    )
    if "lokr_w2" in tensors:
        second = tensors["lokr_w2"].shape[:2]
    elif "lokr_t2" in tensors:
        second = (tensors["lokr_w2_a"].shape[1], tensors["lokr_w2_b"].shape[1])
    else:  # of a kernel that is not factored, w2_b has the kernel's numbers, too
        second = (tensors["lokr_w2_a"].shape[0], tensors["lokr_w2_b"].shape[1])
    sizes = [(first[0], first[0] * second[0]), (first[1], first[1] * second[1])]
    if size is not None:
        sizes = [(first[0], size[0]), (first[1], size[1])]
    for factor in (-1, first[0], first[1], *range(2, 1 + max(first))):
        if all(_smaller(total, factor) == small for small, total in sizes):
            return {"decompose_both": "lokr_w1_a" in tensors, "decompose_factor": factor}
    why = f"w1 is {tuple(first)} and w2 is {tuple(second)}, which no single decompose_factor gives"
    raise SurgeryError("the factors of this LoKr can't be represented", where=change.key, why=why)


def _smaller(total: int, factor: int) -> int:
    """The size of the first factor, as LyCORIS and PEFT choose it."""
    if factor > 0 and total % factor == 0:
        return factor
    limit = total if factor < 0 else factor
    return max(size for size in range(1, int(total**0.5) + 1) if total % size == 0 and size <= limit)
