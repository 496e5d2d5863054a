"""The change ΔW that an adapter makes of each weight, computed from the adapter's files without its base."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError, SurgeryError, SurgeryWarning

if TYPE_CHECKING:
    from torch import Tensor, nn

    from surgery import LowRank

__all__ = ["WeightChange", "changes_of", "compare_changes"]

Shapes = Mapping[str, Sequence[int]]
_FACTORS = (("lora_A", "lora_B"), ("A", "B"))  # (rank, in, …) and (out, rank, …), of PEFT's format and ours
_PAIRS = (("hada_w1_a", "hada_w1_b"), ("w1_a", "w1_b"))  # (out, rank) and (rank, in)
_BIASES = ("lora_B.bias", "B_bias")


@dataclass(frozen=True)
class WeightChange:
    """ΔW in float64: `left @ right`, or `left` itself if `right` is None."""

    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.left.shape) if self.right is None else (self.left.shape[0], self.right.shape[1])

    def dense(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right

    def norm(self) -> float:
        """The Frobenius norm; of a product from the triangles of its factors, which are as small as the rank."""
        import torch

        if self.right is None:
            return float(self.left.norm())
        triangles = [torch.linalg.qr(side, mode="r").R for side in (self.left, self.right.mT)]
        return float((triangles[0] @ triangles[1].mT).norm())

    def minus(self, other: WeightChange) -> WeightChange:
        import torch

        if self.right is None or other.right is None:
            return WeightChange(self.dense() - other.dense())
        return WeightChange(torch.cat([self.left, -other.left], 1), torch.cat([self.right, other.right]))

    def dot(self, other: WeightChange) -> float:
        """The sum of the products of the entries."""
        if self.right is None or other.right is None:
            return float((self.dense() * other.dense()).sum())
        return float(((self.left.mT @ other.left) * (self.right @ other.right.mT)).sum())


def changes_of(folder: Path, sites: Sequence[Mapping[str, Any]]) -> tuple[dict[str, WeightChange], str | None]:
    """The changes by the names of the weights, and why there are none.

    The adapter is loaded on a stand-in for its base: a module of the site's sizes at each path, whose weights are zeros
    that take no memory. A rule that adds the same to any weight gives its ΔW there. Other rules, such as DoRA and OFT,
    need the base's weights.
    """
    from surgery import load_adapter

    try:
        base = _stand_in(sites)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SurgeryWarning)
            load_adapter(base, folder, same_base=False, strict=False, finite=False)
        changes = dict(_changes(base))
    except SurgeryError as error:
        first = error.problems[0] if isinstance(error, PlanError) and error.problems else error
        return {}, first.what
    return changes, None if changes else "its rules need the base's weights, or change no weights"


def _stand_in(sites: Sequence[Mapping[str, Any]]) -> nn.Module:
    from torch import nn

    root = nn.Module()
    for site in sites:
        *above, name = site["path"].split(".")
        place = root
        for part in above:
            place = place._modules.setdefault(part, nn.Module()) or nn.Module()
        module = _module(site["tensors"])
        if name:  # otherwise the tensors belong to all sites
            module._modules.update(getattr(place._modules.get(name), "_modules", {}))
            place._modules[name] = module
    return root.eval()


def _module(shapes: Shapes) -> nn.Module:
    """A module with the sizes that the tensors of a site show, or with the parameters that they replace."""
    import torch
    from torch import nn

    module, parameters = nn.Module(), {name: shape for name, shape in shapes.items() if "." not in name}
    with torch.device("meta"):
        for a, b in _FACTORS:
            if a in shapes and b in shapes:
                module = _for_factors(shapes[a], shapes[b], bias=any(name in shapes for name in _BIASES))
        for a, b in _PAIRS:
            if a in shapes and b in shapes:
                module = _for_factors(shapes[b], shapes[a], bias=False)
        match shapes:
            case {"lora_embedding_A": [_, tokens], "lora_embedding_B": [features, _]} if tokens and features:
                module = nn.Embedding(tokens, features)
        if len(weight := shapes.get("weight", ())) == 2 and 0 not in weight:
            module = nn.Linear(weight[1], weight[0], bias="bias" in shapes)
    parameters = {name: parameter.shape for name, parameter in module.named_parameters()} or parameters
    for name, shape in parameters.items():
        zeros = torch.zeros((), dtype=torch.float32).expand(tuple(shape))
        module.register_parameter(name, nn.Parameter(zeros, requires_grad=False))
    return module


def _for_factors(a: Sequence[int], b: Sequence[int], bias: bool) -> nn.Module:
    from torch import nn

    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    if len(a) != len(b) or not 2 <= len(a) <= 5 or 0 in (*a, *b):
        return nn.Module()
    if len(a) == 2:
        return nn.Linear(a[1], b[0], bias=bias)
    groups = max(1, a[0] // b[1])
    return kinds[len(a)](a[1] * groups, b[0], tuple(a[2:]), groups=groups, bias=bias)


def _changes(base: nn.Module) -> Iterator[tuple[str, WeightChange]]:
    """Each site's changes, if it has one rule and the rule adds the same to any weight."""

    from torch import Tensor

    from surgery import LowRank
    from surgery.authoring.live_site import LiveSite
    from surgery.state.adapter_tensors import tensors_of
    from surgery.state.records import sites

    for path, module, state in sites(base):
        rules = [applied.rule for applied in state.applied]
        if len(rules) != 1 or not (rules[0].additive and rules[0].mergeable):
            continue
        tensors = {name: tensor.detach() for name, tensor in tensors_of(module, "default").items()}
        site = LiveSite(module, path, "default", tensors, lambda name, _, module=module: module.get_parameter(name))
        for name, change in rules[0].merged(site).items():
            if not isinstance(change, (LowRank, Tensor)):
                continue  # rows of an embedding take the place of the base's
            yield f"{path}.{name}", _in_double(change, tuple(module.get_parameter(name).shape), module)


def _in_double(change: LowRank | Tensor, shape: tuple[int, ...], module: nn.Module) -> WeightChange:
    """In the orientation of our format, in which an embedding's A reads tokens as a linear layer's reads features."""
    import torch
    from torch import nn

    from surgery import LowRank

    turned = isinstance(module, nn.Embedding)
    if not isinstance(change, LowRank):
        return WeightChange(change.detach().double().mT if turned else change.detach().double())
    if change.groups != 1 or change.gain is not None:
        return WeightChange(change.delta(shape, torch.float64))
    left, right = change.B.double() * change.scale, change.A.double()
    return WeightChange(right.mT, left.mT) if turned else WeightChange(left, right)


def compare_changes(first: Mapping[str, WeightChange], second: Mapping[str, WeightChange]) -> list[dict[str, Any]]:
    """A row for each weight: norms of both changes and of the difference, that norm as a part of the first, cosine."""
    return [
        {"weight": name, **_compare(first.get(name), second.get(name))} for name in dict.fromkeys([*first, *second])
    ]


def _compare(a: WeightChange | None, b: WeightChange | None) -> dict[str, Any]:
    norm_a, norm_b = (None if change is None else change.norm() for change in (a, b))
    row: dict[str, Any] = {"norm_a": norm_a, "norm_b": norm_b, "difference": None, "relative": None, "cosine": None}
    if a is None or b is None:
        return {"status": "only in second" if a is None else "only in first", **row}
    if a.shape != b.shape:
        return {"status": "other shape", **row}
    difference = b.minus(a).norm()
    relative = difference / norm_a if norm_a else float("inf") if difference else 0.0
    cosine = a.dot(b) / (norm_a * norm_b) if norm_a and norm_b else None
    return {"status": "compared", **row, "difference": difference, "relative": relative, "cosine": cosine}
