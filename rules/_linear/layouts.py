"""The layout of LoRA on each kind of linear map: the shapes of A and B, the branch, and ΔW in the weight's shape."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LowRank, Site, packed_weight_of
from surgery.rules._linear import forward_maps

CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


@dataclass(frozen=True)
class WeightPart:
    """One low-rank change: the name of its weight and its shapes. A module has one, MultiheadAttention several."""

    weight: str
    prefix: str
    shape: tuple[int, ...]  # the weight's
    A: tuple[int, ...]
    B: tuple[int, ...]
    turned: bool = False  # the weight holds the map's transpose
    groups: int = 1
    looked_up: bool = False  # rows of an embedding

    @property
    def out(self) -> int:
        return self.B[0]

    @property
    def matrix(self) -> tuple[int, int]:
        """The sizes (out, in) of the matrix that changes, with all groups."""
        return self.out, math.prod(self.A[1:]) * self.groups

    @property
    def magnitude(self) -> tuple[int, ...]:
        """The shape of DoRA's magnitude, one number per output feature, as in PEFT."""
        return (1, self.out, *(1,) * (len(self.shape) - 2)) if len(self.shape) > 2 else (self.out,)

    @property
    def against_weight(self) -> tuple[int, ...]:
        """The shape in which one number per output feature broadcasts against the weight."""
        return (1, self.out) if self.turned else (self.out, *(1,) * (len(self.shape) - 1))

    def delta(self, A: Tensor, B: Tensor) -> Tensor:
        """Returns ΔW / scale in the weight's shape, for tensors or for values of a rewrite."""
        if self.turned:
            return A.t() @ B.t()
        if self.groups > 1:
            up = B.flatten(1).view(self.groups, self.out // self.groups, self.B[1])
            down = A.flatten(1).view(self.groups, self.B[1], math.prod(self.shape[1:]))
            return (up @ down).view(self.shape)
        return B @ A if len(self.shape) == 2 else (B.flatten(1) @ A.flatten(1)).view(self.shape)

    def low_rank(self, A: Tensor, B: Tensor, scale: float, gain: Tensor | None = None) -> LowRank:
        """Returns ΔW for an exact fold."""
        if self.turned:
            return LowRank(A.t(), B.t(), scale, gain=gain)
        return LowRank(B.flatten(1), A.flatten(1), scale, self.groups, gain)


def column_norm(part: WeightPart, weight: Tensor) -> Tensor:
    """Returns the norm of the weights of each output feature, in the shape of the magnitude."""
    dims = 0 if part.turned else tuple(range(1, len(part.shape)))
    return torch.linalg.vector_norm(weight, dim=dims).view(part.magnitude)


def gain_of(part: WeightPart, magnitude: Tensor, weight: Tensor) -> Tensor:
    """Returns DoRA's magnitude over the norm of the changed weight. The norm has no gradient, as in the paper.

    A feature whose weight is all zero has no direction to scale. Its gain is 1, so that A and B can learn a direction.
    """
    return gain_for(part, magnitude, column_norm(part, weight).detach())


def gain_for(part: WeightPart, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Returns DoRA's magnitude over a norm that is computed already."""
    zero = norm.eq(0)
    return (magnitude / norm.masked_fill(zero, 1.0)).masked_fill(zero, 1.0).view(part.against_weight)


@dataclass(frozen=True)
class Layout:
    """The parts of LoRA on a module, and how its branch is computed, or why the rule edits the weight instead."""

    kind: str
    parts: tuple[WeightPart, ...]
    packed: bool = False
    why: str = ""  # why the rule edits the weight instead of adding a branch
    scaled: bool = False  # the forward is c · (W g(x) + b), with a number and a function of its own around the map

    @property
    def weight_space(self) -> bool:
        return bool(self.why)

    def cast(self, x: Tensor, A: Tensor) -> Tensor:
        return x if self.kind == "embedding" else x.to(A.dtype)

    @property
    def plain(self) -> bool:
        """Whether the module is W x + b and nothing else, so that a rule may turn its input or look at its bias."""
        return not (self.why or self.scaled)

    def takes_bias(self, module: nn.Module) -> bool:
        """Whether a change can have a bias: added to the output or, where something is around the map, to its own."""
        if self.kind in ("attention", "embedding"):
            return False
        return self.plain or type(module._parameters.get("bias")) is nn.Parameter

    def down(self, site: Site, x: Tensor, A: Tensor) -> Tensor:
        """Returns A x: the module's own operation and settings, with A in place of the weight."""
        if self.packed or self.kind == "conv1d":
            return F.linear(x, A)
        if self.kind == "embedding":
            return site.call(x, weight=A.t())
        return site.call(x, weight=A, bias=None)

    def up(self, h: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
        if self.kind == "convolution":
            function = list(CONVOLUTIONS.values())[len(self.parts[0].shape) - 3]
            return function(h, B, bias, groups=self.parts[0].groups)
        return F.linear(h, B) if bias is None else F.linear(h, B, bias)

    def on_output(self, gain: Tensor) -> Tensor:
        """Returns one number per output feature in a shape that broadcasts against the output."""
        shape = self.parts[0].magnitude
        return gain.view(shape[1:] if len(shape) > 2 else shape)  # a convolution's input may have no batch

    def base(self, site: Site, x: Tensor) -> Tensor:
        """Returns W x without the bias, for an input after dropout."""
        if self.kind == "embedding":
            return site.call(x)
        if self.packed:  # its own kernel
            return site.call(x, bias=None).to(x.dtype)
        weight = site.weight.to(x.dtype)
        return F.linear(x, weight.t()) if self.kind == "conv1d" else site.call(x, weight=weight, bias=None)

    def without_bias(self, site: Site) -> Tensor:
        """Returns W x without the bias: the module's output minus its bias if possible."""
        bias = bias_of(site)
        if bias is None:
            return site.base_output
        if self.scaled:
            return site.call(site.input, bias=None)
        return site.base_output - self.on_output(bias)


def bias_of(site: Site) -> Tensor | None:
    """Returns the bias as a value: a parameter, a buffer, or an attribute as in HQQ's modules. None without a bias."""
    module = site.module
    if any(tensors.get("bias") is not None for tensors in (module._parameters, module._buffers)):
        return site.bias
    return site.apply(bias_attribute, site.this) if isinstance(module.__dict__.get("bias"), Tensor) else None


def bias_attribute(module: Any) -> Tensor:
    return module.bias


def layout_of(module: nn.Module, rank: int) -> Layout | str:
    """Returns the layout of LoRA with this rank on a module, or why the module can't have it."""
    if isinstance(module, nn.MultiheadAttention):
        return Layout("attention", tuple(_attention(module, rank)), why="the maps are inside the attention's forward")
    kind = _kind(module)
    weight = module._parameters.get("weight")
    if kind is None:
        if any(parameter is not None and parameter.dim() == 3 for parameter in module._parameters.values()):
            return "LoRA goes on maps of one matrix; for a stack of experts' matrices there is ExpertLoraRule"
        return "LoRA goes on Linear, Embedding, Conv1d/2d/3d, transformers' Conv1D and MultiheadAttention"
    if forward_maps.packed(module):
        if why := forward_maps.why_not_packed(module):
            return why
        if kind != "linear":
            return f"its weight is a {type(weight).__name__} of {getattr(weight, 'dtype', None)}"
        size = packed_sizes(module)
        return Layout(kind, (WeightPart("weight", "", size, (rank, size[1]), (size[0], rank)),), packed=True)
    assert weight is not None
    shape = tuple(weight.shape)
    if not (weight.is_floating_point() or weight.is_complex()):
        return f"its weight is {weight.dtype}, which holds no changes of a number"
    if kind == "convolution":
        return _convolution(module, rank, shape)
    if kind == "embedding" and module.max_norm is not None:
        return "its max_norm rescales rows in place at each call"
    turned = kind != "linear"
    out, inner = (shape[1], shape[0]) if turned else shape
    part = WeightPart("weight", "", shape, (rank, inner), (out, rank), turned, looked_up=kind == "embedding")
    return _with_form(module, Layout(kind, (part,)))


def _convolution(module: Any, rank: int, shape: tuple[int, ...]) -> Layout:
    ones = (1,) * (len(shape) - 2)
    if rank % module.groups:  # such as a depthwise convolution, whose groups are its channels
        part = WeightPart("weight", "", shape, (rank, *shape[1:]), (shape[0], rank, *ones))
        return Layout("convolution", (part,), why=f"its {module.groups} groups don't divide the rank {rank}")
    part = WeightPart(
        "weight", "", shape, (rank, *shape[1:]), (shape[0], rank // module.groups, *ones), groups=module.groups
    )
    return _with_form(module, Layout("convolution", (part,)))


def _attention(module: Any, rank: int) -> Iterator[WeightPart]:
    prefixes = {"in_proj_weight": "", "q_proj_weight": "q_", "k_proj_weight": "k_", "v_proj_weight": "v_"}
    weights = [(name, prefix, module._parameters.get(name)) for name, prefix in prefixes.items()]
    for name, prefix, weight in [*weights, ("out_proj.weight", "out_", module.out_proj.weight)]:
        if weight is not None:
            out, inner = weight.shape
            yield WeightPart(name, prefix, (out, inner), (rank, inner), (out, rank))


def packed_sizes(module: Any) -> tuple[int, int]:
    """Returns (out, in) of a quantised layer. One in a layout that is not known has Linear's attributes."""
    packed = packed_weight_of(module)
    return (module.out_features, module.in_features) if packed is None else packed.shape


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Linear) or packed_weight_of(module) is not None:
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if isinstance(module, tuple(CONVOLUTIONS)):
        return "convolution"
    names = (f"{cls.__module__}.{cls.__name__}" for cls in type(module).__mro__)
    return "conv1d" if "transformers.pytorch_utils.Conv1D" in names else None


OTHERWISE = "its forward is not a plain linear map of its input"


def _with_form(module: nn.Module, layout: Layout) -> Layout:
    """Returns the layout, adjusted to what the module's own forward does around the map."""
    if forward_maps.torchs_own(module):
        return layout
    if layout.kind == "conv1d":  # its forward only runs with a weight of its own sizes
        return replace(layout, why=OTHERWISE)
    part, weight = layout.parts[0], module._parameters["weight"]
    assert weight is not None
    shape = (2 * part.groups, *part.A[1:])
    small = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    small = small.t() if part.turned else small
    form = forward_maps.form_of(module, small, lambda: _samples(module, layout, small))
    return replace(layout, why=OTHERWISE) if form == "other" else replace(layout, scaled=form == "scaled")


def _samples(module: Any, layout: Layout, like: Tensor) -> list[Tensor]:
    """Returns inputs in the shapes that such a module takes."""
    if layout.kind == "embedding":
        ids = torch.arange(min(4, module.num_embeddings), device=like.device)
        return [ids, ids.view(1, -1)]
    if layout.kind == "linear":
        return [like.new_ones(*before, module.in_features) for before in ((), (2,), (1, 3), (1, 1, 2))]
    sizes = [(size - 1) * step for size, step in zip(module.kernel_size, module.dilation, strict=True)]
    inputs = [like.new_ones(module.in_channels, *(size + more for size in sizes)) for more in (4, 5)]
    return [*inputs, *(x.unsqueeze(0) for x in inputs)]
