"""Submodules of an adapter (`Site.submodule`), compared with a forward that calls the same module by hand."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery import (
    Rule,
    Site,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    load_adapter,
    plan_rules,
    remove,
    rule,
    rules_from_json,
    rules_to_json,
    save_adapter,
)
from surgery.testing import Snapshot, assert_reversible
from tests.support.foreign import Experts, Host, Normal

X = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))


@rule("test-submodule")
class BesideRule(Rule):
    """Adds a block's output to the module's output, with an optional gate."""

    size: int = 6
    gated: bool = True

    def rewrite(self, site: Site) -> Tensor:
        width = site.out_features
        make = lambda: nn.Sequential(nn.Linear(width, self.size), nn.GELU(), nn.Linear(self.size, width))  # noqa: E731
        block = site.submodule("block", make)
        if not self.gated:
            return site.output + block(site.output)
        gate = site.submodule("gate", lambda: nn.Linear(width, 1))
        return site.output + gate(site.input).sigmoid() * block(site.output)


@rule("test-submodule-twice")
class TwiceRule(Rule):
    """Calls one submodule twice, one that is a copy, and one that writes a buffer."""

    def rewrite(self, site: Site) -> Tensor:
        mixed, normal = site.submodule("mixed", lambda: Experts(4)), site.submodule("normal", lambda: Normal(4))
        fixed = site.submodule("fixed", FIXED, trainable=False)
        return normal(mixed(site.output) + mixed(site.input)) + fixed(site.output)


@rule("test-submodule-pair")
class PairRule(Rule):
    """A module with several inputs and outputs."""

    def rewrite(self, site: Site) -> Tensor:
        cell = site.submodule("cell", lambda: nn.LSTM(4, 4, batch_first=True))
        return cell(site.output)[0] + site.output


FIXED = nn.Linear(4, 4)


def host() -> Any:
    torch.manual_seed(0)
    return Host(nn.Linear(4, 4))


def block(model: Any) -> nn.Sequential:
    module = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    box = model.inner.adapters.default
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(getattr(box, "block_" + name.replace(".", "_")))
    return module


def by_hand(model: Any, x: Tensor) -> Tensor:
    box = model.inner.adapters.default
    h = torch.tanh(model.first(x))
    output = nn.functional.linear(h, model.inner.weight, model.inner.bias)
    gate = nn.functional.linear(h, box.gate_weight, box.gate_bias).sigmoid()
    inside = nn.functional.gelu(nn.functional.linear(output, box.block_0_weight, box.block_0_bias))
    return model.last(output + gate * nn.functional.linear(inside, box.block_2_weight, box.block_2_bias))


def test_it_is_called_as_written() -> None:
    model = apply_rules(host(), BesideRule("inner"))
    names = ["block_0_weight", "block_0_bias", "block_2_weight", "block_2_bias", "gate_weight", "gate_bias"]
    assert list(adapter_state_dict(model)) == [f"inner.adapters.{name}" for name in names]
    for x in (X, torch.randn(2, 4)):
        assert torch.equal(model(x), by_hand(model, x))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 6
    gradients = torch.autograd.grad(model(X).square().sum(), trained)
    wanted = torch.autograd.grad(by_hand(model, X).square().sum(), trained)
    assert all(torch.equal(grad, want) for grad, want in zip(gradients, wanted, strict=True))


def test_planning_draws_no_numbers_and_it_starts_as_torch_makes_it() -> None:
    model = host()
    torch.manual_seed(3)
    state = torch.get_rng_state()
    assert plan_rules(model, BesideRule("inner", gated=False))
    assert torch.equal(torch.get_rng_state(), state)
    apply_rules(model, BesideRule("inner", gated=False))
    torch.manual_seed(3)
    expected = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
    assert all(torch.equal(p, q) for p, q in zip(expected.parameters(), block(model).parameters(), strict=True))


@pytest.mark.parametrize("make", [BesideRule, TwiceRule, PairRule])
def test_it_goes_and_is_copied_written_and_exported(make: Any, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model, before = host(), Snapshot(plain := host())
    assert_reversible(model, [make("inner")], example_inputs=X)
    assert rules_from_json(rules_to_json([make("inner")])) == [make("inner")]
    apply_rules(model, make("inner"))
    model(X)
    wanted = model.eval()(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(X), wanted) and torch.equal(remove(other)(X), host()(X))
    save_adapter(model, tmp_path)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain.eval()(X), wanted)
    remove(plain.train())
    assert not before.differences(plain)
    for strict in (True, False):
        assert torch.equal(torch.export.export(model, (X,), strict=strict).module()(X), wanted)
    if make is BesideRule:
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(X), wanted) and torch.equal(compiled.train()(X), wanted)


def test_one_module_may_be_called_twice_and_written_to() -> None:
    model = apply_rules(host(), TwiceRule("inner"))
    box = model.inner.adapters.default
    mixed, normal = Experts(4), Normal(4)
    with torch.no_grad():
        for prefix, submodule in (("mixed", mixed), ("normal", normal)):
            for name, tensor in submodule.state_dict().items():
                tensor.copy_(getattr(box, f"{prefix}_{name}".replace(".", "_")))
    for training in (True, True, False):
        model.train(training)
        normal.train(training)
        h = torch.tanh(model.first(X))
        output = nn.functional.linear(h, model.inner.weight, model.inner.bias)
        wanted = model.last(normal(mixed(output) + mixed(h)) + FIXED(output))
        assert torch.equal(model(X), wanted)
    assert torch.equal(box.normal_mean, normal.mean) and bool(box.normal_norm_num_batches_tracked == 2)
    assert not box.fixed_weight.requires_grad and box.mixed_gate_weight.requires_grad


def test_it_computes_in_its_own_dtype() -> None:
    model = apply_rules(host().bfloat16(), BesideRule("inner"))
    assert all(tensor.dtype is torch.float32 for tensor in adapter_state_dict(model).values())
    x = X.bfloat16()
    h = torch.tanh(model.first(x))
    output = nn.functional.linear(h, model.inner.weight, model.inner.bias)
    box = model.inner.adapters.default
    gate = nn.functional.linear(h.float(), box.gate_weight, box.gate_bias).bfloat16().sigmoid()
    assert torch.equal(model(x), model.last(output + gate * block(model)(output.float()).bfloat16()))


def test_sites_share_their_code() -> None:
    model: Any = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    apply_rules(model, BesideRule(nn.Linear))
    assert len({type(module) for module in model}) == 1
    assert not torch.equal(model[0].adapters.default.gate_weight, model[1].adapters.default.gate_weight)


@rule("test-submodule-wrong")
class WrongRule(Rule):
    def rewrite(self, site: Site) -> Tensor:
        return site.submodule("x", lambda: torch.ones(3))(site.output)  # type: ignore[arg-type, return-value]


def test_what_is_not_a_module_is_refused() -> None:
    with pytest.raises(SurgeryError, match="returns a Tensor"):
        apply_rules(host(), WrongRule("inner"))


def test_it_is_merged_by_none_and_switched_as_others() -> None:
    model = apply_rules(host(), BesideRule("inner"))
    wanted = model(X)
    surgery.rename_adapter(model, "default", "new")
    surgery.copy_adapter(model, "new", "other")
    for name in ("new", "other"):
        assert torch.equal(surgery.activate(model, name)(X), wanted)
    surgery.deactivate(model)
    assert torch.equal(model(X), host()(X))
