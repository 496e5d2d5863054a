"""Small decoders of transformers with random weights, by the names of their configurations."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from surgery import apply_rules
from surgery.rules import LoraRule

__all__ = ["IDS", "SIZES", "adapted", "config_of", "model_of"]

SIZES: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, rope_parameters={"rope_type": "default", "rope_theta": 777.0},
)  # fmt: skip
IDS = torch.arange(12)[None] * 5 % 64


def config_of(name: str, **settings: Any) -> Any:
    """A small configuration. Its own copy of the settings: transformers writes into them."""
    return getattr(transformers, f"{name}Config")(**copy.deepcopy(SIZES | settings))


def model_of(name: str = "Llama", **settings: Any) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_of(name, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def adapted(name: str = "Llama", **settings: Any) -> Any:
    model = model_of(name, **settings)
    layers = {path.rpartition(".")[2] for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    return apply_rules(model, LoraRule(sorted(layers - {"lm_head"}) or ["c_attn"], rank=2, init="random"))
