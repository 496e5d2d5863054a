"""The mask of a text alone, (batch, tokens), whichever form a call gives it in: `generate` makes larger ones from it.

For a static cache it hands on what the model would have made itself, (batch, 1, queries, keys), one for each kind of
layer. Virtual tokens need the mask that these came from. It is read off them, and taken where transformers makes the
same of it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.rules._virtual_tokens.past import Past, error, recurrent_layers

_WANTED = "a 2-D mask (batch, tokens) can be widened"


def text_mask(mask: Any, past: Past, module: nn.Module, batch: int) -> Tensor | None:
    """A call's mask as (batch, tokens) of all the text, or None where a call gives none."""
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        wide = past.text is not None and mask.shape[1] == past.room(module) > past.text
        return mask if not wide or bool(mask[:, past.text :].any()) else mask[:, : past.text]
    made = {name: one for name, one in (mask.items() if isinstance(mask, Mapping) else [("", mask)]) if one is not None}
    four = {name: one for name, one in made.items() if isinstance(one, Tensor) and one.dim() == 4 and one.shape[1] == 1}
    flat = [one for one in made.values() if isinstance(one, Tensor) and one.dim() == 2]  # of recurrent layers
    if past.text is None or len(four) + len(flat) < len(made):
        shapes = ", ".join(f"{type(one).__name__} {tuple(getattr(one, 'shape', ()))}" for one in made.values())
        raise error(f"its mask is {shapes or type(mask).__name__}", _WANTED)
    found = _read(four, past, batch, next((one.device for one in four.values()), None))
    if not any(_same(mask, _made(module, past, batch, one, four)) for one in (found, None)):
        raise error("its 4-D mask is not what transformers makes of a 2-D one", _WANTED)
    return found


def filled(mask: Tensor, given: Any) -> Tensor:
    """A mask as wide as the one that was given, which may have a column for each place of a static cache."""
    wide = given.shape[1] - mask.shape[1] if isinstance(given, Tensor) and given.dim() == 2 else 0
    return F.pad(mask, (0, wide)) if wide > 0 else mask


def _read(masks: Mapping[str, Tensor], past: Past, batch: int, device: Any) -> Tensor:
    """Which tokens of the text some query sees; of those that no query can see any more, what was so before."""
    assert past.text is not None
    found = torch.ones(batch, past.text, dtype=torch.long, device=device)
    known = torch.zeros(past.text, dtype=torch.bool)
    for name, mask in masks.items():
        begin = 0 if past.cache is None else past.cache.get_mask_sizes(past.new, _layer(name, past.cache))[1]
        seen = _seen(mask).any(2)[:, 0, : max(past.text - begin, 0)]
        fresh = ~known[begin : begin + seen.shape[1]]
        found[:, begin : begin + seen.shape[1]][:, fresh] = seen[:, fresh].long()
        known[begin : begin + seen.shape[1]] = True
    before = past.mark.mask if past.mark is not None else None
    length = past.text - past.new
    if before is not None and before.shape == (batch, length):
        found[:, :length] = before
    elif before is not None and not bool(known[:length].all()):
        raise error("its mask is of a window alone, and does not tell which tokens before it are padding", _WANTED)
    if past.new > 1 and masks and not bool(known[length:].all()):
        raise error("its mask is of a window alone, and does not tell which tokens are padding", _WANTED)
    return found


def _layer(name: str, cache: Any) -> int:
    """A layer of the cache that this mask is for."""
    sliding = list(cache.is_sliding)
    window = all(sliding) if not name else name.startswith(("sliding", "chunked"))
    states = recurrent_layers(cache)
    return next((i for i, one in enumerate(sliding) if one is window and not states[i]), 0)


def _made(module: nn.Module, past: Past, batch: int, mask: Tensor | None, like: Mapping[str, Tensor]) -> Any:
    """What transformers makes of a mask for this call, or an error."""
    masking: Any = sys.modules.get("transformers.masking_utils")
    make = getattr(masking, "create_masks_for_generate", None)
    if make is None or not hasattr(module, "config"):
        raise error("its mask is 4-D, and this model's masks are not made by transformers", _WANTED)
    kind = next(iter(like.values()), None)
    floating = kind is not None and kind.is_floating_point()
    dtype = kind.dtype if kind is not None and floating else torch.float32
    shape = torch.empty((batch, past.new, 0), dtype=dtype, device=kind.device if kind is not None else None)
    return make(module.config, inputs_embeds=shape, attention_mask=mask, past_key_values=past.cache)


def _same(given: Any, made: Any) -> bool:
    """Whether two masks, or mappings of masks, let the same be seen."""
    if isinstance(given, Mapping):
        return isinstance(made, Mapping) and all(name in made and _same(one, made[name]) for name, one in given.items())
    if given is None or made is None:
        return given is made
    return isinstance(made, Tensor) and made.shape == given.shape and torch.equal(_seen(given), _seen(made))


def _seen(mask: Tensor) -> Tensor:
    return mask if mask.dtype == torch.bool else mask == 0
