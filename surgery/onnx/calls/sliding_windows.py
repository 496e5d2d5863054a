"""Caches with sliding windows: for the export they keep the whole text, and the mask hides what a window would drop.

transformers' window layers count positions in Python and cut to the window, so a graph would be right only for the
example's length. transformers' exporter replaces them by plain layers. We do the same in the live model that is
compared with the file. Notes of rules on a cache are removed, because no file returns them.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.errors import SurgeryError

__all__ = ["adapter_notes", "with_plain_caches", "full_length_caches"]

_NOTED = "_surgery_"  # prefix of attributes in which rules note what they put into a cache
_COUNTING = ("update", "get_mask_sizes", "get_seq_length")


@contextlib.contextmanager
def full_length_caches() -> Iterator[None]:
    """Makes caches of models that are called in the block keep all positions."""
    caches: Any = sys.modules.get("transformers.cache_utils")
    sliding = getattr(caches, "DynamicSlidingWindowLayer", None)
    if sliding is None:
        yield
        return
    methods = {name: sliding.__dict__.get(name) for name in _COUNTING}
    for name in _COUNTING:
        setattr(sliding, name, getattr(caches.DynamicLayer, name))
    try:
        yield
    finally:
        for name, method in methods.items():
            delattr(sliding, name) if method is None else setattr(sliding, name, method)


def with_plain_caches(value: Any) -> Any:
    """Returns an argument or output whose caches have plain layers in place of window layers, and no notes."""
    if type(value) in (tuple, list):
        return type(value)(with_plain_caches(item) for item in value)
    if isinstance(value, Mapping):
        changed = {key: plain for key, item in value.items() if (plain := with_plain_caches(item)) is not item}
        if changed and type(value) is dict:
            return {**value, **changed}
        for key, plain in changed.items():
            value[key] = plain  # type: ignore[index]  # a ModelOutput, which belongs to this call alone
        return value
    return _with_plain_layers(value) if type(value).__name__.endswith("Cache") else value


def adapter_notes(cache: Any) -> list[str]:
    """Returns the attributes of a cache in which rules note what they put into it."""
    return [name for name in vars(cache) if name.startswith(_NOTED)]


_PARTS = ("self_attention_cache", "cross_attention_cache")
_WINDOW = "DynamicSlidingWindowLayer"


def _with_plain_layers(cache: Any) -> Any:
    parts = {name: part for name in _PARTS if (part := getattr(cache, name, None)) is not None}
    changed = {name: plain for name, part in parts.items() if (plain := _with_plain_layers(part)) is not part}
    if not parts and any(type(layer).__name__ == _WINDOW for layer in getattr(cache, "layers", ())):
        changed["layers"] = [_plain_layer(layer) for layer in cache.layers]
    note_names = adapter_notes(cache)
    if not changed and not note_names:
        return cache
    plain_cache = copy.copy(cache)
    plain_cache.__dict__.update(changed)
    for name in note_names:
        del plain_cache.__dict__[name]
    return plain_cache


def _plain_layer(layer: Any) -> Any:
    if type(layer).__name__ != _WINDOW:
        return layer
    from transformers.cache_utils import DynamicLayer

    plain_layer = DynamicLayer()
    if layer.is_initialized:
        read_length, window = layer.cumulative_length, layer.keys.shape[-2]
        if read_length > window:  # `read_length` is 0 if the cache was filled in `full_length_caches`
            why = f"it has the last {window} of {read_length} positions, and a file's cache has all of them"
            raise SurgeryError(
                "the example's cache keeps only a window of the text",
                why=why,
                fix="cache=True makes one for the example",
            )
        plain_layer.lazy_initialization(layer.keys, layer.values)
        plain_layer.keys, plain_layer.values = layer.keys, layer.values
    return plain_layer
