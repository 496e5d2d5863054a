"""Low-rank tensors in another rule's code: another scale, another rank, and room for more rank than is used.

Where A and B have room for more than their rank, what is beyond is zero in both. So it does nothing, and has no
gradient either: a half's gradient has the other half as a factor.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rules._layouts import Part, column_norm
from rules._low_rank import LowRankRule
from surgery import LiveSite, Rule, RuleError

# What LoRA's tensors can make up for, or what only matters in training.
HELD = ("rank", "alpha", "rslora", "rank_pattern", "alpha_pattern", "max_rank", "dropout", "bias", "dtype")


def tensors(rule: LowRankRule, live: Any, site: LiveSite) -> dict[str, Tensor]:
    """A rule's tensors as the code of another wants them to compute the same."""
    more = [name for name in ("lora_bias", "dora") if not getattr(rule, name)]  # in code that has them: as if not
    check(rule, live, *HELD, *more)
    if rule.dropout != live.dropout:
        site.notes.append(f"dropout={rule.dropout} is not taken over: it stays {live.dropout}")
    made, ratio = {}, rule.scale_at(site.path) / live.scale_at(site.path)
    for part, room in zip(rule.layout(site).parts, live.layout(site).parts, strict=True):
        A, B, magnitude = (part.prefix + name for name in ("A", "B", "magnitude"))
        made[A], made[B] = fitted(site.params[A], site.params[B], part, room, site.path)
        made[B] = scaled(made[B], ratio, site)
        if rule.dora:
            made[magnitude] = site.params[magnitude]
    if rule.lora_bias:
        made["B_bias"] = scaled(site.params["B_bias"], ratio, site)
    return completed(live, site, made)


def completed(rule: LowRankRule, site: LiveSite, made: dict[str, Tensor]) -> dict[str, Tensor]:
    """With what a rule has beside A and B, where that is not given: such that it changes nothing."""
    parts = rule.layout(site).parts
    for part in parts if rule.dora else ():
        A, B, magnitude = (part.prefix + name for name in ("A", "B", "magnitude"))
        if magnitude not in made:
            delta = part.delta(made[A], made[B]) * rule.scale_at(site.path)
            made[magnitude] = column_norm(part, site.tensor(part.weight).to(delta.dtype) + delta)
    if rule.lora_bias and "B_bias" not in made:
        made["B_bias"] = made["B"].new_zeros(parts[0].out)
    return made


def used(tensor: Tensor, which: str, part: Part) -> Tensor:
    """What a part of this rank takes up of A or B with room for more: a view. A's ranks lie group by group."""
    rank = part.A[0] // part.groups
    return tensor.unflatten(0, (part.groups, -1))[:, :rank] if which == "A" else tensor[:, :rank]


def beyond(tensor: Tensor, which: str, part: Part) -> Tensor:
    rank = part.A[0] // part.groups
    return tensor.unflatten(0, (part.groups, -1))[:, rank:] if which == "A" else tensor[:, rank:]


def filled(fill: Callable[[Tensor], Any], which: str, part: Part, room: Part) -> Callable[[Tensor], Any]:
    """`fill` for as much of A or B as its rank takes up, with the numbers that it would draw without more room."""

    def start(tensor: Tensor) -> None:
        made = tensor.new_empty(part.A if which == "A" else part.B)
        fill(made)
        put(tensor, made, which, part)

    return fill if part == room else start


def put(room: Tensor, tensor: Tensor, which: str, part: Part) -> Tensor:
    """Put A or B of a part into a tensor that has room for it."""
    held = used(room.zero_(), which, part)
    held.copy_(tensor.unflatten(0, (part.groups, -1)) if which == "A" else tensor)
    return room


def fitted(A: Tensor, B: Tensor, part: Part, room: Part, path: str) -> tuple[Tensor, Tensor]:
    """A and B of one part in the shapes of another; `RuleError` where there is no room for the rank they use."""
    if part == room:
        return A, B
    if part.groups != room.groups:
        raise RuleError(f"ranks {part.A[0]} and {room.A[0]} lie otherwise in a convolution with groups", where=path)
    if part.A[0] <= room.A[0]:
        return put(A.new_empty(room.A), A, "A", part), put(B.new_empty(room.B), B, "B", part)
    if bool(beyond(A, "A", room).any()) and bool(beyond(B, "B", room).any()):
        raise RuleError(
            f"there is no room for rank {part.A[0]}",
            where=path,
            why=f"the tensors in the model hold rank {room.A[0]}",
            fix=f"pad_rank(model, adapter, {part.A[0]}) before compiling, or LoraRule(…, max_rank={part.A[0]})",
        )
    return used(A, "A", room).reshape(room.A), used(B, "B", room).reshape(room.B)


def scaled(tensor: Tensor, ratio: float, site: LiveSite) -> Tensor:
    """The tensor times what one scale is of another: rounded once where that is no power of two, which is noted."""
    if ratio == 1:
        return tensor
    if math.frexp(ratio)[0] == 0.5:
        return tensor * ratio
    bits = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}.get(tensor.dtype)
    site.notes.append(f"multiplied by {ratio:.6g} for another scale, rounded to {bits} bits")
    wide = torch.float32 if tensor.device.type == "mps" else torch.float64
    return (tensor.to(wide) * ratio).to(tensor.dtype)


def check(rule: Rule, live: Rule, *held: str) -> None:
    """`RuleError` where two rules of a kind differ in more than the fields `held`."""
    told = [name for name in rule.differing(live) if name not in held]
    if told:
        why = ", ".join(f"{name}={getattr(live, name)!r} there, {getattr(rule, name)!r} here" for name in told)
        fix = "load it as an adapter of its own: load_adapter"
        raise RuleError(f"a {rule.label} can't take the place of one with other code", why=why, fix=fix)
