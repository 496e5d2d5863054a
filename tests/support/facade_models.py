"""Models for tests of the façade, beside PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import surgery.peft as ours
from tests.support.peers import peft

__all__ = ["CLOSE", "bert", "llama", "moved", "out", "same_adapters", "tiny", "two"]


tiny: Any = pytest.importorskip("tests.support.tiny")

CLOSE: dict[str, Any] = {"atol": 2e-5, "rtol": 1e-4}


def bert() -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    model, example = tiny.bert()
    return model.eval(), example


def llama(seed: int = 0) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(seed)
    model, example = tiny.llama()
    return model.eval(), example


def out(model: Any, example: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**example).logits


def moved(model: Any, seed: int = 1) -> Any:
    """As if it were trained: every trained tensor of the active adapters is another."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=draw) * 0.2)
    return model


def two(library: Any, example_of: Any = llama) -> tuple[Any, dict[str, Tensor], Any]:
    """A model with the adapters "default" and "other", the first active, both not what they started as."""
    model, example = example_of()
    fields = {"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    made = library.get_peft_model(model, library.LoraConfig(**fields))
    made.add_adapter("other", library.LoraConfig(**{**fields, "r": 2}))
    return made.eval(), example, model


def same_adapters(theirs: Any, mine: Any) -> None:
    for name in theirs.peft_config:
        state = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        assert ours.set_peft_model_state_dict(mine, state, adapter_name=name) == ([], [])
