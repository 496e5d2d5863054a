"""Virtual tokens in a text model's forward: where they go in, what else gets longer with them, and the way back out.

Everything is decided at the call: whether it has a mask, positions, a cache, and whether that cache holds the virtual
tokens already. What can't be made right is a `SiteError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from surgery import hidden_of
from surgery.rules._virtual_tokens.padding_columns import Place, padded_left, place_of
from surgery.rules._virtual_tokens.past import CACHES, Mark, Past, error, mark, waiting
from surgery.rules._virtual_tokens.text_mask import pad_mask, text_mask

Inputs = dict[str, Any]

# What a forward may be given beside the text: widened, shifted or passed on here. Other tensors are refused.
CHANGED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "token_type_ids")
Made = tuple[Mark, Place, int | None]  # what a call puts in, where, and its own columns where it began anew


def put_in(
    module: Any,
    prompt: Tensor,
    arguments: Inputs,
    rest: str,
    adapter: str,
    after: int,
    traits: tuple[bool, bool, bool],
    real: Tensor | None = None,
) -> Any:
    """The inputs with virtual tokens, and what this call puts in: None where the cache has them from before.

    `given`: the forward's arguments by name, `rest` the name of its ** argument; `adapter`: the adapter's mark, which
    stays when it is renamed; `traits`: whether padding may be left, whether it changes nothing there, and nothing
    inside of a text; `real`: (batch, length), 1 where a row has a virtual token, and 0 where it only fills up.
    """
    inputs = {**arguments, **(arguments[rest] if rest else {})}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return arguments, None  # the forward has its own words for that
    text = embeds if ids is None else ids
    if text.dim() != (2 if embeds is None else 3):
        raise error(f"the text is {tuple(text.shape)}", "one sequence a row: (batch, tokens)")
    _refuse_unknown(inputs, rest)
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
        anew = past.again({**inputs, "inputs_embeds": _embedded(module, ids, embeds)}, mask)
        if inputs.get("cache_position") is not None:
            anew["cache_position"] = torch.arange(mask.shape[1]).to(inputs["cache_position"])
        call = {name: anew.get(name, value) for name, value in arguments.items()}
        if rest:
            call[rest] = {name: anew.get(name, value) for name, value in arguments[rest].items()}
        changed, new_mark = put_in(module, prompt, call, rest, adapter, after, traits, real)
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
    lag, text_mask_kept = (
        lag if new_mark.lag is None else new_mark.lag,
        None if mask is inputs["attention_mask"] else mask,
    )
    wait = new_mark.behind and mask is not None and waiting(mask)
    kept = past.kept({**inputs, "inputs_embeds": _embedded(module, ids, embeds)}) if wait else None
    new_mark = new_mark._replace(lag=lag, mask=text_mask_kept, text=kept)
    mark(past.cache, adapter, new_mark, first)
    if first:
        embeds = _embedded(module, ids, embeds)
        rows = _for_rows(prompt.to(embeds.device, embeds.dtype), embeds.shape[0])
        changed.update(input_ids=None, inputs_embeds=place.insert(embeds, rows, 1))
        types = inputs.get("token_type_ids")
        if types is not None:
            changed["token_type_ids"] = place.insert(types, types.new_zeros(*types.shape[:-1], count), types.dim() - 1)
    new = {name: changed.get(name, value) for name, value in arguments.items()}
    if rest:
        new[rest] = {name: changed.get(name, value) for name, value in arguments[rest].items() if name != "task_ids"}
    return new, (new_mark, place, None) if first else None


def take_out(output: Any, insertion: Made | None, adapter: str, after: int | None) -> Any:
    """The output without the virtual tokens' positions; the cache, which keeps them, remembers whose they are.

    `after`: how many of the text's tokens stand before them; None: they stay.
    """
    if insertion is None:
        return output
    for cache in _caches_of(output):
        mark(cache, adapter, insertion[0])
    hidden, (mark_made, place, new) = hidden_of(output), insertion
    if after is not None:
        if hidden.dim() != 3 or hidden.shape[1] < mark_made.count + after:
            raise error(f"the model returns {tuple(hidden.shape)}", "its output must have a position for each token")
        output = _without(output, place, hidden.shape[1])
    if new is None:
        return output
    length = hidden_of(output).shape[1]
    return _without(output, Place(length - new, 0), length)


def put_any(
    module: Any, prompt: Tensor, arguments: Inputs, rest: str, after: int, moves: bool
) -> tuple[Inputs, Place | None]:
    """As `put_in`, in the graph of an exported file: of any number of virtual tokens, none included, at any step.

    A mask is of the text alone: what it lacks of the cache, the text and the new virtual tokens are virtual ones.
    """
    inputs = {**arguments, **(arguments[rest] if rest else {})}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return arguments, None
    _refuse_unknown(inputs, rest)
    embeds = _embedded(module, ids, embeds)
    batch, new, count = embeds.shape[0], embeds.shape[1], prompt.shape[0]
    cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
    if cache is not None and (after or any(getattr(cache, "is_linear", ()))):
        raise error("it goes on from a cache", "export it without one")
    mask, positions, steps = (inputs.get(name) for name in ("attention_mask", "position_ids", "cache_position"))
    changed: Inputs = {"input_ids": None, "attention_mask": mask}
    padded = mask if moves or positions is not None else None
    lacking, seen = count, 0
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise error("its mask is not (batch, tokens)", "give it a 2-D mask")
        seen = mask.shape[1] - new
        lacking = (0 if cache is None else cache.get_seq_length()) + count - seen
        changed["attention_mask"] = place_of(padded, lacking, after).insert(mask, mask.new_ones(batch, lacking), 1)
    elif cache is not None and (positions is not None or steps is not None):
        raise error("without a mask it can't be told which tokens a cache has", "give it an attention_mask")
    place = place_of(padded, count, after)
    if isinstance(place.start, Tensor) and cache is not None:  # the mask is of the cache's columns, too
        place = Place(count, (place.start - seen).clamp_min(0))
    rows = _for_rows(prompt.to(embeds.device, embeds.dtype), batch)
    changed["inputs_embeds"] = place.insert(embeds, rows, 1)
    if positions is not None:
        own = torch.arange(count, device=positions.device, dtype=positions.dtype)
        changed["position_ids"] = place.numbered(positions, after, lacking, own, seen)
    if steps is not None:
        changed["cache_position"] = torch.cat([torch.arange(count).to(steps), steps + lacking])
    if (types := inputs.get("token_type_ids")) is not None:
        changed["token_type_ids"] = place.insert(types, types.new_zeros(*types.shape[:-1], count), types.dim() - 1)
    result = {name: changed.get(name, value) for name, value in arguments.items()}
    if rest:
        result[rest] = {name: changed.get(name, value) for name, value in arguments[rest].items()}
    return result, place


def take_any(output: Any, place: Place | None) -> Any:
    """The output without the positions that `put_any` put in; a cache keeps them."""
    return output if place is None else _without(output, place, hidden_of(output).shape[1])


def widen_memory_mask(states: Tensor | None, mask: Tensor | None, count: int | None, moves: bool) -> Tensor | None:
    """The mask of an encoder's states, with columns for virtual tokens that it does not know of; None: any number.

    `moves`: whether they stand behind padding on the left.
    """
    if states is None or mask is None or (count is not None and states.shape[1] - mask.shape[-1] < count):
        return mask
    if mask.dim() != 2:
        raise error("the mask of the encoder's states has no columns for the virtual tokens", "give it as 2-D")
    more = states.shape[1] - mask.shape[-1]
    return place_of(mask if moves else None, more, 0).insert(mask, mask.new_ones(mask.shape[0], more), 1)


def put_after(output: Any, prompt: Tensor, after: int) -> Tensor:
    """A module's hidden state with virtual tokens in it."""
    hidden = hidden_of(output)
    if hidden.dim() != 3:
        raise error(f"the module returns {tuple(hidden.shape)}", "(batch, tokens, features) takes virtual tokens")
    rows = _for_rows(prompt.to(hidden.device, hidden.dtype), hidden.shape[0])
    return Place(rows.shape[1], after).insert(hidden, rows, 1)


# The parts -------------------------------------------------------------------------------------------------------


def _embedded(module: Any, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    return module.get_input_embeddings()(ids) if embeds is None else embeds


def _for_rows(prompt: Tensor, batch: int) -> Tensor:
    """One prompt for all rows, or one a row; of rows that `generate` repeats for its beams, their row's."""
    if prompt.dim() == 3 and prompt.shape[0] not in (1, batch):
        if batch % prompt.shape[0]:
            raise error(f"there are {prompt.shape[0]} tasks for {batch} rows", "name one task, or one a row")
        prompt = prompt.repeat_interleave(batch // prompt.shape[0], 0)
    return prompt.expand(batch, -1, -1)


def _refuse_unknown(inputs: Inputs, rest: str) -> None:
    """Tensors whose columns may be tokens: the image's places in the text, lengths of packed sequences, boxes, …"""
    for name, value in inputs.items():
        if name in CHANGED or name in CACHES or name in ("task_ids", rest) or name.startswith("encoder_"):
            continue
        items = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, Tensor) and item.dim() > 0 for item in items):
            raise error(f"it is called with {name}", "what virtual tokens are to that is not known: leave it out")


def _mask(mask: Any, past: Past, left: bool, module: Any, batch: int) -> Tensor | None:
    """The text's mask, 2-D."""
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
    """By how much positions lag behind tokens; an error where that is no longer what it was.

    Code around this module may take the cache's virtual tokens for text, in what it hands on of a text or in positions.
    """
    if past.text is None or torch.compiler.is_compiling() or mask is not None and not bool(mask.any()):
        return None
    lag, known = past.text - 1 - int(positions.max()), None if past.mark is None else past.mark.lag
    if known is not None and lag != known:
        raise error(
            f"its position_ids end at {past.text - 1 - lag}, and with the text in the cache they should end at "
            f"{past.text - 1 - known}",
            "give positions of the text alone; where generate goes on from a filled cache, the new tokens alone, with "
            "the mask of all",
        )
    return lag


def _fill_in(mask: Tensor | None, positions: Tensor | None, past: Past, text: Tensor) -> tuple[Tensor, Tensor]:
    """The text's mask and positions, where a call leaves them out: rows with fewer virtual tokens need them."""
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
    """Virtual tokens take the text's first positions, and the text those behind: some models count from 1.

    `real`: of rows that have virtual tokens of their own number, 1 for each.
    """
    by = place.count if real is None else real.to(positions).sum(-1, keepdim=True)
    if not past.empty:
        return positions + by
    if unmasked and bool((positions.diff(dim=-1) != 1).any()):
        raise error("its position_ids are those of packed sequences", "give each sequence a row, and a mask")
    own = torch.arange(place.count, device=positions.device, dtype=positions.dtype)
    return place.numbered(
        positions, after, by, own if real is None else (real.to(positions).cumsum(-1) - 1).clamp_min(0)
    )


def _without(value: Any, place: Place, total: int) -> Any:
    if isinstance(value, Tensor):
        dim = {3: 1, 4: 2}.get(value.dim(), 0)  # hidden states; attention maps (batch, heads, queries, keys)
        return place.cut(value, dim) if dim and value.shape[dim] == total else value
    if type(value) in (tuple, list):
        return type(value)(_without(item, place, total) for item in value)
    if isinstance(value, Mapping):
        items = {k: v if k in CACHES else _without(v, place, total) for k, v in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value


def _caches_of(output: Any) -> Iterator[Any]:
    items = output.values() if isinstance(output, Mapping) else output if type(output) in (tuple, list) else ()
    return (item for item in items if hasattr(item, "get_seq_length"))
