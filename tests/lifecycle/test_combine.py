"""`combine` gives PEFT's numbers for each method and Σ w ΔW by plain arithmetic, and refuses wrong calls."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from importlib import metadata
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import (
    PlanError,
    Rule,
    SurgeryError,
    activate,
    active,
    adapter_state_dict,
    adapters,
    apply_rules,
    combine,
    copy_adapter,
    deactivate,
    hotswap,
    load_adapter,
    merge,
    remove,
    rename_adapter,
    rules_of,
    save_adapter,
    unmerge,
    using,
)
from surgery.rules import (
    AdaLoraRule,
    BiasRule,
    BottleneckRule,
    C3aRule,
    CaptureRule,
    ExpertLoraRule,
    FourierRule,
    IA3Rule,
    LohaRule,
    LoraRule,
    MissRule,
    NormRule,
    PrefixRule,
    PromptRule,
    ShiraRule,
    SteerRule,
    TokensRule,
    TrainRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support.tiny import llama

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 2e-6}
WEIGHTS = {"a": 0.7, "b": 0.4, "c": 1.3}


class Kinds(nn.Module):
    """A module of each kind with a linear map."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.embed = nn.Embedding(11, 8)
        self.linear = nn.Linear(8, 6)
        self.turned = Conv1D(7, 8)
        self.conv = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        image = x.view(-1, 4, 2, 1)
        return self.linear(x).sum() + self.turned(x).sum() + self.conv(image).sum()


def disturb(model: nn.Module, scale: float = 0.5) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name and parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * scale)
    return model


def weight_change(model: nn.Module, path: str, adapter: str) -> Tensor:
    """The change of a weight by merging an adapter, in float64: independent of the rule's own ΔW."""
    twin = copy.deepcopy(model).double()
    module = twin.get_submodule(path)
    before = cast(Tensor, module.weight).detach().clone()
    merge(twin, adapter)
    return cast(Tensor, module.weight).detach() - before


# PEFT -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft", reason="compares with PEFT")


PATHS = ("embed", "linear", "turned", "conv")


def in_both(peft: Any, ranks: tuple[int, ...], targets: list[list[str]], **fields: Any) -> tuple[Any, nn.Module]:
    base = Kinds()
    names = list(WEIGHTS)[: len(ranks)]
    configs = [
        peft.LoraConfig(r=rank, lora_alpha=5 + rank, init_lora_weights=False, target_modules=chosen, **fields)
        for rank, chosen in zip(ranks, targets, strict=True)
    ]
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        theirs.add_adapter(name, config)
    ours: nn.Module = copy.deepcopy(base)
    for name, rank, chosen in zip(names, ranks, targets, strict=True):
        rule = LoraRule(chosen, rank=rank, alpha=5 + rank, init="random", rslora=fields.get("use_rslora", False))
        apply_rules(ours, rule, adapter=name)
        for path in chosen:
            box: Any = ours.get_submodule(f"{path}.adapters.{name}")
            layer = theirs.get_submodule(f"base_model.model.{path}")
            for letter in "AB":
                factors = getattr(layer, f"lora_{letter}")
                tensor = factors[name].weight if name in factors else getattr(layer, f"lora_embedding_{letter}")[name]
                getattr(box, letter).data.copy_(tensor)
    return theirs, ours


EVERYWHERE: list[list[str]] = [list(PATHS)] * 3
SOME = [list(PATHS), ["embed", "linear"], ["linear", "conv"]]
METHODS = ["linear", "cat", "svd", "ties", "dare_linear", "dare_ties", "magnitude_prune"]
METHODS += [f"{name}_svd" for name in METHODS[3:]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [EVERYWHERE, SOME], ids=["everywhere", "some"])
@pytest.mark.parametrize(
    ("method", "sign"), [(m, s) for m in METHODS for s in ("total", "frequency") if s == "total" or "ties" in m]
)
def test_every_method_gives_pefts_numbers(
    peft: Any, method: Any, sign: str, targets: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    equal = method in ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
    theirs, ours = in_both(peft, (4, 4, 4) if equal else (4, 2, 3), targets)

    def drawn(chance: Tensor, generator: Any = None) -> Tensor:  # equal for both libraries, in any order of drawing
        places = torch.arange(chance.numel()).view(chance.shape)
        return ((places * 7) % 10 < 10 * chance).to(chance.dtype)

    monkeypatch.setattr(torch, "bernoulli", drawn)
    density: dict[str, Any] = {} if method in ("linear", "cat", "svd") else {"density": 0.6}
    chosen: dict[str, Any] = {} if "ties" not in method else {"majority_sign": sign}
    chosen |= {"rank": 4} if method == "svd" else {}  # PEFT's default, the largest rank
    combine(ours, WEIGHTS, "z", method, **density, **chosen)
    theirs.base_model.add_weighted_adapter(
        list(WEIGHTS), list(WEIGHTS.values()), "z", method, majority_sign_method=sign, **density
    )
    for path in PATHS:
        layer = theirs.get_submodule(f"base_model.model.{path}")
        expected = layer.get_delta_weight("z").detach()
        if path in ("embed", "turned") and method.startswith("dare") and method.endswith("svd"):
            continue  # a transposed weight draws the entries of ΔW in another order
        torch.testing.assert_close(weight_change(ours, path, "z").float(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_negative_weights_give_pefts_numbers(peft: Any, method: Any) -> None:
    theirs, ours = in_both(peft, (4, 4), EVERYWHERE[:2])
    combine(ours, {"a": 1.5, "b": -0.8}, "z", cast(Any, method), rank=4 if method == "svd" else None)
    theirs.base_model.add_weighted_adapter(["a", "b"], [1.5, -0.8], "z", method)
    for path in PATHS:
        expected = theirs.get_submodule(f"base_model.model.{path}").get_delta_weight("z").detach()
        torch.testing.assert_close(weight_change(ours, path, "z").float(), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(metadata.version("peft") != "0.21.2", reason="the failure was seen in PEFT 0.21.2")
def test_peft_multiplies_combined_rslora_by_the_root_of_its_rank(peft: Any) -> None:
    theirs, ours = in_both(peft, (4, 4), EVERYWHERE[:2], use_rslora=True)
    combine(ours, {"a": 0.7, "b": 0.4}, "z", "cat")
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.7, 0.4], "z", "cat")
    for path in PATHS:
        layer = theirs.get_submodule(f"base_model.model.{path}")
        right = 0.7 * layer.get_delta_weight("a") + 0.4 * layer.get_delta_weight("b")
        torch.testing.assert_close(weight_change(ours, path, "z").float(), right.detach(), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(layer.get_delta_weight("z"), right * math.sqrt(8), rtol=1e-4, atol=2e-5)


@pytest.mark.filterwarnings("ignore")
def test_ia3_gives_pefts_numbers(peft: Any) -> None:
    base = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))
    config = peft.IA3Config(target_modules=["0", "2"], feedforward_modules=["2"], init_ia3_weights=False)
    theirs = peft.get_peft_model(copy.deepcopy(base), config, adapter_name="a")
    theirs.add_adapter("b", config)
    ours = copy.deepcopy(base)
    for name in "ab":
        apply_rules(ours, IA3Rule(["0", "2"], feedforward="2", init="random"), adapter=name)
        for path in ("0", "2"):
            layer = theirs.get_submodule(f"base_model.model.{path}")
            ours.get_parameter(f"{path}.adapters.{name}.scale").data.copy_(layer.ia3_l[name].data.flatten())
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.6, 0.5], "z")
    theirs.set_adapter("z")
    combine(ours, {"a": 0.6, "b": 0.5}, "z", "linear")
    x = torch.randn(3, 8)
    torch.testing.assert_close(activate(ours, "z")(x), theirs(x), **CLOSE)


@pytest.mark.parametrize("fed", [(), "0"])
def test_the_default_gives_ia3_the_sum_of_its_changes(fed: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    for name in "ab":
        apply_rules(model, IA3Rule("0", feedforward=fed, init="random"), adapter=name)
    deactivate(model)
    x = torch.randn(3, 8)
    base = model(x)
    change = sum(w * (activate(model, name)(x) - base) for name, w in (("a", 0.7), ("b", -0.3)))
    combine(model, {"a": 0.7, "b": -0.3}, "z")
    torch.testing.assert_close(activate(model, "z")(x), base + change, **CLOSE)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", ["linear", "cat", "svd"])
def test_a_combination_is_saved_as_pefts(peft: Any, method: Any, tmp_path: Any) -> None:
    _, ours = in_both(peft, (4, 4), [["embed", "linear"], ["linear", "conv"]])
    combine(ours, {"a": 0.7, "b": -0.3}, "z", method)
    plain = remove(copy.deepcopy(ours))
    folder = save_adapter(ours, tmp_path / "peft", "z", format="peft")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain), folder)
    for path in ("embed", "linear", "conv"):
        delta = loaded.get_submodule(f"base_model.model.{path}").get_delta_weight("default").detach()
        torch.testing.assert_close(delta, weight_change(ours, path, "z").float(), rtol=1e-4, atol=2e-5)
    for format in ("peft", "surgery"):
        again = copy.deepcopy(plain)
        load_adapter(again, save_adapter(ours, tmp_path / format, "z", format=cast(Any, format)))
        tensors, wanted = adapter_state_dict(again), adapter_state_dict(ours, "z")
        assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in wanted)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(metadata.version("peft") != "0.21.2", reason="the failure was seen in PEFT 0.21.2")
def test_peft_counts_an_absent_ia3_as_zeros(peft: Any) -> None:
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    configs = [peft.IA3Config(target_modules=names, feedforward_modules=[]) for names in (["0"], ["0", "1"])]
    theirs = peft.get_peft_model(copy.deepcopy(base), configs[0], adapter_name="a")
    theirs.add_adapter("b", configs[1])
    theirs.base_model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "z")  # from two adapters that change nothing
    assert torch.equal(theirs.get_submodule("base_model.model.1").ia3_l["z"], torch.full((4, 1), 0.5))
    for name, targets in (("a", ["0"]), ("b", ["0", "1"])):
        apply_rules(base, IA3Rule(targets), adapter=name)
    combine(base, {"a": 0.5, "b": 0.5}, "z")
    assert torch.equal(cast(Any, base[1]).adapters.z.scale, torch.ones(4))


# Plain arithmetic ---------------------------------------------------------------------------------------------


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.deep = nn.Conv1d(4, 4, 3, groups=4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.attention(x, x, x, need_weights=False)[0]).sum()
        image, line = x.flatten()[:64].view(1, 4, 4, 4), x.flatten()[:32].view(1, 4, 8)
        return self.conv(image).sum() + self.deep(line).sum() + y


ALL = ["conv", "deep", "attention", "linear"]
OWN = {"conv": ["weight"], "deep": ["weight"], "linear": ["weight"], "attention": ["in_proj_weight", "out_proj.weight"]}


def changes(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    twin = copy.deepcopy(model).double()
    names = [f"{path}.{name}" for path, own_names in OWN.items() for name in own_names]
    before = {name: twin.get_parameter(name).detach().clone() for name in names}
    merge(twin, adapter, keep="copy")
    return {name: twin.get_parameter(name).detach() - before[name] for name in names}


@pytest.mark.parametrize("method", ["cat", "svd"])
@pytest.mark.parametrize("weights", [{"a": 0.5, "b": 2.0}, {"a": -1.0, "b": 0.25, "c": 0.5}, {"b": -0.7}, {"c": 0.0}])
@pytest.mark.parametrize("ranks", [(2, 4, 6), (3, 1, 2), (4, 3, 1), (1, 1, 2)])
def test_cat_and_svd_are_the_sum(method: Any, weights: dict[str, float], ranks: tuple[int, ...]) -> None:
    model = Grouped()
    for name, rank, targets in zip("abc", ranks, [ALL, ["conv", "linear", "deep"], ["attention", "conv"]], strict=True):
        alphas = {"linear": 7} if "linear" in targets else None
        rule = LoraRule(targets, rank=rank, alpha=3, init="random", alpha_pattern=alphas, rslora=name == "b")
        apply_rules(model, rule, adapter=name)
    x = torch.randn(2, 5, 8)
    before = model(x)
    combine(model, weights, "z", cast(Any, method))
    assert torch.equal(model(x), before) and "z" not in active(model)
    each = {name: changes(model, name) for name in weights}
    for name, change in changes(model, "z").items():
        expected = sum(weight * each[adapter][name] for adapter, weight in weights.items())
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)
    assert {path for path in adapters(model)["z"].sites} == {
        path for adapter in weights for path in adapters(model)[adapter].sites
    }


def test_svd_is_the_best_of_its_rank() -> None:
    model = nn.Sequential(nn.Linear(9, 7))
    for name, rank in (("a", 3), ("b", 4)):
        apply_rules(model, LoraRule("0", rank=rank, init="random"), adapter=name)
    total = 0.5 * weight_change(model, "0", "a") - 2 * weight_change(model, "0", "b")
    for rank in (1, 2, 5):
        combine(model, {"a": 0.5, "b": -2.0}, f"r{rank}", "svd", rank=rank)
        left = total - weight_change(model, "0", f"r{rank}")
        rest = torch.linalg.svdvals(total)[rank:]
        torch.testing.assert_close(left.norm(), rest.norm(), rtol=1e-4, atol=1e-5)
        assert rules_of(model, f"r{rank}")[0].rank == rank  # type: ignore[attr-defined]
    combine(model, {"a": 0.5, "b": -2.0}, "default")
    assert rules_of(model, "default")[0].rank == 7  # type: ignore[attr-defined]  # all of both: nothing is lost
    torch.testing.assert_close(weight_change(model, "0", "default"), total, rtol=1e-4, atol=1e-5)


def test_dora_is_taken_as_a_matrix() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    apply_rules(model, LoraRule(["0", "1"], rank=2, dora=True, init="random"), adapter="a")
    apply_rules(model, LoraRule("0", rank=3, init="random"), adapter="b")
    deactivate(disturb(model, 0.1))
    before = Snapshot(model)
    for method in ("linear", "cat"):
        with pytest.raises(PlanError, match=r"LoraRule can't be combined(.|\n)*where: 0(.|\n)*DoRA(.|\n)*svd"):
            combine(model, {"a": 0.5, "b": 1.0}, "z", method)
        assert before.differences(model) == []
    combine(model, {"a": 0.5, "b": -1.0}, "z", "svd", rank=6)
    for path in ("0", "1"):
        expected = 0.5 * weight_change(model, path, "a")
        expected = expected - weight_change(model, path, "b") if path == "0" else expected
        torch.testing.assert_close(weight_change(model, path, "z"), expected, rtol=1e-4, atol=1e-5)
    combine(model, {"a": 1.0}, "same", "cat")  # the name is taken
    x = torch.randn(3, 6)
    torch.testing.assert_close(activate(model, "same")(x), activate(model, "a")(x), rtol=0, atol=0)


def test_what_lora_trains_beside(tmp_path: Any) -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    for name, bias in (("a", "all"), ("b", "all")):
        apply_rules(model, LoraRule(["0"], rank=2, bias=cast(Any, bias), lora_bias=name == "b"), adapter=name)
        deactivate(model)
    disturb(model)
    combine(model, {"a": 0.5, "b": 0.5}, "z", "cat")
    combine(model, {"a": 0.5, "b": 0.5}, "only", "linear")
    assert [type(rule) for rule in rules_of(model, "z")] == [LoraRule] and rules_of(model, "z")[0].bias == "all"  # type: ignore[attr-defined]
    for path in ("0", "1", "2"):
        box: Any = model.get_submodule(path + ".adapters")
        torch.testing.assert_close(box.z.bias, 0.5 * box.a.bias + 0.5 * box.b.bias, **CLOSE)
    boxes: Any = model[0].adapters
    torch.testing.assert_close(boxes.z.B_bias, 0.5 * 4 * boxes.b.B_bias, **CLOSE)
    twin = remove(copy.deepcopy(model))
    load_adapter(twin, save_adapter(model, tmp_path, "z", format="peft"))
    tensors, wanted = adapter_state_dict(twin), adapter_state_dict(model, "z")
    assert tensors.keys() == wanted.keys() and all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    apply_rules(model, LoraRule("2", rank=2), adapter="c")
    deactivate(model)
    combine(
        model, {"a": 0.5, "c": 0.5}, "mixed", "linear"
    )  # c trains no biases, so the biases of a get a rule of their own
    assert [type(rule) for rule in rules_of(model, "mixed")] == [LoraRule, BiasRule]


# Other rules --------------------------------------------------------------------------------------------------


def copies(model: nn.Module, rule: Rule | list[Rule], *names: str, **more: Any) -> nn.Module:
    for name in names:
        apply_rules(model, rule, adapter=name, **more)
        deactivate(disturb(model))
    return model


@pytest.mark.parametrize(
    "rule",
    [C3aRule("0", block_size=2), MissRule("0", rank=3), FourierRule("0", n_frequency=7),
     ShiraRule("0", rank=1, random_seed=3), SteerRule("0"),
     TokensRule("0", tokens=[1, 3]), TrainRule("0"), BiasRule("0")],
    ids=lambda rule: type(rule).__name__,
)  # fmt: skip
def test_changes_that_are_linear_in_their_tensors_add_up(rule: Rule) -> None:
    model = copies(nn.Sequential(nn.Linear(8, 4)).double(), rule, "a", "b")
    x = torch.randn(5, 8, dtype=torch.float64)
    base = model(x)
    outputs = {name: activate(model, name)(x) - base for name in "ab"}
    for method in ("linear", "cat", "svd"):
        combine(model, {"a": 0.7, "b": -0.4}, method, method)
        output = activate(model, method)(x)
        torch.testing.assert_close(output, base + 0.7 * outputs["a"] - 0.4 * outputs["b"], rtol=1e-9, atol=1e-9)
    combine(model, {"a": 0.7, "b": -0.4}, "pruned", "dare", density=0.5, seed=3)
    assert not torch.equal(activate(model, "pruned")(x), output)


def test_tokens_of_two_adapters_are_joined() -> None:
    model = nn.Sequential(nn.Embedding(9, 4))
    weight = model.get_parameter("0.weight").detach().clone()
    for name, tokens in (("a", [2, 7]), ("b", [7, 1])):
        apply_rules(model, TokensRule("0", tokens=tokens), adapter=name)
        deactivate(disturb(model))
    boxes: Any = model[0].adapters
    combine(model, {"a": 0.5, "b": 2.0}, "z")
    assert rules_of(model, "z")[0].tokens == (1, 2, 7)  # type: ignore[attr-defined]
    expected = weight.clone()
    expected[2] += 0.5 * (boxes.a.rows[0] - weight[2])
    expected[7] += 0.5 * (boxes.a.rows[1] - weight[7]) + 2 * (boxes.b.rows[1] - weight[7])
    expected[1] += 2 * (boxes.b.rows[0] - weight[1])
    torch.testing.assert_close(activate(model, "z")(torch.arange(9)), expected, **CLOSE)


def test_copies_of_the_base_move_from_it() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    for name, rules in (("a", [TrainRule("2"), NormRule()]), ("b", [NormRule("1")])):
        apply_rules(model, rules, adapter=name)
        deactivate(disturb(model))
        box: Any = model.get_submodule(f"1.adapters.{name}")
        box.running_var.mul_(3.0 if name == "a" else 5.0)
        box.num_batches_tracked.fill_(3 if name == "a" else 8)
    combine(model, {"a": 0.5, "b": -1.5}, "z")
    head, norm = cast(Any, model[2]), cast(Any, model[1])
    moved = head.weight + 0.5 * (head.adapters.a.weight - head.weight)
    torch.testing.assert_close(head.adapters.z.weight, moved, **CLOSE)
    a, b, z = norm.adapters.a, norm.adapters.b, norm.adapters.z
    moved = norm.weight + 0.5 * (a.weight - norm.weight) - 1.5 * (b.weight - norm.weight)
    torch.testing.assert_close(z.weight, moved, **CLOSE)
    torch.testing.assert_close(z.running_var, (0.5 * a.running_var + 1.5 * b.running_var) / 2, **CLOSE)
    assert int(z.num_batches_tracked) == 8
    with pytest.raises(SurgeryError, match="can't be live together"):
        activate(model, ["a", "z"])
    activate(model, "z")
    x = torch.randn(3, 4)
    live = model(x)
    merge(model)
    torch.testing.assert_close(model(x), live, **CLOSE)
    assert torch.equal(unmerge(model)(x), live)


def test_ia3_where_one_is_absent() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    for name, targets, fed in (("a", ["0"], ()), ("b", ["0", "1"], "1")):
        apply_rules(model, IA3Rule(targets, feedforward=fed, init="random"), adapter=name)
    deactivate(model)
    first, second = cast(Any, model[0]).adapters, cast(Any, model[1]).adapters
    combine(model, {"a": 0.3, "b": 0.7}, "z")
    torch.testing.assert_close(first.z.scale, 0.3 * first.a.scale + 0.7 * first.b.scale, **CLOSE)
    torch.testing.assert_close(second.z.scale, 0.3 + 0.7 * second.b.scale, **CLOSE)
    (rule,) = rules_of(model, "z")
    assert isinstance(rule, IA3Rule) and rule.feeds("1") and not rule.feeds("0")
    x = torch.randn(2, 8)
    expected = F.linear(model[0](x) * first.z.scale * second.z.scale, *model[1].parameters(recurse=False))  # type: ignore[arg-type]
    torch.testing.assert_close(activate(model, "z")(x), expected, **CLOSE)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 4)), nn.Parameter(torch.randn(3, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(F.linear(x, up), down) for up, down in zip(self.up, self.down, strict=True)])


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_experts(method: Any) -> None:
    model = nn.Sequential(Experts()).double()
    for name, rank, of in (("a", 2, ()), ("b", 3, ("up",))):
        apply_rules(model, ExpertLoraRule("0", rank=rank, alpha=3, parameters=of, init="random"), adapter=name)
    combine(model, {"a": 0.5, "b": -2.0}, "z", method, rank=6 if method == "svd" else None)
    box = cast(Any, model[0]).adapters
    a, b = (
        {n: box.a.tensors()[f"{n}_B"] @ box.a.tensors()[f"{n}_A"] * 1.5 for n in ("up", "down")},
        box.b.up_B @ box.b.up_A,
    )
    scale = 1.0  # alpha equals the rank
    torch.testing.assert_close(box.z.up_B @ box.z.up_A * scale, 0.5 * a["up"] - 2 * b, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(box.z.down_B @ box.z.down_A * scale, 0.5 * a["down"], rtol=1e-8, atol=1e-8)
    x = torch.randn(2, 4).double()
    with torch.no_grad():
        base = deactivate(model)(x)
        up, down = cast(Any, model[0]).up + 0.5 * a["up"] - 2 * b, cast(Any, model[0]).down + 0.5 * a["down"]
        expected = torch.stack([F.linear(F.linear(x, u), d) for u, d in zip(up, down, strict=True)])
        torch.testing.assert_close(activate(model, "z")(x), expected, rtol=1e-8, atol=1e-8)
        assert torch.equal(remove(model)(x), base)


@pytest.mark.parametrize("method", ["cat", "svd", "magnitude_prune_svd"])
def test_adalora(method: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 6))
    for name, rank in (("a", 2), ("b", 3)):
        apply_rules(model, AdaLoraRule("0", rank=rank, target_r=1), adapter=name)
    deactivate(disturb(model))
    rank, density = None if method == "cat" else 6, 1.0 if "prune" in method else None
    combine(model, {"a": 0.5, "b": -2.0}, "z", method, rank=rank, density=density)
    expected = 0.5 * weight_change(model, "0", "a") - 2 * weight_change(model, "0", "b")
    torch.testing.assert_close(weight_change(model, "0", "z"), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(PlanError, match="three factors"):
        combine(model, {"a": 0.5, "b": 0.5}, "y", "linear")


def test_prompts_and_prefixes_need_no_example() -> None:
    model, inputs = llama()
    model.eval()
    prompts = cast(Any, model)
    for name in "ab":
        apply_rules(model, [PromptRule(length=3), PrefixRule(length=2)], adapter=name, example_inputs=inputs)
        deactivate(model)
    combine(model, {"a": 0.5, "b": 0.5}, "z")
    boxes = prompts.model.adapters
    torch.testing.assert_close(boxes.z.prompt, 0.5 * boxes.a.prompt + 0.5 * boxes.b.prompt, **CLOSE)
    own = activate(model, "z")(**inputs).logits
    values = {key: tensor.clone() for key, tensor in adapter_state_dict(model, "z").items()}
    combined_rules = rules_of(model, "z")
    assert [type(rule) for rule in combined_rules] == [PromptRule, PrefixRule] and combined_rules == rules_of(
        model, "a"
    )
    remove(model)
    apply_rules(model, combined_rules, adapter="again", example_inputs=inputs)
    for key, tensor in adapter_state_dict(model, "again").items():
        tensor.copy_(values[key])
    assert torch.equal(model(**inputs).logits, own)
    combine(model, {"again": 1.0}, "copy", "cat")  # a single adapter is copied
    for method, rank in (("cat", None), ("svd", 4)):
        with pytest.raises(PlanError, match="PromptRule can't be combined"):
            combine(model, {"again": 0.5}, "z", cast(Any, method), rank=rank)


def test_what_has_no_sum_is_refused_with_rule_and_site() -> None:
    for rule, why in (
        (VeraRule("0", rank=4), "does not compute the sum of their effects"),
        (LohaRule("0", rank=2), "does not compute the sum of their effects"),
        (BottleneckRule("0", size=2), "linear"),
    ):
        model = copies(nn.Sequential(nn.Linear(8, 4)), rule, "a", "b")
        before = Snapshot(model)
        with pytest.raises(PlanError, match=rf"{type(rule).__name__} can't be combined(.|\n)*where: 0(.|\n)*{why}"):
            combine(model, {"a": 0.5, "b": 0.5}, "z", "cat")
        assert before.differences(model) == []
    combine(model, {"a": 0.5, "b": 0.5}, "z")  # bottlenecks may be averaged
    boxes: Any = model.get_submodule("0.adapters")
    torch.testing.assert_close(boxes.z.down, 0.5 * boxes.a.down + 0.5 * boxes.b.down, **CLOSE)
    model = nn.Sequential(nn.Linear(8, 4))
    apply_rules(model, [CaptureRule("0"), LoraRule("0")], adapter="a")
    apply_rules(model, LoraRule("0"), adapter="b")
    combine(model, {"a": 0.5, "b": 0.5}, "z")
    assert [type(rule) for rule in rules_of(model, "z")] == [CaptureRule, LoraRule]


def test_different_rules_side_by_side() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    apply_rules(model, [LoraRule("0", rank=2, init="random"), TrainRule("1")], adapter="a")
    apply_rules(model, LoraRule("0", rank=2, init="random", dropout=0.1), adapter="b")
    combine(model, {"b": 0.5, "a": 0.5}, "z")
    assert [type(rule) for rule in rules_of(model, "z")] == [LoraRule, TrainRule]
    assert rules_of(model, "z")[0].dropout == 0.1  # type: ignore[attr-defined]  # the first named
    other = nn.Sequential(nn.Linear(8, 4))
    apply_rules(other, TrainRule("0"), adapter="a")
    apply_rules(other, LoraRule("0"), adapter="b")
    with pytest.raises(PlanError, match="takes the whole module"):
        combine(other, {"a": 0.5, "b": 0.5}, "z")
    assert "z" not in adapters(other) and not any(".z." in key for key in other.state_dict())


# The result is an adapter like others ---------------------------------------------------------------------------


def pair(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype).eval()
    for name, targets in (("a", ["0"]), ("b", ["0", "2"])):
        apply_rules(model, LoraRule(targets, rank=2, alpha=3, init="random"), adapter=name)
    return model


def test_it_trains_merges_saves_and_goes(tmp_path: Any) -> None:
    model, x = pair(), torch.randn(5, 8)
    plain = Snapshot(remove(copy.deepcopy(model)))
    combine(model, {"a": 0.7, "b": 0.3}, "z")
    assert (model[0].weight.requires_grad, active(model)) == (False, ("a", "b"))
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".z." in n)
    activate(model, "z")
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"{path}.adapters.z.{name}" for path in (0, 2) for name in "AB"
    ]
    model(x).square().sum().backward()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    optimizer.step()
    live = model(x)
    merge(model)
    torch.testing.assert_close(model(x), live, **CLOSE)
    assert torch.equal(unmerge(model)(x), live)
    with using(model, ["a", "z"]):
        assert active(model) == ("a", "z")
    twin = remove(copy.deepcopy(model), ["a", "b"])
    assert torch.equal(twin(x), live)
    folder = save_adapter(model, tmp_path, "z")
    remove(model)
    load_adapter(model, folder, "again")
    assert torch.equal(model(x), live)
    assert tuple(remove(model).state_dict()) == plain.facts["keys"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_stay(dtype: torch.dtype) -> None:
    model = pair(dtype)
    wanted = {key: tensor.dtype for key, tensor in adapter_state_dict(model, "b").items()}
    for method in ("linear", "cat", "svd"):
        combine(model, {"a": 0.7, "b": 0.3}, method, method)
        assert {key: tensor.dtype for key, tensor in adapter_state_dict(model, method).items()} == wanted
    model = pair().to(torch.bfloat16)  # the adapters, too
    combine(model, {"a": 0.7, "b": 0.3}, "z", "svd")
    assert all(tensor.dtype == torch.bfloat16 for tensor in adapter_state_dict(model, "z").values())
    assert activate(model, "z")(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dare_is_drawn_from_its_seed() -> None:
    model = pair()
    tensors_by_adapter: dict[str, dict[str, Tensor]] = {}
    for name, seed in (("one", 3), ("two", 3), ("three", 4), ("own", torch.Generator().manual_seed(3))):
        torch.rand(7)  # torch's global generator has no influence
        combine(model, {"a": 0.7, "b": 0.3}, name, "dare", density=0.5, seed=seed)
        tensors_by_adapter[name] = adapter_state_dict(model, name)
    for key, tensor in tensors_by_adapter["one"].items():
        assert torch.equal(tensor, tensors_by_adapter["two"][key]) and torch.equal(
            tensor, tensors_by_adapter["own"][key]
        )
    assert any(
        not torch.equal(tensor, tensors_by_adapter["three"][key]) for key, tensor in tensors_by_adapter["one"].items()
    )
    state = torch.get_rng_state()
    combine(model, {"a": 0.7, "b": 0.3}, "five", "dare", density=0.5, seed=9)
    assert torch.equal(torch.get_rng_state(), state)
    wide = nn.Sequential(nn.Linear(2000, 4))
    apply_rules(wide, LoraRule("0", rank=50, init="random"), adapter="a")
    combine(wide, {"a": 1.0}, "z", "dare", density=0.3, seed=0)
    mask, A = (cast(Any, wide[0]).adapters.z.A != 0), cast(Any, wide[0]).adapters.a.A
    assert abs(float(mask.float().mean()) - 0.3) < 0.01
    scale = math.sqrt(8 / 50)
    torch.testing.assert_close(cast(Any, wide[0]).adapters.z.A[mask], A[mask] * scale / 0.3, **CLOSE)


def test_words_of_targets_are_kept() -> None:
    model = pair()
    combine(model, {"a": 0.7, "b": 0.3}, "z", "cat")
    (rule,) = rules_of(model, "z")
    assert rule.targets == ("0", "2") and rule.rank_pattern == {"^(?:2)": 2} and rule.rank == 4  # type: ignore[attr-defined]
    nested = nn.ModuleDict({"q": nn.Linear(4, 4), "in": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    apply_rules(nested, LoraRule("re:q", rank=2), adapter="a")
    apply_rules(nested, LoraRule("re:.*q", rank=2), adapter="b")
    combine(nested, {"a": 0.5, "b": 0.5}, "z", "cat")
    (rule,) = rules_of(nested, "z")
    ranks = {path: rule.rank_at(path) for path in ("q", "in.q")}  # type: ignore[attr-defined]
    assert ranks == {"q": 4, "in.q": 2}


# Refusals -----------------------------------------------------------------------------------------------------

BAD: list[tuple[Callable[[nn.Module], Any], str]] = [
    (lambda m: combine(m, {"topcis": 1.0}, "z"), "topics"),
    (lambda m: combine(m, {"topics": 1.0}, "style"), "already"),
    (lambda m: combine(m, {"topics": 1.0}, "a.b"), "can't name"),
    (lambda m: combine(m, {}, "z"), "not a mapping of weights"),
    (lambda m: combine(m, cast(Any, ["topics"]), "z"), "not a mapping of weights"),
    (lambda m: combine(m, {"topics": float("nan")}, "z"), "finite"),
    (lambda m: combine(m, {"topics": float("inf")}, "z"), "finite"),
    (lambda m: combine(m, {"topics": cast(Any, "1")}, "z"), "finite"),
    (lambda m: combine(m, {"topics": True}, "z"), "finite"),
    (lambda m: combine(m, {"topics": 1.0}, "z", cast(Any, "liner")), "linear"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "ties"), "needs a density"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "ties", density=0.0), "density"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "ties", density=1.1), "density"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "linear", density=0.5), "does not use"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "cat", rank=3), "does not use"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "svd", rank=0), "whole number"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "svd", clamp=2.0), "clamp"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "svd", seed=1), "does not use"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "svd", majority_sign="frequency"), "does not use"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "ties", density=0.5, majority_sign=cast(Any, "all")), "majority_sign"),
    (lambda m: combine(m, {"topics": 1.0}, "z", "dare", density=0.5, seed=cast(Any, "x")), "seed"),
    (lambda m: combine(m, {"topics": 1.0, "style": 1.0}, "z", "linear"), "2 in 'topics', 3 in 'style'"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_refusals_change_nothing(call: Callable[[nn.Module], Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    apply_rules(model, LoraRule(["0", "1"], rank=2), adapter="topics")
    apply_rules(model, LoraRule("0", rank=3), adapter="style")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match=message):
        call(model)
    assert before.differences(model) == [] and list(adapters(model)) == ["topics", "style"]


def test_merged_models_and_changed_bases_are_refused() -> None:
    model = pair()
    merge(model)
    with pytest.raises(SurgeryError, match=r"merged(.|\n)*unmerge"):
        combine(model, {"a": 1.0}, "z")
    unmerge(model)
    apply_rules(model, LoraRule("2", rank=2, init="pissa"), adapter="p")
    with pytest.raises(SurgeryError, match="changed the base's weights"):
        combine(model, {"a": 1.0, "p": 1.0}, "z")
    combine(model, {"a": 1.0}, "z")
    assert list(adapters(model)) == ["a", "b", "p", "z"]


@pytest.mark.parametrize("method", ["linear", "cat", "svd", "ties"])
def test_numbers_that_are_not_finite_are_refused(method: Any) -> None:
    model = pair()
    model.get_parameter("2.adapters.b.A").data[0, 0] = float("nan")
    before = Snapshot(model)
    with pytest.raises(PlanError, match=r"'b' holds numbers(.|\n)*where: 2(.|\n)*A of its LoraRule"):
        combine(model, {"a": 0.5, "b": 0.5}, "z", method, density=0.5 if method == "ties" else None)
    assert before.differences(model) == []
    combine(model, {"a": 0.5}, "z", method, density=0.5 if method == "ties" else None)


def test_made_in_inference_mode_they_train() -> None:
    model = pair()
    with torch.inference_mode():
        combine(model, {"a": 0.5, "b": 0.5}, "z")
        copy_adapter(model, "a", "y")
    activate(model, ["z", "y"])
    model(torch.randn(2, 8)).sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".z." in n or ".y." in n)


def test_a_failure_on_the_way_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pair()
    before, x = Snapshot(model), torch.randn(2, 8)
    output, calls = model(x), 0

    def failing(self: Any, site: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise ValueError("no")
        return rewrite(self, site)

    rewrite = LoraRule.rewrite
    monkeypatch.setattr(LoraRule, "rewrite", failing)
    with pytest.raises(SurgeryError):
        combine(model, {"a": 0.5, "b": 0.5}, "z")
    assert before.differences(model) == [] and list(adapters(model)) == ["a", "b"] and torch.equal(model(x), output)


def test_adapters_with_room_for_more_rank() -> None:
    """After a hot-swap, the tensors may have more ranks in use than the rule's rank."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4)).eval()
    x = torch.randn(3, 8)
    apply_rules(model, LoraRule(["0", "1"], rank=4, alpha=8, init="random"), adapter="wide")
    tensors, rules = adapter_state_dict(model, "wide"), rules_of(model, "wide")
    apply_rules(model, LoraRule(["0", "1"], rank=2, init="random", max_rank=4), adapter="a")
    apply_rules(model, LoraRule("0", rank=3, init="random"), adapter="b")
    for swapped in (False, True):
        if swapped:
            hotswap(model, "a", tensors, rules=rules)
        expected = activate(model, ["a", "b"], [0.5, -2.0])(x)
        for method in ("cat", "svd"):
            combine(model, {"a": 0.5, "b": -2.0}, "c", method=method, rank=8 if method == "svd" else None)
            torch.testing.assert_close(activate(model, "c")(x), expected, rtol=1e-4, atol=1e-5)
            remove(model, "c")
        copy_adapter(model, "a", "d")
        rename_adapter(model, "d", "e")
        torch.testing.assert_close(activate(model, "e")(x), activate(model, "a")(x))
        remove(model, "e")
