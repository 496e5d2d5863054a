"""The formulas of the methods that change a weight, written out in plain torch: tensors in, weight and bias out."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Params = Mapping[str, Tensor]
Changed = tuple[Tensor, Tensor]  # weight (out, in, *kernel) and bias


def ia3(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    s = params["scale"]
    if not rule.feedforward:
        return w * s.view(-1, *(1,) * (w.dim() - 1)), b * s
    w = w.clone()
    groups = len(s) // w.shape[1]
    for o, i in itertools.product(range(w.shape[0]), range(w.shape[1])):
        w[o, i] *= s[o // (w.shape[0] // groups) * w.shape[1] + i]
    return w, b


def vera(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    return w + params["b"].diag() @ params["B"] @ params["d"].diag() @ params["A"], b


def effective(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Σ_ij core[i, j] a[i, out] b[j, in]."""
    return sum(  # type: ignore[return-value]
        core[i, j] * a[i].view(-1, 1, *(1,) * (core.dim() - 2)) * b[j].view(1, -1, *(1,) * (core.dim() - 2))
        for i, j in itertools.product(range(len(a)), range(len(b)))
    )


def loha(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    if "t1" in params:
        first, second = (effective(params[f"t{n}"], params[f"w{n}_a"], params[f"w{n}_b"]) for n in (1, 2))
    else:
        first, second = (params[f"w{n}_a"] @ params[f"w{n}_b"] for n in (1, 2))
    return w + rule.alpha / rule.rank * (first * second).reshape(w.shape), b


def lokr(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    w1 = params["w1"] if "w1" in params else params["w1_a"] @ params["w1_b"]
    if "w2" in params:
        w2 = params["w2"]
    elif "t2" in params:
        w2 = effective(params["t2"], params["w2_a"], params["w2_b"])
    else:
        w2 = params["w2_a"] @ params["w2_b"]
    o, i = w1.shape
    w2 = w2.reshape(w.shape[0] // o, w.shape[1] // i, *w.shape[2:])
    rows = [torch.cat([w1[row, column] * w2 for column in range(i)], 1) for row in range(o)]
    return w + rule.alpha / rule.rank * torch.cat(rows, 0), b


def skew(numbers: Tensor, size: int) -> Tensor:
    q = torch.zeros(size, size)
    places = list(itertools.combinations(range(size), 2))
    for (i, j), number in zip(places, numbers, strict=True):
        q[i, j], q[j, i] = number, -number
    return q


def oft(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    width = math.prod(w.shape[1:])
    size = rule.block_size or width // rule.blocks
    blocks = []
    for row in params["R"]:
        q, eye = skew(row, size), torch.eye(size)
        if rule.coft:
            q = q * min(1.0, rule.eps / math.sqrt(len(params["R"])) / float(q.detach().norm()))
        if rule.use_cayley_neumann:
            powers = [torch.linalg.matrix_power(q, n) for n in range(5)]
            assert rule.num_cayley_neumann_terms == 5
            blocks.append(powers[0] + 2 * powers[1] + 2 * powers[2] + 2 * powers[3] + powers[4])
        else:
            blocks.append((eye - q) @ torch.linalg.inv(eye + q))
    blocks = blocks * (width // size) if rule.block_share else blocks
    return (w.flatten(1) @ torch.block_diag(*blocks).T).view(w.shape), b


def boft(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    """With the permutation matrices of the paper's code: within a block, even half blocks first, then odd ones."""
    width, rows = math.prod(w.shape[1:]), w.flatten(1)
    size = params["R"].shape[-1]
    for i, factor in enumerate(params["R"]):
        length, half = size * 2**i, size // 2
        chunks = [torch.arange(at, at + half) for at in range(0, length, half)] if i else [torch.arange(length)]
        order = torch.cat(chunks[::2] + chunks[1::2])
        P = torch.eye(width)[torch.cat([start + order for start in range(0, width, length)])]
        q = [(r - r.T) / 2 for r in factor]
        turns = torch.block_diag(*((torch.eye(size) - item) @ torch.linalg.inv(torch.eye(size) + item) for item in q))
        rows = rows @ (P @ turns @ P.T).T
    return (rows * params["s"]).view(w.shape), b


def hra(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    rows, vectors = w.flatten(1), []
    for u in params["u"].T:
        if rule.apply_GS:
            for other in vectors:
                u = u - (u @ other) * other
        u = u / u.norm()
        vectors.append(u)
        rows = rows @ (torch.eye(len(u)) - 2 * torch.outer(u, u))
    return rows.view(w.shape), b


def road(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    half, out = rule.group_size // 2, len(w)
    R = torch.zeros(out, out)
    for o in range(out):
        group, place = divmod(o, rule.group_size)
        first = place < half
        other = o + half if first else o - half
        if rule.variant == "road_1":
            c = s = group * half + place % half
        elif rule.variant == "road_2":
            c = s = o
        else:
            c, s = group * 2 * rule.group_size + place, group * 2 * rule.group_size + rule.group_size + place
        R[o, o] = params["alpha"][c] * params["theta"][c].cos()
        R[o, other] = params["alpha"][s] * params["theta"][s].sin() * (-1 if first else 1)
    return R @ w, R @ b


def miss(w: Tensor, b: Tensor, params: Params, rule: Any) -> Changed:
    D, r, new = params["block"], rule.rank, w.clone()
    if rule.variant == "bat":
        for o, i in itertools.product(range(0, w.shape[0], r), range(0, w.shape[1], r)):
            piece = w[o : o + r, i : i + r]
            new[o : o + r, i : i + r] = piece + piece @ D[o // r] + D[o // r]
        return new, b
    for o, i in itertools.product(range(w.shape[0]), range(w.shape[1])):
        new[o, i] = w[o, i] + D[i % r, o % rule.mini_r if rule.variant == "mini" else o]
    return new, b
