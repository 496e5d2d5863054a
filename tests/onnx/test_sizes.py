"""Free sizes: models whose sizes depend on each other, or whose graphs would follow the example's sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import apply_rules, export_onnx
from surgery.errors import ParityError
from surgery.rules import LoraRule

pytest.importorskip("onnx")


class Chunked(nn.Module):
    """Sums within chunks of four positions; the last chunk is padded, as in state-space models."""

    def __init__(self, strict: bool = False) -> None:
        super().__init__()
        self.embed, self.out, self.strict = nn.Embedding(9, 8), nn.Linear(8, 3), strict

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embed(input_ids)
        batch, length, width = hidden.shape
        missing = -length % 4
        hidden = F.pad(hidden, (0, 0, 0, missing)).view(batch, -1, 4, width).cumsum(2).reshape(batch, -1, width)
        if missing:
            hidden = hidden[:, :length]
        if self.strict:  # two different graphs
            hidden = hidden * 2 if length % 2 else hidden + 1
        return self.out(hidden)


class Illustrated(nn.Module):
    """One picture per text, and two positions in each text for its picture's features."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.seen, self.out = nn.Embedding(9, 8), nn.Linear(16, 16), nn.Linear(8, 3)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        places = (input_ids == 8).unsqueeze(-1)
        seen = self.seen(pixel_values.flatten(1)).view(-1, 2, 8)
        if not torch.compiler.is_exporting() and int(places.sum()) != 2 * len(pixel_values):
            raise ValueError("two places a picture")
        return self.out(self.embed(input_ids).masked_scatter(places, seen))


def sizes(report: Any, adapter: str) -> set[str]:
    return {comparison.sizes for comparison in report.parity.compared if comparison.adapter == adapter}


@pytest.mark.parametrize("length", [8, pytest.param(7, marks=pytest.mark.slow("a text of 8 fills its chunk"))])
def test_a_text_that_fills_its_last_chunk_is_an_example_too(length: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = apply_rules(Chunked(), LoraRule("out", rank=2, init="random"), adapter="a")
    ids = torch.randint(9, (2, length))
    report = export_onnx(model, tmp_path / "m.onnx", {"input_ids": ids}, adapters="slots")
    assert sizes(report, "a") == {f"batch 2, sequence {length}", f"batch 3, sequence {length + 3}"}


def test_what_no_example_makes_free_is_refused_with_the_first_reason(tmp_path: Path) -> None:
    ids = torch.randint(9, (2, 8))
    with pytest.raises(ParityError, match="sequence 11") as caught:
        export_onnx(Chunked(strict=True), tmp_path / "m.onnx", {"input_ids": ids})
    assert caught.value.elsewhere and not list(tmp_path.iterdir())


def test_so_many_pictures_for_so_many_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = apply_rules(Illustrated(), LoraRule(["seen", "out"], rank=2, init="random"), adapter="a")
    example = {"input_ids": torch.tensor([[8, 8, 1, 2, 3]] * 2), "pixel_values": torch.randn(2, 1, 4, 4)}
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots")
    assert any("batch 4" in size for size in sizes(report, "a")), report.parity
    assert not report.parity.notices  # pyright: ignore[reportOptionalMemberAccess]


class Paired(nn.Module):
    """One picture per text, checked with a number that tracing takes for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.seen = nn.Embedding(9, 8), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        if int(input_ids.shape[0]) != int(pixel_values.shape[0]):
            raise ValueError("one picture a text")
        return self.embed(input_ids) + self.seen(pixel_values.flatten(1)).unsqueeze(1)


def test_batches_that_go_together_are_not_said_to_be_the_models_own(tmp_path: Path) -> None:
    example = {"input_ids": torch.randint(9, (2, 5)), "pixel_values": torch.randn(2, 1, 4, 4)}
    report = export_onnx(Paired(), tmp_path / "m.onnx", example)
    assert report.notices == [
        f"{name} is fixed at 2 along axis 0 ({dim}): tracing fixed it, though the model takes others"
        for name, dim in (("input_ids", "batch"), ("pixel_values", "pixel_values_batch"))
    ]
