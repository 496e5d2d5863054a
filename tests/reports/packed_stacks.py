"""The table of packed stacks of experts in docs/reference/quantised.md; `make quantised` writes it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PlanError, apply_rules, packed_stacks_of
from surgery.rules import ExpertLoraRule

__all__ = ["STACKS", "stack_table"]


def _mxfp4() -> tuple[nn.Module, Callable[[str], Tensor]]:
    """gpt-oss' experts with random codes and scales under the checkpoint's names, and their numbers by transformers."""
    mxfp4: Any = importlib.import_module("transformers.integrations.mxfp4")
    transformers: Any = importlib.import_module("transformers")
    config = transformers.GptOssConfig(num_local_experts=4, intermediate_size=64, hidden_size=96)
    module, generator = mxfp4.Mxfp4GptOssExperts(config), torch.Generator().manual_seed(0)
    for name, sizes in {"gate_up_proj": (4, 128, 3), "down_proj": (4, 96, 2)}.items():
        delattr(module, name)
        blocks = torch.randint(256, (*sizes, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, sizes, dtype=torch.uint8, generator=generator)
        setattr(module, f"{name}_blocks", nn.Parameter(blocks, requires_grad=False))
        setattr(module, f"{name}_scales", nn.Parameter(scales, requires_grad=False))

    def numbers(name: str) -> Tensor:
        return mxfp4.convert_moe_packed_tensors(getattr(module, f"{name}_blocks"), getattr(module, f"{name}_scales"))

    return module, numbers


STACKS: dict[str, Callable[[], tuple[nn.Module, Callable[[str], Tensor]]]] = {"transformers Mxfp4GptOssExperts": _mxfp4}


def _dequantised(module: nn.Module, numbers: Callable[[str], Tensor]) -> str:
    stacks = packed_stacks_of(module)
    assert stacks and all(torch.equal(stack.dequantise(), numbers(name)) for name, stack in stacks.items())
    return "✔"


def _requantised(module: nn.Module, numbers: Callable[[str], Tensor]) -> str:
    lost, whole = 0.0, 0.0
    for name, stack in packed_stacks_of(module).items():
        weight = torch.randn(stack.shape, generator=torch.Generator().manual_seed(1))
        stack.write(stack.requantise(weight))
        assert torch.equal(stack.dequantise(), numbers(name))
        lost += float((numbers(name).float() - weight).square().sum())
        whole += float(weight.square().sum())
    return f"✔, {(lost / whole) ** 0.5:.0%} of ‖W‖ lost"


def _inverse(module: nn.Module, numbers: Callable[[str], Tensor]) -> str:
    for stack in packed_stacks_of(module).values():
        before = {name: tensor.clone() for name, tensor in stack.tensors().items()}
        values = stack.dequantise()
        again = stack.requantise(values, scales="keep")
        assert all(torch.equal(again[name], tensor) for name, tensor in before.items())
        stack.write(stack.requantise(torch.zeros(stack.shape)))
        stack.write(before)
        assert all(torch.equal(stack.tensors()[name], tensor) for name, tensor in before.items())
    return "✔"


def _rules(module: nn.Module, numbers: Callable[[str], Tensor]) -> str:
    try:
        apply_rules(nn.Sequential(module), ExpertLoraRule("0", rank=2))
    except PlanError as error:
        assert "dequantize=True" in str(error)
        return "refused: load them dequantised"
    return "✔"


CHECKS = {
    "dequantised": _dequantised,
    "requantised": _requantised,
    "inverse to the bit": _inverse,
    "ExpertLoraRule": _rules,
}


def stack_table() -> str:
    """Runs the checks, and returns the table."""
    lines = [f"| stacks of experts | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"]
    for name, build in STACKS.items():
        cells = []
        for check in CHECKS.values():
            try:
                cells.append(check(*build()))
            except Exception as error:  # every failure is a cell of the table
                cells.append(f"✘ {type(error).__name__}: {error}".splitlines()[0].replace("|", "/")[:90])
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)
