"""Exported files of models with structural rules have the structure, in all three forms."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import apply_rules, export_onnx
from surgery.rules import DropRule, LoraRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.stack import stack

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")
IDS = torch.randint(0, 50, (2, 5), generator=torch.Generator().manual_seed(1))


def cut(model: Any) -> Any:
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"), adapter="a")
    apply_rules(model, DropRule("model.layers.0"), adapter="cut")
    return apply_rules(model, [RepeatRule("model.layers", times=2), LoraRule("v_proj", rank=2)], adapter="deep")


def llama() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=24)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, use_cache=False, **sizes)).eval()


@pytest.mark.parametrize("adapters", ["merged", "constant", "slots"])
@pytest.mark.parametrize("make", [stack, *([llama] if os.environ.get("ALL_STRUCTURE") else [])])
def test_the_file_has_the_structure(make: Callable[[], Any], adapters: Any, tmp_path: Path) -> None:
    model = cut(make())
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "model.onnx", IDS, adapters=adapters)  # compares outputs and weights
    assert report.parity is not None and report.parity.ok and report.parity.weights > 5
    assert before.differences(model) == []
