"""Finds the embedding of a model's positions by calls, for models in which PEFT's prefix only shifts positions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from surgery import class_of
from surgery.rules._virtual_tokens import text_inputs

LENGTH = 3
POSITIONS = "position_ids"


def position_embedding(model: nn.Module) -> str | None:
    """Returns the path of the embedding of positions, if a cache before a text only shifts them.

    It puts a text into a cache and calls the model with the same text again. Exactly one embedding must get inputs that
    are larger by the text's length. The order of the tokens in the cache must not matter, as it does for biases of
    relative positions.
    """
    hosts = [(path, module) for path, module in text_inputs.hosts(model, "")]
    if len(hosts) != 1 or any("rotary" in name for module in model.modules() for name in _names(module)):
        return None
    path, host = hosts[0]
    try:
        cache = _cache_of()
        with _evaluation_mode(model), torch.no_grad():
            ids = torch.arange(LENGTH, device=next(model.parameters()).device)[None] + 4
            first, _ = _call(host, ids, cache)
            layers = [(layer.keys, layer.values) for layer in cache.layers]
            second, output = _call(host, ids, _cache_of(layers))
            other = _call(host, ids, _cache_of([(key.flip(2), value.flip(2)) for key, value in layers]))[1]
            without = _call(host, ids, _cache_of())[1]
        shifted_embeddings = [name for name in first if not torch.equal(first[name], second[name])]
        alone = len(shifted_embeddings) == 1 and torch.equal(
            first[shifted_embeddings[0]] + LENGTH, second[shifted_embeddings[0]]
        )
        near = max(1e-5, 8 * torch.finfo(output.dtype).eps)  # sums in another order
        alone = alone and torch.allclose(output, other, rtol=near, atol=near) and not torch.equal(output, without)
    except Exception:  # a model that does not take a cache may fail in any way
        return None
    return ".".join(filter(None, (path, shifted_embeddings[0]))) if alone else None


def positions_input(module: nn.Module) -> str | None:
    """Returns how an embedding gets positions: "" for its only input, "position_ids", or None if it is not known.

    OPT's embedding takes `position_ids`, with -1 at padding, and adds a number to them.
    """
    forward = class_of(module).forward
    if forward is nn.Embedding.forward:
        return ""
    takes = isinstance(module, nn.Embedding) and POSITIONS in inspect.signature(forward).parameters
    return POSITIONS if takes else None


def _names(module: nn.Module) -> tuple[str, ...]:
    return getattr(getattr(class_of(module).forward, "__code__", None), "co_names", ())


def _cache_of(layers: Any = ()) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    for i, (key, value) in enumerate(layers):
        cache.update(key.clone(), value.clone(), i)
    return cache


def _call(host: Any, ids: Tensor, cache: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Returns the inputs of the embeddings inside that may be of positions, and the hidden state."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        key = positions_input(module)
        value = args[0] if key == "" else kwargs.get(key)
        if isinstance(value, Tensor):
            inputs[name] = value.clone()

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        for name, module in host.named_modules()
        if positions_input(module) is not None
    ]
    mask = ids.new_ones(1, LENGTH + cache.get_seq_length())
    try:
        output = host(input_ids=ids, attention_mask=mask, past_key_values=cache)
    finally:
        for handle in handles:
            handle.remove()
    return inputs, output[0]


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
