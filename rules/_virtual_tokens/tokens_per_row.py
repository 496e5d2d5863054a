"""Virtual tokens of several adapters in one batch: each row has its own, padded on the left and masked."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from surgery import SiteError, hidden_of
from surgery.rules._virtual_tokens import insertion, token_rows

# The rows of an adapter, and its virtual tokens (length, features).
RowPrompt = tuple[Any, Tensor]


def insert_tokens_per_row(
    module: Any,
    arguments: dict[str, Any],
    rest: str,
    after: int,
    traits: tuple[bool, bool, bool],
    counted: bool,
    *members: RowPrompt,
) -> Any:
    """As `insertion.insert_tokens`, for each row its own. Also returns the mark for the cache.

    `counted`: whether the model's positions are the tokens' numbers, so that a call without positions can get them.
    """
    ids, embeds = arguments["input_ids"], arguments["inputs_embeds"]
    text = ids if embeds is None else embeds
    if text is None:
        return arguments, None, ""
    prompt, real, name = stack_prompts(len(text), text.device, *members)
    if real is not None and not counted:
        raise _unequal("this model's positions can't be given for each row")
    return *insertion.insert_tokens(module, prompt, arguments, rest, name, after, traits, real), name


def insert_after_per_row(output: Any, after: int, *members: RowPrompt) -> Tensor:
    """As `token_rows.insert_after`."""
    hidden = hidden_of(output)
    prompt, real, _ = stack_prompts(len(hidden), hidden.device, *members)
    if real is not None:
        raise _unequal("what a module returns has no mask")
    return token_rows.insert_after(output, prompt, after)


def stack_prompts(batch: int, device: torch.device, *members: RowPrompt) -> tuple[Tensor, Tensor | None, str]:
    """Returns the rows' virtual tokens (batch, length, features), which of them are real (None: all), and a mark."""
    length = max(len(prompt) for _, prompt in members)
    first = members[0][1]
    whole = first.new_zeros(batch, length, first.shape[-1])
    real = torch.zeros(batch, length, dtype=torch.long, device=device)
    for rows, prompt in members:
        index = rows.of(batch, device)
        padded = F.pad(prompt.to(whole.dtype), (0, 0, length - len(prompt), 0))
        whole = whole.index_copy(0, index, padded.expand(len(index), -1, -1))
        real[index, length - len(prompt) :] = 1
    names = members[0][0].rows.names
    equal = all(name is not None for name in names) and len({len(prompt) for _, prompt in members}) == 1
    return whole, None if equal else real, f"rows of {', '.join(name or '-' for name in names)}"


def _unequal(why: str) -> SiteError:
    return SiteError(
        "rows with and without virtual tokens, or of different numbers of them, can't be routed together here",
        why=why,
        fix="route rows whose prompts are equally long in batches of their own",
    )
