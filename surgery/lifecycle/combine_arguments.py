"""Checks the arguments of `combine`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch

from surgery.authoring.combination import METHODS, Combination, Method
from surgery.errors import SurgeryError, near_misses
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import ModelState

__all__ = ["requested_combination"]


def requested_combination(
    state: ModelState,
    weights: Mapping[str, float],
    method: Method,
    rank: int | None,
    density: float | None,
    majority_sign: Literal["total", "frequency"],
    clamp: float | None,
    seed: int | torch.Generator | None,
) -> Combination:
    """The combination that these arguments ask for; `SurgeryError` if a value is wrong."""
    if not isinstance(weights, Mapping) or not weights:
        fix = 'a mapping from adapters to numbers: {"a": 0.7, "b": 0.3}'
        raise SurgeryError(f"{weights!r} is not a mapping of weights", fix=fix)
    adapter_names(state, list(weights))
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise SurgeryError(f"the weight {weight!r} of {name!r} is not a finite number")
    if method not in METHODS:
        why = near_misses(str(method), METHODS) or f"the methods are {', '.join(METHODS)}"
        raise SurgeryError(f"there is no method {method!r}", why=why)
    method = "dare_linear" if method == "dare" else method
    arguments = {"rank": rank, "density": density, "majority_sign": majority_sign, "clamp": clamp, "seed": seed}
    for name, fix in _unused_arguments(method):
        if arguments[name] not in (None, "total"):
            raise SurgeryError(f"method={method!r} does not use {name}={arguments[name]!r}", fix=fix)
    if method.startswith(_PRUNED) and density is None:
        fix = "give the share of each tensor that stays, such as density=0.5"
        raise SurgeryError(f"method={method!r} needs a density", fix=fix)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise SurgeryError(f"rank={rank!r} is not a whole number from 1")
    for name in ("density", "clamp"):
        if (value := arguments[name]) is not None and not _is_share(value):
            raise SurgeryError(f"{name}={value!r} is not a number above 0 and at most 1")
    if majority_sign not in ("total", "frequency"):
        raise SurgeryError(f"majority_sign={majority_sign!r} is not 'total' or 'frequency'")
    if seed is not None and type(seed) is not int and not isinstance(seed, torch.Generator):
        raise SurgeryError(f"seed={seed!r} is neither a whole number nor a torch.Generator")
    draw = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    named = {name: float(weight) for name, weight in weights.items()}
    return Combination(method, named, (), rank, float(density or 1), majority_sign, clamp, draw)


_PRUNED = ("ties", "dare", "magnitude_prune")


def _unused_arguments(method: Method) -> Iterator[tuple[str, str]]:
    """The arguments that a method does not use, and which methods use them."""
    if not method.endswith("svd"):
        yield from ((name, "the methods that end in 'svd' take one") for name in ("rank", "clamp"))
    if not method.startswith(_PRUNED):
        yield "density", "'ties', 'dare…' and 'magnitude_prune' take one"
    if "ties" not in method:
        yield "majority_sign", "the methods with 'ties' elect signs"
    if not method.startswith("dare"):
        yield "seed", "the methods with 'dare' draw numbers"


def _is_share(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1
