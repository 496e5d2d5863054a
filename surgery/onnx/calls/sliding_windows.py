"""Sliding windows: in an exported file their caches keep the whole text, as others do, and the mask does the rest.

transformers' layers of a cache that keep a window count positions in Python and cut to the window, which a graph would
have at the example's length for good. Its exporter traces them so, too; here the live model that is compared has them
alike, and they are plain layers in what goes in and comes out. What rules note on a cache comes out of no file: it is
left out of what the live model gives, too.
"""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from surgery.errors import SurgeryError

__all__ = ["notes", "whole", "whole_windows"]

_NOTED = "_surgery_"  # begins the names of attributes in which rules note on a cache what they put into it
_COUNTING = ("update", "get_mask_sizes", "get_seq_length")


@contextlib.contextmanager
def whole_windows() -> Iterator[None]:
    """Models that are called inside of the block keep all positions in their caches."""
    caches: Any = sys.modules.get("transformers.cache_utils")
    sliding = getattr(caches, "DynamicSlidingWindowLayer", None)
    if sliding is None:
        yield
        return
    own = {name: sliding.__dict__.get(name) for name in _COUNTING}
    for name in _COUNTING:
        setattr(sliding, name, getattr(caches.DynamicLayer, name))
    try:
        yield
    finally:
        for name, method in own.items():
            delattr(sliding, name) if method is None else setattr(sliding, name, method)


def whole(value: Any) -> Any:
    """A value, such as an argument or what a model returns, whose caches have plain layers for those of a window, and
    no notes."""
    if type(value) in (tuple, list):
        return type(value)(whole(item) for item in value)
    if isinstance(value, Mapping):
        changed = {key: plain for key, item in value.items() if (plain := whole(item)) is not item}
        if changed and type(value) is dict:
            return {**value, **changed}
        for key, plain in changed.items():
            value[key] = plain  # type: ignore[index]  # a ModelOutput, which is this call's own
        return value
    return _whole_cache(value) if type(value).__name__.endswith("Cache") else value


def notes(cache: Any) -> list[str]:
    """The attributes of a cache in which rules note what they put into it."""
    return [name for name in vars(cache) if name.startswith(_NOTED)]


_PARTS = ("self_attention_cache", "cross_attention_cache")
_WINDOW = "DynamicSlidingWindowLayer"


def _whole_cache(cache: Any) -> Any:
    parts = {name: part for name in _PARTS if (part := getattr(cache, name, None)) is not None}
    changed = {name: plain for name, part in parts.items() if (plain := _whole_cache(part)) is not part}
    if not parts and any(type(layer).__name__ == _WINDOW for layer in getattr(cache, "layers", ())):
        changed["layers"] = [_plain(layer) for layer in cache.layers]
    noted = notes(cache)
    if not changed and not noted:
        return cache
    plain_cache = copy.copy(cache)
    plain_cache.__dict__.update(changed)
    for name in noted:
        del plain_cache.__dict__[name]
    return plain_cache


def _plain(layer: Any) -> Any:
    if type(layer).__name__ != _WINDOW:
        return layer
    from transformers.cache_utils import DynamicLayer

    plain_layer = DynamicLayer()
    if layer.is_initialized:
        seen, kept = layer.cumulative_length, layer.keys.shape[-2]
        if seen > kept:  # 0 where it was filled inside of `whole_windows`
            why = f"it has the last {kept} of {seen} positions, and a file's cache has them all"
            raise SurgeryError(
                "the example's cache keeps a window", why=why, fix="cache=True makes one for the example"
            )
        plain_layer.lazy_initialization(layer.keys, layer.values)
        plain_layer.keys, plain_layer.values = layer.keys, layer.values
    return plain_layer
