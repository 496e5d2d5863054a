"""Rules that look into a forward: their edits apply to every kind of call, and removing them leaves no trace."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import surgery.tracing.traced_forward
from surgery import (
    PlanError,
    Rule,
    SiteError,
    Structure,
    SurgeryError,
    TraceError,
    apply_rules,
    draw,
    merge,
    remove,
    rule,
    show,
    summary,
    trace,
)
from surgery.rules import LoraRule
from surgery.testing import Snapshot, assert_reversible
from tests.support.tower import (
    MASK,
    RULES,
    Attention,
    Mlp,
    SwishOnceRule,
    SwishRule,
    TemperRule,
    Tower,
    X,
    plainly,
    tempered,
)


class Cache:
    """Joins the tensors of all calls so far, like a key cache."""

    def __init__(self) -> None:
        self.joined: Tensor | None = None
        self.calls = 0

    def add(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.joined = x if self.joined is None else torch.cat([self.joined, x], 1)
        return self.joined


def head(tower: nn.Module) -> Any:
    return tower.get_submodule("blocks.0")


def test_every_kind_of_call_is_edited() -> None:
    tower = Tower()
    tempered(apply_rules(tower, RULES, example_inputs=X))
    long = torch.randn(3, 9, 8)
    for training in (False, True):
        tower.train(training)
        for x, mask in ((X, None), (X, MASK), (long, None), (X, MASK), (X[:1], None)):
            expected = x
            for block in tower.blocks:
                expected = plainly(block, expected, mask)  # type: ignore[arg-type]
            torch.testing.assert_close(tower(x, mask), expected, rtol=1e-5, atol=1e-6)
    tower(X).sum().backward()
    assert all(p.grad is not None for name, p in tower.named_parameters() if "adapters" in name)


def test_everything_comes_back() -> None:
    assert_reversible(Tower(), RULES, example_inputs=X)


def test_beside_other_rules_in_any_order() -> None:
    tower = Tower().eval()
    before, snapshot = tower(X), Snapshot(tower)
    apply_rules(tower, [LoraRule(["qkv", "up"], rank=2), TemperRule(Attention)], adapter="a", example_inputs=X)
    apply_rules(tower, [TemperRule(Attention), SwishRule(Mlp)], adapter="b", example_inputs=X)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if name.endswith("temper"):
                parameter.fill_(1.5 if ".a." in name else 0.5)
    attention: Any = head(tower).attention
    twice = Attention.forward(attention, X, temper=0.75)
    torch.testing.assert_close(attention(X), twice, rtol=1e-5, atol=1e-6)
    with pytest.raises(SurgeryError, match="closed form|merged"):
        merge(tower)
    remove(tower, "a")
    once = Attention.forward(attention, X, temper=0.5)
    torch.testing.assert_close(attention(X), once, rtol=1e-5, atol=1e-6)
    remove(tower)
    assert snapshot.differences(tower) == [] and torch.equal(tower(X), before)


def test_alike_modules_share_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    tracing = surgery.tracing.traced_forward
    seen: list[str] = []
    trace = tracing.traced

    def counted(module: nn.Module, *args: Any) -> Any:
        seen.append(type(module).__name__)
        return trace(module, *args)

    monkeypatch.setattr(tracing, "traced", counted)
    tracing._known.clear()
    tower = Tower(32)
    apply_rules(tower, TemperRule(Attention), example_inputs=X)
    assert seen == ["Attention"] * 4  # evaluation and training, with and without gradients
    tower.eval()(X)
    tower(X, MASK)
    assert len(seen) == 5  # with a mask
    sites: list[Any] = [block.attention.__dict__["_surgery_site"] for block in tower.blocks]
    assert len({id(form.run) for site in sites for form in site.variants}) <= 3


def test_copies_and_pickles_go_on() -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    expected = tower(X)
    stored = io.BytesIO()
    torch.save(tower, stored)
    stored.seek(0)
    for other in (copy.deepcopy(tower), torch.load(stored, weights_only=False)):
        assert torch.equal(other(X), expected) and torch.equal(other(X, MASK), tower(X, MASK))
        assert summary(other).rows == summary(tower).rows
        remove(other)
        assert not any("adapters" in name for name in other.state_dict())


def test_dtypes_autocast_and_inference_mode() -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    with torch.inference_mode():
        first = tower(X, MASK)
    torch.testing.assert_close(first, tower(X, MASK))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(tower(X).float(), tower.float()(X).float(), rtol=0.1, atol=0.1)
    double = copy.deepcopy(tower).double()
    torch.testing.assert_close(double(X.double()).float(), tower(X), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_may_meet_a_new_kind_of_call(reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    tower = tempered(apply_rules(Tower(drop=0.2), RULES, example_inputs=X)).train()
    x = X.clone().requires_grad_()
    torch.manual_seed(0)
    out = checkpoint(head(tower), x, MASK, use_reentrant=reentrant)
    out.sum().backward()
    gradient = head(tower).attention.adapters.default.temper.grad.clone()
    tower.zero_grad()
    torch.manual_seed(0)
    again = head(tower)(X, MASK)
    again.sum().backward()
    assert torch.equal(out, again)
    torch.testing.assert_close(gradient, head(tower).attention.adapters.default.temper.grad)


def test_a_new_kind_of_call_leaves_no_trace() -> None:
    tower = apply_rules(Tower(drop=0.5), RULES, example_inputs=X).train()
    torch.manual_seed(3)
    first = tower(X, MASK)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    assert torch.equal(tower(X, MASK), first) and torch.equal(torch.get_rng_state(), state)
    cache = Cache()
    head(tower).attention(X, None, cache)
    assert cache.calls == 1  # the forward writes to an argument once, although it is traced


def test_compile_and_export() -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    expected = tower(X)
    compiled = torch.compile(tower, fullgraph=True, backend="eager")
    assert torch.equal(compiled(X), expected)
    dims = ({0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=6)}, None)
    program = torch.export.export(tower, (X, None), dynamic_shapes=dims, strict=True)
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(program.module()(x, None), tower(x))


def test_threads_may_meet_a_kind_of_call_at_once() -> None:
    tower = tempered(apply_rules(Tower(), RULES, example_inputs=X)).eval()
    inputs = [torch.randn(2, n, 8) for n in (3, 4, 5, 8)]
    outputs: dict[int, Tensor] = {}

    def work(index: int) -> None:
        with torch.no_grad():
            outputs[index] = tower(inputs[index])

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, x in enumerate(inputs):
        torch.testing.assert_close(outputs[index], tower(x))


def test_a_graph_module_of_the_user() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(F.gelu(self.up(x)))

    model = fx.symbolic_trace(Net())
    before = model(X)
    apply_rules(model, [SwishRule(""), LoraRule("up", rank=2)], example_inputs=X)
    up = model.get_submodule("up")(X)
    torch.testing.assert_close(model(X), model.get_submodule("down")(up * torch.sigmoid(1.702 * up)))
    remove(model)
    assert torch.equal(model(X), before)


def test_show_and_draw_tell_what_runs() -> None:
    tower = apply_rules(Tower(), RULES, example_inputs=X)
    code = show(tower, "blocks.0.attention")
    assert "softmax" in code and "# TemperRule [default]" in code and "masked_fill" not in code
    tower(X, MASK)
    assert "masked_fill" in show(tower, "blocks.0.attention")
    assert "temper" in draw(tower, "blocks.0.attention")


# Refusals -----------------------------------------------------------------------------------------------------


def test_an_example_is_asked_for() -> None:
    tower = Tower()
    snapshot = Snapshot(tower)
    with pytest.raises(PlanError, match="needs example_inputs"):
        apply_rules(tower, TemperRule(Attention))
    with pytest.raises(PlanError, match="nothing to do"):
        apply_rules(tower, TemperRule(Mlp), example_inputs=X)
    assert snapshot.differences(tower) == []


def test_what_can_t_be_a_graph_is_refused() -> None:
    class Picky(Attention):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    model = nn.Sequential(Picky())
    with pytest.raises(PlanError, match="content of a tensor"):
        apply_rules(model, TemperRule("0"), example_inputs=X)


def test_a_call_without_what_the_rule_edits_is_an_error() -> None:
    class Sometimes(Mlp):
        def forward(self, x: Tensor, scale: float = 1.0, linear: bool = False) -> Tensor:
            return self.down(self.up(x)) if linear else super().forward(x, scale)

    model = Sometimes()
    apply_rules(model, SwishRule(Sometimes), example_inputs=X)
    model(X, 2.0)
    with pytest.raises(SiteError, match="does not find in this call|changes nothing"):
        model(X, linear=True)


def test_too_many_ways_to_decide_are_an_error() -> None:
    class Rolling(Mlp):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            for _ in range(x.shape[1]):
                x = F.gelu(x)
            return x

    model = Rolling()
    apply_rules(model, SwishOnceRule(Rolling), example_inputs=X)
    with pytest.raises(TraceError, match="more than 32 ways"):
        for length in range(1, 40):
            model(torch.randn(1, length, 8))


def test_a_late_decision_is_told() -> None:
    class Late(Mlp):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            joined = cache.add(F.gelu(x))
            return joined + 1.0 if joined.shape[1] > 6 else joined

    model = Late()
    apply_rules(model, SwishOnceRule(Late), example_inputs=(X, Cache()))
    cache = Cache()
    model(X, cache)
    with pytest.raises(TraceError, match="when it has written"):
        model(X, cache)


@rule("test-inside-body")
class BodyRule(Rule):
    """A rule whose rewrite is a function."""

    body: Any = None

    def rewrite(self, site: Any) -> Any:
        return self.body(site)


class Guarded(nn.Module):
    """Operations under a region of the forward's own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = torch.softmax(x * 2.0, 1)
        with torch.autocast("cpu", enabled=False):
            low = F.relu(x)
        return self.lin(x) * gate + low


def test_operations_under_a_region_of_the_forward_are_found() -> None:
    graph = trace(Guarded(), torch.randn(2, 3))
    assert len(Structure(lambda x: torch.softmax(x * 2.0, -1)).find(graph)) == 1

    def body(site: Any) -> None:
        for match in site.find(Structure(lambda x: torch.softmax(x * 2.0, -1))):
            site.replace(match.root, torch.sigmoid(match.bindings["x"]))
        for match in site.find(Structure(lambda x: F.relu(x))):
            site.replace(match.root, F.gelu(match.bindings["x"]))

    torch.manual_seed(0)
    model, x = Guarded(), torch.randn(2, 3, requires_grad=True)
    apply_rules(model, BodyRule(Guarded, body=body), example_inputs=x)
    expected = model.lin(x) * torch.sigmoid(x).detach() + F.gelu(x)
    assert torch.equal(model(x), expected)
    gradient, expected_gradient = (torch.autograd.grad(y.sum(), x)[0] for y in (model(x), expected))
    assert torch.allclose(gradient, expected_gradient)  # sums in another order
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), model.lin(x) * torch.sigmoid(x) + F.gelu(x))
