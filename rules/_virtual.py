"""Virtual tokens in a text model's forward: where they go in, what else gets longer with them, and the way back out.

Everything is decided at the call: whether it has a mask, positions, a cache, and whether that cache holds the virtual
tokens already. What can't be made right is a `SiteError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery import SiteError, hidden_of

Inputs = dict[str, Any]

# What a forward may be given beside the text: widened, shifted or passed on here. Other tensors are refused.
CHANGED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "token_type_ids")
_CACHES = ("past_key_values", "cache_params")
_MARK = "_surgery_prompts"
# How many virtual tokens an adapter put into a cache, and by how much the text's positions lag behind its tokens: 0 but
# for images, whose tokens share positions. None: not known, while compiling.
Mark = tuple[int, int | None]


def put_in(
    module: Any,
    prompt: Tensor,
    given: Inputs,
    rest: str,
    adapter: str,
    after: int,
    left: bool,
    real: Tensor | None = None,
) -> Any:
    """The inputs with virtual tokens, and what this call puts in: None where the cache has them from before.

    `given`: the forward's arguments by name, `rest` the name of its ** argument; `left`: whether padding may be left;
    `adapter`: the adapter's mark, which stays when it is renamed; `real`: (batch, length), 1 where a row has a virtual
    token, and 0 where it only fills up.
    """
    inputs = {**given, **(given[rest] if rest else {})}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return given, None  # the forward has its own words for that
    text = embeds if ids is None else ids
    if text.dim() != (2 if embeds is None else 3):
        raise _error(f"the text is {tuple(text.shape)}", "one sequence a row: (batch, tokens)")
    _refuse_unknown(inputs, rest)
    past = _Past.of(inputs, adapter, text.shape[1])
    count, first = prompt.shape[-2], past.empty
    past.check_room(past.seen + text.shape[1] + (count if first else 0))
    if first and text.shape[1] < after:
        raise _error(f"the first call has {text.shape[1]} tokens, fewer than after={after}", "give the text's start")
    mask = _mask(inputs["attention_mask"], past, left)
    positions = inputs.get("position_ids")
    if real is not None:
        mask, positions = _told(mask, positions, past, text)
    changed: Inputs = {"attention_mask": mask}
    if mask is not None:
        columns = mask.new_ones(mask.shape[0], count) if real is None else real.to(mask)
        changed["attention_mask"] = _spliced(mask, columns, after, 1)
    elif not first and "position_ids" not in given and past.seen and past.new > 1:
        raise _error("it can't be told from the call which tokens the cache has already", "give an attention_mask")
    lag: int | None = 0
    if positions is not None:
        lag = _lag(positions, past)
        changed["position_ids"] = _positions(positions, count, after, past, mask is None, real)
    if inputs.get("cache_position") is not None:
        steps = inputs["cache_position"] + count
        changed["cache_position"] = torch.cat([torch.arange(count).to(steps), steps]) if first else steps
    if first:
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)
        rows = _for_rows(prompt.to(embeds.device, embeds.dtype), embeds.shape[0])
        changed.update(input_ids=None, inputs_embeds=_spliced(embeds, rows, after, 1))
        types = inputs.get("token_type_ids")
        if types is not None:
            changed["token_type_ids"] = _spliced(types, types.new_zeros(*types.shape[:-1], count), after, -1)
        _mark(past.cache, adapter, (count, lag))
    new = {name: changed.get(name, value) for name, value in given.items()}
    if rest:
        new[rest] = {name: changed.get(name, value) for name, value in given[rest].items() if name != "task_ids"}
    return new, (count, lag) if first else None


def take_out(output: Any, made: Mark | None, adapter: str, after: int | None) -> Any:
    """The output without the virtual tokens' positions; the cache, which keeps them, remembers whose they are.

    `after`: how many of the text's tokens stand before them; None: they stay.
    """
    if made is None:
        return output
    for cache in _caches_of(output):
        _mark(cache, adapter, made)
    if after is None:
        return output
    count, hidden = made[0], hidden_of(output)
    if hidden.dim() != 3 or hidden.shape[1] < count + after:
        raise _error(f"the model returns {tuple(hidden.shape)}", "its output must have a position for each token")
    return _without(output, count, hidden.shape[1], after)


def put_any(module: Any, prompt: Tensor, given: Inputs, rest: str, after: int) -> Inputs:
    """As `put_in`, in the graph of an exported file: of any number of virtual tokens, none included, at any step.

    A mask is of the text alone: what it lacks of the cache, the text and the new virtual tokens are virtual ones.
    """
    inputs = {**given, **(given[rest] if rest else {})}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return given
    _refuse_unknown(inputs, rest)
    embeds = module.get_input_embeddings()(ids) if embeds is None else embeds
    batch, new, count = embeds.shape[0], embeds.shape[1], prompt.shape[0]
    cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
    if cache is not None and (after or any(getattr(cache, "is_linear", ()))):
        raise _error("it goes on from a cache", "export it without one")
    mask, positions, steps = (inputs.get(name) for name in ("attention_mask", "position_ids", "cache_position"))
    changed: Inputs = {"input_ids": None, "attention_mask": mask}
    lacking = count
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise _error("its mask is not (batch, tokens)", "give it a 2-D mask")
        lacking = (0 if cache is None else cache.get_seq_length()) + new + count - mask.shape[1]
        changed["attention_mask"] = _spliced(mask, mask.new_ones(batch, lacking), after, 1)
    elif cache is not None and (positions is not None or steps is not None):
        raise _error("without a mask it can't be told which tokens a cache has", "give it an attention_mask")
    rows = _for_rows(prompt.to(embeds.device, embeds.dtype), batch)
    changed["inputs_embeds"] = _spliced(embeds, rows, after, 1)
    if positions is not None:
        changed["position_ids"] = _numbered(positions, count, after, lacking)
    if steps is not None:
        changed["cache_position"] = torch.cat([torch.arange(count).to(steps), steps + lacking])
    if (types := inputs.get("token_type_ids")) is not None:
        changed["token_type_ids"] = _spliced(types, types.new_zeros(*types.shape[:-1], count), after, -1)
    found = {name: changed.get(name, value) for name, value in given.items()}
    if rest:
        found[rest] = {name: changed.get(name, value) for name, value in given[rest].items()}
    return found


def take_any(output: Any, prompt: Tensor, after: int) -> Any:
    """The output without the positions that `put_any` put in; a cache keeps them."""
    return _without(output, prompt.shape[0], hidden_of(output).shape[1], after)


def widened(states: Tensor | None, mask: Tensor | None, count: int | None) -> Tensor | None:
    """The mask of an encoder's states, with columns for virtual tokens that it does not know of; None: any number."""
    if states is None or mask is None or (count is not None and states.shape[1] - mask.shape[-1] < count):
        return mask
    if mask.dim() != 2:
        raise _error("the mask of the encoder's states has no columns for the virtual tokens", "give it as 2-D")
    return _spliced(mask, mask.new_ones(mask.shape[0], states.shape[1] - mask.shape[-1]), 0, 1)


def put_after(output: Any, prompt: Tensor, after: int) -> Tensor:
    """A module's hidden state with virtual tokens in it."""
    hidden = hidden_of(output)
    if hidden.dim() != 3:
        raise _error(f"the module returns {tuple(hidden.shape)}", "(batch, tokens, features) takes virtual tokens")
    return _spliced(hidden, _for_rows(prompt.to(hidden.device, hidden.dtype), hidden.shape[0]), after, 1)


# The parts -------------------------------------------------------------------------------------------------------


def _spliced(tensor: Tensor, rows: Tensor, after: int, dim: int) -> Tensor:
    if not after:
        return torch.cat([rows, tensor], dim)
    length = tensor.shape[dim]
    return torch.cat([tensor.narrow(dim, 0, after), rows, tensor.narrow(dim, after, length - after)], dim)


def _for_rows(prompt: Tensor, batch: int) -> Tensor:
    """One prompt for all rows, or one a row; of rows that `generate` repeats for its beams, their row's."""
    if prompt.dim() == 3 and prompt.shape[0] not in (1, batch):
        if batch % prompt.shape[0]:
            raise _error(f"there are {prompt.shape[0]} tasks for {batch} rows", "name one task, or one a row")
        prompt = prompt.repeat_interleave(batch // prompt.shape[0], 0)
    return prompt.expand(batch, -1, -1)


def _mark(cache: Any, adapter: str, made: Mark) -> None:
    """Write down on a cache that it holds an adapter's virtual tokens, in the order in which adapters put them in."""
    if cache is not None:
        marks = {name: mark for name, mark in getattr(cache, _MARK, {}).items() if name != adapter}
        setattr(cache, _MARK, {**marks, adapter: made})


def _refuse_unknown(inputs: Inputs, rest: str) -> None:
    """Tensors whose columns may be tokens: the image's places in the text, lengths of packed sequences, boxes, …"""
    for name, value in inputs.items():
        if name in CHANGED or name in _CACHES or name in ("task_ids", rest) or name.startswith("encoder_"):
            continue
        items = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, Tensor) and item.dim() > 0 for item in items):
            raise _error(f"it is called with {name}", "what virtual tokens are to that is not known: leave it out")


@dataclass
class _Past:
    """What a call's cache says: whether it is empty, how many positions it holds, the virtual ones included, how many
    tokens are new, how many of text there are with them (None: not known), and how positions lag."""

    cache: Any
    empty: bool
    seen: int
    new: int
    text: int | None
    lag: int | None = None

    @staticmethod
    def of(inputs: Inputs, adapter: str, new: int) -> _Past:
        cache = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
        if cache is None:
            return _Past(None, True, 0, new, new)
        if not hasattr(cache, "get_seq_length"):
            raise _error(f"its cache is a {type(cache).__name__}", "one that tells its length: get_seq_length()")
        recurrent = list(getattr(cache, "is_linear", ()))
        seen = 0 if recurrent and all(recurrent) else int(cache.get_seq_length())  # such states count no positions
        if not seen and not (any(recurrent) and cache.has_previous_state()):
            return _Past(cache, True, 0, new, new)
        marks: dict[str, Mark] = getattr(cache, _MARK, {})
        if adapter not in marks:
            raise _error("the cache was filled without the virtual tokens", "start with an empty cache")
        # To this rule, what earlier ones put in is text.
        later = list(marks.values())[list(marks).index(adapter) :]
        text = seen + new - sum(count for count, _ in later) if seen else None
        return _Past(cache, False, seen, new, text, marks[adapter][1])

    def check_room(self, needed: int) -> None:
        if not hasattr(self.cache, "get_max_length") or all(self.cache.is_sliding or (True,)):
            return
        room = self.cache.get_max_length()
        if 0 <= room < needed:
            raise _error(
                f"the cache has room for {room} positions, and {needed} are needed",
                "virtual tokens take room: give past_key_values=StaticCache(config, max_cache_len=…)",
            )


def _mask(mask: Any, past: _Past, left: bool) -> Tensor | None:
    """The text's mask, 2-D."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        mask = _flat(mask, past)
    if past.text is not None and mask.shape[1] != past.text:
        raise _error(
            f"its mask is of {mask.shape[1]} tokens, and with those in the cache there are {past.text}",
            "code that goes on from a filled cache may have counted its virtual tokens as text: give the new tokens "
            "alone, with the mask of all",
        )
    if not left and bool((mask[:, 0] == 0).any()):
        raise _error(
            "the text is padded on the left, and this model's positions then depend on token ids",
            "pad on the right: tokenizer.padding_side = 'right'",
        )
    return mask


def _flat(mask: Any, past: _Past) -> Tensor:
    """The 2-D mask that a causal 4-D one was made from; with it the model makes its own, for virtual tokens, too."""
    wanted = "a 2-D mask (batch, tokens) can be widened"
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        raise _error(f"its mask is {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}", wanted)
    if past.cache is None or past.text is None or any(past.cache.is_sliding) or mask.shape[-1] < past.text:
        raise _error(f"its mask is {tuple(mask.shape)}", wanted)
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, : past.text]
    columns = seen[:, -1]
    order = torch.ones(past.new, past.text, dtype=torch.bool, device=mask.device).tril(past.text - past.new)
    real = columns[:, past.text - past.new :].unsqueeze(-1)  # what a row of padding sees is of no account
    if mask.shape[-2] != past.new or bool(((seen != (columns.unsqueeze(1) & order)) & real).any()):
        raise _error("its 4-D mask is not causal with padding", wanted)
    return columns.long()


def _lag(positions: Tensor, past: _Past) -> int | None:
    """By how much positions lag behind tokens; an error where that is no longer what it was.

    Code around this module may take the cache's virtual tokens for text, in what it hands on of a text or in positions.
    """
    if past.text is None or torch.compiler.is_compiling():
        return None
    lag = past.text - 1 - int(positions.max())
    if past.lag is not None and lag != past.lag:
        raise _error(
            f"its position_ids end at {past.text - 1 - lag}, and with the text in the cache they should end at "
            f"{past.text - 1 - past.lag}",
            "give positions of the text alone; where generate goes on from a filled cache, the new tokens alone, with "
            "the mask of all",
        )
    return lag


def _told(mask: Tensor | None, positions: Tensor | None, past: _Past, text: Tensor) -> tuple[Tensor, Tensor]:
    """The text's mask and positions, where a call leaves them out: rows with fewer virtual tokens need them."""
    if past.text is None:
        raise _error("it can't be told how long the text is", "route rows whose prompts are equally long")
    if mask is None:
        mask = torch.ones(len(text), past.text, dtype=torch.long, device=text.device)
    if positions is None:
        positions = torch.arange(past.text - past.new, past.text, device=text.device).expand(len(text), -1)
    return mask, positions


def _positions(
    positions: Tensor, count: int, after: int, past: _Past, unmasked: bool, real: Tensor | None = None
) -> Tensor:
    if real is not None:
        return _positions_of_rows(positions, after, past, real.to(positions))
    if not past.empty:
        return positions + count
    if unmasked and bool((positions.diff(dim=-1) != 1).any()):
        raise _error("its position_ids are those of packed sequences", "give each sequence a row, and a mask")
    return _numbered(positions, count, after, count)


def _numbered(positions: Tensor, count: int, after: int, by: int) -> Tensor:
    """Virtual tokens take the text's first positions, and the text those `by` behind: some models count from 1."""
    start = positions[..., after - 1 : after] + 1 if after else positions.amin(-1, keepdim=True)
    rows = start + torch.arange(count, device=positions.device, dtype=positions.dtype)
    shifted = torch.cat([positions[..., :after], positions[..., after:] + by], -1) if after else positions + by
    return _spliced(shifted, rows.expand(*positions.shape[:-1], -1), after, -1)


def _positions_of_rows(positions: Tensor, after: int, past: _Past, real: Tensor) -> Tensor:
    """As `_positions`, of rows that have virtual tokens of their own number: 1 in `real`."""
    count = real.sum(-1, keepdim=True)
    positions = positions.expand(len(real), -1)
    if not past.empty:
        return positions + count
    start = positions[..., after - 1 : after] + 1 if after else positions.amin(-1, keepdim=True)
    rows = start + (real.cumsum(-1) - 1).clamp_min(0)
    return _spliced(torch.cat([positions[..., :after], positions[..., after:] + count], -1), rows, after, -1)


def _without(value: Any, count: int, total: int, after: int) -> Any:
    if isinstance(value, Tensor):
        dim = {3: 1, 4: 2}.get(value.dim(), 0)  # hidden states; attention maps (batch, heads, queries, keys)
        if not dim or value.shape[dim] != total:
            return value
        kept = value.narrow(dim, after + count, total - after - count)
        return torch.cat([value.narrow(dim, 0, after), kept], dim) if after else kept.contiguous()
    if type(value) in (tuple, list):
        return type(value)(_without(item, count, total, after) for item in value)
    if isinstance(value, Mapping):
        items = {k: v if k in _CACHES else _without(v, count, total, after) for k, v in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value


def _caches_of(output: Any) -> Iterator[Any]:
    items = output.values() if isinstance(output, Mapping) else output if type(output) in (tuple, list) else ()
    return (item for item in items if hasattr(item, "get_seq_length"))


def _error(why: str, fix: str) -> SiteError:
    return SiteError("virtual tokens can't be put into this call", why=why, fix=fix)
