"""PEFT's adapters beside files with slots."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery.onnx import OnnxRunner, convert_peft  # noqa: E402

__all__ = ["check_peft", "export_slots", "onnx", "peft_of", "peft_on", "quietly"]


onnx = pytest.importorskip("onnx")


@contextmanager
def quietly() -> Iterator[None]:
    """Ignore PEFT's warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def peft_of() -> Any:
    with quietly():
        return pytest.importorskip("peft")


def peft_on(model: nn.Module, config: Any, folder: Path, seed: int = 0) -> Any:
    """PEFT's model with random trained tensors, saved to the folder."""
    with quietly():
        peft_model = peft_of().get_peft_model(model, config)
    draw = torch.Generator().manual_seed(seed)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=draw) * 0.3 + (parameter.dim() == 1)
    with quietly():
        peft_model.save_pretrained(str(folder))
    return peft_model.eval()


def export_slots(model: nn.Module, rules: Any, inputs: dict[str, torch.Tensor], folder: Path) -> Path:
    """Export the model with slots for the rules of one adapter, or of several adapters by name."""
    pytest.importorskip("onnxscript")
    from surgery import apply_rules
    from surgery.onnx import export_onnx

    adapted = copy.deepcopy(model).eval()
    for name, own in (rules if isinstance(rules, dict) else {"default": rules}).items():
        apply_rules(adapted, own, adapter=name, example_inputs=inputs)
    export_onnx(adapted, folder / "model.onnx", inputs, adapters="slots", verify=False)
    return folder / "model.onnx"


def check_peft(peft_model: Any, file: Path, inputs: dict[str, torch.Tensor], folder: Path, slack: float = 2e-4) -> None:
    """The converted checkpoint in the folder gives the outputs of PEFT's model."""
    runner = OnnxRunner(file)
    runner.load("a", convert_peft(folder / "peft", file, folder / "a.onnx_adapter"))
    names = set(runner.manifest.inputs)
    feeds = {name: value.numpy() for name, value in inputs.items() if name in names}
    with torch.no_grad(), quietly():
        expected = peft_model(**inputs).logits.numpy()
    assert np.abs(runner.run(feeds)["logits"] - expected).max() > 1e-2
    np.testing.assert_allclose(runner.run(feeds, "a")["logits"], expected, atol=slack, rtol=1e-3)
