"""Methods that add ΔW beside LoRA, given PEFT's tensors: the same numbers, live and merged; and ΔW of linear rules."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import (
    LiveSite,
    MergeError,
    PlanError,
    Rule,
    RuleError,
    Site,
    adapter_state_dict,
    apply_rules,
    merge,
    plan_rules,
    remove,
    rule,
    rules_from_json,
    rules_to_json,
    unmerge,
)
from surgery.rules import (
    AdaLoraRule,
    BiasRule,
    C3aRule,
    FourierRule,
    LoraRule,
    RandLoraRule,
    RankAllocator,
    ShiraRule,
    orthogonal_loss,
)
from surgery.testing import assert_equivalent, assert_reversible

foreign = pytest.mark.filterwarnings("ignore")  # PEFT's own


class Holder(nn.Module):
    def __init__(self, module: nn.Module):
        super().__init__()
        self.m = module

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


def conv1d(out: int, inner: int) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = pytest.importorskip("transformers.pytorch_utils").Conv1D(out, inner)
    return module


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: nn.Linear(12, 8),
    "tall": lambda: nn.Linear(8, 12, bias=False),
    "Conv1D": lambda: conv1d(12, 8),
}
RULES: dict[str, Rule] = {
    "adalora": AdaLoraRule("m", rank=4, alpha=6, total_step=10),
    "fourier": FourierRule("m", n_frequency=10, scaling=20.0),
    "shira": ShiraRule("m", rank=2, random_seed=3, init="random"),
    "c3a": C3aRule("m", block_size=4),
    "randlora": RandLoraRule("m", rank=3, alpha=6),
}


def disturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def assert_close(found: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """Equal to within a few float32 roundings of the largest entry: sums are taken in another order."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= slack * max(1.0, float(expected.abs().max().detach()))


# Against PEFT -------------------------------------------------------------------------------------------------


def in_peft(model: nn.Module, name: str) -> Any:
    """PEFT's form of a copy of the model, with tensors as if trained."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    turned = {"fan_in_fan_out": not isinstance(model.m, nn.Linear)}
    configs: dict[str, Callable[[], Any]] = {
        "adalora": lambda: peft.AdaLoraConfig(init_r=4, lora_alpha=6, total_step=10, target_modules=["m"], **turned),
        "fourier": lambda: peft.FourierFTConfig(n_frequency=10, scaling=20.0, target_modules=["m"], **turned),
        "shira": lambda: peft.ShiraConfig(r=2, random_seed=3, target_modules=["m"]),
        "c3a": lambda: peft.C3AConfig(block_size=4, target_modules=["m"]),
        "randlora": lambda: peft.RandLoraConfig(r=3, randlora_alpha=6, target_modules=["m"], **turned),
    }
    theirs = peft.get_peft_model(copy.deepcopy(model), configs[name]())
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs


def tensors_of(layer: Any) -> dict[str, Tensor]:
    """A PEFT layer's tensors under our names."""
    names = {"A": "lora_A", "E": "lora_E", "B": "lora_B", "spectrum": "fourierft_spectrum", "values": "shira_weight"}
    names |= {"kernel": "c3a_kernel", "lambda_": "randlora_lambda", "gamma": "randlora_gamma"}
    found = {ours: getattr(layer, name)["default"] for ours, name in names.items() if len(getattr(layer, name, ())) > 0}
    if "lambda_" in found:
        found |= {"A": layer.randlora_A["default"], "B": layer.randlora_B["default"]}
    return found


def take_over(theirs: Any, ours: Any) -> dict[str, Tensor]:
    found = tensors_of(theirs.base_model.model.m)
    with torch.no_grad():
        for name, tensor in found.items():
            assert getattr(ours.m.adapters.default, name).shape == tensor.shape, name
            getattr(ours.m.adapters.default, name).copy_(tensor)
    return found


@foreign
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_given_the_same_tensors_a_layer_is_pefts(name: str, layer: str) -> None:
    if layer == "Conv1D" and name in ("shira", "c3a"):
        pytest.skip("PEFT has it on Linear alone")
    model: Any = Holder(LAYERS[layer]())
    theirs = in_peft(model, name)
    ours = apply_rules(model, [RULES[name]])
    tensors = take_over(theirs, ours)
    x = torch.randn(2, 3, 12 if layer == "wide" else 8)
    found, expected = ours(x), theirs(x)
    assert (expected - theirs.base_model.model.m.base_layer(x)).abs().max() > 1e-3
    assert_close(found, expected)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for key, tensor in tensors.items():
        if tensor.requires_grad:
            assert tensor.grad is not None
            assert_close(ours.get_parameter(f"m.adapters.default.{key}").grad, tensor.grad, 3e-6)  # type: ignore[arg-type]
    theirs.eval().merge_adapter()
    before = ours.eval()(x)
    merge(ours)
    assert_close(ours.m.weight, theirs.base_model.model.m.base_layer.weight)
    assert_close(ours(x), before, 3e-6)
    remove(unmerge(ours))


@foreign
def test_the_same_places_as_in_peft() -> None:
    model: Any = Holder(nn.Linear(12, 8))
    fourier: Any = apply_rules(copy.deepcopy(model), [RULES["fourier"]])
    rows = in_peft(model, "fourier").base_model.model.m.indices["default"]
    assert torch.equal(fourier.m.adapters.default.index, rows[0] * 12 + rows[1])
    shira: Any = apply_rules(copy.deepcopy(model), [RULES["shira"]])
    rows = in_peft(model, "shira").base_model.model.m.shira_indices["default"].long()
    assert torch.equal(shira.m.adapters.default.index, rows[0] * 12 + rows[1])


@foreign
def test_defaults_are_pefts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    pairs: list[tuple[Rule, Any, dict[str, str]]] = [
        (AdaLoraRule("m"), peft.AdaLoraConfig, {"rank": "init_r", "alpha": "lora_alpha", "dropout": "lora_dropout"}),
        (FourierRule("m"), peft.FourierFTConfig, {}),
        (ShiraRule("m"), peft.ShiraConfig, {"rank": "r"}),
        (C3aRule("m"), peft.C3AConfig, {"init": "init_weights"}),
        (
            RandLoraRule("m"),
            peft.RandLoraConfig,
            {"rank": "r", "alpha": "randlora_alpha", "dropout": "randlora_dropout"},
        ),
    ]
    for made, config, names in pairs:
        given = {"total_step": 10} if config is peft.AdaLoraConfig else {}
        theirs = config(**given)
        for field in made.to_dict():
            name = names.get(field, field)
            if hasattr(theirs, name) and field not in ("total_step", "targets", "exclude", "layers"):
                assert getattr(made, field) == getattr(theirs, name), (made, field)


# By themselves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", RULES)
def test_reversible(name: str, layer: str, dtype: torch.dtype) -> None:
    model: Any = Holder(LAYERS[layer]()).to(dtype).eval()
    x = torch.randn(2, 3, 12 if layer == "wide" else 8).to(dtype)
    assert_reversible(model, [RULES[name]], example_inputs=x)
    apply_rules(model, [RULES[name]])
    disturb(model)
    live = model(x)
    merge(model)
    slack = {torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(model(x), live, rtol=slack, atol=slack)


@pytest.mark.parametrize("name", RULES)
def test_written_read_exported_and_compiled(name: str) -> None:
    assert rules_from_json(rules_to_json([RULES[name]])) == [RULES[name]]
    model, x = Holder(nn.Linear(12, 8)).eval(), torch.randn(2, 12)
    apply_rules(model, [RULES[name]])
    disturb(model)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


def test_a_start_that_changes_nothing() -> None:
    x = torch.randn(3, 12)
    for made in (
        AdaLoraRule("m"),
        FourierRule("m", n_frequency=5, init="identity"),
        ShiraRule("m", rank=2),
        C3aRule("m", block_size=4, init="identity"),
        RandLoraRule("m"),
    ):
        assert made.identity
        apply_rules(Holder(nn.Linear(12, 8)).eval(), [made], example_inputs=x)


def test_fourier_by_hand() -> None:
    model: Any = Holder(nn.Linear(5, 3))

    def by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        delta = torch.zeros(3, 5)
        for place, value in zip(tensors["m.adapters.index"].tolist(), tensors["m.adapters.spectrum"], strict=True):
            k, l = divmod(place, 5)  # noqa: E741
            rows, columns = torch.arange(3).view(-1, 1), torch.arange(5)
            delta += value * torch.cos(2 * torch.pi * (k * rows / 3 + l * columns / 5)) / 15
        return F.linear(x, model.m.weight + 7 * delta, model.m.bias)

    assert_equivalent(model, [FourierRule("m", n_frequency=4, scaling=7.0)], by_hand, torch.randn(2, 5))


def test_c3a_by_hand() -> None:
    model: Any = Holder(nn.Linear(6, 3, bias=False))

    def by_hand(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        kernel, C = tensors["m.adapters.kernel"], torch.zeros(3, 6)
        for block in range(2):
            for i in range(3):
                for j in range(3):
                    C[i, 3 * block + j] = kernel[0, block, (j - i) % 3]
        return x @ (model.m.weight + C / 6).T

    assert_equivalent(model, [C3aRule("m", block_size=3)], by_hand, torch.randn(2, 6))


@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"very_sparse": True}], ids=str)
def test_randlora_has_full_rank(fields: dict[str, Any]) -> None:
    model: Any = Holder(nn.Linear(64, 48))
    before = model.m.weight.detach().clone()
    apply_rules(model, [RandLoraRule("m", rank=8, **fields)])
    held = model.m.adapters.default
    for base in (held.A, held.B):
        assert abs(float(base.std()) - 1) < 1e-4
        values = base.unique()
        assert len(values) == 3 if fields else len(values) > 3
    disturb(model)
    merge(model)
    rank = int(torch.linalg.matrix_rank(model.m.weight - before))
    assert rank == 48 if not fields else 8 < rank <= 48  # a sparse base may have empty columns


@pytest.mark.parametrize("fields", [{"rank": 0}, {"rank": 1.5}, {"init": "zero"}, {"random_seed": -1}], ids=str)
def test_values_out_of_range(fields: dict[str, Any]) -> None:
    with pytest.raises(RuleError, match=next(iter(fields))):
        ShiraRule("m", **fields)


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaLoraRule("m", tinit=5, tfinal=5, total_step=10),
        lambda: AdaLoraRule("m", beta1=1.0),
        lambda: AdaLoraRule("m", orth_reg_weight=-1),
        lambda: FourierRule("m", scaling="large"),  # type: ignore[arg-type]
        lambda: C3aRule("m", block_size=0),
        lambda: RandLoraRule("m", sparse="yes"),  # type: ignore[arg-type]
        lambda: RandLoraRule("m", dropout=1.0),
    ],
)
def test_more_values_out_of_range(make: Callable[[], Rule]) -> None:
    with pytest.raises(RuleError):
        make()


def test_where_they_can_not_go() -> None:
    class Activated(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    for module, why in ((nn.Conv2d(4, 4, 1), "Linear and"), (Activated(12, 8), "not a plain linear map")):
        for made in RULES.values():
            (problem,) = plan_rules(Holder(module), [made]).problems
            assert why in str(problem)
    small = Holder(nn.Linear(3, 2))
    for made, why in (
        (FourierRule("m"), "1000 entries are more than the 6"),
        (ShiraRule("m", rank=2), "10 entries are more than the 6"),
        (C3aRule("m", block_size=2), "do not divide its sizes, 2 and 3"),
    ):
        (problem,) = plan_rules(small, [made]).problems
        assert why in str(problem)


# AdaLoRA's training -------------------------------------------------------------------------------------------


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


@foreign
@pytest.mark.parametrize("fields", [{}, {"deltaT": 3, "tinit": 2, "tfinal": 3}, {"target_r": 5}], ids=str)
def test_ranks_are_shared_out_as_in_peft(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")
    fields = {"target_r": 2, "total_step": 12, **fields}
    model = Two()
    config = peft.AdaLoraConfig(init_r=4, target_modules=["a", "b"], **fields)
    if fields["target_r"] > 4:
        fields["target_r"] = config.target_r = 3
    theirs = peft.get_peft_model(copy.deepcopy(model), config)
    ours: Any = apply_rules(model, [AdaLoraRule(["a", "b"], rank=4, **fields)])
    layers = {name: getattr(theirs.base_model.model, name) for name in "ab"}
    with torch.no_grad():
        for name, layer in layers.items():
            for key in "AEB":
                tensor = getattr(layer, f"lora_{key}")["default"]
                tensor.normal_(std=0.3)
                getattr(getattr(ours, name).adapters.default, key).copy_(tensor)
    allocator = RankAllocator(ours)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (ours, theirs)]
    for step in range(1, 13):
        x, target = torch.randn(7, 6), torch.randn(7, 4)
        for each, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            F.mse_loss(each(x), target).backward()
            optimizer.step()
        allocator.update_and_allocate(step)
        theirs.base_model.update_and_allocate(step)
        for name, layer in layers.items():
            E = getattr(ours, name).adapters.default.E
            assert torch.equal(E == 0, layer.lora_E["default"] == 0), step
            assert_close(E, layer.lora_E["default"], 1e-5)
    assert sum(int(kept.sum()) for kept in allocator.kept.values()) == 2 * fields["target_r"]


@foreign
def test_the_orthogonal_loss_is_pefts() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft: Any = pytest.importorskip("peft")

    class WithLoss(Two):
        def forward(self, x: Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(loss=super().forward(x).square().mean())

    model, x = WithLoss(), torch.randn(3, 6)
    theirs = peft.get_peft_model(
        copy.deepcopy(model), peft.AdaLoraConfig(init_r=4, target_modules=["a", "b"], total_step=9)
    )
    ours: Any = apply_rules(model, [AdaLoraRule(["a", "b"], rank=4, total_step=9), BiasRule("b")], adapter="one")
    with torch.no_grad():
        for name in "ab":
            for key in "AEB":
                tensor = getattr(getattr(theirs.base_model.model, name), f"lora_{key}")["default"]
                getattr(getattr(ours, name).adapters.one, key).copy_(tensor.normal_())
    assert_close(ours(x).loss + orthogonal_loss(ours, "one"), theirs.base_model(x).loss)


def test_ranks_can_not_be_shared_out() -> None:
    model = apply_rules(Two(), [AdaLoraRule("a")])
    with pytest.raises(RuleError, match="no total_step"):
        RankAllocator(model)
    model = apply_rules(Two(), [AdaLoraRule("a", total_step=5)])
    with pytest.raises(RuleError, match="a: A has no gradient"):
        RankAllocator(model).update_and_allocate(1)
    model = apply_rules(Two(), [LoraRule("a")])
    with pytest.raises(RuleError, match="0 AdaLoraRules"):
        orthogonal_loss(model)


# linear = True ------------------------------------------------------------------------------------------------


@rule("test-linear-lora")
class LinearLora(Rule):
    """LoRA without a `merged` of its own, with all that a rewrite may use."""

    dropout: float = 0.0
    linear = True

    def rewrite(self, site: Site) -> Tensor:
        A = site.param("A", (2, site.in_features), nn.init.normal_)
        B = site.param("B", (site.out_features, 2), nn.init.normal_)
        shift = site.buffer("turn", torch.tensor([1, 0]))
        x = F.dropout(site.inputs[next(iter(site.inputs))], self.dropout, site.training)  # type: ignore[arg-type]
        return site.output + site.apply(F.linear, x.to(A.dtype), A)[..., shift] @ B.t()


class OwnOperation(LinearLora):
    def rewrite(self, site: Site) -> Tensor:
        A = site.param("A", (2, site.in_features), nn.init.normal_)
        B = site.param("B", (site.out_features, 2), nn.init.normal_)
        return site.with_hidden(site.hidden + F.linear(site.call(site.input, weight=A, bias=None), B))


class Masked(LinearLora):
    """HiRA, W ∘ ΔW: linear in the input, but of the base's weight too."""

    additive = False  # type: ignore[assignment]

    def rewrite(self, site: Site) -> Tensor:
        A = site.param("A", (2, site.in_features), nn.init.normal_)
        B = site.param("B", (site.out_features, 2), nn.init.normal_)
        return site.output + F.linear(site.input, site.weight * (B @ A))


def derived_delta(rule: Rule, model: Any, x: Tensor) -> None:
    apply_rules(model, [rule])
    live = model.eval()(x)
    before = model.m.weight.detach().clone()
    merge(model)
    torch.testing.assert_close(model(x), live)
    assert not torch.equal(model.m.weight, before)
    remove(unmerge(model))
    assert torch.equal(model.m.weight, before)


@pytest.mark.parametrize("layer", LAYERS)
def test_delta_is_derived_from_a_linear_rewrite(layer: str) -> None:
    x = torch.randn(2, 3, 12 if layer == "wide" else 8)
    derived_delta(LinearLora("m", dropout=0.5), Holder(LAYERS[layer]()), x)


def test_delta_is_derived_through_the_modules_own_operation_and_its_weight() -> None:
    for kind in (OwnOperation, Masked):
        derived_delta(kind("m"), Holder(nn.Linear(12, 8)), torch.randn(3, 12))


def test_linear_rules_add_up() -> None:
    model, x = Holder(nn.Linear(12, 8)), torch.randn(3, 12)
    apply_rules(model, [LinearLora("m")], adapter="one")
    apply_rules(model, [LoraRule("m", init="random")], adapter="two")
    live = model(x)
    merge(model, "one")
    torch.testing.assert_close(merge_rest(model, x), live)


def merge_rest(model: Any, x: Tensor) -> Tensor:
    unmerge(model)
    merge(model)
    return model(x)


@rule("test-not-linear")
class NotLinear(Rule):
    how: str = "relu"
    linear = True

    def rewrite(self, site: Site) -> Tensor | None:
        g = site.param("g", (site.out_features, site.in_features), nn.init.normal_)
        y = F.linear(site.input, g)
        if self.how == "relu":
            return site.output + y.relu()
        if self.how == "bias":
            return site.output + y + site.param("b", (site.out_features,), 1.0)
        if self.how == "product":
            return site.output * 1.5 + y
        if self.how == "weight":
            return site.output + F.linear(site.input, site.weight * g)
        site.replace(site.output, site.output + y)
        return None


@pytest.mark.parametrize(
    "how, why",
    [
        ("relu", "and it is not"),
        ("bias", "and it is not"),
        ("product", "and it is not"),
        ("weight", "it reads the base's weight"),
        ("replace", "it replaces a value"),
    ],
)
def test_a_rule_that_is_not_linear_is_found_out(how: str, why: str) -> None:
    model: Any = Holder(nn.Linear(12, 8))
    before = model.m.weight.detach().clone()
    apply_rules(model, [NotLinear("m", how=how)])
    with pytest.raises(MergeError, match=why):
        merge(model)
    assert torch.equal(model.m.weight, before)
    assert remove(model).m.weight is not None


def test_delta_is_derived_on_linear_maps_alone() -> None:
    model = Holder(nn.Embedding(4, 4))

    @rule("test-shift")
    class Shift(Rule):
        linear = True

        def rewrite(self, site: Site) -> Tensor:
            return site.output + site.param("s", (4,), 1.0)

    apply_rules(model, [Shift("m")])
    with pytest.raises(MergeError, match="can't be derived on a Embedding"):
        merge(model)


def test_a_rule_without_a_closed_form_says_so() -> None:
    @rule("test-formless")
    class Formless(Rule):
        def rewrite(self, site: Site) -> Tensor:
            return site.output * 2

    model = apply_rules(Holder(nn.Linear(2, 2)), [Formless("m")])
    assert not Formless("m").mergeable and not Formless("m").additive
    with pytest.raises(PlanError, match="does not define merging"):
        merge(model)
    with pytest.raises(NotImplementedError):
        Formless("m").merged(LiveSite(nn.Linear(2, 2), "m", "default", {}, lambda *_: torch.zeros(())))


def test_attributes_of_attributes_are_recorded() -> None:
    @rule("test-real")
    class Real(Rule):
        def rewrite(self, site: Site) -> Tensor:
            return torch.fft.fft(site.output).real.T.mT.flatten(0)

    model, x = Holder(nn.Linear(3, 3)), torch.randn(2, 3)
    expected = torch.fft.fft(model(x)).real.flatten()
    apply_rules(model, [Real("m")])
    torch.testing.assert_close(model(x), expected)


def test_dropout_while_training() -> None:
    for made in (AdaLoraRule("m", dropout=0.5), RandLoraRule("m", rank=2, dropout=0.5)):
        model, x = Holder(nn.Linear(12, 8)), torch.randn(3, 12)
        disturb(apply_rules(model, [made]))
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))
        assert set(adapter_state_dict(model))
