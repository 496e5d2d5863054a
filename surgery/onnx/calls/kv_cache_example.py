"""A decoder's example with a cache in it, so that the file takes one and gives one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.onnx.calls.example import ExampleCall, is_cache
from surgery.onnx.calls.shared_copy import leave_live, sharing_copy, traced_path
from surgery.onnx.calls.sliding_windows import whole

__all__ = ["with_cache"]

_ALONG = ("position_ids", "token_type_ids", "cache_position")  # what goes with the text, position for position


def with_cache(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The example with the first half of its text in a cache, which the model without adapters makes.

    `SurgeryError` where the example has no text of two tokens, or the model no cache that it gives and takes.
    """
    values = ExampleCall.of(model, example_inputs).values
    ids = values.get("input_ids")
    if "past_key_values" in values:
        raise SurgeryError("the example has a cache already", fix="cache=False exports with that")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise SurgeryError(
            "cache=True is for decoders alone",
            why="what an encoder-decoder keeps of its encoder's text is no text of its own",
            fix="give encoder_outputs, decoder_input_ids and past_key_values in example_inputs",
        )
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] < 2:
        raise SurgeryError("cache=True needs a text", why="input_ids (batch, positions) of two tokens or more")
    mask = values.get("attention_mask")
    mask = torch.ones_like(ids) if mask is None else mask
    if mask.shape != ids.shape:
        raise SurgeryError("cache=True needs one mask for each position", why=f"it has the shape {tuple(mask.shape)}")
    half = ids.shape[1] // 2
    first = {**values, "input_ids": ids[:, :half], "attention_mask": mask[:, :half], "use_cache": True}
    rest = {**values, "input_ids": ids[:, half:], "attention_mask": mask}
    for name in _ALONG:
        if isinstance(value := values.get(name), Tensor):
            first[name], rest[name] = value[..., :half], value[..., half:]
    try:
        past = _past(model, first)
    except Exception as error:
        why = f"called with use_cache=True: {type(error).__name__}: {error}"[:300]
        raise SurgeryError(f"this {type(model).__name__} gives no cache", why=why) from error
    if past is None or not is_cache(past):
        fix = "export it without, or put what it keeps into example_inputs"
        raise SurgeryError(f"this {type(model).__name__} gives no cache", why="it has no past_key_values", fix=fix)
    return {**rest, "past_key_values": whole(past), "use_cache": True}


def _past(model: nn.Module, inputs: dict[str, Any]) -> Any:
    copy = sharing_copy(model)
    leave_live(copy, ())
    with torch.no_grad(), torch.random.fork_rng(), traced_path():
        return getattr(copy(**inputs), "past_key_values", None)
