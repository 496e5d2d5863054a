"""LoRA slots in exported files: every layout, and methods that are converted to LoRA, against the live model."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from surgery import SiteError, activate, apply_rules, merge
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.graph.lifted_tensors import Lifted, split_factors
from surgery.onnx.graph.prepare import ExportSettings
from surgery.onnx.graph.trace_program import program_of
from surgery.rules import AdaLoraRule, LohaRule, LokrRule, LoraRule, MissRule, RandLoraRule, VeraRule
from surgery.weaving.low_rank_kernel import low_rank_linear
from tests.support.slots import Exported, adapted, check_slots, outputs, plain, same, shaken

Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D


class Maps(nn.Module):
    """One of each module that LoRA goes on; two convolutions have groups, one of them a group a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.turned = nn.Linear(8, 6), Conv1D(5, 8)
        self.word = nn.Embedding(11, 8, padding_idx=0)
        self.one = nn.Conv1d(8, 6, 3, padding=1, groups=2)
        self.depth = nn.Conv1d(8, 8, 3, groups=8)
        self.two = nn.Conv2d(8, 4, (3, 1), stride=2)
        self.three = nn.Conv3d(8, 4, (2, 1, 1), dilation=2, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.apart = nn.MultiheadAttention(8, 2, kdim=4, vdim=3, batch_first=True)

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        c = x.transpose(1, 2)
        wide = c.unsqueeze(-1).repeat(1, 1, 1, 3)
        return (
            self.linear(x), self.turned(x), self.word(ids), self.one(c), self.depth(c), self.two(wide),
            self.three(wide.unsqueeze(-1)), self.attention(x, x, x, need_weights=False)[0],
            self.apart(x, x[..., :4], x[..., :3], need_weights=False)[0],
        )  # fmt: skip


ALL = [name for name, _ in Maps().named_children()]


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    # A batch of 3: with one of 2, torch takes the attention's sizes for constants, slots or none.
    return {"x": torch.randn(batch, length, 8), "ids": torch.randint(0, 11, (batch, length))}


@pytest.mark.filterwarnings("ignore:.*more than the weights")  # ranks above the weights' sizes, on purpose
def test_every_layout_of_ranks_that_groups_divide(tmp_path: Path) -> None:
    model = Maps()
    base = plain(model)
    patterns = {"rank_pattern": {"two": 4}, "alpha_pattern": {"one": 3}}
    rules = {"a": LoraRule(ALL, rank=8, alpha=5), "b": LoraRule(ALL, rank=16, rslora=True, **patterns)}  # type: ignore[arg-type]
    exported = Exported(adapted(model, rules), inputs(3, 7), tmp_path)
    assert exported.report.notices == []
    assert exported.nodes() == {name: "LoraRule" for name in ALL}
    check_slots(exported, base, [inputs(5, 9)])
    other = adapted(plain(base), {"z": LoraRule(ALL, rank=24, alpha=3)})  # another rank than any at export
    more = inputs(4, 8)
    same(exported.run(more, exported.tensors("z", other)), outputs(activate(other, "z"), more))
    odd = adapted(plain(base), {"z": LoraRule(["one"], rank=3)})
    with pytest.raises(SiteError, match="a rank of 3 that its groups don't divide, and its slot has none"):
        exported.tensors("z", odd)
    gained = adapted(plain(base), {"z": LoraRule(["linear"], dora=True)})
    with pytest.raises(SiteError, match="no adapter had one when the file was exported"):
        exported.tensors("z", gained)


@pytest.mark.filterwarnings("ignore:.*more than the weights")  # ranks above the weights' sizes, on purpose
def test_ranks_that_groups_do_not_divide_gains_and_biases(tmp_path: Path) -> None:
    """A slot without groups takes factors with groups; missing gains become ones; biases of lora_only are copies."""
    model = Maps()
    base = plain(model)
    biased = LoraRule(["linear", "one", "two", "turned"], rank=2, lora_bias=True, bias="lora_only")
    rules = {"a": LoraRule(ALL, rank=3, alpha=5), "dora": LoraRule(ALL, rank=8, dora=True), "biased": biased}
    exported = Exported(adapted(model, rules), inputs(3, 7), tmp_path)
    assert exported.report.notices == []
    check_slots(exported, base, [inputs(5, 9)])
    other = adapted(plain(base), {"z": LoraRule(ALL, rank=17, dora=True, alpha=3)})
    more = inputs(4, 8)
    same(exported.run(more, exported.tensors("z", other)), outputs(activate(other, "z"), more))
    merge(exported.model, "dora")  # gains are computed from the base, merged or not
    wanted = outputs(exported.model, more)
    same(exported.run(more, exported.tensors("dora")), wanted)


def test_methods_that_are_low_rank_changes_share_the_slot(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), Conv1D(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.up(x).relu())

    model = Two()
    base = plain(model)
    rules = {
        "lora": LoraRule(["up", "down"], rank=3, max_rank=5),
        "ada": AdaLoraRule(["up", "down"], rank=4, total_step=10),
        "vera": VeraRule(["up", "down"], rank=7),
        "miss": [MissRule(["up"], rank=5), MissRule(["down"], rank=5, variant="mini", mini_r=2)],
        "rand": RandLoraRule(["up", "down"], rank=3),
    }
    exported = Exported(adapted(model, rules), {"x": torch.randn(3, 8)}, tmp_path, empty="zeros1")
    kinds = {site["rule"] for site in exported.manifest["sites"]}
    assert kinds == {"lora"} and len(exported.manifest["sites"]) == 2
    assert set(exported.nodes().values()) == {"LoraRule, AdaLoraRule, VeraRule, MissRule, RandLoraRule"}
    check_slots(exported, base, [{"x": torch.randn(5, 8)}])
    bat = adapted(plain(base), {"z": MissRule(["up"], rank=4, variant="bat")})
    with pytest.raises(Exception, match="none of the adapters' rules can be a slot"):
        Exported(bat, {"x": torch.randn(3, 8)}, tmp_path)


@pytest.mark.filterwarnings("ignore:.*more than the weights")  # ranks above the weights' sizes, on purpose
def test_products_of_low_rank_matrices_are_of_low_rank(tmp_path: Path) -> None:
    """In a slot, LoHa has its squared rank and LoKr the product of two ranks, at most the weight's smaller size."""
    names = ["linear", "turned", "one", "depth", "two", "three"]
    model = Maps()
    base = plain(model)
    rules = {
        "loha": LohaRule(names, rank=2, alpha=3),
        "kernels": LohaRule(names, rank=3, use_effective_conv2d=True),
        "lokr": LokrRule(names, rank=2),
        "both": LokrRule(names, rank=1, use_effective_conv2d=True, decompose_both=True),
        "whole": LokrRule(names, rank=32, alpha=5),
        "lora": LoraRule(names, rank=8),
    }
    exported = Exported(adapted(model, rules), inputs(3, 7), tmp_path)
    assert exported.report.notices == []
    check_slots(exported, base, [inputs(5, 9)])
    ranks = {name: exported.tensors(name)["linear.adapters.slot.A"].shape[0] for name in rules}
    assert ranks == {"loha": 4, "kernels": 6, "lokr": 6, "both": 2, "whole": 6, "lora": 8}


def test_what_a_start_changed_in_the_base_belongs_to_the_adapter(tmp_path: Path) -> None:
    """The file has the original base; A and B contain both changes, so they have twice the rank."""
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).eval()
    base, x = plain(model), {"input": torch.randn(3, 8)}
    apply_rules(model, [LoraRule("0", rank=3, init="pissa"), LoraRule("2", rank=2, init="olora", dora=True)])
    exported = Exported(shaken(model), x, tmp_path)
    check_slots(exported, base, [{"input": torch.randn(5, 8)}])
    tensors = exported.tensors("default")
    assert [len(tensors[f"{at}.adapters.slot.A"]) for at in (0, 2)] == [6, 4]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_adapters_are_in_the_dtypes_of_the_live_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)).to(dtype)
    base, x = plain(model), {"input": torch.randn(3, 8, dtype=dtype)}
    rules = {"a": LoraRule(["0", "2"], rank=3), "b": LoraRule(["2"], rank=2, dora=True)}
    exported = Exported(adapted(model, rules), x, tmp_path)
    wide = "float32" if dtype == torch.float16 else "float64"  # half-precision bases have adapters in float32
    assert {slot["dtype"] for slot in exported.manifest["slots"]} == {wide}
    check_slots(exported, base, [], 4e-3 if dtype == torch.float16 else 1e-12)  # roundings of 11 bits, some in a row
    chosen = adapted(plain(base), {"a": LoraRule(["0"], rank=3, dtype=dtype)})
    exported = Exported(chosen, x, tmp_path)
    assert json.dumps(exported.manifest["slots"]).count(str(dtype).removeprefix("torch.")) == 2
    check_slots(exported, base, [], 4e-3 if dtype == torch.float16 else 1e-12)


class Looked(nn.Module):
    """A layer with a branch; with `more`, another operation reads one of its factors."""

    def __init__(self, more: bool) -> None:
        super().__init__()
        self.weight, self.A, self.B = (nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (2, 4), (6, 2)))
        self.more = more

    def forward(self, input: Tensor) -> Tensor:
        y = low_rank_linear(input, self.weight, None, (self.A, self.B, 0.5, 0.0, False))
        return y + self.A.sum() if self.more else y


@pytest.mark.parametrize("more", [False, True])
def test_factors_are_in_the_graph_by_name_until_its_end_unless_something_else_looks_at_them(more: bool) -> None:
    model, x = Looked(more), torch.randn(3, 4)
    expected, call = model(x), ExampleCall.of(model, x)
    lifted = [Lifted.lift(name, model, name, axis, True) for name, axis in (("A", 0), ("B", 1))]
    named, brought = split_factors(model, call, lifted)
    assert [len(named), len(brought)] == ([0, 2] if more else [2, 0])
    program = program_of(model, call, lifted, {"input": {}}, ExportSettings())
    inputs = {value.name: value.shape for value in program.model.graph.inputs}
    assert list(inputs) == ["input", "A", "B"] and not isinstance(inputs["A"][0], int)
    assert {node.domain for node in program.model.graph} <= {"", "ai.onnx"} and "" in program.model.opset_imports
    session = onnxruntime.InferenceSession(onnx_ir.to_proto(program.model).SerializeToString())
    feeds = {"input": x.numpy(), **{tensor.name: tensor.tensor.numpy() for tensor in lifted}}
    assert torch.allclose(torch.from_numpy(session.run(None, feeds)[0]), expected, atol=1e-5)
