"""Half-precision models with adapters in float32, by torch's exporter and by transformers'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rules import LoraRule, PrefixRule, PromptRule
from surgery import Rule, apply_rules, export_onnx
from tests import tiny
from tests.slots import shaken

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")


CASES: dict[str, tuple[Any, list[Rule], dict[str, Any]]] = {
    "bert": (tiny.bert, [LoraRule("all-linear", rank=2)], {}),
    "gpt2": (tiny.gpt2, [LoraRule(["c_attn", "wte"], rank=2)], {"cache": True}),
    "llama": (tiny.llama, [LoraRule("all-linear", rank=2), PrefixRule("self_attn", length=2)], {"cache": True}),
    "llama, a prompt": (tiny.llama, [PromptRule(length=2)], {}),
}


@pytest.mark.parametrize(
    ("name", "adapters"),
    [("bert", "slots"), ("gpt2", "constant"), ("llama", "slots"), ("llama, a prompt", "slots")],
)
def test_float16(name: str, adapters: Any, tmp_path: Path) -> None:
    make, rules, how = CASES[name]
    model, example = make()
    apply_rules(model.eval().half(), rules, example_inputs=example)
    report = export_onnx(shaken(model), tmp_path / "m.onnx", example, adapters=adapters, **how)
    assert report.parity is not None and min(report.parity.moved.values()) > 0.02
    assert {slot["dtype"] for slot in report.manifest["slots"]} == ({"float32"} if adapters == "slots" else set())


def test_bfloat16_is_written(tmp_path: Path) -> None:
    model, example = tiny.bert()
    apply_rules(model.eval().bfloat16(), LoraRule("query", rank=2))
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots", verify=False)
    assert {slot["dtype"] for slot in report.manifest["slots"]} == {"float32"}
