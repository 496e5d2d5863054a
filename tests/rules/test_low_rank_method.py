"""A low-rank method that defines only its factors: the branch, merging, combination, hot-swapping and slots."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LoadError,
    PlanError,
    RuleError,
    activate,
    apply_rules,
    combine,
    copy_adapter,
    hotswap,
    load_adapter,
    merge,
    pad_rank,
    rule,
    rules_of,
    save_adapter,
)
from surgery.onnx import export_adapter, import_adapter
from surgery.rules import AdaLoraRule, LoraRule
from surgery.rules._linear.layouts import WeightPart, layout_of
from surgery.rules._low_rank.method import LowRankMethod
from surgery.rules._low_rank.rule import TensorSource
from surgery.testing import assert_reversible
from tests.support.slots import Exported, check_slots, plain, shaken


@rule("sized-lora")
class SizedLoraRule(LowRankMethod):
    """W + alpha / rank · B diag(s) Â: the rows of A are directions, and their sizes s are parameters of their own."""

    rank: int = 4
    alpha: float = 8
    dropout: float = 0.0
    max_rank: int | None = None
    identity = True

    def factors(self, part: WeightPart, tensor: TensorSource) -> tuple[Tensor, Tensor]:
        A, s = tensor("A", part.A, nn.init.normal_), tensor("s", part.A[:1])
        return A / _sizes(A).clamp(min=1e-12) * s.view(-1, *(1,) * (len(part.A) - 1)), tensor(
            "B", part.B, nn.init.normal_
        )

    def tensors_for(self, part: WeightPart, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        return {"A": A, "s": _sizes(A).flatten(), "B": B}


def _sizes(A: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A, dim=list(range(1, A.dim())), keepdim=True)


@rule("bounded-lora")
class BoundedLoraRule(LowRankMethod):
    """W + B tanh(A), without `tensors_for`."""

    rank: int = 4
    max_rank: int | None = None

    def factors(self, part: WeightPart, tensor: TensorSource) -> tuple[Tensor, Tensor]:
        return tensor("A", part.A, nn.init.normal_).tanh(), tensor("B", part.B, nn.init.normal_)


class Maps(nn.Module):
    """Modules with different layouts of a low-rank change."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.linear = nn.Embedding(11, 8), nn.Linear(8, 8)
        self.grouped, self.depth = nn.Conv1d(8, 8, 3, padding=1, groups=2), nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.word(ids))
        x = self.depth(self.grouped(x.mT)).mT
        return self.attention(x, x, x, need_weights=False)[0]


TARGETS = ["word", "linear", "grouped", "depth", "attention"]
IDS = torch.arange(14).view(2, 7) % 11


def adapt(model: nn.Module, targets: list[str] = TARGETS, adapter: str = "default", **fields: Any) -> nn.Module:
    """Returns the model with an adapter whose tensors differ from their initial values."""
    return shaken(apply_rules(model, SizedLoraRule(targets, **fields), adapter=adapter))


def reference(model: nn.Module, tensors: Mapping[str, Tensor], rank: int, scale: float) -> nn.Module:
    """Returns a plain model with the weights of the formula."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for path in TARGETS:
            module = model.get_submodule(path)
            layout: Any = layout_of(module, rank)
            for part in layout.parts:
                A, s, B = (tensors[f"{path}.adapters.default.{part.prefix}{name}"] for name in ("A", "s", "B"))
                rows = A.flatten(1) / A.flatten(1).norm(dim=1, keepdim=True) * s.unsqueeze(1)
                weight = module.get_parameter(part.weight)
                if part.turned:
                    weight += scale * (B @ rows).T
                    continue
                pairs = zip(B.flatten(1).chunk(part.groups), rows.chunk(part.groups), strict=True)
                weight += scale * torch.cat([up @ down for up, down in pairs]).view(weight.shape)
    return model


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)  # sums in another order, float32


def test_the_branch_and_the_merged_weights_are_the_formula() -> None:
    torch.manual_seed(0)
    base = Maps()
    model = adapt(copy.deepcopy(base))
    expected = reference(base, dict(model.named_parameters()), 4, 2.0)(IDS)
    assert not torch.allclose(expected, base(IDS), atol=1e-2)
    near(model(IDS), expected)
    merge(model)
    near(model(IDS), expected)


def test_it_starts_as_the_base_and_leaves_it_to_the_bit() -> None:
    torch.manual_seed(0)
    model = Maps()
    before = model(IDS)
    assert torch.equal(apply_rules(copy.deepcopy(model), SizedLoraRule(TARGETS))(IDS), before)
    assert_reversible(model, SizedLoraRule(TARGETS), example_inputs=(IDS,))


def test_all_of_its_tensors_train() -> None:
    torch.manual_seed(0)
    model = adapt(Maps())
    model(IDS).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for name, p in model.named_parameters() if "adapters" in name)


@pytest.mark.parametrize("method", ["svd", "cat"])
def test_a_combination_is_the_weighted_sum(method: Any) -> None:
    torch.manual_seed(0)
    model, names = Maps(), {"a": 0.7, "b": -0.4}
    adapt(model, adapter="a", rank=2, alpha=3)
    adapt(model, adapter="b", rank=4)
    expected = activate(model, list(names), weights=list(names.values()))(IDS)
    combine(model, names, "c", method)
    near(activate(model, "c")(IDS), expected)
    (combined_rule,) = rules_of(model, "c")
    assert isinstance(combined_rule, SizedLoraRule) and combined_rule.rank in (6, 7)


@pytest.mark.filterwarnings("ignore:.*more than the weights")  # ranks that no weight can use, on purpose
def test_a_padded_adapter_takes_smaller_and_larger_ones_with_other_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Maps()
    model = adapt(copy.deepcopy(base), rank=8, alpha=4)
    before = model(IDS)
    near(pad_rank(model, "default", 16)(IDS), before)
    for rank, alpha in ((16, 3), (8, 4), (8, 5)):
        other = adapt(copy.deepcopy(base), rank=rank, alpha=alpha)
        save_adapter(other, tmp_path / f"{rank}-{alpha}")
        hotswap(model, "default", tmp_path / f"{rank}-{alpha}")
        near(model(IDS), other(IDS))
    large = adapt(copy.deepcopy(base), rank=32)
    save_adapter(large, tmp_path / "large")
    with pytest.raises(LoadError, match="no room for rank 32"):
        hotswap(model, "default", tmp_path / "large")


def test_room_for_more_rank_changes_nothing_at_the_start() -> None:
    """The used part starts with the same numbers as without the room, and the rest is zero."""
    actual: list[dict[str, Tensor]] = []
    for room in (None, 16):
        torch.manual_seed(0)
        model = apply_rules(Maps(), SizedLoraRule(TARGETS, rank=8, max_rank=room))
        actual.append({name: tensor for name, tensor in model.named_parameters() if ".adapters." in name})
    assert actual[0].keys() == actual[1].keys()
    for name, tensor in actual[0].items():
        wide = actual[1][name]
        assert wide.numel() == 2 * tensor.numel() and torch.equal(wide[wide != 0], tensor[tensor != 0]), name


def test_adalora_takes_a_smaller_rank_and_another_scale(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(8, 6)), torch.randn(3, 8)
    model, other = (
        shaken(apply_rules(copy.deepcopy(base), AdaLoraRule("0", rank=rank, alpha=alpha, target_r=2)))
        for rank, alpha in ((4, 8), (2, 3))
    )
    save_adapter(other, tmp_path)
    hotswap(model, "default", tmp_path)
    near(model(x), other(x))
    large = shaken(apply_rules(copy.deepcopy(base), AdaLoraRule("0", rank=6, target_r=2)))
    save_adapter(large, tmp_path / "large")
    with pytest.raises(LoadError, match="no room for rank 6"):
        hotswap(model, "default", tmp_path / "large")


@pytest.mark.filterwarnings("ignore:.*more than the weights")  # ranks that no weight can use, on purpose
def test_exported_slots_hold_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Maps()
    base = plain(model)
    for name, rank in (("a", 8), ("b", 16)):
        adapt(model, adapter=name, rank=rank, alpha=5)
    exported = Exported(model, {"ids": IDS}, tmp_path)
    check_slots(exported, base, [{"ids": torch.randint(0, 11, (3, 9))}])
    file = export_adapter(model, "b", exported.report.path, tmp_path / "b.onnx_adapter")
    again = copy.deepcopy(base)
    load_adapter(again, import_adapter(file, exported.report.path))
    near(again(IDS), activate(model, "b")(IDS))
    assert {type(item) for item in rules_of(again)} == {LoraRule}


def test_what_its_tensors_cannot_be_made_for_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6))
    for name in ("a", "b"):
        apply_rules(model, BoundedLoraRule("0"), adapter=name)
    with pytest.raises(PlanError, match="no `tensors_for`"):
        combine(model, {"a": 1.0, "b": 1.0}, "c")
    combine(model, {"a": 1.0}, "c")
    copy_adapter(model, "a", "d")
    x = torch.randn(2, 6)
    near(activate(model, "c")(x), activate(model, "d")(x))
    expected = activate(model, "a")(x)
    near(pad_rank(model, "a", 8)(x), expected)


def test_fields_out_of_range_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"rank": 0}, {"alpha": 0}, {"dropout": 1.0}, {"rank": 4, "max_rank": 2}]
    for fields in wrong:
        with pytest.raises(RuleError, match=list(fields)[-1]):
            SizedLoraRule("0", **fields)
