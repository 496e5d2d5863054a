"""Tiny models of transformers' families with random weights, each with an example call.

Tests that export a model take one layer where a second adds nothing: it takes as long again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers: Any = pytest.importorskip("transformers")

_SMALL: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip
_TOKENS: dict[str, Any] = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def ids(length: int = 7) -> torch.Tensor:
    return torch.randint(3, 99, (2, length))


def _text() -> dict[str, Any]:
    return {"input_ids": ids(), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}


def _images(size: int = 16) -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, size, size)}


def bert(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.BertConfig(**{**_SMALL, "num_hidden_layers": layers}, **_TOKENS)
    return transformers.BertForSequenceClassification(config), _text()


def albert() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.AlbertConfig(**{**_SMALL, "num_hidden_layers": 4}, **_TOKENS, embedding_size=16)
    return transformers.AlbertForSequenceClassification(config), _text()


def distilbert() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DistilBertConfig(**_TOKENS, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    return transformers.DistilBertForTokenClassification(config), _text()


def deberta() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.DebertaV2Config(
        **_SMALL, **_TOKENS, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8,
        share_att_key=True, norm_rel_ebd="layer_norm",
    )  # fmt: skip
    return transformers.DebertaV2ForSequenceClassification(config), _text()


def gpt2(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.GPT2Config(**_TOKENS, n_embd=32, n_layer=layers, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config), _text()


def llama(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    sizes = {**_SMALL, "num_hidden_layers": layers}
    config = transformers.LlamaConfig(**sizes, **_TOKENS, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config), _text()


def mistral(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    """With a sliding window that is shorter than a text."""
    sizes = {**_SMALL, "num_hidden_layers": layers, "sliding_window": 4}
    config = transformers.MistralConfig(**sizes, **_TOKENS, num_key_value_heads=2, max_position_embeddings=64)
    return transformers.MistralForCausalLM(config), _text()


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MixtralConfig(
        **_SMALL, **_TOKENS, num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64
    )
    return transformers.MixtralForCausalLM(config), _text()


def t5(layers: int = 2) -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=layers, num_heads=4,
        pad_token_id=0, eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config), {**_text(), "decoder_input_ids": ids(4)}


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.WhisperConfig(
        **_TOKENS, decoder_start_token_id=1, d_model=32, encoder_layers=2, decoder_layers=2, num_mel_bins=8,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
        max_source_positions=20, max_target_positions=20,
    )  # fmt: skip
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids(4)}
    return transformers.WhisperForConditionalGeneration(config), inputs


def vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(**_SMALL, image_size=16, patch_size=8, num_labels=3)
    return transformers.ViTForImageClassification(config), _images()


def clip() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.CLIPConfig(
        text_config={**_SMALL, **_TOKENS, "max_position_embeddings": 16},
        vision_config={**_SMALL, "image_size": 16, "patch_size": 8},
        projection_dim=16,
    )
    return transformers.CLIPModel(config), {**_text(), **_images()}


def resnet() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=3)
    return transformers.ResNetForImageClassification(config), _images(32)


def mamba() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.MambaConfig(vocab_size=99, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.MambaForCausalLM(config), {"input_ids": ids()}


FAMILIES: dict[str, Callable[..., tuple[nn.Module, dict[str, Any]]]] = {
    function.__name__: function
    for function in (
        bert, albert, distilbert, deberta, gpt2, llama, mixtral, t5, whisper, vit, clip, resnet, mamba,
    )
}  # fmt: skip
