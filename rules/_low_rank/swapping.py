"""Converts low-rank tensors for another rule's code: another scale, another rank, or room for a larger rank.

If A and B have room for more than their rank, the rest is zero in both. So it has no effect and no gradient: the
gradient of one factor has the other factor as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from surgery import LiveSite, Rule, RuleError
from surgery.rules._linear.layouts import WeightPart, column_norm
from surgery.rules._low_rank.rule import LowRankRule

# Fields that may differ: the tensors can be converted, or the field only matters in training.
ADJUSTABLE = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "max_rank", "dropout", "bias", "dtype")


def tensors(rule: LowRankRule, live: LowRankRule, site: LiveSite) -> dict[str, Tensor]:
    """Converts a rule's tensors so that the code of another rule of its class computes the same with them."""
    more = [
        name for name in ("lora_bias", "dora") if not getattr(rule, name)
    ]  # the live code may have them: then they get neutral values
    check(rule, live, *ADJUSTABLE, *more)
    if rule.dropout != live.dropout:
        site.notes.append(f"dropout={rule.dropout} is not taken over: it stays {live.dropout}")
    results, ratio = dict[str, Tensor](), rule.scale_at(site.path) / live.scale_at(site.path)
    for part, room in zip(rule.layout(site).parts, live.layout(site).parts, strict=True):
        part_tensors = fit(rule, site.params, part, room, site.path)
        if ratio != 1:
            if not rule.invertible:
                why = f"it is {rule.scale_at(site.path):g} here, {live.scale_at(site.path):g} there"
                raise RuleError(f"the tensors of {rule.label} can't be had for another scale", why=why)
            A, B = rule.factors_of(part_tensors, room)
            scaled_tensors = rule.tensors_for(room, A, scale(B, ratio, site))
            part_tensors = {part.prefix + name: tensor for name, tensor in scaled_tensors.items()}
        results.update(part_tensors)
        if rule.dora:
            results[part.prefix + "magnitude"] = site.params[part.prefix + "magnitude"]
    if rule.lora_bias:
        results["B_bias"] = scale(site.params["B_bias"], ratio, site)
    return complete(live, site, results)


def complete(rule: LowRankRule, site: LiveSite, results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Adds the rule's tensors beside A and B that are missing, with values that change nothing."""
    parts = rule.layout(site).parts
    for part in parts if rule.dora else ():
        A, B, magnitude = (part.prefix + name for name in ("A", "B", "magnitude"))
        if magnitude not in results:
            delta = part.delta(results[A], results[B]) * rule.scale_at(site.path)
            results[magnitude] = column_norm(part, site.tensor(part.weight).to(delta.dtype) + delta)
    if rule.lora_bias and "B_bias" not in results:
        results["B_bias"] = results["B"].new_zeros(parts[0].out)
    return results


def occupied_view(tensor: Tensor, shape: Sequence[int], part: WeightPart) -> Tensor:
    """Returns the view of a larger tensor that a tensor of this shape occupies.

    The ranks of a grouped convolution are stored group by group, so an axis of the ranks of all groups becomes two
    axes.
    """
    view = tensor
    for axis in reversed(range(len(shape))):
        if tensor.shape[axis] == shape[axis]:
            continue
        if part.groups > 1 and shape[axis] == part.A[0]:
            view = view.unflatten(axis, (part.groups, -1)).narrow(axis + 1, 0, shape[axis] // part.groups)
        else:
            view = view.narrow(axis, 0, shape[axis])
    return view


def fill_room(fill: float | Callable[[Tensor], Any], shape: Sequence[int], part: WeightPart) -> Callable[[Tensor], Any]:
    """Returns a fill of the part that the rank occupies, with the random numbers of a tensor without more room."""

    def start(tensor: Tensor) -> None:
        result = tensor.new_empty(shape)
        if callable(fill):
            fill(result)
        else:
            result.fill_(fill)
        copy_into(tensor, result, part)

    return start


def copy_into(room: Tensor, tensor: Tensor, part: WeightPart) -> Tensor:
    """Copies a tensor into a larger one, and fills the rest with zeros."""
    view = occupied_view(room.zero_(), tensor.shape, part)
    view.copy_(tensor.reshape(view.shape))
    return room


def fit(
    rule: LowRankRule, params: Mapping[str, Tensor], part: WeightPart, room: WeightPart, path: str
) -> dict[str, Tensor]:
    """Converts a rule's tensors of one part to the shapes of another. `RuleError` if their rank does not fit."""
    shapes = {part.prefix + name: shape for name, shape in rule.shapes(room).items()}
    if part == room:
        return {name: params[name] for name in shapes}
    if part.groups != room.groups:
        raise RuleError(f"ranks {part.A[0]} and {room.A[0]} lie otherwise in a convolution with groups", where=path)
    if part.A[0] <= room.A[0]:
        return {name: copy_into(params[name].new_empty(shape), params[name], part) for name, shape in shapes.items()}
    A, B = rule.factors_of(params, part)
    if _beyond(A, room.A, room) and _beyond(B, room.B, room):
        rank, why = part.A[0], f"the tensors in the model hold rank {room.A[0]}"
        fix = f"pad_rank(model, adapter, {rank}) before compiling, or {rule.label}(…, max_rank={rank})"
        fix = fix if rule.has_field("max_rank") else "load it as an adapter of its own: load_adapter"
        raise RuleError(f"there is no room for rank {rank}", where=path, why=why, fix=fix)
    return {name: occupied_view(params[name], shape, room).reshape(shape) for name, shape in shapes.items()}


def _beyond(tensor: Tensor, shape: Sequence[int], part: WeightPart) -> bool:
    """Whether a factor has entries other than zeros outside the region that a part occupies."""
    rest = tensor.clone()
    occupied_view(rest, shape, part).zero_()
    return bool(rest.any())


def scale(tensor: Tensor, ratio: float, site: LiveSite) -> Tensor:
    """Multiplies a tensor by the ratio of two scales. A ratio that is not a power of two rounds once, and is noted."""
    if ratio == 1:
        return tensor
    if math.frexp(ratio)[0] == 0.5:
        return tensor * ratio
    bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(tensor.dtype)
    site.notes.append(f"multiplied by {ratio:.6g} for another scale, rounded to {bits} bits")
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    return (tensor.to(wide) * ratio).to(tensor.dtype)


def check(rule: Rule, live: Rule, *adjustable: str) -> None:
    """Raises `RuleError` if two rules of a class differ in other fields than the adjustable ones."""
    differing = [name for name in rule.differing_fields(live) if name not in adjustable]
    if differing:
        why = ", ".join(f"{name}={getattr(live, name)!r} there, {getattr(rule, name)!r} here" for name in differing)
        fix = "load it as an adapter of its own: load_adapter"
        raise RuleError(f"a {rule.label} can't take the place of one with other code", why=why, fix=fix)
