"""HRA: reflects the input of a linear map at a few trained hyperplanes, one after the other."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery import LiveSite, LowRank, Rule, Site, rule
from surgery.rules._linear import maps
from surgery.rules._shared import complex_weights, fields
from surgery.rules._shared.solving import orthonormal_columns, upper_inverse


@rule("hra")
class HraRule(Rule):
    """y = W H₁ … H_r x + b, with Householder reflections H_i = I - 2 u_i u_iᵀ / ‖u_i‖².

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import HraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 6)), [HraRule("0", rank=4)])
    >>> model[0].adapters.default.u.shape
    torch.Size([8, 4])

    The product is computed at once: H₁ … H_r = I - U T Uᵀ, with U the unit vectors and T⁻¹ = I / 2 + the part of Uᵀ U
    above the diagonal. So it is a low-rank change, live and merged. On Linear, transformers' Conv1D and quantised
    Linear (unmerged) it changes the input. On Conv1d/2d/3d it changes the weight, (in/groups · kernel) numbers of each
    output at a time. `u` is (in, rank), and float32 on modules in half precision.

    Args:
        rank: number of reflections; default 8. PEFT: r.
        apply_GS: reflect at the orthogonal vectors of Gram-Schmidt, I - 2 Q Qᵀ; default False.
        init: "identity" (default; PEFT's init_weights=True) or "random" (False). With "identity", vectors come in equal
            pairs, whose reflections cancel up to rounding. An odd rank, or apply_GS, starts at random, as in PEFT.

    Raises:
        RuleError: a field is out of range.

    Source: Yuan et al. 2024, arXiv:2405.17484; PEFT's HRAConfig.
    """

    rank: int = 8
    apply_GS: bool = False
    init: Literal["identity", "random"] = "identity"

    def validate(self) -> None:
        fields.whole(self, "rank")
        fields.flag(self, "apply_GS")
        fields.one_of(self, "init", "identity", "random")

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module, "Gram-Schmidt turns real vectors" if self.apply_GS else ""):
            return why
        layout = maps.linear_map(module, "linear", "conv1d", "convolution")
        if isinstance(layout, str):
            return layout
        width = math.prod(maps.sizes(layout)[1:])
        return f"rank={self.rank} orthogonal vectors can't be had of {width} numbers" if self.rank > width else None

    def rewrite(self, site: Site) -> None:
        shape = (math.prod(maps.sizes(maps.at(site))[1:]), self.rank)
        paired = self.init == "identity" and self.rank % 2 == 0 and not self.apply_GS
        u = site.param("u", shape, _pairs if paired else partial(nn.init.kaiming_uniform_, a=math.sqrt(5)))
        pair: Any = site.apply(factors, u, self.apply_GS)
        U, T = pair[0], pair[1]
        # w - (w U) T Uᵀ for rows of the weight, x - (x U) Tᵀ Uᵀ for rows of inputs
        maps.turn(site, lambda rows, back: rows - rows @ U @ (T if back else T.t()) @ U.t(), u.dtype)

    def merged(self, site: LiveSite) -> dict[str, LowRank]:
        layout = maps.at(site)
        U, T = factors(site.params["u"].detach(), self.apply_GS)
        up = maps.rows_of(layout, site.weight).to(U.dtype) @ U @ T
        turned = layout.parts[0].turned
        return {"weight": LowRank(U, up.t(), -1.0) if turned else LowRank(up, U.t(), -1.0)}


def factors(u: Tensor, orthogonal: bool) -> tuple[Tensor, Tensor]:
    """The unit vectors U (in, rank) and the small matrix T of I - U T Uᵀ."""
    eye = torch.diag_embed(torch.ones_like(u[0]))
    if orthogonal:
        return orthonormal_columns(u), 2 * eye
    U = u / torch.linalg.vector_norm(u, dim=0)
    between = (U.t() @ U).to(u.dtype).triu(1)  # autocast would leave it in half precision
    return U, upper_inverse(eye / 2 + between)


def _pairs(u: Tensor) -> None:
    half = nn.init.kaiming_uniform_(torch.empty_like(u[:, ::2]), a=math.sqrt(5))
    u.copy_(half.repeat_interleave(2, dim=1))
