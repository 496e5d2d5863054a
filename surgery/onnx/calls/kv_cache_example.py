"""Adds a cache to a decoder's example, so that the exported file takes and returns a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.onnx.calls.example import ExampleCall, is_cache
from surgery.onnx.calls.shared_copy import leave_live, sharing_copy, traced_path
from surgery.onnx.calls.sliding_windows import with_plain_caches

__all__ = ["with_cache"]

_ALONG = ("position_ids", "token_type_ids", "cache_position")  # inputs with one entry per position of the text


def with_cache(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Returns the example with the first half of its text in a cache, computed by the model without adapters.

    Raises `SurgeryError` if the text has fewer than two tokens, or the model does not return a cache.
    """
    values = ExampleCall.of(model, example_inputs).values
    ids = values.get("input_ids")
    if "past_key_values" in values:
        raise SurgeryError("the example has a cache already", fix="use cache=False, which exports the example's cache")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SurgeryError(
            "cache=True is for decoders alone",
            why="the cache of an encoder-decoder also holds its encoder's text",
            fix="give encoder_outputs, decoder_input_ids and past_key_values in example_inputs",
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        raise SurgeryError("cache=True needs a text", why="input_ids (batch, positions) of two tokens or more")
    mask = values.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise SurgeryError(
            "cache=True needs a mask with one entry per position", why=f"the mask has the shape {tuple(mask.shape)}"
        )
    half = ids.shape[1] // 2
    first_half = {**values, "input_ids": ids[:, :half], "attention_mask": mask[:, :half], "use_cache": True}
    second_half = {**values, "input_ids": ids[:, half:], "attention_mask": mask}
    for name in _ALONG:
        if isinstance(value := values.get(name), Tensor):
            first_half[name], second_half[name] = value[..., :half], value[..., half:]
    try:
        past = _past(model, first_half)
    except Exception as error:
        why = f"called with use_cache=True: {type(error).__name__}: {error}"[:300]
        raise SurgeryError(f"this {type(model).__name__} returns no cache", why=why) from error
    if past is None or not is_cache(past):
        fix = "use cache=False, or put the model's state into example_inputs"
        raise SurgeryError(f"this {type(model).__name__} returns no cache", why="it has no past_key_values", fix=fix)
    return {**second_half, "past_key_values": with_plain_caches(past), "use_cache": True}


def _past(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Runs the model without adapters and returns its cache."""
    copy = sharing_copy(model)
    leave_live(copy, ())
    with torch.no_grad(), torch.random.fork_rng(), traced_path():
        return getattr(copy(**inputs), "past_key_values", None)
