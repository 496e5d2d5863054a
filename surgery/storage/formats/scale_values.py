"""What is said of the scale of changes: what is written of it, and numbers that are read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from surgery.errors import SurgeryError
from surgery.storage.formats.contents import Contents

__all__ = ["Scale", "Written", "alpha_of", "multiply", "number", "ranks_and_alphas"]


@dataclass
class Written:
    """What is written beside the tensors: values for the template of the settings, and fields of the header."""

    values: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Scale(NamedTuple):
    """`read` sets the scale of every change. `write` says the scales, and folds into B what can't be said."""

    read: Callable[[Contents, Any, Mapping[str, Any]], None]
    write: Callable[[Contents, Written], None]


def alpha_of(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is the scale, to the bit if there is one."""
    alpha = scale * rank
    for value in (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0)):
        if rank and value / rank == scale:
            return int(value) if value == int(value) else value
    return alpha


def number(value: Any, what: str) -> float:
    """A number above 0 of a file."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = 0.0
    if not 0 < result < math.inf or isinstance(value, bool):
        raise SurgeryError(f"{what}={str(value)[:40]!r} is not a number above 0")
    return result


def ranks_and_alphas(contents: Contents) -> tuple[list[int], list[float]]:
    """The ranks and the alphas of the changes, the most frequent first."""
    changes = [change for _, _, change in contents.each() if change.rank]
    ranks = Counter(change.rank for change in changes)
    alphas = Counter(alpha_of(change.scale, change.rank) for change in changes)
    return [rank for rank, _ in ranks.most_common()], [alpha for alpha, _ in alphas.most_common()]


def multiply(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)
