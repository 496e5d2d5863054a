"""The table of packed stacks of experts in docs/reference/quantised.md; `make quantised` writes it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_rules, load_adapter, merge, packed_stacks_of, remove, route, save_adapter, unmerge, using
from surgery.routing.rows import RowsError
from surgery.rules import ExpertLoraRule
from tests.support.packed_experts import EXPERT_MODELS, ExpertModel

__all__ = ["stack_table"]

IDS = torch.randint(48, (4, 7), generator=torch.Generator().manual_seed(0))
RULE = ExpertLoraRule("experts", rank=2, init="random")


def _adapted(model: Any, *names: str) -> Any:
    for seed, name in enumerate(names or ("default",)):
        torch.manual_seed(seed)
        apply_rules(model, RULE, adapter=name)
    return model


def _both(case: ExpertModel) -> tuple[Any, Any]:
    """The packed model and the plain one, with the same adapter of small changes."""
    models = tuple(map(_adapted, case.build()))
    for model in models:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("_B"):
                    parameter.mul_(0.1)
    return models[0], models[1]


def _bits(model: nn.Module) -> list[Tensor]:
    stacks = [stack for module in model.modules() for stack in packed_stacks_of(module).values()]
    assert stacks
    return [tensor.flatten().view(torch.uint8).clone() for stack in stacks for tensor in stack.tensors().values()]


def _logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def dequantised(case: ExpertModel) -> str:
    packed, plain = case.build()
    for path, module in packed.named_modules():
        for name, stack in packed_stacks_of(module).items():
            assert torch.equal(stack.dequantise().float(), getattr(plain.get_submodule(path), name))
    return "✔"


def forward(case: ExpertModel) -> str:
    packed, plain = _both(case)
    assert torch.equal(_logits(packed), _logits(plain))
    return "✔"


def train(case: ExpertModel) -> str:
    results = []
    for model in _both(case):
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimiser = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(3):
            optimiser.zero_grad()
            model(IDS).logits.square().mean().backward()
            optimiser.step()
        results.append(parameters)
    assert all(map(torch.equal, *results))
    return "✔"


def merge_dequantised(case: ExpertModel) -> str:
    packed, plain = _both(case)
    merge(packed, quantised="dequantise")
    merge(plain)
    actual, expected = packed.state_dict(), plain.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())
    return "✔"


def merge_requantised(case: ExpertModel) -> str:
    packed, _ = _both(case)
    report = merge(packed, quantised="requantise", limit=None)
    return f"✔, {report.loss.share:.0%} of ‖ΔW‖ lost"


def inverse(case: ExpertModel) -> str:
    packed, _ = _both(case)
    before, live, kinds = _bits(packed), _logits(packed), [type(module) for module in packed.modules()]
    for how in ("dequantise", "requantise"):
        merge(packed, quantised=how, limit=None)  # type: ignore[arg-type]
        unmerge(packed)
        assert all(map(torch.equal, _bits(packed), before)) and torch.equal(_logits(packed), live)
        assert [type(module) for module in packed.modules()] == kinds
    remove(packed)
    assert all(map(torch.equal, _bits(packed), before))
    return "✔"


def files(case: ExpertModel) -> str:
    for source in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            models = case.build()
            save_adapter(_adapted(models[source]), folder)
            load_adapter(models[1 - source], folder)
            assert torch.equal(_logits(models[0]), _logits(models[1]))
    return "✔"


def routed(case: ExpertModel) -> str:
    packed, plain = (_adapted(model, "a", "b") for model in case.build())
    try:
        with route(plain, ["a", "b"] * 2):
            _logits(plain)
    except RowsError:  # rows of the batch are not those of the experts' input
        with pytest.raises(RowsError), route(packed, ["a", "b"] * 2):
            _logits(packed)
        return "refused, as on plain experts"
    alone = []
    for name in "ab":
        with using(packed, name):
            alone.append(_logits(packed))
    with route(packed, ["a", "b"] * 2), torch.no_grad():
        actual = packed(IDS).logits
    torch.testing.assert_close(actual, torch.stack([alone[row % 2][row] for row in range(4)]))
    return "✔"


CHECKS: dict[str, Callable[[ExpertModel], str]] = {
    "dequantised": dequantised,
    "forward": forward,
    "train": train,
    "merge dequantised": merge_dequantised,
    "merge requantised": merge_requantised,
    "inverse to the bit": inverse,
    "files both ways": files,
    "route": routed,
}


def stack_table() -> str:
    """Runs the checks, and returns the table."""
    lines = [f"| stacks of experts | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"]
    for case in EXPERT_MODELS:
        cells = []
        for check in CHECKS.values():
            try:
                cells.append(check(case))
            except Exception as error:  # every failure is a cell of the table
                cells.append(f"✘ {type(error).__name__}: {error}".splitlines()[0].replace("|", "/")[:90])
        lines.append(f"| {case.title} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)
