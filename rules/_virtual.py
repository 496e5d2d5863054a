"""Virtual tokens in a text model's forward: where they go in, what else gets longer with them, and the way back out.

Everything is decided at the call: whether it has a mask, positions, a cache, and whether that cache holds the virtual
tokens already. What can't be made right is a `SiteError`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import Site, SiteError, hidden_of

Inputs = dict[str, Any]

# What a forward may be given beside the text: widened, shifted or passed on here. Other tensors are refused.
CHANGED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "token_type_ids")
_CACHES = ("past_key_values", "cache_params")
_MARK = "_surgery_prompts"


def put_in(module: Any, prompt: Tensor, given: Inputs, rest: str, adapter: str, after: int, left: bool):
    """The inputs with virtual tokens, and how many this call puts in: none where the cache has them from before.

    `given`: the forward's arguments by name, `rest` the name of its ** argument; `left`: whether padding may be left.
    """
    inputs = {**given, **(given[rest] if rest else {})}
    inputs.pop(rest, None)
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return given, 0  # the forward has its own words for that
    text = embeds if ids is None else ids
    if text.dim() != (2 if embeds is None else 3):
        raise _error(f"the text is {tuple(text.shape)}", "one sequence a row: (batch, tokens)")
    _refuse_unknown(inputs)
    count, length = prompt.shape[-2], text.shape[1]
    cache = _cache_in(inputs)
    seen = _seen(cache)
    first = seen is None
    marks: dict[str, int] = getattr(cache, _MARK, {})
    if not first and adapter not in marks:
        raise _error("the cache was filled without the virtual tokens", "start with an empty cache")
    if first and length < after:
        raise _error(f"the first call has {length} tokens, fewer than after={after}", "give the text's start at once")
    mask = inputs["attention_mask"]
    if not (mask is None or isinstance(mask, Tensor) and mask.dim() == 2):
        mask = _flat(mask, cache, length + (0 if seen is None else seen - sum(marks.values())), length)
    if mask is not None:
        if not left and bool((mask[:, 0] == 0).any()):
            raise _error(
                "the text is padded on the left, and this model's positions then depend on token ids",
                "pad on the right: tokenizer.padding_side = 'right'",
            )
        mask = _spliced(mask, mask.new_ones(mask.shape[0], count), after, 1)
    _check_room(cache, (seen or 0) + length + (count if first else 0))
    changed: Inputs = {"attention_mask": mask}
    positions = inputs.get("position_ids")
    if positions is not None:
        changed["position_ids"] = _positions(positions, count, after, first, mask, (seen or 0) - count + length)
    steps = inputs.get("cache_position")
    if steps is not None:
        changed["cache_position"] = (
            _spliced(steps + count, torch.arange(count).to(steps), 0, 0) if first else steps + count
        )
    if first:
        if embeds is None:
            embeds = module.get_input_embeddings()(ids)
        rows = _for_rows(prompt.to(embeds.device, embeds.dtype), embeds.shape[0])
        changed.update(input_ids=None, inputs_embeds=_spliced(embeds, rows, after, 1))
        types = inputs.get("token_type_ids")
        if types is not None:
            changed["token_type_ids"] = _spliced(types, types.new_zeros(*types.shape[:-1], count), after, -1)
        _mark(cache, adapter, count)
    new = {name: changed.get(name, value) for name, value in given.items()}
    if rest:
        new[rest] = {name: changed.get(name, value) for name, value in given[rest].items() if name != "task_ids"}
    return new, count if first else 0


def take_out(output: Any, count: int, adapter: str, after: int) -> Any:
    """The output without the virtual tokens' positions; the cache, which keeps them, remembers whose they are."""
    if not count:
        return output
    for cache in _caches_of(output):
        _mark(cache, adapter, count)
    hidden = hidden_of(output)
    if hidden.dim() != 3 or hidden.shape[1] < count + after:
        raise _error(f"the model returns {tuple(hidden.shape)}", "its output must have a position for each token")
    return _without(output, count, hidden.shape[1], after)


def widened(states: Tensor | None, mask: Tensor | None, count: int) -> Tensor | None:
    """The mask of an encoder's states, with columns for virtual tokens that it does not know of."""
    if states is None or mask is None or states.shape[1] - mask.shape[-1] < count:
        return mask
    if mask.dim() != 2:
        raise _error("the mask of the encoder's states has no columns for the virtual tokens", "give it as 2-D")
    return _spliced(mask, mask.new_ones(mask.shape[0], count), 0, 1)


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


def _mark(cache: Any, adapter: str, count: int) -> None:
    if cache is not None:
        setattr(cache, _MARK, {**getattr(cache, _MARK, {}), adapter: count})


def _refuse_unknown(inputs: Inputs) -> None:
    """Tensors whose columns may be tokens: the image's places in the text, lengths of packed sequences, boxes, …"""
    for name, value in inputs.items():
        if name in CHANGED or name in _CACHES or name == "task_ids" or name.startswith("encoder_"):
            continue
        items = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, Tensor) and item.dim() > 0 for item in items):
            raise _error(f"it is called with {name}", "what virtual tokens are to that is not known: leave it out")


def _cache_in(inputs: Inputs) -> Any:
    found = next((inputs[name] for name in _CACHES if inputs.get(name) is not None), None)
    if found is not None and not hasattr(found, "get_seq_length"):
        raise _error(f"its cache is a {type(found).__name__}", "one that tells its length is needed: get_seq_length()")
    return found


def _seen(cache: Any) -> int | None:
    """How many positions a cache holds, virtual ones included; None where it holds nothing yet."""
    if cache is None:
        return None
    length = int(cache.get_seq_length())
    if length == 0 and any(getattr(cache, "is_linear", ())) and cache.has_previous_state():
        return 0  # recurrent states alone count no positions
    return length or None


def _check_room(cache: Any, needed: int) -> None:
    if not hasattr(cache, "get_max_length") or all(cache.is_sliding or (True,)):
        return
    room = cache.get_max_length()
    if 0 <= room < needed:
        raise _error(
            f"the cache has room for {room} positions, and {needed} are needed",
            "virtual tokens take room: give past_key_values=StaticCache(config, max_cache_len=…)",
        )


def _flat(mask: Any, cache: Any, text: int, length: int) -> Tensor:
    """The 2-D mask that a causal 4-D one was made from; with it the model makes its own, for virtual tokens, too."""
    wanted = "a 2-D mask (batch, tokens) can be widened"
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[1] != 1:
        raise _error(f"its mask is {type(mask).__name__} {tuple(getattr(mask, 'shape', ()))}", wanted)
    if cache is None or any(cache.is_sliding) or mask.shape[-1] < text or mask.shape[-2] != length:
        raise _error(f"its mask is {tuple(mask.shape)}", wanted)
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0, :, :text]
    columns = seen[:, -1]
    order = torch.ones(length, text, dtype=torch.bool, device=mask.device).tril(text - length)
    real = columns[:, text - length :].unsqueeze(-1)  # what a row of padding sees is of no account
    if bool(((seen != (columns.unsqueeze(1) & order)) & real).any()):
        raise _error("its 4-D mask is not causal with padding", wanted)
    return columns.long()


def _positions(positions: Tensor, count: int, after: int, first: bool, mask: Any, bound: int) -> Tensor:
    if not first:
        # Code around this module may have counted the cache's virtual tokens already; then they would count twice.
        if not torch.compiler.is_compiling() and bound > 0 and int(positions.max()) >= bound:
            raise _error("its position_ids count the virtual tokens in the cache", "give positions of the text alone")
        return positions + count
    if mask is None and bool((positions.diff(dim=-1) != 1).any()):
        raise _error("its position_ids are those of packed sequences", "give each sequence a row, and a mask")
    start = positions[..., after - 1 : after] + 1 if after else positions.new_zeros(())
    rows = (start + torch.arange(count, device=positions.device, dtype=positions.dtype)).expand(
        *positions.shape[:-1], -1
    )
    shifted = torch.cat([positions[..., :after], positions[..., after:] + count], -1) if after else positions + count
    return _spliced(shifted, rows, after, -1)


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


# What a model is, found while planning -----------------------------------------------------------------------------


def starred(site: Site) -> str | None:
    """The name of the forward's ** argument."""
    return next((name for name, p in site.own.signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)


def takes_text(module: nn.Module) -> bool:
    return _takes(module, "input_ids", "inputs_embeds", "attention_mask") and hasattr(module, "get_input_embeddings")


def hosts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The innermost modules in this one that take a text, as ids or embedded, with its mask; no decoder of two."""
    owners = tuple(inner for inner in module.modules() if _has_both(inner))
    return ((name, inner) for name, inner in _innermost(module, path) if role_of(inner, owners) != "decoder")


def decoders(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Those that look at an encoder's states through a mask."""
    owners = tuple(inner for inner in module.modules() if _has_both(inner))
    for name, inner in _innermost(module, path):
        if _takes(inner, "encoder_hidden_states", "encoder_attention_mask") and role_of(inner, owners) == "decoder":
            yield name, inner


def role_of(module: nn.Module, owners: tuple[nn.Module, ...]) -> str:
    """ "encoder" or "decoder" of a model that has both, or "alone"."""
    for owner in owners:
        if owner is not module and _has_both(owner) and any(inner is module for inner in owner.modules()):
            encoder = owner.get_encoder()  # type: ignore[operator]
            inside = encoder is not owner and any(inner is module for inner in encoder.modules())
            return "encoder" if inside else "decoder"
    return "alone"


def _innermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, inner in module.named_modules(prefix=path):
        if takes_text(inner) and not any(takes_text(other) for other in inner.modules() if other is not inner):
            yield name, inner


def _has_both(module: nn.Module) -> bool:
    return _takes(module, "encoder_outputs") and hasattr(module, "get_encoder")


def _takes(module: nn.Module, *names: str) -> bool:
    return set(names) <= _arguments(getattr(module, "_surgery_base", type(module)))


@functools.lru_cache(1024)
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(kind.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def probed(run: Callable[..., Any], embedding: nn.Module, ids: Tensor | None = None) -> dict[str, Any]:
    """What short calls show of a text model, or `why` it can't be given embeddings for ids.

    `width`: of its embeddings; `pooled`: whether it returns a vector of the whole beside the hidden states; `left`:
    whether padding on the left is the same to it for embeddings as for ids.
    """
    padding = getattr(embedding, "padding_idx", None)
    weight = next(embedding.parameters())
    if ids is None:
        rows = [row for row in range(min(weight.shape[0], 8)) if row != padding]
        ids = torch.tensor([(rows * 4)[:4]], device=weight.device)
    given, embeds = run(input_ids=ids), embedding(ids).detach()
    hidden = hidden_of(given)
    found = {"why": "", "width": embeds.shape[-1], "left": True}
    if hidden.dim() != 3 or hidden.shape[1] != ids.shape[1]:
        return {**found, "why": f"for {ids.shape[1]} tokens it returns {tuple(hidden.shape)}"}
    if not _same(hidden, hidden_of(run(inputs_embeds=embeds))):
        return {**found, "why": "given inputs_embeds, it computes something else than for the ids that they embed"}
    values = given.values() if isinstance(given, Mapping) else given if isinstance(given, (tuple, list)) else ()
    found["pooled"] = any(isinstance(value, Tensor) and value.shape == hidden[:, 0].shape for value in values)
    if padding is not None:
        ids, mask = ids.clone(), torch.ones_like(ids)
        ids[:, 0], mask[:, 0] = padding, 0
        as_ids = hidden_of(run(input_ids=ids, attention_mask=mask))
        embedded = hidden_of(run(inputs_embeds=embedding(ids).detach(), attention_mask=mask))
        found["left"] = _same(as_ids[:, 1:], embedded[:, 1:])
    return found


def _same(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or one.shape == other.shape and torch.equal(one, other)
