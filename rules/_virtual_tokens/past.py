"""Reads from a call's cache how much text came before, and marks on it an adapter's virtual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery import SiteError
from surgery.rules._virtual_tokens.padding_columns import padding_of

CACHES = ("past_key_values", "cache_params")
_MARK = "_surgery_prompts"


class Mark(NamedTuple):
    """What a cache holds of an adapter: `count` virtual tokens, inserted into the first `first` columns of a text.

    `behind`: whether they stand after padding on the left; `lag`: how far the text's positions lag behind its tokens,
    0 except for padding and for images, whose tokens share positions (None: not known, as while compiling); `mask`: the
    text's mask at the last call, if the call had it in another form; `text`: the whole text in the form of the call, as
    long as a row contains only padding.
    """

    count: int
    first: int
    behind: bool
    lag: int | None = None
    mask: Tensor | None = None
    text: dict[str, Tensor] | None = None


def mark(cache: Any, adapter: str, new: Mark, first: bool = True) -> None:
    """Marks on a cache that it contains an adapter's virtual tokens, in the order of insertion."""
    if cache is None or torch.compiler.is_compiling() and not first:
        return
    marks = {name: other for name, other in getattr(cache, _MARK, {}).items() if not first or name != adapter}
    new = new._replace(mask=None) if torch.compiler.is_compiling() else new
    setattr(cache, _MARK, {**marks, adapter: new})


def error(why: str, fix: str) -> SiteError:
    return SiteError("virtual tokens can't be put into this call", why=why, fix=fix)


@dataclass
class Past:
    """The state of a call's cache: whether it is empty, its number of positions with the virtual ones, the number of
    new tokens, the length of the text with them (None: not known), and the mark of the adapter.
    """

    cache: Any
    empty: bool
    seen: int
    new: int
    text: int | None
    mark: Mark | None = None

    @staticmethod
    def of(inputs: Mapping[str, Any], adapter: str, new: int) -> Past:
        cache = next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)
        if cache is None:
            return Past(None, True, 0, new, new)
        if not hasattr(cache, "get_seq_length"):
            raise error(f"its cache is a {type(cache).__name__}", "one that tells its length: get_seq_length()")
        recurrent = recurrent_layers(cache)
        seen = (
            0 if recurrent and all(recurrent) else int(cache.get_seq_length())
        )  # recurrent states do not count positions
        if not seen and not (any(recurrent) and cache.has_previous_state()):
            return Past(cache, True, 0, new, new)
        marks: dict[str, Mark] = getattr(cache, _MARK, {})
        if adapter not in marks:
            raise error("the cache was filled without the virtual tokens", "start with an empty cache")
        # For this rule, the virtual tokens of earlier rules are text.
        later = list(marks.values())[list(marks).index(adapter) :]
        text = seen + new - sum(later_mark.count for later_mark in later) if seen else None
        return Past(cache, False, seen, new, text, marks[adapter])

    def room(self, module: nn.Module) -> int:
        """Returns the number of positions that the cache can hold; -1: any number."""
        rooms = [room for room in [_room(layer, module) for layer in _layers(self.cache)] if room >= 0]
        return min(rooms) if rooms else -1

    def check_room(self, needed: int, module: nn.Module) -> None:
        room = self.room(module)
        if 0 <= room < needed:
            raise error(
                f"the cache has room for {room} positions, and {needed} are needed",
                "virtual tokens take room: give past_key_values=StaticCache(config, max_cache_len=…)",
            )

    def kept(self, call: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the text so far. `call`: the part of it in this call."""
        now = {name: value for name in PARTS if (value := call.get(name)) is not None}
        return now if self.mark is None else self._joined(now)

    def _joined(self, now: Mapping[str, Any]) -> dict[str, Tensor]:
        """Returns the text of earlier calls and of this one, or nothing if they do not fit together."""
        before = (self.mark.text if self.mark is not None else None) or {}
        if any(now.get(name) is None for name in before):
            return {}
        return {
            name: torch.cat([before_value, now[name]], 1 if name == PARTS[0] else -1)
            for name, before_value in before.items()
        }

    def late(self, mask: Tensor, after: int, module: nn.Module, numbered: bool, gaps: bool) -> bool:
        """Whether a row's text begins in this call, after padding that followed its virtual tokens, and the model
        counts such padding.

        `numbered`: whether the call has positions; `gaps`: whether padding inside a text changes nothing.
        """
        if self.mark is None or torch.compiler.is_compiling():
            return False
        begin = padding_of(mask)
        if not bool(((begin + after > self.mark.first) & (begin < mask.shape[1])).any()):
            return False
        counted = any(
            getattr(layer, "is_sliding", False) or hasattr(layer, "conv_states") for layer in _layers(self.cache)
        )
        return not (numbered or gaps) or bool(after) or counted or bool(_windows(module))

    def again(self, call: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
        """All of the text, for a call that begins anew: the cache is emptied, and each row gets its virtual tokens."""
        assert self.mark is not None
        text = self._joined(call)
        if not text or len(getattr(self.cache, _MARK)) > 1 or not hasattr(self.cache, "reset"):
            raise error(
                f"a row's text begins at column {int(padding_of(mask).max())}, and the first call had "
                f"{self.mark.first}: the padding between its virtual tokens and its text would count as text",
                "give the first call the start of each row's text: larger chunks, or rows of like length",
            )
        self.cache.reset()
        return {**text, "input_ids": None, "attention_mask": mask}


PARTS = ("inputs_embeds", "position_ids", "token_type_ids")


def waiting(mask: Tensor) -> bool:
    """Whether a row contains only padding so far."""
    return not torch.compiler.is_compiling() and bool((padding_of(mask) == mask.shape[1]).any())


def recurrent_layers(cache: Any) -> list[bool]:
    """Returns which layers of a cache hold only a state, which does not count positions."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return list(getattr(cache, "is_linear", ()))
    return [hasattr(layer, "conv_states") and not hasattr(layer, "get_seq_length") for layer in layers]


def _layers(cache: Any) -> list[Any]:
    return list(getattr(getattr(cache, "self_attention_cache", cache), "layers", ()))


def _room(layer: Any, module: nn.Module) -> int:
    """Returns the number of positions that a layer of a cache can take; -1: any number, as with a sliding window."""
    length_of = getattr(layer, "get_max_length", None)
    room = int(length_of()) if length_of is not None else -1
    if room < 0 or not getattr(layer, "is_sliding", False):
        return room
    if not hasattr(layer, "max_cache_len"):
        return -1
    windows = _windows(module)  # a static layer has the size of its window or the requested size, whichever is smaller
    return -1 if windows and room >= min(windows) else room


_WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "attention_window", "local_attention")


def _windows(module: nn.Module) -> list[int]:
    config: Any = getattr(module, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return [size for name in _WINDOWS if type(size := getattr(config, name, None)) is int]
