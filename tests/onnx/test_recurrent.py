"""LSTM, GRU and RNN in exported files: free in time, by ONNX's own operators, and with the model's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx: Any = pytest.importorskip("onnx", reason="reads files")
onnxruntime: Any = pytest.importorskip("onnxruntime", reason="runs files")

from surgery import apply_rules, export_onnx  # noqa: E402
from surgery.onnx import OnnxRunner, export_adapter  # noqa: E402
from surgery.rules import LoraRule, TrainRule  # noqa: E402


class Reader(nn.Module):
    """Returns a head's outputs at all positions, and the last states."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        out, last = self.layer(x)
        states = last if isinstance(last, tuple) else (last,)
        return self.head(out), *states


CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}),
    ("GRU", {"num_layers": 2, "batch_first": True, "bias": False}),
    ("RNN", {"bidirectional": True, "nonlinearity": "relu"}),
    ("RNN", {"batch_first": True}),
]


@pytest.mark.parametrize(("kind", "fields"), CASES)
def test_any_number_of_steps(kind: str, fields: dict[str, Any], tmp_path: Path) -> None:
    layer = getattr(nn, kind)(4, 5, **fields)
    model = apply_rules(
        Reader(layer, 10 if fields.get("bidirectional") else 5), LoraRule("head", rank=2, init="random")
    )
    shape = (2, 6, 4) if fields.get("batch_first") else (6, 2, 4)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(shape), adapters="slots", dynamic=_both_free(fields))
    assert report.notices == [] and report.parity is not None and report.parity.ok
    kinds = {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    assert kind in kinds and not kinds & {"Loop", "Scan"}
    runner = OnnxRunner(tmp_path / "m.onnx")
    export_adapter(model, "default", tmp_path / "m.onnx", tmp_path / "a.onnx_adapter")
    runner.load("default", tmp_path / "a.onnx_adapter")
    model.eval()
    for steps, batch in ((1, 1), (11, 3)):
        x = torch.randn((batch, steps, 4) if fields.get("batch_first") else (steps, batch, 4))
        outputs = list(runner.run({"x": x.numpy()}, "default").values())
        for actual, expected in zip(outputs, model(x), strict=True):
            np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=1e-5, atol=1e-5)  # sums of ten float32


def _both_free(fields: dict[str, Any]) -> dict[str, dict[int, str]]:
    first = bool(fields.get("batch_first"))
    return {"x": {0: "batch" if first else "steps", 1: "steps" if first else "batch"}}


def test_an_adapters_own_weights_of_a_layer(tmp_path: Path) -> None:
    model = apply_rules(Reader(nn.GRU(4, 5, batch_first=True), 5), TrainRule("layer"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 6, 4), adapters="slots")
    assert report.parity is not None and report.parity.ok and report.notices == []


def test_where_tracing_fixes_a_size_it_is_said(tmp_path: Path) -> None:
    model = Reader(nn.LSTM(4, 5, proj_size=3, batch_first=True), 3)  # ONNX's LSTM has no projection
    report = export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 6, 4))
    assert report.notices == [
        "x is fixed at 6 along axis 1 (sequence): tracing fixed it, though the model takes others"
    ]


def test_torchs_functions_are_their_own_again() -> None:
    from surgery.onnx.graph.recurrent import recurrent_layers

    own, layer, x = (torch.lstm, torch.gru), nn.LSTM(4, 5), torch.randn(6, 2, 4)
    before = layer(x)[0]
    with recurrent_layers():
        with torch.no_grad():
            torch.testing.assert_close(layer(x)[0], before)  # with gradients, torch may take another kernel
            assert torch.lstm is not own[0]
    assert (torch.lstm, torch.gru) == own and "lstm" not in vars(torch._VF) and torch.equal(layer(x)[0], before)
