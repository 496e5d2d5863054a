"""Inserts virtual tokens into the inputs of a text model's forward, and removes their positions from its output.

Each call decides anew: whether it has a mask, positions and a cache, and whether the cache already has the virtual
tokens. A call for which no correct result is known is a `SiteError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from surgery import hidden_of
from surgery.rules._virtual_tokens.padding_columns import Place, padded_left, place_of
from surgery.rules._virtual_tokens.past import Mark, Past, error, mark, waiting
from surgery.rules._virtual_tokens.text_mask import pad_mask, text_mask
from surgery.rules._virtual_tokens.token_rows import Inputs, embedded, prompt_rows, refuse_unknown, without_tokens

T = TypeVar("T")

# What a call inserts, where, and the number of its own columns if it started again from the text.
Inserted = tuple[Mark, Place, int | None]


def insert_tokens(
    module: Any,
    prompt: Tensor,
    arguments: Inputs,
    rest: str,
    adapter: str,
    after: int,
    traits: tuple[bool, bool, bool],
    real: Tensor | None = None,
) -> Any:
    """Returns the inputs with virtual tokens, and what this call inserts: None if the cache has them already.

    Args:
        module: The text model.
        prompt: The virtual tokens, (length, features) or one such matrix for each row.
        arguments: The forward's arguments by name.
        rest: The name of its ** argument, or "".
        adapter: The adapter's mark, which stays when the adapter is renamed.
        after: How many tokens of the text stand before the virtual tokens.
        traits: Whether padding may stand on the left, whether padding there changes no number of the text, and
            whether padding inside a text changes none.
        real: (batch, length), 1 for a virtual token of the row, 0 for a column that only fills it up.
    """
    inputs = {**arguments, **(arguments[rest] if rest else {})}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return arguments, None  # the forward raises its own error
    text = embeds if ids is None else ids
    if text.dim() != (2 if embeds is None else 3):
        raise error(f"the text is {tuple(text.shape)}", "one sequence a row: (batch, tokens)")
    refuse_unknown(inputs, rest)
    past = Past.of(inputs, adapter, text.shape[1])
    count, first = prompt.shape[-2], past.empty
    past.check_room(past.seen + text.shape[1] + (count if first else 0), module)
    if first and text.shape[1] < after:
        raise error(f"the first call has {text.shape[1]} tokens, fewer than after={after}", "give the text's start")
    left, moves, gaps = traits
    mask = _mask(inputs["attention_mask"], past, left, module, text.shape[0])
    positions = inputs.get("position_ids")
    new_mark = past.mark or Mark(count, text.shape[1], moves or positions is not None)
    if new_mark.behind and mask is not None and past.late(mask, after, module, positions is not None, gaps):
        anew = past.again({**inputs, "inputs_embeds": embedded(module, ids, embeds)}, mask)
        if inputs.get("cache_position") is not None:
            anew["cache_position"] = torch.arange(mask.shape[1]).to(inputs["cache_position"])
        call = {name: anew.get(name, value) for name, value in arguments.items()}
        if rest:
            call[rest] = {name: anew.get(name, value) for name, value in arguments[rest].items()}
        changed, new_mark = insert_tokens(module, prompt, call, rest, adapter, after, traits, real)
        return changed, (*new_mark[:2], text.shape[1])
    if real is not None:
        mask, positions = _fill_in(mask, positions, past, text)
    place = place_of(mask if new_mark.behind else None, count, after, new_mark.first)
    changed: Inputs = {"attention_mask": mask}
    if mask is not None:
        columns = mask.new_ones(mask.shape[0], count) if real is None else real.to(mask)
        changed["attention_mask"] = pad_mask(place.insert(mask, columns, 1), inputs["attention_mask"])
    elif not first and "position_ids" not in arguments and past.seen and past.new > 1:
        raise error("it can't be told from the call which tokens the cache has already", "give an attention_mask")
    lag: int | None = 0
    if positions is not None:
        lag = _lag(positions, mask, past)
        changed["position_ids"] = _positions(positions, place, after, past, mask is None, real)
    if inputs.get("cache_position") is not None:
        steps = inputs["cache_position"] + count
        changed["cache_position"] = torch.cat([torch.arange(count).to(steps), steps]) if first else steps
    lag, kept_mask = (
        lag if new_mark.lag is None else new_mark.lag,
        None if mask is inputs["attention_mask"] else mask,
    )
    wait = new_mark.behind and mask is not None and waiting(mask)
    text_so_far = past.kept({**inputs, "inputs_embeds": embedded(module, ids, embeds)}) if wait else None
    new_mark = new_mark._replace(lag=lag, mask=kept_mask, text=text_so_far)
    mark(past.cache, adapter, new_mark, first)
    if first:
        embeds = embedded(module, ids, embeds)
        rows = prompt_rows(prompt.to(embeds.device, embeds.dtype), embeds.shape[0])
        changed.update(input_ids=None, inputs_embeds=place.insert(embeds, rows, 1))
        types = inputs.get("token_type_ids")
        if types is not None:
            changed["token_type_ids"] = place.insert(types, types.new_zeros(*types.shape[:-1], count), types.dim() - 1)
    new = {name: changed.get(name, value) for name, value in arguments.items()}
    if rest:
        new[rest] = {name: changed.get(name, value) for name, value in arguments[rest].items() if name != "task_ids"}
    return new, (new_mark, place, None) if first else None


def remove_tokens(output: T, insertion: Inserted | None, adapter: str, after: int | None) -> T:
    """Removes the positions of the virtual tokens from the output. The cache keeps them, and is marked with theirs.

    `after`: how many tokens of the text stand before them. None: the output keeps their positions.
    """
    if insertion is None:
        return output
    for cache in _caches_of(output):
        mark(cache, adapter, insertion[0])
    hidden, (mark_made, place, new) = hidden_of(output), insertion
    if after is not None:
        if hidden.dim() != 3 or hidden.shape[1] < mark_made.count + after:
            raise error(f"the model returns {tuple(hidden.shape)}", "its output must have a position for each token")
        output = without_tokens(output, place, hidden.shape[1])
    if new is None:
        return output
    length = hidden_of(output).shape[1]
    return without_tokens(output, Place(length - new, 0), length)


def _mask(mask: Any, past: Past, left: bool, module: Any, batch: int) -> Tensor | None:
    """Returns the text's mask as 2-D."""
    mask = text_mask(mask, past, module, batch)
    if mask is None:
        return None
    if past.text is not None and mask.shape[1] != past.text:
        raise error(
            f"its mask is of {mask.shape[1]} tokens, and with those in the cache there are {past.text}",
            "code that goes on from a filled cache may have counted its virtual tokens as text: give the new tokens "
            "alone, with the mask of all",
        )
    if not left and padded_left(mask):
        raise error(
            "the text is padded on the left, and this model's positions then depend on token ids",
            "pad on the right: tokenizer.padding_side = 'right'",
        )
    return mask


def _lag(positions: Tensor, mask: Tensor | None, past: Past) -> int | None:
    """Returns how far the positions lag behind the tokens. An error if this changed since the last call.

    Code around this module may count the cache's virtual tokens as text, and then pass a wrong part of a text or wrong
    positions.
    """
    if past.text is None or torch.compiler.is_compiling() or mask is not None and not bool(mask.any()):
        return None
    lag, last_lag = past.text - 1 - int(positions.max()), None if past.mark is None else past.mark.lag
    if last_lag is not None and lag != last_lag:
        raise error(
            f"its position_ids end at {past.text - 1 - lag}, and with the text in the cache they should end at "
            f"{past.text - 1 - last_lag}",
            "give positions of the text alone; where generate goes on from a filled cache, the new tokens alone, with "
            "the mask of all",
        )
    return lag


def _fill_in(mask: Tensor | None, positions: Tensor | None, past: Past, text: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the text's mask and positions if a call has none: rows with fewer virtual tokens need them."""
    if past.text is None:
        raise error("it can't be told how long the text is", "route rows whose prompts are equally long")
    if mask is None:
        mask = torch.ones(text.shape[0], past.text, dtype=torch.long, device=text.device)
    if positions is None:
        positions = torch.arange(past.text - past.new, past.text, device=text.device).expand(text.shape[0], -1)
    return mask, positions


def _positions(
    positions: Tensor, place: Place, after: int, past: Past, unmasked: bool, real: Tensor | None = None
) -> Tensor:
    """Gives the virtual tokens the text's first positions, and the text the positions after them.

    The first position is read from the text, because some models count from 1. `real`: as in `insert_tokens`.
    """
    by = place.count if real is None else real.to(positions).sum(-1, keepdim=True)
    if not past.empty:
        return positions + by
    if unmasked and bool((positions.diff(dim=-1) != 1).any()):
        raise error("its position_ids are those of packed sequences", "give each sequence a row, and a mask")
    first = torch.arange(place.count, device=positions.device, dtype=positions.dtype)
    return place.numbered(
        positions, after, by, first if real is None else (real.to(positions).cumsum(-1) - 1).clamp_min(0)
    )


def _caches_of(output: Any) -> Iterator[Any]:
    items = output.values() if isinstance(output, Mapping) else output if type(output) in (tuple, list) else ()
    return (item for item in items if hasattr(item, "get_seq_length"))
