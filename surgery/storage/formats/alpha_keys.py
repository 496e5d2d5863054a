"""The scale as an alpha beside each module, or once in the header: alpha / rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import SurgeryError, abbreviate
from surgery.storage.formats.contents import Change, Contents
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.scale_values import Written, alpha_of, multiply, number, ranks_and_alphas

__all__ = ["read_alpha_keys", "write_alpha_keys"]


_HEADER_ALPHA = ("ss_network_alpha", "network_alpha", "lora_alpha")


def read_alpha_keys(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    common = next((number(header[name], f"the header's {name}") for name in _HEADER_ALPHA if name in header), None)
    for component, changes in contents.changes.items():
        unsaid = [path for path, change in changes.items() if not _take_alpha(change, common)]
        if unsaid:
            count = f", for {len(unsaid)} modules such as {unsaid[0]}," if len(unsaid) < len(changes) else ""
            text = f"the file{count} does not say alpha: it is taken to be the rank, a scale of 1"
            contents.assumed_of.setdefault(component, []).append(text)
    if '"split_qkv": "True"' in str(header.get("ss_network_args", "")):
        contents.assumed.append(
            "the header says split_qkv: the scale is alpha / rank in the file, as every program computes it, and not "
            "that of the training, alpha / rank of one part"
        )


def _take_alpha(change: Change, common: float | None) -> bool:
    """Sets a change's scale by the alpha beside it, or by that of the header; returns whether one of them is there."""
    if change.kind == "oft":  # its alpha bounds a norm
        return True
    tensor = change.tensors.pop("alpha", None)
    if not change.rank:  # a change in full has no rank, and LyCORIS gives it the scale 1
        change.scale = 1.0
        return True
    if tensor is not None:
        values = tensor.read()
        if values.numel() != 1:
            raise SurgeryError("an alpha is not one number", where=tensor.key, why=f"its shape is {tensor.shape}")
        change.scale = number(values.item(), f"the alpha {tensor.key}") / change.rank
    elif common is not None:
        change.scale = common / change.rank
    return tensor is not None or common is not None


def write_alpha_keys(contents: Contents, written: Written) -> None:
    multiplied, unopened = list[str](), list[str]()
    for _, path, change in contents.each():
        if not change.rank and change.kind != "lokr":
            continue
        if change.kind == "lokr":
            if _multiply_lokr_scale(change):
                multiplied.append(path)
            if _is_larger_first(change):
                unopened.append(path)
        dtype = next(iter(change.tensors.values())).dtype
        alpha = torch.tensor(alpha_of(change.scale, change.rank) if change.rank else 1.0, dtype=torch.float64)
        fits = dtype.is_floating_point and torch.equal(alpha.to(dtype).double(), alpha)
        change.tensors["alpha"] = FileTensor.of(alpha.to(dtype if fits else torch.float32))
    ranks, alphas = ranks_and_alphas(contents)
    written.values |= {"rank": ranks[0] if ranks else 0, "alpha": alphas[0] if alphas else 1}
    if multiplied:
        where = abbreviate(multiplied, "modules")
        written.notes.append(f"LyCORIS has no scale for a LoKr in full: it is multiplied into lokr_w1, at {where}")
    if unopened:
        where = abbreviate(unopened, "modules")
        written.notes.append(f"LyCORIS itself does not open a LoKr whose first factor is the larger one, as at {where}")


def _multiply_lokr_scale(change: Change) -> bool:
    """Multiplies the scale into a LoKr in full, to which LyCORIS gives the scale 1. Returns whether it did."""
    tensors, scale = change.tensors, change.scale
    if not {"lokr_w1", "lokr_w2"} <= set(tensors) or scale == 1:
        return False
    tensors["lokr_w1"] = tensors["lokr_w1"].convert(lambda w1: multiply(w1, scale))
    change.scale = 1.0
    return True


def _is_larger_first(change: Change) -> bool:
    """Whether the first factor is the larger one: LyCORIS divides sizes so that it is the smaller one."""
    tensors = change.tensors
    if "lokr_w1" not in tensors or "lokr_t2" in tensors:
        return False
    halves = [tensors.get("lokr_w2") or tensors[f"lokr_w2_{name}"] for name in "ab"]
    second = [half.shape[axis] for axis, half in enumerate(halves)]
    return any(one > two for one, two in zip(tensors["lokr_w1"].shape, second, strict=True))
