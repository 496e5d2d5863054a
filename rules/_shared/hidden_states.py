"""Helpers of rules on hidden states: the size of a module's hidden state, and positions in a sequence."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from surgery import SiteError

_OWN = ("out_features", "embedding_dim", "nf", "hidden_size", "embed_dim", "d_model")
_CONFIG = ("hidden_size", "d_model", "n_embd", "dim")


def features_of(module: nn.Module, stated: int | None, side: str = "output") -> int | str:
    """Returns the size of the hidden state's last dimension, read from the module, or why it is not known."""
    if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)):
        return "its features are not the last dimension"
    if stated is not None:
        return stated
    if side == "input" and any(type(getattr(module, name, None)) is int for name in ("in_features", "nx")):
        return int(getattr(module, "in_features", None) or module.nx)  # type: ignore[arg-type]
    own = [getattr(module, name, None) for name in _OWN]
    own += [getattr(getattr(module, "config", None), name, None) for name in _CONFIG]
    stated_size = next((size for size in own if type(size) is int), None)
    if stated_size is not None:
        return stated_size
    # A block that does not state its size has the size of its norms, if all of them have one size.
    norms = {width for inner in module.modules() if (width := _width(inner)) is not None}
    return norms.pop() if len(norms) == 1 else "it does not say how wide its hidden state is: give features="


def _width(norm: nn.Module) -> int | None:
    weight = norm._parameters.get("weight")
    if weight is None or weight.dim() != 1 or isinstance(norm, nn.modules.batchnorm._NormBase):
        return None
    return weight.shape[0] if "Norm" in type(norm).__name__ else None


def in_dtype_of(like: Tensor, hidden: Tensor) -> Tensor:
    """Casts a hidden state to the dtype of a rule's tensor. `SiteError` if this would drop its imaginary part."""
    if hidden.is_complex() and not like.is_complex():
        raise SiteError(
            f"a hidden state of {hidden.dtype} meets an adapter of {like.dtype}",
            why="its imaginary part would be dropped",
            fix="take the module out of the rule's targets",
        )
    return hidden.to(like.dtype)


def positions_of(text: Any) -> tuple[int, ...] | None:
    """Returns the numbers of first and last positions of "f3+l2" (as in pyreft); None for "all", () for other texts."""
    if text == "all":
        return None
    match = re.fullmatch(r"f(\d+)(?:[+]l(\d+))?|l(\d+)", text) if isinstance(text, str) else None
    if match is None or not any(int(count or 0) for count in match.groups()):
        return ()
    return int(match[1] or 0), int(match[2] or match[3] or 0)


def at_positions(new: Tensor, old: Tensor, first: int, last: int) -> Tensor:
    """Returns `new` at the first and last positions of (…, length, features), and `old` at the others.

    A call with one position is a decoding step with a cache. The prompt came before it, so it returns `old`.
    """
    length = old.shape[-2]
    exporting = torch.compiler.is_exporting()  # then the length is free, and the graph reads it when it runs
    if not exporting and length == 1:
        return old
    at = torch.arange(length, device=old.device)
    chosen = (at < first) | (at >= length - last)
    return torch.where((chosen & (at[-1:] > 0) if exporting else chosen).unsqueeze(-1), new, old)


def chosen_positions(hidden: Tensor, first: int, last: int) -> Tensor:
    """Returns the rows of (…, length, features) that `at_positions` changes."""
    length = hidden.shape[-2]
    at = torch.arange(length, device=hidden.device)
    return hidden[..., (at < first) | (at >= length - last), :]
