"""Every rule on quantised Linears: forward and training equal those of the same rule on the dequantised weight."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Rule, SurgeryError, apply_rules, load_adapter, packed_weight_of, plan_rules, remove, save_adapter
from surgery.rules import (
    AdaLoraRule,
    BiasRule,
    BoftRule,
    C3aRule,
    FourierRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    MissRule,
    OftRule,
    RandLoraRule,
    RoadRule,
    ShiraRule,
    VeraRule,
)
from surgery.rules._linear import packed_norm
from surgery.testing import Snapshot
from tests.support.quantised import BACKENDS, BY_NAME, QuantisedLinear

pytestmark = pytest.mark.usefixtures("quiet")
T = ["0"]
RULES: dict[str, Rule] = {
    "lora": LoraRule(T, rank=4, init="random"),
    "lora_bias": LoraRule(T, rank=4, lora_bias=True, init="random"),
    "dora": LoraRule(T, rank=4, dora=True, init="random"),
    "mica": LoraRule(T, rank=4, init="mica"),
    "adalora": AdaLoraRule(T, rank=4, init="random"),
    "bias": BiasRule("0"),
    "boft": BoftRule(T, block_size=4, init="random"),
    "boft factors": BoftRule(T, block_size=4, n_butterfly_factor=2, init="random"),
    "c3a": C3aRule(T, block_size=4),
    "fourier": FourierRule(T, n_frequency=10),
    "hra": HraRule(T, rank=4, init="random"),
    "ia3": IA3Rule(T, init="random"),
    "ia3 inputs": IA3Rule(T, feedforward=["0"], init="random"),
    "loha": LohaRule(T, rank=4, init="random"),
    "lokr": LokrRule(T, rank=4, init="random"),
    "miss": MissRule(T, rank=4, init="random"),
    "bat": MissRule(T, rank=4, variant="bat", init="random"),
    "oft": OftRule(T, block_size=4, init="random"),
    "randlora": RandLoraRule(T, rank=4),
    "road": RoadRule(T, group_size=4),
    "shira": ShiraRule(T, rank=1, init="random"),
    "vera": VeraRule(T, rank=4),
}


def pair(backend: QuantisedLinear) -> tuple[Any, Any]:
    """A model with the quantised Linear, and the same with a plain Linear of its dequantised weight."""
    torch.manual_seed(0)
    linear, plain = nn.Linear(64, 32), nn.Linear(64, 32)
    plain.load_state_dict(linear.state_dict())
    try:
        layer = backend.build(linear)
    except ImportError as error:
        pytest.skip(f"needs {backend.package}: {error}")
    packed = packed_weight_of(layer)
    assert packed is not None
    plain.weight.data = packed.dequantise().float()
    return nn.Sequential(layer), nn.Sequential(plain)


def trained(model: Any, x: Tensor, steps: int = 3) -> list[Tensor]:
    """The outputs of some steps of an optimiser, and the adapter's tensors after them."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.05)
    outputs = []
    for _ in range(steps):
        optimiser.zero_grad()
        y = model(x)
        y.square().mean().backward()
        outputs.append(y.detach())
        optimiser.step()
    return [*outputs, *[parameter.detach().clone() for parameter in parameters]]


def assert_same_training(backend: QuantisedLinear, chosen: Rule) -> None:
    model, plain = pair(backend)
    before = Snapshot(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for one in (model, plain):
            torch.manual_seed(1)
            apply_rules(one, [chosen])
    stops = backend.package == "torchao" and not backend.exact
    assert [str(item.message).count("no gradient passes through the kernels of") for item in caught] == [1] * stops
    plain[0].adapters.load_state_dict(model[0].adapters.state_dict())
    torch.manual_seed(2)
    x = torch.randn(16, 64)
    # float32 arithmetic in another order: eps times the square root of the lengths of sums, a few times on the way.
    for actual, expected in zip(trained(model, x), trained(plain, x), strict=True):
        assert (actual - expected).norm() <= max(backend.slack, 1e-5) * expected.norm()
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
    remove(model)
    assert before.differences(model) == []


@pytest.mark.parametrize("name", RULES)
def test_a_rule_trains_as_on_the_dequantised_weight(name: str) -> None:
    assert_same_training(BY_NAME["bitsandbytes Linear4bit nf4, double"], RULES[name])


@pytest.mark.parametrize("name", ["lora", "dora", "boft", "oft"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_a_layout_trains_as_its_dequantised_weight(backend: QuantisedLinear, name: str) -> None:
    if name == "oft" and backend.package == "torchao" and not backend.exact:
        pytest.skip("the kernel has no gradient for its input")
    assert_same_training(backend, RULES[name])


def test_a_plan_names_the_layout() -> None:
    model, _ = pair(BY_NAME["bitsandbytes Linear4bit nf4, double"])
    assert "Linear4bit (nf4, blocks of 64," in str(plan_rules(model, LoraRule("0", rank=4)))


def test_dora_is_the_papers_formula() -> None:
    model, plain = pair(BY_NAME["bitsandbytes Linear4bit nf4"])
    apply_rules(model, LoraRule("0", rank=4, alpha=6, dora=True, init="random"))
    params, weight = model[0].adapters.default, plain[0].weight.detach()
    changed = weight + 1.5 * params.B @ params.A
    start = torch.linalg.vector_norm(changed, dim=1)
    torch.testing.assert_close(params.magnitude, start)
    with torch.no_grad():
        params.magnitude.mul_(torch.linspace(0.5, 2, 32))
    x = torch.randn(3, 64)
    direction = changed / start.detach()[:, None]
    torch.testing.assert_close(model(x), F.linear(x, params.magnitude[:, None] * direction, plain[0].bias))


def test_the_norm_is_computed_again_when_it_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = pair(BY_NAME["bitsandbytes Linear4bit nf4, double"])
    apply_rules(model, LoraRule("0", rank=4, dora=True, init="random"))
    packed, params, x = packed_weight_of(model[0]), model[0].adapters.default, torch.randn(3, 64)
    assert packed is not None
    count, compute = [0], packed_norm._norm

    def counted(*args: Any) -> Tensor:
        count[0] += 1
        return compute(*args)

    monkeypatch.setattr(packed_norm, "_norm", counted)

    def calls() -> int:
        count[0] = 0
        first = model(x).detach()
        assert torch.equal(model(x), first)
        packed_norm._norms.clear()
        assert torch.equal(model(x), first)  # a norm that was kept is the norm computed anew
        return count[0] - 1

    assert calls() == 1
    assert calls() == 0
    for change in (
        lambda: params.A.data.mul_(2),  # which counts no version
        lambda: packed.write(packed.requantise(torch.randn(32, 64))),
        lambda: torch.optim.SGD([params.B], lr=0.1).step(lambda: model(x).sum().backward()),  # type: ignore[arg-type]
        lambda: setattr(model[0].weight, "data", model[0].weight.data.flip(0)),
    ):
        change()
        assert calls() == 1
    with torch.inference_mode():
        assert model(x).shape == (3, 32)


def test_rules_that_edit_the_weight_one_after_the_other() -> None:
    model, plain = pair(BY_NAME["bitsandbytes Linear4bit nf4, double"])
    for one in (model, plain):
        torch.manual_seed(1)
        for place, name in enumerate(("boft", "shira", "dora")):
            apply_rules(one, RULES[name], adapter=f"a{place}")
    plain[0].adapters.load_state_dict(model[0].adapters.state_dict())
    x = torch.randn(5, 64)
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)  # sums of 64 products, three times


def test_an_adapter_moves_to_a_base_that_is_quantised_afterwards(tmp_path: Path) -> None:
    backend = BY_NAME["torchao int8"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32))
    apply_rules(model, LoraRule("0", rank=4, dora=True, init="random"))
    x = torch.randn(3, 64)
    before = model(x).detach()
    backend.build(model[0])  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="can't compute with a quantised weight") as caught:
        model(x)
    assert "save the adapter, remove it, and load it" in str(caught.value.fix)
    save_adapter(model, tmp_path)
    remove(model)
    load_adapter(model, tmp_path)
    assert (model(x) - before).norm() < 2e-2 * before.norm()  # 8 bits a number
