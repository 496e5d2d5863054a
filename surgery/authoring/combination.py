"""How adapters are combined, as a rule is told: the methods on tensors of one shape, and on matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from surgery.authoring.declaration import Declaration
from surgery.authoring.live_site import LiveSite
from surgery.errors import SiteError

__all__ = ["METHODS", "Combination", "Method", "Share", "joint_dtype"]

Method = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
METHODS: tuple[str, ...] = get_args(Method)
_START = frozenset(("targets", "exclude", "layers", "expect", "init", "dropout"))  # say nothing of what is computed


@dataclass(frozen=True, eq=False)
class Share:
    """What one adapter has at a site: its rule, the rule's tensors, and the weight of the adapter.

    >>> from torch import nn
    >>> from surgery.rules import IA3Rule
    >>> from surgery import Share, apply_rules, combine
    >>> def told(self, shares, how):
    ...     print([(share.adapter, share.weight, list(share.params)) for share in shares])
    ...     return self, shares[0].params
    >>> kind = type("ToldRule", (IA3Rule,), {"combined": told})
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, kind("0"), adapter=name)
    >>> _ = combine(model, {"a": 0.7, "b": 0.3}, "c")
    [('a', 0.7, ['scale']), ('b', 0.3, ['scale'])]
    """

    weight: float
    rule: Declaration
    site: LiveSite
    params: Mapping[str, Tensor]

    @property
    def adapter(self) -> str:
        return self.site.adapter


@dataclass(frozen=True, eq=False)
class Combination:
    """How adapters are combined, for `Rule.combined`.

    >>> import torch
    >>> from surgery import Combination
    >>> how = Combination("ties", {"a": 0.7, "b": 0.3})
    >>> how.sum([torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])], [0.7, 0.3])  # by entry, of the sign with more
    tensor([ 0.8000, -1.4000])

    `method` is one of PEFT's names, `weights` those of all adapters, also of those that are not at a site, `rules` all
    rules of the kind in question. `rank` is what was asked for, if anything was.
    """

    method: str
    weights: Mapping[str, float]
    rules: tuple[Declaration, ...] = ()
    rank: int | None = None
    density: float = 1.0
    majority_sign: str = "total"
    clamp: float | None = None
    generator: torch.Generator | None = None

    @property
    def by_matrix(self) -> bool:
        """Whether changes of weights are summed as matrices, of which the largest singular values are kept."""
        return self.method.endswith("svd")

    @property
    def whole(self) -> bool:
        """Whether the result has as many ranks as all the adapters together, and so loses nothing of Σ w ΔW."""
        return self.method == "cat" or (self.method == "svd" and self.rank is None)

    @property
    def plain(self) -> bool:
        """Whether a sum is a sum: nothing is pruned."""
        return self.method in ("linear", "cat", "svd")

    def sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Tensors of one shape times their weights, added up entry by entry as the method says.

        Pruned first, each to its `density`: the largest entries stay ("magnitude_prune", "ties"), or random ones,
        divided by the density ("dare…"). "…ties" elects each entry's sign, by the sum of values or by their number, and
        takes the mean of those that have it, 0 counting as none. At least in float32.
        """
        wide = torch.promote_types(joint_dtype(tensors), torch.float32)
        kept = [self._pruned(tensor.detach().to(wide)) for tensor in tensors]
        scaled = [tensor * weight for tensor, weight in zip(kept, weights, strict=True)]
        if "ties" not in self.method:
            return torch.stack(scaled).sum(0)
        stack = torch.stack(kept)
        votes = stack.sum(0) if self.majority_sign == "total" else stack.sign().sum(0)
        agreeing = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
        return (torch.stack(scaled) * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)

    def largest(self, matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The factors (…, out, rank), (…, rank, in) of the best approximations of matrices (…, out, in)."""
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return self._kept(u, s, vh, rank)

    def largest_of_product(self, up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """The same of a product (…, out, k) (…, k, in), which is never made: k is small."""
        if up.device.type != "mps":
            up, down = up.double(), down.double()
        left, upper = torch.linalg.qr(up)
        right, lower = torch.linalg.qr(down.mT)
        u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        return self._kept(left @ u, s, vh @ right.mT, rank)

    def lacking(self, shares: Sequence[Share]) -> float:
        """The sum of the weights of adapters that are not at the site."""
        here = {share.adapter for share in shares}
        return sum(weight for name, weight in self.weights.items() if name not in here)

    def untouched(self, shares: Sequence[Share]) -> bool:
        """Whether what is asked for is there already: one adapter with weight 1, or equal rules without tensors."""
        if any(share.params for share in shares):
            return (
                len(shares) == 1
                and shares[0].weight == 1
                and self.method in ("linear", "cat", "svd")
                and self.rank is None
            )
        self.agree(shares)
        return True

    def agree(self, shares: Sequence[Share], *free: str) -> None:
        """An error where rules differ in fields that say what they compute; `free` may differ, and how they start."""
        first = shares[0]
        for name in (field.name for field in fields(first.rule) if field.name not in _START | set(free)):
            for other in shares[1:]:
                one, two = getattr(first.rule, name), getattr(other.rule, name)
                if one != two:
                    why = f"{name} is {one!r} in {first.adapter!r} and {two!r} in {other.adapter!r}"
                    raise self.refusal(shares, why, "combine adapters whose rules agree in it")

    def refusal(self, shares: Sequence[Share], why: str, fix: str | None = None) -> SiteError:
        what = f"{shares[0].rule.label} can't be combined by method={self.method!r}"
        return SiteError(what, where=shares[0].site.path, why=why, fix=fix or "combine adapters that are without it")

    def _pruned(self, tensor: Tensor) -> Tensor:
        if self.plain or self.density == 1:
            return tensor
        if self.method.startswith("dare"):
            place = "cpu" if self.generator is None else self.generator.device
            chance = torch.full(tensor.shape, self.density, dtype=torch.float32, device=place)
            mask = torch.bernoulli(chance, generator=self.generator)
            return tensor * mask.to(tensor.device, tensor.dtype) / self.density
        flat = tensor.flatten()
        places = flat.abs().topk(int(self.density * len(flat))).indices
        return torch.zeros_like(flat).index_copy(0, places, flat[places]).view(tensor.shape)

    def _kept(self, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        lacking = max(0, rank - s.shape[-1])  # a matrix has no more singular values than rows or columns
        up = torch.nn.functional.pad((u * s.unsqueeze(-2))[..., :rank], (0, lacking))
        down = torch.nn.functional.pad(vh[..., :rank, :], (0, 0, 0, lacking))
        if self.clamp is not None:
            most = _quantile(torch.cat([up.flatten(), down.flatten()]), self.clamp)
            up, down = up.clamp(-most, most), down.clamp(-most, most)
        return up, down


def joint_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _quantile(values: Tensor, q: float) -> Any:
    """torch.quantile, which takes no more than 16 million values."""
    values = values.sort().values
    place = q * (len(values) - 1)
    low, high = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    return torch.lerp(low, high, place - int(place))
