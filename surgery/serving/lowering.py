"""Changes an adapter's low-rank factors to what a program takes: one rank, one scale, all modules of a group.

Each function edits the changes, and tells what it did as `Steps`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.serving.profile import TargetProfile
from surgery.storage.formats.contents import Change
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.scale_values import alpha_of

__all__ = ["Steps", "fill_groups", "fold_scales", "pad_ranks", "set_dtypes"]


@dataclass
class Steps:
    """What was done at each path, and the share of the change that it loses."""

    done: dict[str, list[str]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    def add(self, path: str, text: str, error: float = 0.0) -> None:
        self.done.setdefault(path, []).append(text)
        self.errors[path] = math.hypot(self.errors.get(path, 0.0), error)


def fill_groups(
    profile: TargetProfile,
    changes: dict[str, Change],
    paths: Collection[str] | None,
    outputs_of: Callable[[str], int | None],
    steps: Steps,
) -> list[SurgeryError]:
    """Adds zeros for the modules that a program wants beside others. `outputs_of`: the number of a module's outputs."""
    problems: list[SurgeryError] = []
    for group in profile.groups:
        for path in list(changes):
            parent, _, name = path.rpartition(".")
            if name not in group or changes[path].kind != "lora":
                continue
            for other in group:
                missing = f"{parent}.{other}".strip(".")
                if missing in changes:
                    continue
                size = outputs_of(missing)
                if size is None:
                    if paths is None or missing in paths:
                        why = f"{profile.title} wants {', '.join(group)} together, and the files do not tell its size"
                        problems.append(
                            SurgeryError("a change is missing", where=missing, why=why, fix="give the model")
                        )
                    continue  # the model has no such module
                changes[missing] = _zeros(changes[path], size)
                steps.add(missing, f"zeros are written, since {profile.title} wants {', '.join(group)} together")
    return problems


def _zeros(like: Change, size: int) -> Change:
    A, B = like.tensors["A"], like.tensors["B"]
    down, up = torch.zeros(A.shape, dtype=A.dtype), torch.zeros((size, *B.shape[1:]), dtype=B.dtype)
    return Change("lora", {"A": FileTensor.of(down), "B": FileTensor.of(up)}, like.scale, like.rank)


def pad_ranks(profile: TargetProfile, changes: Mapping[str, Change], steps: Steps) -> None:
    """Fills all factors up to the largest rank, where the program has one rank for all modules."""
    low_rank = {path: change for path, change in changes.items() if change.kind == "lora"}
    rank = max((change.rank for change in low_rank.values()), default=0)
    for path, change in low_rank.items() if profile.ranks == "one" else ():
        if change.rank == rank:
            continue
        more = rank - change.rank
        change.tensors["A"] = change.tensors["A"].convert(lambda A, more=more: _padded(A, 0, more))
        change.tensors["B"] = change.tensors["B"].convert(lambda B, more=more: _padded(B, 1, more))
        steps.add(path, f"rank {change.rank} is filled up with zeros to {rank}")
        change.rank = rank


def _padded(tensor: Tensor, axis: int, more: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = more
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def fold_scales(profile: TargetProfile, changes: Mapping[str, Change], steps: Steps) -> list[SurgeryError]:
    """Multiplies into B what the program can't be told of the scales."""
    if profile.scale == "module" or not changes:
        return []
    low_rank = {path: change for path, change in changes.items() if change.kind == "lora"}
    wanted = _wanted(profile, low_rank)
    problems: list[SurgeryError] = []
    for path, change in changes.items():
        if change.kind != "lora":
            if change.scale != 1:
                problems.append(SurgeryError(f"{profile.title} has no scale for a {change.kind}", where=path))
            continue
        factor = change.scale / wanted[path]
        if factor == 1:
            continue
        B = change.tensors["B"]
        error = _rounding(B.read(), factor)
        change.tensors["B"] = B.convert(lambda B, factor=factor: _times(B, factor))
        change.scale = wanted[path]
        exact = "exact" if not error else f"rounded to {str(B.dtype).removeprefix('torch.')}"
        steps.add(path, f"{factor:g} of the scale is multiplied into B, {exact}", error)
    return problems


def _wanted(profile: TargetProfile, changes: Mapping[str, Change]) -> dict[str, float]:
    """The scale of each module that the file can say."""
    if profile.scale == "none":
        return dict.fromkeys(changes, 1.0)
    if profile.scale == "scale":
        common = Counter(change.scale for change in changes.values()).most_common(1)
        return dict.fromkeys(changes, common[0][0] if common else 1.0)
    alphas = Counter(alpha_of(change.scale, change.rank) for change in changes.values()).most_common(1)
    return {path: alphas[0][0] / change.rank for path, change in changes.items()}


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)


def _rounding(tensor: Tensor, factor: float) -> float:
    """The share of a tensor that a multiplication loses to its dtype."""
    exact = tensor.double() * factor
    norm = float(exact.norm())
    return float((exact - exact.to(tensor.dtype).double()).norm()) / norm if norm else 0.0


def set_dtypes(profile: TargetProfile, changes: Mapping[str, Change], steps: Steps) -> None:
    """Casts tensors of dtypes that the program does not read to float32."""
    for path, change in changes.items() if profile.dtypes else ():
        for name, tensor in change.tensors.items():
            if (dtype := str(tensor.dtype).removeprefix("torch.")) in profile.dtypes:
                continue
            values = tensor.read().double()
            norm = float(values.norm())
            error = float((values - values.float().double()).norm()) / norm if norm else 0.0
            change.tensors[name] = tensor.convert(lambda value: value.float())
            steps.add(path, f"{name} is cast from {dtype} to float32", error)
