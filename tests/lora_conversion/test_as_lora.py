"""`as_lora`, against plain arithmetic and torch's own singular values."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from surgery import (
    PlanError,
    Rule,
    SurgeryError,
    activate,
    active,
    adapter_state_dict,
    apply_rules,
    as_lora,
    remove,
    rules_of,
    save_adapter,
    using,
)
from surgery.rules import (
    FourierRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    OftRule,
    PrefixRule,
    RandLoraRule,
    ReftRule,
    ShiraRule,
    TrainRule,
    VeraRule,
)
from tests.support.quantised import BY_NAME


class Net(nn.Module):
    """Each kind of map that LoRA takes, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(11, 12), nn.Linear(12, 10), Conv1D(8, 10)
        self.grouped = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.depth = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.LayerNorm(8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.down(torch.tanh(self.up(self.embed(ids)))).transpose(1, 2)
        return self.norm(self.depth(self.grouped(hidden[:, :4])).transpose(1, 2))


X = torch.arange(10).view(2, 5)
MAPS = ["embed", "up", "down", "grouped", "depth"]


def adapted(rules: Any, adapter: str = "default", model: nn.Module | None = None) -> Any:
    """A model in evaluation mode with rules whose tensors are random."""
    model = apply_rules(model or Net().eval(), rules, adapter=adapter, example_inputs=X)
    with torch.no_grad():
        for name, tensor in adapter_state_dict(model, adapter).items():
            if tensor.is_floating_point() and not name.endswith("magnitude"):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))))
    return model


RULES: dict[str, Rule] = {
    "rslora": LoraRule(MAPS, rank=2, alpha=3, rslora=True),
    "patterns": LoraRule(MAPS, rank=2, alpha=5, rank_pattern={"up": 4}, alpha_pattern={"up": 1}),
    "dora": LoraRule(["up", "down", "grouped"], rank=2, dora=True),
    "ia3": IA3Rule(["up", "down", "grouped", "depth"], feedforward="down"),
    "loha": LohaRule(["up", "down", "grouped"], rank=2),
    "lokr": LokrRule("up", rank=2),
    "vera": VeraRule(["up", "down"], rank=4),
    "oft": OftRule("up", block_size=4),
    "hra": HraRule("up", rank=2),
    "randlora": RandLoraRule("up", rank=2),
    "fourier": FourierRule("up", n_frequency=20),
    "shira": ShiraRule("up", rank=1),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_outputs_stay(rule: Rule) -> None:
    model = adapted(rule)
    before = model(X)
    report = as_lora(model, example_inputs=X)
    # The factors are rounded to float32, and the layers after a site amplify that.
    assert torch.allclose(model(X), before, atol=2e-6) and report.error < 1e-6 and report.outputs[0] < 1e-4
    assert {rule.name for rule in rules_of(model)} == {"lora"} and active(model) == ("default",)
    assert torch.equal(remove(model)(X), Net().eval()(X))


def test_the_error_is_that_of_the_discarded_singular_values() -> None:
    model = adapted(LohaRule("up", rank=2, alpha=3))
    box: Any = model.up.adapters.default
    delta = (box.w1_a @ box.w1_b) * (box.w2_a @ box.w2_b) * (3 / 2)
    values = torch.linalg.svdvals(delta.detach().double())
    expected = float(values[2:].square().sum().sqrt() / values.square().sum().sqrt())
    report = as_lora(model, rank=2)
    (site,) = report.sites
    assert (site.path, site.weight, site.rank) == ("up", "weight", 2)
    assert math.isclose(site.error, expected, rel_tol=1e-5) and math.isclose(report.error, expected, rel_tol=1e-5)
    lora: Any = model.up.adapters.default
    left, kept, right = torch.linalg.svd(delta.detach(), full_matrices=False)
    assert torch.allclose(lora.B @ lora.A, (left[:, :2] * kept[:2]) @ right[:2], atol=1e-5)
    assert float((lora.B @ lora.A - delta).detach().norm() / delta.detach().norm()) == pytest.approx(expected, rel=1e-4)


def test_a_tolerance_gives_the_lowest_rank_that_keeps_it() -> None:
    model = adapted(RandLoraRule("up", rank=2))
    plain = torch.nn.functional.linear(torch.eye(12), model.up.weight)
    delta = (model.up(torch.eye(12)) - model.up.bias - plain).detach().double()
    squares = torch.linalg.svdvals(delta).square()
    tails = [float((squares[rank:].sum() / squares.sum()).sqrt()) for rank in range(11)]
    wanted = next(rank for rank, lost in enumerate(tails) if lost <= 0.2)
    (site,) = as_lora(model, tolerance=0.2).sites
    assert site.rank == wanted and site.error == pytest.approx(tails[wanted], rel=1e-3)


def test_known_factors_are_joined_with_their_scales() -> None:
    model = adapted(LoraRule("up", rank=2, alpha=3, rslora=True), "a")
    adapted(VeraRule("up", rank=4), "b", model)
    first: Any = model.up.adapters.a
    expected = first.B @ first.A * (3 / math.sqrt(2)) * 0.5
    report = as_lora(model, {"a": 0.5}, "lesser")
    lesser: Any = model.up.adapters.lesser
    assert (
        torch.allclose(lesser.B @ lesser.A, expected, atol=1e-6) and report.sites[0].exact and report.sites[0].rank == 2
    )
    with using(model, ["a", "b"], [0.5, -2.0]):
        both = model(X)
    report = as_lora(model, {"a": 0.5, "b": -2.0}, "both", example_inputs=[X, X[:1]])
    assert report.sites[0].exact and report.sites[0].rank == 6 and max(report.outputs) < 1e-4
    assert torch.allclose(activate(model, "both")(X), both, atol=1e-5)


def test_a_rank_is_that_of_every_site() -> None:
    model = adapted(LoraRule(MAPS, rank=2, rank_pattern={"up": 4}))
    before = model(X)
    report = as_lora(model, rank=8)
    assert [tuple(model.get_submodule(path).adapters.default.A.shape)[0] for path in MAPS] == [8, 8, 8, 8, 9]
    (rule,) = rules_of(model)
    assert rule.rank == 8 and torch.allclose(model(X), before, atol=2e-6)  # type: ignore[attr-defined]
    assert report.sites[0].exact


def test_what_is_not_a_matrix_stays_as_it_is() -> None:
    rules = [IA3Rule("up"), TrainRule("norm"), LoraRule("down", rank=2, bias="lora_only")]
    model = adapted(rules)
    before = model(X)
    report = as_lora(model)
    assert torch.allclose(model(X), before, atol=2e-6)
    assert set(report.trained) == {"norm.weight", "norm.bias", "down.bias"}
    assert {rule.name for rule in rules_of(model)} == {"lora", "train", "bias"}
    assert "up.adapters.default.B_bias" in dict(model.named_parameters())


def test_attention_has_one_rank(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model: Any = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    apply_rules(model, LoraRule(nn.MultiheadAttention, rank=2, init="random"), example_inputs=(x, x, x))
    before = model(x, x, x)[0]
    assert len(as_lora(model, rank=3).sites) == 2
    assert torch.allclose(model(x, x, x)[0], before, atol=1e-6)


def test_rules_without_a_change_of_weights_are_refused_by_name() -> None:
    model = adapted([LoraRule("up", rank=2), ReftRule("down", rank=2)])
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, model(X)
    with pytest.raises(PlanError, match="ReftRule can't be converted to LoRA"):
        as_lora(model)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()) and torch.equal(model(X), before)
    assert not PrefixRule("up", length=1).mergeable


def test_arguments_that_do_not_fit() -> None:
    model = adapted(LoraRule("up", rank=2))
    wrong: tuple[dict[str, Any], ...] = (
        {"rank": 0},
        {"tolerance": 1.0},
        {"adapter": "other"},
        {"adapter": []},
        {"into": "default"},
    )
    for arguments in wrong:
        with pytest.raises(SurgeryError):
            as_lora(model, **arguments)
    adapted(OftRule("up", block_size=4), "turn", model)
    with pytest.raises(PlanError, match="loses more than the tolerance"):
        as_lora(model, "turn", "lora", rank=1, tolerance=0.01)
    with pytest.raises(SurgeryError, match="no one name"):
        as_lora(model, ["default", "turn"])
    assert list(model.up.adapters._modules) == ["default", "turn"]
    copies = adapted(TrainRule("norm"))
    with pytest.raises(SurgeryError, match="nothing is to be converted"):
        as_lora(copies)


def test_the_report_prints_and_the_result_is_saved_in_pefts_format(tmp_path: Any) -> None:
    model = adapted(LokrRule("up", rank=2))
    report = as_lora(model, rank=1)
    assert str(report).startswith("LoRA at 1 weights, rank 1; ") and "up.weight" in str(report)
    assert [row["path"] for row in report.to_rows()] == ["up"] and report.to_dict()["adapters"] == ["default"]
    folder = save_adapter(model, tmp_path, format="peft")
    assert (folder / "adapter_config.json").is_file()


def test_half_precision_keeps_float32_factors() -> None:
    model = adapted(IA3Rule("up"), model=Net().eval().to(torch.bfloat16))
    weight, scale = model.up.weight.double(), model.up.adapters.default.scale.double()
    as_lora(model)
    lora: Any = model.up.adapters.default
    assert lora.A.dtype == torch.float32
    expected = (scale - 1).unsqueeze(1) * weight
    assert torch.allclose(lora.B.double() @ lora.A.double(), expected, rtol=1e-5, atol=1e-6)


QUANTISED = ["bitsandbytes Linear4bit nf4, double", "bitsandbytes Linear8bitLt", "torchao int8"]


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("name", QUANTISED)
def test_adapters_on_quantised_weights(name: str) -> None:
    """The change is that of the dequantised weight, which the module's kernel multiplies."""
    backend, x = BY_NAME[name], torch.randn(3, 64)
    for rule in (LoraRule("0", rank=4, rslora=True, init="random"), LoraRule("0", rank=4, dora=True, init="random")):
        torch.manual_seed(0)
        try:
            model = nn.Sequential(backend.build(nn.Linear(64, 32))).eval()
        except ImportError:
            pytest.skip(f"needs {backend.package}")
        apply_rules(model, rule)
        before = model(x)
        report = as_lora(model)
        assert report.error < 1e-6 and torch.allclose(model(x), before, atol=1e-5)
        assert [getattr(rule, "dora", None) for rule in rules_of(model)] == [False]


@pytest.mark.usefixtures("quiet")
def test_a_stack_on_a_quantised_weight() -> None:
    backend, x = BY_NAME["torchao int8"], torch.randn(3, 64)
    torch.manual_seed(0)
    try:
        model = nn.Sequential(backend.build(nn.Linear(64, 32))).eval()
    except ImportError:
        pytest.skip(f"needs {backend.package}")
    apply_rules(model, LoraRule("0", rank=4, init="random"), adapter="a")
    apply_rules(model, IA3Rule("0", init="random"), adapter="b")
    with using(model, ["a", "b"]):
        both = model(x)
    as_lora(model, ["a", "b"], "both")
    assert torch.allclose(activate(model, "both")(x), both, atol=1e-4)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_start_that_changed_the_base(init: str) -> None:
    """The LoRA has twice the rank, and goes on the base as it was."""
    model = apply_rules(Net().eval(), LoraRule(["up", "down"], rank=2, init=init), example_inputs=X)
    with torch.no_grad():
        for tensor in adapter_state_dict(model).values():
            tensor.add_(0.1 * torch.randn_like(tensor))
    before = model(X)
    with pytest.raises(SurgeryError, match="can't be converted to LoRA beside it"):
        as_lora(model, "default", "other")
    report = as_lora(model, example_inputs=X)
    assert report.outputs[0] < 1e-4
    assert [site.rank for site in report.sites] == [4, 4] and torch.allclose(model(X), before, atol=2e-6)
    assert torch.equal(model.up.weight, Net().up.weight)
    assert torch.equal(remove(model)(X), Net().eval()(X))
