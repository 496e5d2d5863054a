"""Virtual tokens in the graph of an exported file: any number of them, at any step, and none without an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surgery import hidden_of
from surgery.rules._virtual_tokens.padding_columns import Place, place_of
from surgery.rules._virtual_tokens.past import CACHES, error
from surgery.rules._virtual_tokens.token_rows import Inputs, embedded, prompt_rows, refuse_unknown, without_tokens


def insert_in_graph(
    module: Any, prompt: Tensor, arguments: Inputs, rest: str, after: int, moves: bool
) -> tuple[Inputs, Place | None]:
    """As `insertion.insert_tokens`, in the graph of an exported file: any number of virtual tokens, also none.

    A mask covers the text alone. The columns that it lacks, counted with the cache and the new virtual tokens, are
    columns of virtual tokens.
    """
    inputs = {**arguments, **(arguments[rest] if rest else {})}
    ids, embeds = inputs["input_ids"], inputs["inputs_embeds"]
    if (ids is None) == (embeds is None):
        return arguments, None
    refuse_unknown(inputs, rest)
    embeds = embedded(module, ids, embeds)
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
    rows = prompt_rows(prompt.to(embeds.device, embeds.dtype), batch)
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


def remove_in_graph(output: Any, place: Place | None) -> Any:
    """Removes the positions that `insert_in_graph` inserted from the output. A cache keeps them."""
    return output if place is None else without_tokens(output, place, hidden_of(output).shape[1])
