"""Adapters on packed stacks of experts, beside the same model with the numbers that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import SurgeryError, apply_rules, load_adapter, packed_stacks_of, remove, route, save_adapter, using
from surgery.packed.dequantised_stack import DequantisedStack
from surgery.rules import ExpertLoraRule
from tests.support.packed_experts import EXPERT_MODELS, LAYOUTS, ExpertModel

pytest.importorskip("transformers")
every_layout = pytest.mark.parametrize("case", LAYOUTS)
IDS = torch.randint(48, (2, 7), generator=torch.Generator().manual_seed(0))
RULE = ExpertLoraRule("experts", rank=2, init="random")


def experts_of(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if path.endswith(".experts")}


def adapted(model: Any, *names: str) -> Any:
    for seed, name in enumerate(names or ("default",)):
        torch.manual_seed(seed)
        apply_rules(model, RULE, adapter=name)
    return model


def results(model: Any) -> list[Tensor]:
    """The logits, and the gradients of the adapter."""
    logits = model(IDS).logits
    logits.square().mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]


@every_layout
def test_the_dequantised_stacks_are_those_that_transformers_loads(case: ExpertModel) -> None:
    packed, plain = case.build()
    for path, module in experts_of(packed).items():
        stacks = packed_stacks_of(module)
        assert list(stacks) == ["gate_up_proj", "down_proj"]
        for name, stack in stacks.items():
            expected = getattr(plain.get_submodule(path), name)
            assert torch.equal(stack.dequantise().float(), expected) and stack.shape == expected.shape
            some = torch.tensor([2, 0, 2])
            assert torch.equal(stack.dequantise_experts(some).float(), expected[some])


@every_layout
def test_adapters_compute_and_train_as_on_plain_experts(case: ExpertModel) -> None:
    """To the bit: the same operations run on the same numbers, also in the backward, which dequantises again."""
    packed, plain = case.build()
    kinds = [type(module) for module in experts_of(packed).values()]
    for actual, expected in zip(results(adapted(packed)), results(adapted(plain)), strict=True):
        assert torch.equal(actual, expected)
    for module in experts_of(packed).values():
        assert packed_stacks_of(module)  # still packed
    remove(packed)
    assert kinds == [type(module) for module in experts_of(packed).values()]
    assert not any(hasattr(module, "_is_hooked") for module in experts_of(packed).values())


@every_layout
def test_codes_of_new_numbers_are_those_of_the_nearest_values(case: ExpertModel) -> None:
    module = next(iter(experts_of(case.build()[0]).values()))
    for stack in packed_stacks_of(module).values():
        before = {name: tensor.clone() for name, tensor in stack.tensors().items()}
        values = stack.dequantise().float()
        kept = stack.requantise(values, scales="keep")
        stack.write(kept)
        assert torch.equal(stack.dequantise().float(), values)  # they are on the grid
        stack.write(stack.requantise(values * 3))
        again = stack.dequantise().float()
        error = float((again - values * 3).norm() / (values * 3).norm())
        assert error < (2**-4 if "float8" in stack.layout else 2**-2)  # half a step, 3 or 1 bits after the first
        stack.write(before)
        assert all(torch.equal(stack.tensors()[name], tensor) for name, tensor in before.items())
        with pytest.raises(SurgeryError, match=f"can't be quantised as {stack.name}"):
            stack.requantise(values * torch.nan)


def test_refitted_scales_and_codes_are_those_of_transformers() -> None:
    """Beside transformers' `Fp8Quantize`, which divides and multiplies in another order: one bit of float32."""
    packed, plain = EXPERT_MODELS[2].build()
    for path, module in experts_of(packed).items():
        for name, stack in packed_stacks_of(module).items():
            before = {key: tensor.clone() for key, tensor in stack.tensors().items()}
            new = stack.requantise(getattr(plain.get_submodule(path), name))
            for key, tensor in before.items():
                torch.testing.assert_close(new[key].float(), tensor.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("case", EXPERT_MODELS[:3:2], ids=str)
def test_files_go_both_ways(case: ExpertModel, tmp_path: Path) -> None:
    for source, target in ((0, 1), (1, 0)):
        models = case.build()
        save_adapter(adapted(models[source]), tmp_path / str(source))
        load_adapter(models[target], tmp_path / str(source))
        with torch.no_grad():
            assert torch.equal(models[0](IDS).logits, models[1](IDS).logits)


def test_rows_of_a_batch_have_adapters_of_their_own() -> None:
    packed = adapted(EXPERT_MODELS[0].build()[0], "a", "b")
    with torch.no_grad():
        alone = []
        for name in "ab":
            with using(packed, name):
                alone.append(packed(IDS).logits)
        with route(packed, ["a", "b"]):
            actual = packed(IDS).logits
    torch.testing.assert_close(actual, torch.stack([alone[0][0], alone[1][1]]))  # products of other sizes


def test_only_the_picked_experts_are_dequantised(monkeypatch: pytest.MonkeyPatch) -> None:
    module = next(iter(experts_of(EXPERT_MODELS[0].build()[0]).values()))
    model, picked = adapted(nn.ModuleDict({"experts": module})), []
    kind = type(packed_stacks_of(module)["down_proj"])
    read = kind.dequantise_experts
    monkeypatch.setattr(kind, "dequantise", lambda self: pytest.fail("all experts are dequantised"))
    monkeypatch.setattr(
        kind, "dequantise_experts", lambda self, which: picked.extend(which.tolist()) or read(self, which)
    )
    x = torch.randn(3, 64, requires_grad=True)
    model["experts"](x, torch.tensor([[3], [1], [3]]), torch.ones(3, 1)).sum().backward()
    assert sorted(picked) == [1] * 4 + [3] * 4  # two stacks, forward and backward
    assert x.grad is not None


def test_the_stand_in_is_the_plain_stack_for_all_other_code() -> None:
    stack = packed_stacks_of(next(iter(experts_of(EXPERT_MODELS[0].build()[0]).values())))["down_proj"]
    lazy, plain = DequantisedStack(stack, torch.float32), stack.dequantise().float()
    x = torch.randn(4, 3, 32)
    expressions: list[Any] = [
        lambda w: w + 1,
        lambda w: 2 * w - w.mean(),
        lambda w: w[:, 0],
        lambda w: w[torch.tensor([1, 1])].norm(dim=1),
        lambda w: torch.bmm(x, w),
        lambda w: x[0] @ w[2],
        lambda w: torch.stack([w[1], w[0]]),
        lambda w: nn.functional.linear(x[0], w[3].mT),
        lambda w: w.to(torch.bfloat16)[0].mT @ x[0].mT.bfloat16(),
        lambda w: torch.tensor([*w.shape, w.dim(), len(w), w.size(1), w.ndim]),
    ]
    for expression in expressions:
        assert torch.equal(expression(lazy), expression(plain))
