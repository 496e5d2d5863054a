"""Files of models with packed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from surgery import apply_rules, export_onnx, packed_stacks_of
from surgery.rules import ExpertLoraRule
from tests.support.packed_experts import EXPERT_MODELS

pytest.importorskip("onnxruntime")


@pytest.mark.slow("a file of a whole model of experts; other quantised layers are exported in test_quantised.py")
def test_packed_experts_are_plain_in_the_file(tmp_path: Path) -> None:
    model: Any = EXPERT_MODELS[0].build()[0]
    model.set_experts_implementation("batched_mm")
    torch.manual_seed(0)
    apply_rules(model, ExpertLoraRule("experts", rank=2, init="random"))
    ids = torch.randint(48, (2, 9))
    report: Any = export_onnx(model, tmp_path / "model.onnx", {"input_ids": ids}, adapters="merged")
    assert report.parity.ok
    assert packed_stacks_of(model.model.layers[0].mlp.experts)  # the model itself is as before
