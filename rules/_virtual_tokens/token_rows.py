"""Virtual tokens among the rows of a text: embeddings, masks and outputs with them and without them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from surgery import hidden_of
from surgery.rules._virtual_tokens.padding_columns import Place, place_of
from surgery.rules._virtual_tokens.past import CACHES, error

Inputs = dict[str, Any]

# The tensors that a forward may take beside the text. Calls with other tensors are refused.
CHANGED = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "cache_position", "token_type_ids")


def insert_after(output: Any, prompt: Tensor, after: int) -> Tensor:
    """Returns a module's hidden state with virtual tokens in it."""
    hidden = hidden_of(output)
    if hidden.dim() != 3:
        raise error(f"the module returns {tuple(hidden.shape)}", "(batch, tokens, features) takes virtual tokens")
    rows = prompt_rows(prompt.to(hidden.device, hidden.dtype), hidden.shape[0])
    return Place(rows.shape[1], after).insert(hidden, rows, 1)


def widen_memory_mask(states: Tensor | None, mask: Tensor | None, count: int | None, moves: bool) -> Tensor | None:
    """Returns the mask of an encoder's states with columns for the virtual tokens in front of them.

    Args:
        states: The encoder's states, virtual tokens included.
        mask: The mask of the text.
        count: The number of virtual tokens. None: any number.
        moves: Whether they stand behind padding on the left.
    """
    if states is None or mask is None or (count is not None and states.shape[1] - mask.shape[-1] < count):
        return mask
    if mask.dim() != 2:
        raise error("the mask of the encoder's states has no columns for the virtual tokens", "give it as 2-D")
    more = states.shape[1] - mask.shape[-1]
    return place_of(mask if moves else None, more, 0).insert(mask, mask.new_ones(mask.shape[0], more), 1)


def embedded(module: Any, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
    return module.get_input_embeddings()(ids) if embeds is None else embeds


def prompt_rows(prompt: Tensor, batch: int) -> Tensor:
    """Returns one prompt per row. Rows that `generate` repeats for its beams get the prompt of their row."""
    if prompt.dim() == 3 and prompt.shape[0] not in (1, batch):
        if batch % prompt.shape[0]:
            raise error(f"there are {prompt.shape[0]} tasks for {batch} rows", "name one task, or one a row")
        prompt = prompt.repeat_interleave(batch // prompt.shape[0], 0)
    return prompt.expand(batch, -1, -1)


def refuse_unknown(inputs: Inputs, rest: str) -> None:
    """Refuses tensors whose columns may be tokens: places of images, lengths of packed sequences, boxes, …"""
    for name, value in inputs.items():
        if name in CHANGED or name in CACHES or name in ("task_ids", rest) or name.startswith("encoder_"):
            continue
        items = value if isinstance(value, (tuple, list)) else (value,)
        if any(isinstance(item, Tensor) and item.dim() > 0 for item in items):
            raise error(f"it is called with {name}", "what virtual tokens are to that is not known: leave it out")


def without_tokens(value: Any, place: Place, total: int) -> Any:
    if isinstance(value, Tensor):
        dim = {3: 1, 4: 2}.get(value.dim(), 0)  # hidden states; attention maps (batch, heads, queries, keys)
        return place.cut(value, dim) if dim and value.shape[dim] == total else value
    if type(value) in (tuple, list):
        return type(value)(without_tokens(item, place, total) for item in value)
    if isinstance(value, Mapping):
        items = {k: v if k in CACHES else without_tokens(v, place, total) for k, v in value.items()}
        return items if type(value) is dict else type(value)(**items)
    return value
