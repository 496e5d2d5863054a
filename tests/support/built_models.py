"""Builds models of transformers from a class name and fields, and calls them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.peers import transformers

__all__ = ["SEQ2SEQ", "SIZES", "TEXT", "build_model", "logits_of"]

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 40}
SEQ2SEQ: dict[str, Any] = {
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
       (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))},
    **{"d_model": 16, "vocab_size": 40, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    **{"decoder_start_token_id": 2, "forced_eos_token_id": None, "max_position_embeddings": 32, "dropout": 0.0},
}  # fmt: skip


def build_model(name: str, fields: dict[str, Any]) -> Any:
    """A model of a class, always with the same weights."""
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**fields)).eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """The logits for token ids, which a decoder behind an encoder gets, too."""
    seq2seq = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **seq2seq).logits
