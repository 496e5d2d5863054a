"""Hot-swapping gives the outputs of a fresh load, keeps compiled code, and changes nothing if it fails."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    LoadError,
    Rule,
    RuleError,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapter_state_dict,
    apply_rules,
    deactivate,
    hotswap,
    load_adapter,
    merge,
    pad_rank,
    remove,
    rule,
    rules_of,
    save_adapter,
    unmerge,
)
from surgery.rules import (
    AdaLoraRule,
    BottleneckRule,
    ExpertLoraRule,
    FourierRule,
    IA3Rule,
    LohaRule,
    LoraRule,
    PrefixRule,
    TrainRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support.peers import peft

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Mixed(nn.Module):
    """An embedding, convolutions with and without groups, and a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.wide, self.grouped = nn.Conv1d(8, 12, 3, padding=1), nn.Conv2d(12, 8, (3, 1), groups=4)
        self.head = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.wide(self.tokens(ids).mT).relu()
        return self.head(self.grouped(h.unsqueeze(-1)).mean((2, 3)))


def mixed() -> tuple[nn.Module, dict[str, Any]]:
    return Mixed(), {"ids": torch.randint(0, 20, (2, 7))}


MODELS: dict[str, tuple[Callable[[], tuple[nn.Module, dict[str, Any]]], list[str]]] = {
    "bert": (tiny.bert, ["query", "value", "dense"]),
    "llama": (tiny.llama, ["q_proj", "v_proj", "down_proj"]),
    "gpt2": (tiny.gpt2, ["c_attn", "wte"]),
    "mixed": (mixed, ["tokens", "wide", "head"]),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "smaller": {"r": 4, "lora_alpha": 3},
    "equal": {"r": 8, "lora_alpha": 8},
    "larger": {"r": 16, "lora_alpha": 5},
    "rslora": {"r": 8, "lora_alpha": 7, "use_rslora": True},
}


def output(model: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        result = model(**inputs)
    return result if isinstance(result, Tensor) else result[0]


def in_peft(model: nn.Module, folder: Path, targets: Any, **fields: Any) -> Path:
    """A checkpoint that PEFT wrote, of an adapter with an effect."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=targets, init_lora_weights=False, **fields)
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
    return folder


def afresh(model: nn.Module, folder: Path, inputs: dict[str, Any]) -> Tensor:
    model = copy.deepcopy(model)
    load_adapter(model, folder)
    return output(model, inputs)


def bits(model: nn.Module, adapter: str = "a") -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in adapter_state_dict(model, adapter).items()}


def same(tensors: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return tensors.keys() == other.keys() and all(torch.equal(tensors[key], other[key]) for key in tensors)


def linear(*names: str, **fields: Any) -> nn.Module:
    """Two Linears with a LoRA adapter of this name."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    for name in names or ("a",):
        apply_rules(model, LoraRule(["0", "2"], **{"rank": 4, "alpha": 4, "init": "random", **fields}), adapter=name)
    return model


# As if loaded afresh ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
def test_pefts_checkpoints_as_if_loaded_afresh(family: str, tmp_path: Path) -> None:
    make, targets = MODELS[family]
    base, inputs = make()
    base.eval()
    model = copy.deepcopy(base)
    load_adapter(model, in_peft(base, tmp_path / "first", targets, r=4, lora_alpha=8), "a")
    before = output(model, inputs)
    pad_rank(model, "a", 16)
    torch.testing.assert_close(output(model, inputs), before, rtol=1e-6, atol=1e-6)
    tensors = {name: p for name, p in model.named_parameters() if ".adapters." in name}
    for name, fields in SETTINGS.items():
        folder = in_peft(base, tmp_path / name, targets, **fields)
        report = hotswap(model, "a", folder)
        assert report and not report.idle and len(report.loaded) == len(tensors)
        expected = afresh(base, folder, inputs)
        torch.testing.assert_close(output(model, inputs), expected, rtol=1e-6, atol=2e-6)
        assert (output(model, inputs) - before).abs().max() > 1e-3
    assert {n: id(p) for n, p in model.named_parameters() if ".adapters." in n} == {
        n: id(p) for n, p in tensors.items()
    }
    assert all(p.requires_grad for p in tensors.values())


@pytest.mark.parametrize("family", MODELS)
def test_equal_to_the_bit_where_scales_are_powers_of_two_apart(family: str, tmp_path: Path) -> None:
    make, targets = MODELS[family]
    base, inputs = make()
    base.eval()
    model = copy.deepcopy(base)
    load_adapter(model, in_peft(base, tmp_path / "first", targets, r=4, lora_alpha=3), "a")
    for alpha in (3, 12, 0.75):
        folder = in_peft(base, tmp_path / str(alpha), targets, r=4, lora_alpha=alpha)
        report = hotswap(model, "a", folder)
        assert not report.notes
        assert torch.equal(output(model, inputs), afresh(base, folder, inputs))
    odd = hotswap(model, "a", in_peft(base, tmp_path / "odd", targets, r=4, lora_alpha=5))
    (note,) = odd.notes
    assert "1.66667" in note and "24 bits" in note and "sites" in str(odd)


def test_patterns_of_rank_and_alpha(tmp_path: Path) -> None:
    base, inputs = tiny.bert()
    base.eval()
    model = copy.deepcopy(base)
    apply_rules(model, LoraRule(["query", "value"], rank=2, alpha=1, max_rank=12), adapter="a")
    patterns = {"rank_pattern": {"query": 12, "layer.1.attention.self.value": 3}, "alpha_pattern": {"value": 9}}
    folder = in_peft(base, tmp_path / "peft", ["query", "value"], r=5, lora_alpha=4, **patterns)
    hotswap(model, "a", folder)
    torch.testing.assert_close(output(model, inputs), afresh(base, folder, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("live", [{}, {"dora": True}, {"lora_bias": True}, {"dora": True, "lora_bias": True}])
@pytest.mark.parametrize("new", [{}, {"dora": True}, {"lora_bias": True}, {"dora": True, "lora_bias": True}])
def test_dora_and_biases(live: dict[str, Any], new: dict[str, Any], tmp_path: Path) -> None:
    base = linear()
    remove(base)
    other = apply_rules(copy.deepcopy(base), LoraRule(["0", "2"], rank=2, alpha=3, init="random", **new), adapter="b")
    with torch.no_grad():
        for tensor in adapter_state_dict(other, "b").values():
            tensor.mul_(torch.rand_like(tensor) + 0.5)  # as if trained
            tensor.add_(0.01)
    folder = save_adapter(other, tmp_path, "b", format="surgery")
    model = apply_rules(base, LoraRule(["0", "2"], rank=4, max_rank=6, **live), adapter="a")
    lacking = [field for field in new if field not in live]
    before = bits(model)
    if lacking:
        with pytest.raises(LoadError, match=f"{lacking[0]}=False there, True here"):
            hotswap(model, "a", folder)
        assert same(bits(model), before)
        return
    hotswap(model, "a", folder)
    torch.testing.assert_close(model(X), other(X), rtol=1e-6, atol=1e-6)


def test_multihead_attention(tmp_path: Path) -> None:
    base = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    other = apply_rules(nn.Sequential(copy.deepcopy(base)), LoraRule("0", rank=2, alpha=3, init="random"))
    folder = save_adapter(other, tmp_path)
    model = apply_rules(nn.Sequential(base), LoraRule("0", rank=4, alpha=1), adapter="a")
    hotswap(model, "a", folder)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(model[0](x, x, x)[0], other[0](x, x, x)[0], rtol=1e-6, atol=1e-6)  # type: ignore[operator]


def test_convolutions_with_groups_and_stacks_of_experts(tmp_path: Path) -> None:
    base, inputs = mixed()
    other = apply_rules(copy.deepcopy(base), LoraRule(["grouped", "wide"], rank=4, alpha=3, init="random"))
    model = apply_rules(copy.deepcopy(base), LoraRule(["grouped", "wide"], rank=8, max_rank=16), adapter="a")
    hotswap(model, "a", save_adapter(other, tmp_path / "grouped"))
    torch.testing.assert_close(output(model, inputs), output(other, inputs), rtol=1e-6, atol=1e-6)
    mixtral, inputs = tiny.mixtral()
    mixtral.eval()
    experts = ExpertLoraRule("re:.*experts", rank=2, alpha=3, init="random")
    model = apply_rules(copy.deepcopy(mixtral), experts.replace(alpha=8, init="kaiming"), adapter="a")
    for rules in (experts, experts.replace(parameters=("down_proj",))):
        other = apply_rules(copy.deepcopy(mixtral), rules)
        assert hotswap(model, "a", save_adapter(other, tmp_path / "experts")).notes
        torch.testing.assert_close(output(model, inputs), output(other, inputs), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    """The tensors keep their dtype; the base's comparison allows for another precision."""
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype).eval()
    other = apply_rules(copy.deepcopy(base), LoraRule(["0", "2"], rank=2, alpha=3, init="random"))
    folder = save_adapter(other, tmp_path, format="surgery")
    model = apply_rules(base, LoraRule(["0", "2"], rank=4, alpha=4), adapter="a")
    kinds = {name: tensor.dtype for name, tensor in bits(model).items()}
    hotswap(model, "a", folder)
    assert {name: tensor.dtype for name, tensor in bits(model).items()} == kinds
    torch.testing.assert_close(model(X.to(dtype)), other(X.to(dtype)))


def test_numbers_that_a_dtype_cant_hold_are_refused() -> None:
    model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=4, dtype="float16"), adapter="a")
    before = bits(model)
    tensors = {key: torch.full_like(tensor, 3e4, dtype=torch.float32) for key, tensor in before.items()}
    with pytest.raises(LoadError, match="float16 can't hold"):
        hotswap(model, "a", tensors, rules=LoraRule("0", rank=4, alpha=64))
    assert same(bits(model), before)


# Fewer sites, other states ------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"lora_bias": True}])
def test_sites_that_nothing_came_for_do_nothing(fields: dict[str, Any], tmp_path: Path) -> None:
    model = linear(**fields)
    base = remove(copy.deepcopy(model))
    other = apply_rules(copy.deepcopy(base), LoraRule("2", rank=4, alpha=8, init="random", **fields))
    report = hotswap(model, "a", save_adapter(other, tmp_path, format="surgery"))
    assert report.idle == ["0"] and "nothing came for one site: 0" in str(report)
    torch.testing.assert_close(model[0](X), base[0](X), rtol=0, atol=1e-6 if fields.get("dora") else 0)  # type: ignore[operator]
    torch.testing.assert_close(model(X), other(X), rtol=1e-6, atol=1e-6)
    assert not model[0].adapters.a.A.any() and not model[0].adapters.a.B.any()  # type: ignore[union-attr]


def test_modules_that_are_trained_in_full_come_back_to_the_base(tmp_path: Path) -> None:
    base, inputs = tiny.bert()
    base.eval()
    model = apply_rules(copy.deepcopy(base), [LoraRule("query", rank=2), TrainRule("classifier")], adapter="a")
    with torch.no_grad():
        for tensor in adapter_state_dict(model, "a").values():
            tensor.add_(0.1)
    report = hotswap(model, "a", folder := in_peft(base, tmp_path, ["query"], r=2))
    assert report.idle == ["classifier"]
    assert torch.equal(output(model, inputs), afresh(base, folder, inputs))


def test_live_idle_and_merged(tmp_path: Path) -> None:
    other = linear("b", alpha=8)
    folder = save_adapter(other, tmp_path, "b")
    model = linear("a", "c")
    model.load_state_dict(other.state_dict(), strict=False)  # the same base
    deactivate(model)
    plain = model(X)
    hotswap(model, "a", folder)
    assert torch.equal(model(X), plain) and not any(p.requires_grad for p in model.parameters())
    activate(model, "a")
    assert torch.equal(model(X), other(X))
    merge(model)
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(SurgeryError, match="merged"):
        hotswap(model, "a", folder)
    with pytest.raises(SurgeryError, match="merged"):
        pad_rank(model, "a", 8)
    assert same(weights, dict(model.state_dict()))
    unmerge(model)
    hotswap(model, "a", folder)
    assert torch.equal(model(X), other(X))


def test_what_changed_the_base_is_not_swapped(tmp_path: Path) -> None:
    model = linear(init="pissa")
    with pytest.raises(SurgeryError, match="changed the base's weights at its start"):
        hotswap(model, "a", adapter_state_dict(model, "a"))
    folder = save_adapter(model, tmp_path, "a")
    live = apply_rules(remove(model), LoraRule(["0", "2"], rank=4), adapter="a")
    before = Snapshot(live)
    with pytest.raises(LoadError, match="hold only with another base") as caught:
        hotswap(live, "a", folder)
    assert len(caught.value.problems) == 1  # not once a site
    assert not before.differences(live)


def test_in_inference_mode() -> None:
    with torch.inference_mode():
        model = linear()
        wanted = {key: torch.randn_like(tensor) for key, tensor in bits(model).items()}
    hotswap(model, "a", wanted)  # from outside
    assert same(bits(model), wanted)
    plain = linear()
    with torch.inference_mode():
        hotswap(plain, "a", wanted)  # and tensors of training from inside
    assert same(bits(plain), wanted)
    with torch.inference_mode():
        pad_rank(plain, "a", 6)
    plain(X).sum().backward()
    assert all(p.grad is not None for n, p in plain.named_parameters() if ".adapters." in n)


def test_copies_and_pickles_swap_too(tmp_path: Path) -> None:
    model = linear()
    other = linear("b", rank=2, alpha=3)
    other.load_state_dict(model.state_dict(), strict=False)
    folder = save_adapter(other, tmp_path, "b")
    for duplicate in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        hotswap(duplicate, "a", folder)
        torch.testing.assert_close(duplicate(X), other(X), rtol=1e-6, atol=1e-6)
        pad_rank(duplicate, "a", 9)
        torch.testing.assert_close(duplicate(X), other(X), rtol=1e-6, atol=1e-6)


def test_optimisers_go_on_and_the_way_back_is_exact() -> None:
    model = linear()
    base = remove(copy.deepcopy(model))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained)
    for _ in range(2):
        hotswap(model, "a", {key: torch.randn_like(tensor) for key, tensor in bits(model).items()})
        before = bits(model)
        model(X).square().sum().backward()
        optimiser.step()
        assert not any(torch.equal(before[key], tensor) for key, tensor in bits(model).items())
    remove(model)
    assert same(dict(model.state_dict()), dict(base.state_dict()))


def test_a_backward_across_a_swap_is_an_error_of_torchs() -> None:
    model = linear()
    loss = model(X).square().sum()
    hotswap(model, "a", {key: torch.randn_like(tensor) for key, tensor in bits(model).items()})
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Compiled -----------------------------------------------------------------------------------------------------

MORE_CALLS: list[tuple[str, bool | None]] = [("llama", None), ("llama", False), ("bert", False), ("bert", True)]


@pytest.mark.parametrize(
    ("family", "dynamic"),
    [
        ("llama", True),
        ("bert", None),
        *(pytest.param(*case, marks=pytest.mark.slow("one family is compiled in each way")) for case in MORE_CALLS),
    ],
)
def test_nothing_is_compiled_anew(family: str, dynamic: bool | None, tmp_path: Path) -> None:
    make, targets = MODELS[family]
    base, inputs = make()
    base.eval()
    model = copy.deepcopy(base)
    load_adapter(model, in_peft(base, tmp_path / "first", targets, r=4, lora_alpha=8), "a")
    pad_rank(model, "a", 16)
    graphs = []

    def backend(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)
    before = output(compiled, inputs)
    assert len(graphs) == 1
    subset = in_peft(base, tmp_path / "subset", targets[:1], r=2, lora_alpha=8, use_rslora=True)
    folders = [in_peft(base, tmp_path / name, targets, **fields) for name, fields in SETTINGS.items()]
    for folder in (*folders, subset):
        hotswap(compiled, "a", folder)  # type: ignore[arg-type]  # the compiled model itself
        after = output(compiled, inputs)
        torch.testing.assert_close(after, afresh(base, folder, inputs), rtol=1e-6, atol=2e-6)
        assert not torch.equal(after, before)
        before = after
    assert len(graphs) == 1


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")  # torch's own, where inductor is imported
def test_inductors_code_runs_on_with_the_new_weights() -> None:
    model = linear()
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(model, fullgraph=True)
    compiled(X)
    counted = dict(counters["stats"])
    for _ in range(5):
        hotswap(model, "a", {key: torch.randn_like(tensor) for key, tensor in bits(model).items()})
        torch.testing.assert_close(compiled(X), model(X), rtol=1e-5, atol=1e-5)
    assert dict(counters["stats"]) == counted


# Room for more rank -------------------------------------------------------------------------------------------


def test_room_from_the_start_is_the_same_adapter() -> None:
    """The same random values, outputs and gradients; the padded ranks stay zero in training."""
    models = []
    for room in (None, 10):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
        rules = [LoraRule(["0", "2"], rank=3, alpha=4, init="gaussian", max_rank=room)]
        apply_rules(model, rules, adapter="a")
        optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(5):
            optimiser.zero_grad()
            model(X).square().sum().backward()
            optimiser.step()
        models.append(model)
    small, wide = (bits(model) for model in models)
    for key, tensor in small.items():
        used, left = (wide[key][:3], wide[key][3:]) if key.endswith("A") else (wide[key][:, :3], wide[key][:, 3:])
        assert torch.allclose(used, tensor, rtol=1e-4, atol=1e-5) and used.abs().sum() > 0 and not left.any()


@pytest.mark.parametrize("init", ["kaiming", "random", "orthogonal", "pissa", "olora"])
def test_every_start_with_room(init: str) -> None:
    results = []
    for room in (None, 7):
        torch.manual_seed(0)
        model: Any = nn.Sequential(nn.Linear(8, 8))
        x = torch.randn(3, 8)
        apply_rules(model, LoraRule("0", rank=4, alpha=4, init=init, max_rank=room))
        adapted = model(x)
        merge(model)
        unmerge(model)
        weight = model[0].weight.clone()
        remove(model)
        assert torch.equal(weight, model.get_parameter("0.weight")) == (init in ("kaiming", "random", "orthogonal"))
        results.append((adapted, weight, model.get_parameter("0.weight")))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    assert torch.equal(results[0][2], results[1][2])


def test_padding_keeps_what_needs_none() -> None:
    model = apply_rules(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), [LoraRule("0", rank=4), TrainRule("1")], adapter="a"
    )
    model[0].adapters.a.A.requires_grad_(False)  # type: ignore[union-attr]
    before = dict(model.named_parameters())
    assert pad_rank(model, "a", 6) is model
    after = dict(model.named_parameters())
    assert [name for name in before if before[name] is not after[name]] == ["0.adapters.a.A", "0.adapters.a.B"]
    assert not after["0.adapters.a.A"].requires_grad and after["0.adapters.a.B"].requires_grad
    pad_rank(model, "a", 6)
    assert all(after[name] is p for name, p in model.named_parameters())
    pad_rank(model, "a", 5)  # what is beyond is zero
    assert tuple(model[0].adapters.a.A.shape) == (5, 8) and rules_of(model)[0].max_rank == 5  # type: ignore[union-attr, attr-defined]
    with pytest.raises(RuleError, match="max_rank=3 is not"):
        pad_rank(model, "a", 3)
    for name, wrong in (("a", "six"), ("b", 6), (None, 6)):
        with pytest.raises(SurgeryError):
            pad_rank(model, name, wrong)  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="no rank to pad"):
        pad_rank(apply_rules(nn.Sequential(nn.Linear(2, 2)), IA3Rule("0")), "default", 8)


def test_padding_is_all_or_nothing() -> None:
    model = apply_rules(Mixed(), LoraRule(["wide", "grouped", "head"], rank=4), adapter="a")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="groups"):
        pad_rank(model, "a", 6)  # four groups
    assert not before.differences(model)
    pad_rank(model, "a", 8)


def test_an_idle_adapter_is_padded_and_gets_its_flags_back() -> None:
    model = linear("a", "b")
    activate(model, "a")
    wanted = model(X)
    activate(model, "b")
    pad_rank(model, "a", 9)
    assert not model[0].adapters.a.A.requires_grad  # type: ignore[union-attr]
    activate(model, "a")
    assert model[0].adapters.a.A.requires_grad  # type: ignore[union-attr]
    torch.testing.assert_close(model(X), wanted, rtol=1e-6, atol=1e-6)


def test_too_high_a_rank_is_told_with_the_remedy() -> None:
    model, other = linear(), linear("b", rank=6, alpha=6)
    before = bits(model)
    with pytest.raises(LoadError, match=r"pad_rank\(model, adapter, 6\)"):
        hotswap(model, "a", adapter_state_dict(other, "b"), rules=rules_of(other))
    assert same(bits(model), before)
    pad_rank(model, "a", 6)
    hotswap(model, "a", adapter_state_dict(other, "b"), rules=rules_of(other))
    assert same(bits(model), bits(other, "b"))
    room = linear("b", rank=2, max_rank=32)  # more room than there is here, and unused
    hotswap(model, "a", adapter_state_dict(room, "b"), rules=rules_of(room))
    assert torch.equal(model[0].adapters.a.A[:2], room[0].adapters.b.A[:2])  # type: ignore[union-attr]


# Saving what is there -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("live", [{"rank": 4, "alpha": 3, "rslora": True}, {"rank": 4, "alpha": 3}])
def test_what_was_swapped_in_is_saved_as_it_is(family: str, live: dict[str, Any], tmp_path: Path) -> None:
    """Read again by PEFT, and by us in both formats."""
    make, targets = MODELS[family]
    base, inputs = make()
    base.eval()
    fields = {**live, "max_rank": 16, "rank_pattern": {targets[0]: 8}, "alpha_pattern": {targets[1]: 5}}
    model = apply_rules(copy.deepcopy(base), LoraRule(targets, **fields), adapter="a")
    hotswap(model, "a", in_peft(base, tmp_path / "in", targets, r=12, lora_alpha=7))
    wanted = output(model, inputs)
    for format in ("peft", "surgery", "auto"):
        folder = save_adapter(model, tmp_path / format, "a", format=format)  # type: ignore[arg-type]
        assert torch.equal(afresh(base, folder, inputs), wanted)
    assert (tmp_path / "auto" / "adapter_config.json").exists()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    torch.testing.assert_close(output(theirs, inputs), wanted, rtol=1e-5, atol=1e-5)


def test_a_scale_that_peft_cant_hold_to_the_bit_is_saved_in_our_format(tmp_path: Path) -> None:
    ranks = range(3, 40)
    scales = [(alpha, room) for room in ranks for alpha in (1.1, 1.3, 1.7) if alpha / 3 * room / room != alpha / 3]
    assert scales
    for alpha, room in scales[:3]:
        model = apply_rules(nn.Sequential(nn.Linear(8, 8)), LoraRule("0", rank=3, alpha=alpha, max_rank=room))
        with pytest.raises(SurgeryError, match="to the last bit"):
            save_adapter(model, tmp_path / "peft", format="peft")
        folder = save_adapter(model, tmp_path / f"{alpha}{room}")
        assert (folder / "rules.json").exists()


# Other rules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule",
    [
        IA3Rule(["0", "2"], init="random"),
        VeraRule(["0", "2"], rank=6, init="random"),
        LohaRule(["0", "2"], rank=2, init="random"),
        AdaLoraRule(["0", "2"], rank=3),
        FourierRule(["0", "2"], n_frequency=9, init="random"),
        TrainRule(["0", "2"]),
        BottleneckRule(["0", "2"], size=3),
    ],
    ids=lambda rule: rule.label,
)
def test_any_rule_with_tensors_of_the_same_shapes(rule: Rule, tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).eval()
    models = [apply_rules(copy.deepcopy(base), rule, adapter=name) for name in ("a", "b")]
    with torch.no_grad():
        for p in models[1].parameters():
            p.add_(torch.randn_like(p) * 0.1 * p.requires_grad)
    folder = save_adapter(models[1], tmp_path / "both", "b")
    hotswap(models[0], "a", folder)
    assert torch.equal(models[0](X), models[1](X)) and not torch.equal(models[0](X), base(X))
    part = apply_rules(copy.deepcopy(base), rule.replace(targets="2"), adapter="b")
    report = hotswap(models[0], "a", save_adapter(part, tmp_path / "part", "b"))
    assert report.idle == ["0"] and torch.equal(models[0][0](X), base[0](X)) and torch.equal(models[0](X), part(X))


def test_prefixes_of_one_length(tmp_path: Path) -> None:
    base, inputs = tiny.llama()
    base.eval()
    models = []
    for length in (4, 4, 5):
        models.append(apply_rules(copy.deepcopy(base), PrefixRule(length=length), adapter="a", example_inputs=inputs))
    model, other, longer = models
    folder = save_adapter(other, tmp_path / "other", "a")
    assert not torch.equal(output(model, inputs), output(other, inputs))
    hotswap(model, "a", folder)
    assert torch.equal(output(model, inputs), output(other, inputs))
    before = bits(model)
    with pytest.raises(LoadError, match="length=4 there, 5 here"):
        hotswap(model, "a", save_adapter(longer, tmp_path / "longer", "a"))
    assert same(bits(model), before)


def test_a_rule_that_passes_sites_over(tmp_path: Path) -> None:
    """A prefix skips cross-attentions, which only a call shows; a swap needs no call."""
    base, inputs = tiny.t5()
    base.eval()
    models = [
        apply_rules(copy.deepcopy(base), PrefixRule(length=3), adapter="a", example_inputs=inputs) for _ in range(2)
    ]
    hotswap(models[0], "a", save_adapter(models[1], tmp_path, "a"))
    assert torch.equal(output(models[0], inputs), output(models[1], inputs))
    tensors = dict(adapter_state_dict(models[1], "a"))
    path = "decoder.block.0.layer.1.EncDecAttention"
    with pytest.raises(LoadError, match="no place for a PrefixRule") as caught:
        hotswap(models[0], "a", tensors | {f"{path}.adapters.key": torch.zeros(4, 3, 8)})
    assert any(path in str(problem) for problem in caught.value.problems)


def test_a_rule_inside_a_forward(tmp_path: Path) -> None:
    base, inputs = tiny.distilbert()
    base.eval()
    models = [
        apply_rules(copy.deepcopy(base), PrefixRule(length=3), adapter="a", example_inputs=inputs) for _ in range(2)
    ]
    hotswap(models[0], "a", save_adapter(models[1], tmp_path, "a"))
    assert torch.equal(output(models[0], inputs), output(models[1], inputs))


def test_fields_that_cant_be_made_up_for_are_named() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    pairs: list[tuple[Rule, Rule, str]] = [
        (FourierRule("0", n_frequency=9), FourierRule("0", n_frequency=9, random_loc_seed=3), "random_loc_seed"),
        (VeraRule("0", rank=4), VeraRule("0", rank=5), "rank=4 there, 5 here"),
        (LoraRule("0"), IA3Rule("0"), "no place for a IA3Rule"),
        (LoraRule("0"), LoraRule("2"), "no place for a LoraRule"),
        (LoraRule("0"), LoraRule("0", bias="lora_only"), "no place for a BiasRule"),
        (LoraRule("0"), LoraRule("qurey"), "matches nothing"),
    ]
    for live, new, message in pairs:
        model = apply_rules(copy.deepcopy(base), live, adapter="a")
        tensors: dict[str, Tensor] = {}
        if new.targets != ("qurey",):
            tensors = adapter_state_dict(apply_rules(copy.deepcopy(base), new))
        before = Snapshot(model)
        with pytest.raises(LoadError, match=message):
            hotswap(model, "a", tensors, rules=new)
        assert not before.differences(model)


def test_ia3_of_pefts_whose_words_are_others(tmp_path: Path) -> None:
    base, inputs = tiny.bert()
    base.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fields = {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]}
        config = peft.IA3Config(**fields, init_ia3_weights=False)
        peft.get_peft_model(copy.deepcopy(base), config).save_pretrained(tmp_path)
    rule = IA3Rule(["key", "output.dense"], feedforward=["output.dense"])
    model = apply_rules(copy.deepcopy(base), rule, adapter="a")
    hotswap(model, "a", tmp_path)
    assert torch.equal(output(model, inputs), afresh(base, tmp_path, inputs))
    other = apply_rules(copy.deepcopy(base), rule.replace(feedforward=()), adapter="a")
    with pytest.raises(LoadError, match="feedforward"):
        hotswap(other, "a", tmp_path)


def test_the_scale_of_loha_is_folded_in() -> None:
    base = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    model = apply_rules(copy.deepcopy(base), LohaRule("0", rank=2, alpha=3), adapter="a")
    new = LohaRule("0", rank=2, alpha=1, init="random", alpha_pattern={"0": 12})
    other = apply_rules(copy.deepcopy(base), new)
    hotswap(model, "a", adapter_state_dict(other), rules=new)
    torch.testing.assert_close(model(X), other(X), rtol=1e-6, atol=1e-6)


def test_a_rule_of_ones_own_that_says_nothing() -> None:
    @rule("hotswap-shift")
    class Shift(Rule):
        by: float = 1.0

        def rewrite(self, site: Any) -> Any:
            return site.output + site.param("shift", (site.out_features,), 0.5) * self.by

    model = apply_rules(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), Shift(["0", "1"]), adapter="a")
    tensors = {key: torch.randn_like(tensor) for key, tensor in bits(model).items()}
    hotswap(model, "a", tensors)
    assert same(bits(model), tensors)
    with pytest.raises(LoadError, match="by=1.0 there, 2.0 here"):
        hotswap(model, "a", tensors, rules=Shift(["0", "1"], by=2.0))
    with pytest.raises(LoadError, match="the new adapter lacks Shift"):
        hotswap(model, "a", {"0.adapters.shift": tensors["0.adapters.shift"]}, rules=Shift("0"))
    assert same(bits(model), tensors)


# What does not fit --------------------------------------------------------------------------------------------


def test_damaged_and_foreign_files_change_nothing(tmp_path: Path) -> None:
    base, inputs = tiny.bert()
    base.eval()
    good = in_peft(base, tmp_path / "good", ["query"], r=4)
    model = copy.deepcopy(base)
    load_adapter(model, good, "a")
    tensors = {id(p): p.clone() for p in model.parameters()}
    raw = (good / "adapter_model.safetensors").read_bytes()
    config = json.loads((good / "adapter_config.json").read_text())
    size = int.from_bytes(raw[:8], "little")
    cases: dict[str, tuple[bytes, Any, str]] = {
        "cut": (raw[: len(raw) // 2], config, "damaged"),
        "header": (b"\xff" * 8 + raw[8:], config, "damaged"),
        "nan": (raw[:-4] + b"\x00\x00\xc0\x7f", config, "NaN"),
        "rank": (raw, config | {"r": 3}, "does not give"),
        "method": (raw, config | {"peft_type": "IA3"}, "no place for a IA3Rule"),
        "targets": (raw, config | {"target_modules": ["value"]}, "no place for a LoraRule"),
        "field": (raw, config | {"use_qalora": True}, "use_qalora"),
        "renamed": (raw[:8] + raw[8 : 8 + size].replace(b"layer.0", b"layer.7") + raw[8 + size :], config, "missing"),
        "empty": (b"", config, "damaged"),
        "no json": (raw, None, "JSON"),
    }
    for name, (content, settings, message) in cases.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_model.safetensors").write_bytes(content)
        (folder / "adapter_config.json").write_text("{" if settings is None else json.dumps(settings))
        with pytest.raises(LoadError, match=message):
            hotswap(model, "a", folder)
        assert all(torch.equal(tensors[id(p)], p) for p in model.parameters()), name
    for source in (tmp_path / "nothing", tmp_path):
        with pytest.raises(SurgeryError):
            hotswap(model, "a", source)
    assert all(torch.equal(tensors[id(p)], p) for p in model.parameters())
    hotswap(model, "a", good)


def test_all_that_is_wrong_is_told_at_once(tmp_path: Path) -> None:
    other = linear("b")
    with torch.no_grad():
        other[0].adapters.b.A[0, 0] = float("nan")  # type: ignore[union-attr, index]
    tensors = dict(adapter_state_dict(other, "b"))
    del tensors["2.adapters.A"]
    tensors["1.adapters.A"] = torch.zeros(2)
    model = linear()
    with pytest.raises(LoadError) as caught:
        hotswap(model, "a", tensors)
    text = str(caught.value)
    assert "2.adapters.A" in text and "1.adapters.A" in text and "NaN" in text
    with pytest.warns(SurgeryWarning) as warned:
        report = hotswap(model, "a", tensors, strict=False, finite=False)
    assert ["2.adapters.A" in str(warned[0].message), "1.adapters.A" in str(warned[1].message)] == [True, True]
    assert report.missing == ["2.adapters.A"] and report.unexpected == ["1.adapters.A"]


def test_another_base_is_told(tmp_path: Path) -> None:
    folder = save_adapter(linear("b"), tmp_path, "b")
    model = linear()
    before = bits(model)
    with pytest.raises(LoadError, match="another base"):
        hotswap(model, "a", folder)
    assert same(bits(model), before)
    with pytest.warns(SurgeryWarning, match="another base"):
        hotswap(model, "a", folder, strict=False)
    assert not same(bits(model), before)


def test_a_failure_on_the_way_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    import surgery.storage.hotswap as swap

    model = linear()
    before, done, real = bits(model), [], swap.copy_into

    def failing(tensor: Tensor, new: Tensor) -> None:
        done.append(tensor)
        if len(done) == 3:
            raise KeyboardInterrupt
        real(tensor, new)

    monkeypatch.setattr(swap, "copy_into", failing)
    with pytest.raises(KeyboardInterrupt):
        hotswap(model, "a", {key: torch.randn_like(tensor) for key, tensor in before.items()})
    assert len(done) > 3 and same(bits(model), before)


def test_what_is_no_source() -> None:
    model = linear()
    tensors = adapter_state_dict(model, "a")
    for adapter, source, options in (
        ("b", tensors, {}),
        (["a"], tensors, {}),
        ("a", {"0.adapters.A": 3}, {}),
        ("a", {}, {"rules": []}),
        ("a", "folder", {"rules": LoraRule("0")}),
    ):
        with pytest.raises(SurgeryError):
            hotswap(model, adapter, source, **options)  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="no rules were applied"):
        hotswap(nn.Linear(2, 2), "a", tensors)


def test_another_adapter_of_the_model_is_a_source() -> None:
    model = linear("a", "b")
    other = bits(model, "b")
    hotswap(model, "a", adapter_state_dict(model, "b"), rules=rules_of(model, "b"))
    assert same(bits(model), other) and same(bits(model, "b"), other)
    hotswap(model, "a", adapter_state_dict(model, "a"))  # onto itself
    assert same(bits(model), other)


def test_dropout_stays_the_live_ones(tmp_path: Path) -> None:
    base, inputs = tiny.bert()
    base.eval()
    model = apply_rules(copy.deepcopy(base), LoraRule("query", rank=4), adapter="a")
    report = hotswap(model, "a", folder := in_peft(base, tmp_path, ["query"], r=4, lora_dropout=0.3))
    assert list(report.notes) == ["dropout=0.3 is not taken over: it stays 0.0"]
    assert torch.equal(output(model, inputs), afresh(base, folder, inputs))


def test_the_function_by_plain_arithmetic() -> None:
    model = linear()
    new = LoraRule(["0", "2"], rank=2, alpha=5, rslora=True)
    tensors = {
        "0.adapters.A": torch.randn(2, 8), "0.adapters.B": torch.randn(8, 2),
        "2.adapters.A": torch.randn(2, 8), "2.adapters.B": torch.randn(4, 2),
    }  # fmt: skip
    hotswap(model, "a", tensors, rules=new)
    x, scale = X, 5 / 2**0.5
    for path in ("0", "2"):
        layer: Any = model.get_submodule(path)
        x = F.linear(
            x, layer.weight + scale * tensors[f"{path}.adapters.B"] @ tensors[f"{path}.adapters.A"], layer.bias
        )
        x = x.tanh() if path == "0" else x
    torch.testing.assert_close(model(X), x, rtol=1e-5, atol=1e-5)
    assert rules_of(model, "a") == [LoraRule(["0", "2"], rank=4, alpha=4, init="random")]
