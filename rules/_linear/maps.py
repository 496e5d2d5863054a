"""Linear maps for the rules beside LoRA: which modules have one, and how rules add to its weight or rotate it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import LiveSite, Site
from surgery.rules._linear.layouts import Layout, layout_of

NAMES = {
    "linear": "Linear", "conv1d": "transformers' Conv1D", "convolution": "Conv1d/2d/3d", "embedding": "Embedding",
}  # fmt: skip


def linear_map(module: nn.Module, *kinds: str) -> Layout | str:
    """Returns the layout of a map of one of these kinds (keys of `NAMES`), or why it has none."""
    groups = getattr(module, "groups", 1)  # as the rank, so that groups are no reason against a branch
    layout = layout_of(module, groups if type(groups) is int else 1)
    if isinstance(layout, Layout):
        return layout if layout.kind in kinds else _only(kinds)
    return _only(kinds) if layout.startswith("LoRA goes") else layout


def at(site: Site | LiveSite) -> Layout:
    """Returns the layout of a site whose module passed `linear_map` in the rule's check."""
    layout = linear_map(site.module, *NAMES)
    assert isinstance(layout, Layout), layout
    return layout


def sizes(layout: Layout) -> tuple[int, ...]:
    """Returns the weight's shape as (out, in, *kernel), also if it is stored as (in, out); `in` is one group's."""
    shape = layout.parts[0].shape
    return shape[::-1] if layout.parts[0].turned else shape


def rows_of(layout: Layout, weight: Tensor) -> Tensor:
    """Returns the weight as a matrix with one row per output feature."""
    return weight.t() if layout.parts[0].turned else weight.flatten(1)


def from_rows(layout: Layout, rows: Tensor) -> Tensor:
    """The inverse of `rows_of`."""
    return rows.t() if layout.parts[0].turned else rows.reshape(layout.parts[0].shape)


def each_output(layout: Layout, scale: Tensor) -> Tensor:
    """Returns one number per output feature in a shape that broadcasts against the weight."""
    return scale.view(layout.parts[0].against_weight)


def add(site: Site, delta: Tensor, dropout: float = 0.0) -> Tensor | None:
    """Adds Δ (out, in, *kernel) to W: a second pass of the module's own operation with Δ as its weight.

    `dropout`: on the input of this pass. If the module's forward is not a plain map, the weight itself is edited, which
    also rounds Δ in half precision.
    """
    layout = at(site)
    if not layout.weight_space:
        x = site.input.to(delta.dtype)
        if dropout:
            x = F.dropout(x, dropout, site.training)  # type: ignore[arg-type]  # the flag as it is at each call
        return site.output + layout.down(site, x, delta)
    weight = site.weight
    site.replace(weight, (weight.to(delta.dtype) + from_rows(layout, delta.flatten(1))).to(weight.dtype))
    return None


def why_no_dropout(layout: Layout, dropout: float) -> str | None:
    """Returns why dropout has no input to act on, if the rule edits the weight, or None."""
    if not dropout or not layout.weight_space:
        return None
    return f"dropout={dropout} has no input to act on: {layout.why}; give it a rule with dropout=0"


def add_to_weight(site: LiveSite, delta: Tensor) -> dict[str, Any]:
    """Returns the change of the weight that equals `add`, for merging."""
    weight, layout = site.weight, at(site)
    delta = delta.t() if layout.parts[0].turned else delta
    return {"weight": weight.to(delta.dtype) + delta}


def turn(site: Site, turned: Callable[[Tensor, bool], Tensor], dtype: Any) -> Tensor | None:
    """Replaces W by W M. `turned(x, False)` is M x for each row x of a matrix; `turned(w, True)` is w M for rows of W.

    On a Linear this changes the input, which needs no second weight. On an Embedding, whose input has no
    features, each row w becomes M w: the output changes and is returned. On other modules the weight changes.
    """
    layout = at(site)
    if layout.kind == "embedding" and not layout.weight_space:
        y = site.output
        return turned(y.to(dtype), False).to(y.dtype)
    if turns_input(site):
        x = site.input
        site.replace(x, turned(x.to(dtype), False).to(x.dtype))
    else:
        weight = site.weight
        site.replace(weight, _turned_weight(layout, weight, turned, dtype).to(weight.dtype))
    return None


def turn_weight(site: LiveSite, turned: Callable[[Tensor, bool], Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the change of the weight that equals `turn`, for merging."""
    return {"weight": _turned_weight(at(site), site.weight, turned, dtype)}


def _turned_weight(layout: Layout, weight: Tensor, turned: Callable[[Tensor, bool], Tensor], dtype: Any) -> Tensor:
    if layout.kind == "embedding":
        return turned(weight.to(dtype), False)
    return from_rows(layout, turned(rows_of(layout, weight).to(dtype), True))


def turned_width(layout: Layout) -> int:
    """Returns how many numbers of a row `turn` mixes: those of one output's weights, or of an embedding's row."""
    return layout.parts[0].shape[1] if layout.kind == "embedding" else math.prod(sizes(layout)[1:])


def turns_input(site: Site | LiveSite) -> bool:
    layout = at(site)
    return layout.packed or layout.kind == "conv1d" and layout.plain or site.base_class.forward is nn.Linear.forward


def by_block(rows: Tensor, blocks: Tensor) -> Tensor:
    """Rows (…, in) times a block-diagonal matrix: blocks (n, size, size), or one, which is repeated."""
    return torch.einsum("...kb,kbc->...kc", rows.unflatten(-1, (-1, blocks.shape[-1])), blocks).flatten(-2)


def block_of(layout: Layout, block_size: int, blocks: int, width: int | None = None) -> int | str:
    """Returns the size of the blocks of a map's input, from the size or the number of blocks, or why not."""
    width = turned_width(layout) if width is None else width
    number, name = (blocks, "blocks") if blocks else (block_size, "block_size")
    if width % number == 0:
        return width // number if blocks else number
    near = min((divisor for divisor in range(1, width + 1) if width % divisor == 0), key=lambda d: abs(d - number))
    numbers = "of each row" if layout.kind == "embedding" else "that each output is made of"
    return f"{name}={number} does not divide the {width} numbers {numbers}; {near} does"


def keep_mask(site: Site, like: Tensor, chance: float) -> Tensor:
    """Returns ones in the shape of `like`, each zero with this probability in training: dropout without scaling."""
    return F.dropout(torch.ones_like(like), chance, site.training).sign()  # type: ignore[arg-type]  # a flag at each call


def _only(kinds: tuple[str, ...]) -> str:
    return f"it goes on {' and '.join(NAMES[kind] for kind in kinds)}"
