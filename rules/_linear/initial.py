"""Initial values of LoRA's A and B: PEFT's init_lora_weights."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery.rules._linear.layouts import Layout, WeightPart

NAMES = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_N", "olora", "random", "mica", "loftq")


def is_known(name: Any) -> bool:
    return isinstance(name, str) and (name in NAMES[:4] or name in NAMES[5:] or _niter(name) is not None)


def why_not(name: str, layout: Layout, is_complex: bool = False) -> str | None:
    """Returns why a module can't have these initial values, or None."""
    if name in ("kaiming", "gaussian", "random"):
        return None
    if layout.kind not in ("linear", "conv1d", *(["embedding"] if name == "mica" else [])):
        return f"init={name!r} is for Linear and Conv1D"
    part = layout.parts[0]
    rank = part.A[0]
    if is_complex:
        return f"init={name!r} works on real numbers, and the weight is complex"
    if name == "orthogonal":
        return None if rank % 2 == 0 else f"init='orthogonal' needs an even rank, not {rank}"
    if rank > min(part.shape):
        return f"init={name!r} takes {rank} directions of a weight that has {min(part.shape)}"
    return None


def fill(name: str, which: str, part: WeightPart) -> Callable[[Tensor], Any]:
    """Returns the function that fills A or B in place, for initial values that do not depend on each other."""
    if part.looked_up:  # in an embedding A starts at zero
        return Tensor.zero_ if which == "A" and name != "random" else nn.init.normal_
    if which == "B":
        return _kaiming if name == "random" else Tensor.zero_
    if name == "gaussian":
        return _gaussian
    return _kaiming


def fill_transposed(name: str) -> Callable[[Tensor], Any]:
    """Returns the function that fills the B of an embedding as the A of the head that shares it."""
    fills: dict[str, Callable[[Tensor], Any]] = {"random": nn.init.normal_, "gaussian": _gaussian}
    return lambda B: fills.get(name, _kaiming)(B.t())


def needs_weight(name: str) -> bool:
    """Whether the initial values of A and B depend on each other or on the weight."""
    return name in ("orthogonal", "olora", "mica", "loftq") or name.startswith("pissa")


def trains(name: str, which: str) -> bool:
    """Whether A or B is trained. MiCA does not train B."""
    return name != "mica" or which == "A"


def fill_jointly(name: str, part: WeightPart, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> bool:
    """Fills A and B from each other or the weight. Returns whether scale · B A is subtracted from the weight."""
    if not needs_weight(name):
        return False
    if name == "orthogonal":
        _orthogonal(A, B)
        return False
    matrix = (weight.t() if part.turned else weight).detach().to(torch.float32)
    rank = A.shape[0]
    if name == "olora":
        q, r = torch.linalg.qr(matrix)
        A.copy_(r[:rank])
        B.copy_(q[:, :rank])
        return True
    if name == "mica":  # the directions of the smallest singular values of the weight
        B.copy_(torch.linalg.svd(matrix, full_matrices=False)[0][:, -rank:])
        A.zero_()
        return False
    niter = _niter(name)
    if niter is None:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(matrix, rank, niter=niter)
        vh = v.t()
    root = (s / scale).sqrt()
    A.copy_(root.unsqueeze(1) * vh)
    B.copy_(u * root)
    return True


def _gaussian(A: Tensor) -> Tensor:
    return nn.init.normal_(A, std=1 / len(A))


def _kaiming(tensor: Tensor) -> Tensor:
    """`nn.init.kaiming_uniform_(tensor, a=math.sqrt(5))`: the initial values of torch's Linear, and of PEFT's A.

    The bits are equal, in a quarter of the time, which matters for thousands of sites.
    """
    fan_in = math.prod(tensor.shape[1:])
    return tensor.uniform_(-_bound(fan_in), _bound(fan_in)) if tensor.numel() else tensor


@functools.cache
def _bound(fan_in: int) -> float:
    return math.sqrt(3.0) * (nn.init.calculate_gain("leaky_relu", math.sqrt(5)) / math.sqrt(fan_in))


def _orthogonal(A: Tensor, B: Tensor) -> None:
    # B A = 0, and neither is zero: A consists of the odd rows of an orthogonal matrix, B of the even rows.
    rank = A.shape[0]
    q, _ = torch.linalg.qr(torch.randn(rank, rank))
    A.copy_(torch.randn(A.shape[1], rank // 2).mm(q[0::2]).t() / 10)
    B.copy_(torch.randn(rank // 2, B.shape[0]).t().mm(q[1::2]) / 10)


def _niter(name: str) -> int | None:
    match = re.fullmatch(r"pissa_niter_(\d{1,3})", name)
    return int(match[1]) if match else None
