"""OFT: trained rotations turn the input of a linear map block by block."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LiveSite, MergeError, Rule, Site, rule
from surgery.rules._linear import maps
from surgery.rules._linear.layouts import Layout
from surgery.rules._shared import complex_weights, fields
from surgery.rules._shared.solving import cayley


@rule("oft")
class OftRule(Rule):
    """y = W Rᵀ x + b: R is block-diagonal, each block the Cayley transform of a trained skew-symmetric matrix Q.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import OftRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 6)), [OftRule("0", block_size=4)])
    >>> model[0].adapters.default.R.shape  # of two blocks, what stands above the diagonal
    torch.Size([2, 6])

    R = (I - Q) (I + Q)⁻¹, or with `use_cayley_neumann` its series I + 2 Q + 2 Q² + … + Qⁿ, which is a rotation while Q
    is small. On Linear, transformers' Conv1D and quantised Linear (unmerged) the input is rotated. On an Embedding the
    output is rotated: each row w of the weight becomes w R, as in PEFT. On a convolution the weight is rotated,
    (in/groups · kernel) numbers of each output channel at a time. With `patches`, which is PEFT's OFT of a Conv2d,
    every patch of the input is rotated, (in · kernel) numbers, and the rotated patches are added up. `R` is
    (blocks, block_size · (block_size - 1) / 2), and float32 on modules in half precision. PEFT's module_dropout has no
    effect in PEFT, so it is not a field here.

    Args:
        block_size: rows of a block; default 32. PEFT: oft_block_size.
        blocks: number of blocks; default 0. Set one of `block_size` and `blocks`, and the other to 0. PEFT: r.
        block_share: one block for all places; default False.
        coft: keep Q within eps / √rows of zero; default False. PEFT writes the projected Q back into the parameter;
            here the parameter keeps the optimizer's value.
        eps: bound of `coft`; default 6e-5.
        use_cayley_neumann: use the series instead of the inverse; default True.
        num_cayley_neumann_terms: terms of the series, at most 100; default 5.
        nearest: whether a site whose numbers `block_size` or `blocks` does not divide takes the nearest divisor, as
            PEFT does; default False: such a site is a problem of the plan.
        patches: rotate the patches of a Conv2d's input, as PEFT does; default False. PEFT adds the patches up where
            they overlap, and at other places than they came from, so the output changes also where R is the identity.
            No weight computes the same: such a Conv2d can't be merged. A 1×1 kernel and other modules are as without.
        init: "identity" (default; PEFT's init_weights=True) or "random" (False).

    Raises:
        RuleError: a field is out of range.

    Source: Qiu et al. 2023, arXiv:2306.07280, and 2025 (OFTv2), arXiv:2506.19847; PEFT's OFTConfig.
    """

    block_size: int = 32
    blocks: int = 0
    block_share: bool = False
    coft: bool = False
    eps: float = 6e-5
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    init: Literal["identity", "random"] = "identity"
    nearest: bool = False
    patches: bool = False

    def validate(self) -> None:
        fields.either(self, "block_size", "blocks")
        fields.flag(self, "block_share", "coft", "use_cayley_neumann", "nearest", "patches")
        fields.positive(self, "eps")
        fields.whole(self, "num_cayley_neumann_terms")
        if self.num_cayley_neumann_terms > 100:  # each is a product of matrices
            raise self.bad("num_cayley_neumann_terms", "at most 100")
        fields.one_of(self, "init", "identity", "random")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity" and not self.patches

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module, "coft bounds the size of real numbers" if self.coft else ""):
            return why
        layout = maps.linear_map(module, "linear", "conv1d", "convolution", "embedding")
        if isinstance(layout, str):
            return layout
        turns_patches = self.turns_patches(module, layout)
        if turns_patches and max(module.dilation) > 1:  # type: ignore[arg-type, type-var]
            return "Conv2d with dilation > 1 is not supported by OFT. Its patches have gaps"
        if self.nearest:
            return None
        size = maps.block_of(layout, self.block_size, self.blocks, patch_width(module) if turns_patches else None)
        return size if isinstance(size, str) else None

    def turns_patches(self, module: nn.Module, layout: Layout) -> bool:
        """Whether the patches of a module's input are rotated. With a 1×1 kernel, its weight is rotated instead."""
        if not self.patches or not isinstance(module, nn.Conv2d):
            return False
        return module.groups > 1 or patch_width(module) > module.in_channels or not layout.plain

    def rewrite(self, site: Site) -> Tensor | None:
        layout, module = maps.at(site), site.module
        turns_patches = self.turns_patches(module, layout)
        width = patch_width(module) if turns_patches else maps.turned_width(layout)
        block_size, blocks = self.block_size, self.blocks
        if self.nearest:
            block_size, blocks = (count and nearest_divisor(width, count) for count in (block_size, blocks))
        size = block_size or width // blocks
        rows, columns = torch.triu_indices(size, size, 1)
        index = torch.zeros(size, size, dtype=torch.long)
        index[rows, columns] = torch.arange(len(rows))
        shape = (1 if self.block_share else width // size, len(rows))
        R = site.param("R", shape, partial(nn.init.normal_, std=0.1) if self.init == "random" else 0.0)
        rotation = self._rotation(R, site.buffer("index", index), shape[0], site.apply)
        if turns_patches:
            x = site.input
            site.replace(x, _turn_patches(x.to(R.dtype), rotation, module.kernel_size).to(x.dtype))  # type: ignore[arg-type]
            return None
        return maps.turn(site, partial(_rotate, rotation=rotation), R.dtype)

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        if self.turns_patches(site.module, maps.at(site)):
            why = "it adds up patches of the input, as PEFT's OFT does, and no weight computes the same"
            fix = "keep it unmerged; OftRule(patches=False) has the weight that PEFT merges to, live and merged"
            raise MergeError(f"{self.label} can't be merged", where=site.path, why=why, fix=fix)
        R = site.params["R"].detach()
        return maps.turn_weight(
            site, partial(_rotate, rotation=self._rotation(R, site.params["index"], len(R))), R.dtype
        )

    def _rotation(self, R: Tensor, index: Tensor, blocks: int, apply: Any = None) -> Tensor:
        """(blocks, size, size), for rows x of a block: x R. `apply` calls a function on values of a graph."""
        if self.coft:
            norm = (R * R).sum(-1, keepdim=True).mul(2).sqrt()  # of Q, where each number stands twice
            most = self.eps / math.sqrt(blocks)
            R = R + (R * (most / norm.clamp(min=most)) - R).detach()
        entries = R[:, index]
        Q = entries.triu(1) - entries.triu(1).transpose(-1, -2)
        if not self.use_cayley_neumann:
            return cayley(Q) if apply is None else apply(cayley, Q)
        eye = torch.diag_embed(torch.ones_like(Q[..., 0]))
        last = {1: 0, 2: 1}.get(self.num_cayley_neumann_terms, max(3, self.num_cayley_neumann_terms - 1))  # as in PEFT
        power, total = Q, eye
        for n in range(1, last + 1):
            power = power if n == 1 else power @ Q
            total = total + (power if n == last > 1 else 2 * power)
        return total


def nearest_divisor(width: int, count: int) -> int:
    """The divisor of `width` that is nearest to `count`; of two, the smaller one."""
    divisors = [divisor for divisor in range(1, width + 1) if width % divisor == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - count), divisor))


def _rotate(rows: Tensor, back: bool, rotation: Tensor) -> Tensor:
    """Multiplies each row (…, in) block by block: x R, or w Rᵀ."""
    return maps.by_block(rows, rotation.transpose(-1, -2) if back else rotation)


def patch_width(module: Any) -> int:
    """The numbers of one patch of a convolution's input."""
    return module.in_channels * math.prod(module.kernel_size)


def _turn_patches(x: Tensor, rotation: Tensor, kernel: tuple[int, int]) -> Tensor:
    """Rotates each patch of (…, in, height, width), at every place, and adds the patches up where they overlap.

    PEFT (to 0.21.2) reads a channel's numbers, which are (places, kernel), as (kernel, places) before it adds them.
    """
    patches = F.unfold(x, kernel).transpose(-1, -2)  # (…, places, in · kernel)
    turned = maps.by_block(patches, rotation).unflatten(-1, (-1, math.prod(kernel)))
    mixed = turned.transpose(-2, -3).flatten(-3).unflatten(-1, (-1, patches.shape[-2]))
    return F.fold(mixed, (x.shape[-2], x.shape[-1]), kernel)
