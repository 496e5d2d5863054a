"""Finds the mask of a text alone, (batch, tokens), in any form of mask that a call may have.

For a static cache, `generate` passes the masks that the model would compute itself: (batch, 1, queries, keys), one for
each kind of layer. Virtual tokens need the mask of the text from which they were computed. It is read from them, and
accepted if transformers computes the same masks from it.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.rules._virtual_tokens.past import Past, error, recurrent_layers

_WANTED = "a 2-D mask (batch, tokens) can be widened"


def text_mask(mask: Any, past: Past, module: nn.Module, batch: int) -> Tensor | None:
    """Returns a call's mask as (batch, tokens) of the whole text, or None if the call has no mask."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        wide = past.text is not None and mask.shape[1] == past.room(module) > past.text
        return mask if not wide or bool(mask[:, past.text :].any()) else mask[:, : past.text]
    masks = {
        name: value
        for name, value in (mask.items() if isinstance(mask, Mapping) else [("", mask)])
        if value is not None
    }
    four = {
        name: value
        for name, value in masks.items()
        if isinstance(value, Tensor) and value.dim() == 4 and value.shape[1] == 1
    }
    flat = [value for value in masks.values() if isinstance(value, Tensor) and value.dim() == 2]  # of recurrent layers
    if past.text is None or len(four) + len(flat) < len(masks):
        shapes = ", ".join(f"{type(value).__name__} {tuple(getattr(value, 'shape', ()))}" for value in masks.values())
        raise error(f"its mask is {shapes or type(mask).__name__}", _WANTED)
    text = _text_mask_from(four, past, batch, next((value.device for value in four.values()), None))
    attentions = (None, "eager")  # sdpa's masks may be left out, or lack rows of padding; those of eager do not
    made = (_transformers_mask(module, past, batch, text, four, attention) for attention in attentions)
    if not any(_same(mask, each) for each in (*made, _transformers_mask(module, past, batch, None, four))):
        raise error("its 4-D mask is not what transformers makes of a 2-D one", _WANTED)
    return text


def pad_mask(mask: Tensor, original: Any) -> Tensor:
    """Returns a mask as wide as the call's own, which may have a column for each place of a static cache."""
    wide = original.shape[1] - mask.shape[1] if isinstance(original, Tensor) and original.dim() == 2 else 0
    return F.pad(mask, (0, wide)) if wide > 0 else mask


def _text_mask_from(masks: Mapping[str, Tensor], past: Past, batch: int, device: Any) -> Tensor:
    """Returns which tokens of the text some query attends to. Tokens that left the window keep their earlier value."""
    assert past.text is not None
    result = torch.ones(batch, past.text, dtype=torch.long, device=device)
    is_known = torch.zeros(past.text, dtype=torch.bool)
    for name, mask in masks.items():
        begin = 0 if past.cache is None else past.cache.get_mask_sizes(past.new, _layer(name, past.cache))[1]
        seen = _visible(mask).any(2)[:, 0, : max(past.text - begin, 0)]
        fresh = ~is_known[begin : begin + seen.shape[1]]
        result[:, begin : begin + seen.shape[1]][:, fresh] = seen[:, fresh].long()
        is_known[begin : begin + seen.shape[1]] = True
    before = past.mark.mask if past.mark is not None else None
    length = past.text - past.new
    if before is not None and before.shape == (batch, length):
        result[:, :length] = before
    elif before is not None and not bool(is_known[:length].all()):
        raise error("its mask is of a window alone, and does not tell which tokens before it are padding", _WANTED)
    if past.new > 1 and masks and not bool(is_known[length:].all()):
        raise error("its mask is of a window alone, and does not tell which tokens are padding", _WANTED)
    return result


def _layer(name: str, cache: Any) -> int:
    """Returns a layer of the cache that this mask is for."""
    sliding = list(cache.is_sliding)
    window = all(sliding) if not name else name.startswith(("sliding", "chunked"))
    states = recurrent_layers(cache)
    return next((i for i, slides in enumerate(sliding) if slides is window and not states[i]), 0)


def _transformers_mask(
    module: nn.Module,
    past: Past,
    batch: int,
    mask: Tensor | None,
    like: Mapping[str, Tensor],
    attention: str | None = None,
) -> Any:
    """Returns the mask that transformers computes for this call, or raises an error.

    Args:
        attention: the attention function that the mask is for; default None, the model's.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    make = getattr(masking, "create_masks_for_generate", None)
    if make is None or not hasattr(module, "config"):
        raise error("its mask is 4-D, and this model's masks are not made by transformers", _WANTED)
    kind = next(iter(like.values()), None)
    floating = kind is not None and kind.is_floating_point()
    dtype = kind.dtype if kind is not None and floating else torch.float32
    shape = torch.empty((batch, past.new, 0), dtype=dtype, device=kind.device if kind is not None else None)
    config: Any = module.config
    if attention is not None:
        config = copy.deepcopy(config)
        config._attn_implementation = attention
    return make(config, inputs_embeds=shape, attention_mask=mask, past_key_values=past.cache)


def _same(first: Any, second: Any) -> bool:
    """Whether two masks, or mappings of masks, are equivalent."""
    if isinstance(first, Mapping):
        return isinstance(second, Mapping) and all(
            name in second and _same(value, second[name]) for name, value in first.items()
        )
    if first is None or second is None:
        return first is second
    if not isinstance(second, Tensor) or second.shape[1:] != first.shape[1:]:
        return False
    rows = max(len(first), len(second))  # a mask of one row is for all rows
    same_rows = {len(first), len(second)} <= {1, rows}
    return same_rows and bool((_visible(first) == _visible(second)).all())


def _visible(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0
