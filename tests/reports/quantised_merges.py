"""Measures what merges into quantised weights lose: `python -m tests.reports.quantised_merges` prints the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from surgery import apply_rules, merge
from surgery.packed.packed_weight import packed_weight_of
from surgery.rules import LoraRule
from tests.support.quantised import BY_NAME

SIZE, RATIOS = 512, (0.003, 0.03, 0.3)
LAYOUTS = {"nf4": "bitsandbytes Linear4bit nf4", "int8": "bitsandbytes Linear8bitLt"}
Lost = tuple[float, float]  # of ‖ΔW‖, and of ‖ΔW x‖


def measure(layout: str, ratio: float, merge_into: Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]) -> Lost:
    """The shares that a merge loses. `merge_into` gets the model, the wanted weight and inputs; others are measured."""
    torch.manual_seed(0)
    inputs = torch.randn(2048, 32) @ torch.randn(32, SIZE) + 0.1 * torch.randn(2048, SIZE)
    x, unseen = inputs[:1024], inputs[1024:]
    dense = nn.Linear(SIZE, SIZE, bias=False)
    nn.init.normal_(dense.weight, std=0.02)
    model = apply_rules(nn.Sequential(BY_NAME[LAYOUTS[layout]].build(dense)), LoraRule("0", rank=8, alpha=8))
    site: Any = model[0]
    box = site.adapters.default
    base = packed(site).dequantise().float()
    with torch.no_grad():
        nn.init.normal_(box.B)
        box.B.mul_(ratio * base.norm() / (box.B @ box.A).norm())
        delta = box.B @ box.A
    merge_into(model, base + delta, x)
    error = packed(site).dequantise().float() - base - delta
    return float(error.norm() / delta.norm()), float((error @ unseen.t()).norm() / (delta @ unseen.t()).norm())


def packed(module: nn.Module) -> Any:
    return packed_weight_of(module)


def naive(model: Any, wanted: torch.Tensor, x: torch.Tensor) -> None:
    """Dequantise, add, quantise, as PEFT merges."""
    packed(model[0]).write(packed(model[0]).requantise(wanted))


def alone(model: Any, wanted: torch.Tensor, x: torch.Tensor) -> None:
    merge(model, quantised="requantise", limit=None)


def with_inputs(model: Any, wanted: torch.Tensor, x: torch.Tensor) -> None:
    merge(model, quantised="requantise", limit=None, example_inputs=x)


def rows() -> list[list[str]]:
    table = []
    for layout in LAYOUTS:
        for ratio in RATIOS:
            results = [measure(layout, ratio, how) for how in (naive, alone, with_inputs)]
            numbers = [results[0][0], results[1][0], results[0][1], results[1][1], results[2][1]]
            table.append([layout, f"{ratio * 100:g} %", *(f"{number:.2f}" for number in numbers)])
    return table


if __name__ == "__main__":
    for row in rows():
        print(f"| {' | '.join(row)} |")
