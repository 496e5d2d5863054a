"""Half-precision models with adapters in float32, by torch's exporter and by transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import Rule, apply_rules, export_onnx
from surgery.onnx import OnnxRunner, export_adapter
from surgery.rules import LoraRule, PrefixRule, PromptRule
from tests.support import tiny
from tests.support.sampling import LAYERS, onnx_cases
from tests.support.slots import shaken

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")


CASES: dict[str, tuple[Any, list[Rule], dict[str, Any]]] = {
    "bert": (tiny.bert, [LoraRule("all-linear", rank=2)], {}),
    "gpt2": (tiny.gpt2, [LoraRule(["c_attn", "wte"], rank=2)], {"cache": True}),
    "llama": (tiny.llama, [LoraRule("all-linear", rank=2), PrefixRule("self_attn", length=2)], {"cache": True}),
    "llama, a prompt": (tiny.llama, [PromptRule(length=2), LoraRule("all-linear", rank=2)], {"cache": True}),
}


@pytest.mark.parametrize(
    ("name", "adapters"),
    onnx_cases(
        [("bert", "slots"), ("gpt2", "constant"), ("llama", "slots"), ("llama, a prompt", "slots")],
        ("gpt2", "constant"),
        ("llama", "slots"),
        ("llama, a prompt", "slots"),
    ),
)
def test_float16(name: str, adapters: Any, tmp_path: Path) -> None:
    make, rules, how = CASES[name]
    model, example = make(LAYERS)
    apply_rules(model.eval().half(), rules, example_inputs=example)
    report = export_onnx(shaken(model), tmp_path / "m.onnx", example, adapters=adapters, **how)
    assert report.parity is not None and min(report.parity.moved.values()) > 0.02
    assert {slot["dtype"] for slot in report.manifest["slots"]} == ({"float32"} if adapters == "slots" else set())


def test_bfloat16_is_written(tmp_path: Path) -> None:
    model, example = tiny.bert(LAYERS)
    apply_rules(model.eval().bfloat16(), LoraRule("query", rank=2))
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots", verify=False)
    assert {slot["dtype"] for slot in report.manifest["slots"]} == {"float32"}


def test_attention_of_torch_itself(tmp_path: Path) -> None:
    """onnxruntime's NchwcTransformer (1.32) ends the process on this model, so sessions disable that pass."""
    torch.manual_seed(0)
    model, x = Attending().eval().half(), torch.randn(3, 5, 8).half()
    apply_rules(model, [LoraRule(["attention", "out"], rank=2, init="random")], adapter="a")
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    assert report.parity is not None and report.parity.moved["a"] > 0.02
    runner = OnnxRunner(report.path)
    runner.load("a", export_adapter(model, "a", report.path, tmp_path / "a.onnx_adapter"))
    actual = torch.from_numpy(runner.run({"x": x.numpy()}, "a")["output"])
    assert torch.allclose(actual, model(x), atol=2e-2, rtol=2e-2)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0])
