"""`Combination` and `Share`: what `Rule.combined` gets, with the methods that combine tensors and matrices."""

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
_START = frozenset(
    ("targets", "exclude", "layers", "expect", "init", "dropout")
)  # fields without influence on the computation


@dataclass(frozen=True, eq=False)
class Share:
    """One adapter's part in a combination: its rule at a site, the rule's tensors, and the adapter's weight.

    >>> from torch import nn
    >>> from surgery.rules import IA3Rule
    >>> from surgery import Share, apply_rules, combine
    >>> def combined(self, shares, how):
    ...     print([(share.adapter, share.weight, list(share.params)) for share in shares])
    ...     return self, shares[0].params
    >>> kind = type("PrintingRule", (IA3Rule,), {"combined": combined})
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, kind("0"), adapter=name)
    >>> _ = combine(model, {"a": 0.7, "b": 0.3}, "c")
    [('a', 0.7, ['scale']), ('b', 0.3, ['scale'])]

    Attributes:
        weight: The adapter's weight.
        rule: Its rule at the site.
        site: The site with the adapter's tensors.
        params: The adapter's tensors, by name.
        adapter: The adapter's name.
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
    """The method, weights and options of a `combine` call, as `Rule.combined` gets them.

    >>> import torch
    >>> from surgery import Combination
    >>> how = Combination("ties", {"a": 0.7, "b": 0.3})
    >>> how.sum([torch.tensor([1.0, -2.0]), torch.tensor([3.0, 1.0])], [0.7, 0.3])  # by entry, of the sign with more
    tensor([ 0.8000, -1.4000])

    Attributes:
        method: The combination type, by PEFT's name.
        weights: Adapter → weight, for all adapters, also those without a rule at the site.
        rules: All rules of the class that is combined.
        rank: The rank of the result that the caller asked for. Default None.
        density: The fraction of entries that pruning keeps. Default 1.
        majority_sign: How "ties" chooses the sign of an entry: "total" sums values, "frequency" counts signs.
        clamp: The quantile to which the factors of "svd" methods are clamped. Default None.
        generator: The random generator of "dare" methods. Default None: torch's own.

    Source:
        PEFT's `add_weighted_adapter`.
    """

    method: Method
    weights: Mapping[str, float]
    rules: tuple[Declaration, ...] = ()
    rank: int | None = None
    density: float = 1.0
    majority_sign: Literal["total", "frequency"] = "total"
    clamp: float | None = None
    generator: torch.Generator | None = None

    @property
    def by_matrix(self) -> bool:
        """Whether the method sums matrices ΔW and keeps their largest singular values."""
        return self.method.endswith("svd")

    @property
    def whole(self) -> bool:
        """Whether the rank of the result is the sum of all ranks, so that it equals Σ w ΔW exactly."""
        return self.method == "cat" or (self.method == "svd" and self.rank is None)

    @property
    def plain(self) -> bool:
        """Whether the method is a plain weighted sum, without pruning."""
        return self.method in ("linear", "cat", "svd")

    def sum(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Compute the weighted sum of tensors, entry by entry, as the method says.

        First each tensor is pruned to `density`. "magnitude_prune" and "ties" keep the largest entries. "dare…" keeps
        random entries and divides them by the density. "…ties" then elects a sign for each entry and takes the mean
        of the values with this sign.

        Args:
            tensors: Tensors of one shape.
            weights: One weight for each tensor.

        Returns:
            A tensor of the same shape, in float32 or a wider dtype.
        """
        wide = torch.promote_types(joint_dtype(tensors), torch.float32)
        pruned = [self._prune(tensor.detach().to(wide)) for tensor in tensors]
        scaled = [tensor * weight for tensor, weight in zip(pruned, weights, strict=True)]
        if "ties" not in self.method:
            return torch.stack(scaled).sum(0)
        stack = torch.stack(pruned)
        votes = stack.sum(0) if self.majority_sign == "total" else stack.sign().sum(0)
        agreeing = stack.sign() == torch.where(votes >= 0, 1.0, -1.0)
        return (torch.stack(scaled) * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)

    def largest(self, matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Returns the factors (…, out, rank) and (…, rank, in) of the best approximation of matrices (…, out, in)."""
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        return self._truncate(u, s, vh, rank)

    def largest_of_product(self, up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Like `largest`, for a product (…, out, k) (…, k, in) with small k, without computing the product."""
        if up.device.type != "mps":
            up, down = up.double(), down.double()
        left, upper = torch.linalg.qr(up)
        right, lower = torch.linalg.qr(down.mT)
        u, s, vh = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
        return self._truncate(left @ u, s, vh @ right.mT, rank)

    def lacking(self, shares: Sequence[Share]) -> float:
        """Returns the sum of the weights of adapters without a rule at the site."""
        present = {share.adapter for share in shares}
        return sum(weight for name, weight in self.weights.items() if name not in present)

    def untouched(self, shares: Sequence[Share]) -> bool:
        """Whether the first share already is the result: one adapter with weight 1, or equal rules without tensors."""
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
        """Raise `SiteError` if rules differ in a field that changes the computation, except the fields in `free`."""
        first = shares[0]
        for name in (field.name for field in fields(first.rule) if field.name not in _START | set(free)):
            for other in shares[1:]:
                expected, value = getattr(first.rule, name), getattr(other.rule, name)
                if expected != value:
                    why = f"{name} is {expected!r} in {first.adapter!r} and {value!r} in {other.adapter!r}"
                    raise self.refusal(shares, why, f"combine adapters whose rules have the same {name}")

    def refusal(self, shares: Sequence[Share], why: str, fix: str | None = None) -> SiteError:
        """Build the error for rules that can't be combined."""
        what = f"{shares[0].rule.label} can't be combined by method={self.method!r}"
        return SiteError(what, where=shares[0].site.path, why=why, fix=fix or "combine other adapters")

    def _prune(self, tensor: Tensor) -> Tensor:
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

    def _truncate(self, u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
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
    """Like torch.quantile, which is limited to 16 million values."""
    values = values.sort().values
    place = q * (len(values) - 1)
    low, high = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    return torch.lerp(low, high, place - int(place))
