"""A small Llama whose layers tests drop, repeat and exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch

__all__ = ["IDS", "llama"]

IDS = torch.arange(12).reshape(2, 6)


def llama(layers: int = 4, **fields: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=48)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=layers, **sizes, **fields)).eval()
