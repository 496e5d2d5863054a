"""Finds how transformers' `generate` differs from repeated calls of the forward, for the manifest."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.onnx.calls.example import ExampleCall, is_cache, is_transformers
from surgery.onnx.calls.shared_copy import leave_live, sharing_copy, traced_path

__all__ = ["GENERATION", "changed_logits", "generation_of"]

GENERATION = "generation"  # a field of the manifest with `reread` and `differs`: see `generation_of`
_ROW = 8  # so many positions of the example show whether `generate` differs
_NEAR = 1e-3
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # settings that change logits, with their neutral values
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "min_new_tokens": (0,), "guidance_scale": (1.0,),
    "bad_words_ids": (), "sequence_bias": (), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "suppress_tokens": ([],), "begin_suppress_tokens": ([],), "exponential_decay_length_penalty": (),
    "watermarking_config": (),
}  # fmt: skip


def generation_of(model: nn.Module, example: ExampleCall) -> dict[str, Any]:
    """Returns how `generate` differs from repeated forwards; empty if it does not.

    `reread`: the length at which `generate` drops the cache and reads the text again; `differs`: why the forward gives
    other first logits than `generate`.
    """
    ids = example.values.get("input_ids")
    decodes = is_transformers(model) and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 0
    can_generate: Any = getattr(model, "can_generate", None)
    config: Any = getattr(model, "config", None)
    if not decodes or not callable(can_generate) or not can_generate() or getattr(config, "is_encoder_decoder", False):
        return {}
    assert isinstance(ids, Tensor)
    generation: dict[str, Any] = {}
    if any(map(is_cache, example.values.values())):
        length = next((size for size in _switch_lengths(config) if _drops_cache(model, ids, size)), None)
        generation |= {} if length is None else {"reread": length + 1}
    if (why := _difference(model, example, ids[:1, :_ROW])) is not None:
        generation["differs"] = why
    return generation


def changed_logits(model: nn.Module) -> list[str]:
    """Returns settings of a generation config by which `generate` changes the forward's logits."""
    config = getattr(model, "generation_config", None)
    settings = []
    for name, neutral in _NEUTRAL.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            settings.append(f"{name}={value!r}")
    return settings


def _switch_lengths(config: Any) -> Iterator[int]:
    """Yields lengths at which, according to the configuration, rotations change."""
    for part in (config, getattr(config, "text_config", None)):
        rope = getattr(part, "rope_parameters", None)
        for attributes in (vars(part) if part is not None else {}, rope if isinstance(rope, Mapping) else {}):
            size = attributes.get("original_max_position_embeddings")
            if type(size) is int and size > 0:
                yield size


def _drops_cache(model: nn.Module, ids: Tensor, size: int) -> bool:
    """Whether `generate` drops a cache of this length."""
    prepare: Any = getattr(model, "prepare_inputs_for_generation", None)
    with contextlib.suppress(Exception), torch.no_grad():
        text = ids.new_ones((1, size + 1))
        mask = torch.ones_like(text)
        prepared = prepare(
            text, past_key_values=_cache_of_length(size), attention_mask=mask, use_cache=True, next_sequence_length=1
        )
        return prepared.get("past_key_values") is None
    return False


def _cache_of_length(size: int) -> Any:
    """Returns an empty cache that reports this length."""
    from transformers.cache_utils import DynamicCache

    class FixedLengthCache(DynamicCache):
        def get_seq_length(self, *_: Any, **__: Any) -> int:
            return size

        def __len__(self) -> int:
            return 1

    return FixedLengthCache()


def _difference(model: nn.Module, example: ExampleCall, row: Tensor) -> str | None:
    """Returns why the first logits of `generate` and of the forward differ; None if they agree or a call fails."""
    copy: Any = sharing_copy(model)
    leave_live(copy, ())
    mask = torch.ones_like(row)
    further = (
        {"position_ids": mask.cumsum(-1) - 1} if "position_ids" in example.values else {}
    )  # as `generate` computes them
    with contextlib.suppress(Exception), torch.no_grad(), torch.random.fork_rng(), traced_path():
        expected = copy(input_ids=row, attention_mask=mask, **further).logits[:, -1].float()
        generated = copy.generate(
            row, attention_mask=mask, max_new_tokens=1, do_sample=False, num_beams=1, eos_token_id=None, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        logits = generated.logits[0].float()
        if logits.shape != expected.shape or (logits - expected).abs().max() > _NEAR * max(
            1.0, float(expected.abs().max())
        ):
            places = "" if further else ", or positions that begin at 0 (give position_ids in the example)"
            return f"{type(model).__name__}.generate calls the forward with more than a text and its mask{places}"
    return None
