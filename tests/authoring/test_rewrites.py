"""A rewrite computes what the same Python computes in a handwritten forward."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import PlanError, Rule, Site, Structure, SurgeryError, apply_rules, remove, rule
from surgery.testing import Snapshot


@rule("test-program")
class Program(Rule):
    """A rule whose rewrite is a function."""

    body: Any = None

    def rewrite(self, site: Site) -> Any:
        return self.body(site)


def apply_program(model: nn.Module, kind: Any, body: Callable[[Site], Any], *inputs: Any, **settings: Any) -> nn.Module:
    apply_rules(model, Program(kind, body=body, **settings), example_inputs=inputs or None)
    return model


# Factories --------------------------------------------------------------------------------------------------------

FACTORIES: dict[str, Callable[[Any], Any]] = {
    "arange": lambda h: h + torch.arange(h.shape[1]),
    "arange, from": lambda h: h + torch.arange(1, h.shape[1] + 1, device=h.device),
    "zeros": lambda h: h + torch.zeros(h.shape[1]),
    "zeros, device": lambda h: h + torch.zeros(3, device=h.device),
    "full": lambda h: h + torch.full((1, h.shape[1]), 2.0),
    "eye": lambda h: h @ torch.eye(h.shape[1]),
    "eye, plain": lambda h: h @ torch.eye(3),
    "linspace": lambda h: h * torch.linspace(0, 1, h.shape[1]),
    "tril_indices": lambda h: h + torch.tril_indices(h.shape[1], h.shape[1]).sum(),
    "tensor": lambda h: h + torch.tensor([1.0, 2.0, 3.0]),
    "scalar": lambda h: h + torch.tensor(h.shape[0]),
    "ones": lambda h: torch.ones(3) - h,
    "mask": lambda h: h.masked_fill(torch.ones(3, 3).tril()[1] == 0, 0.0),
    "unpacked": lambda h: _unpack(h),
    "topk": lambda h: _topk(h),
    "written": lambda h: h * _write_mask(),
    "len": lambda h: h * h.size(1),
    "new": lambda h: h + h.new_ones(h.shape[1]),
    "chunks": lambda h: _chunks(h),
    "star": lambda h: h.reshape(*h.shape[:-1], 3, 1).squeeze(-1),
    "loop": lambda h: torch.stack([h[:, i] * i for i in range(h.shape[1])], 1),
    "in": lambda h: h + (2.0 if h.dim() == 2 else 3.0),
}


def _unpack(h: Any) -> Any:
    b, d = h.shape
    return h.reshape(b * d).view(b, d) / d


def _topk(h: Any) -> Any:
    top, index = h.topk(2, -1)
    return torch.zeros_like(h).scatter(-1, index, top)


def _write_mask() -> Any:
    mask = torch.ones(3)
    mask[1] = 0.5
    mask[2:].mul_(4)
    return mask


def _chunks(h: Any) -> Any:
    a, b, c = h.chunk(3, -1)
    return torch.cat([c, b, a], -1)


@pytest.mark.parametrize("name", FACTORIES)
def test_all_of_python_that_torch_fx_traces(name: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    wanted = FACTORIES[name](linear(x))
    apply_program(linear, nn.Linear, lambda site: FACTORIES[name](site.output), x)
    assert torch.equal(linear(x), wanted)


# Order ------------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.m = nn.Buffer(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x * 1.0


def test_effects_come_in_the_order_written() -> None:
    def body(site: Site) -> Tensor:
        m = site.tensor("m")
        d = site.output - m
        m.add_(1.0)
        return d

    model = apply_program(Counting(), Counting, body)
    assert [model(torch.zeros(2))[0].item() for _ in range(3)] == [0.0, -1.0, -2.0]


def test_what_is_read_before_the_output_is_read_before_the_call() -> None:
    def body(site: Site) -> Tensor:
        keep = site.input.clone()
        return site.output + keep

    relu = apply_program(nn.ReLU(inplace=True), nn.ReLU, body)
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(relu(x.clone()), x.relu() + x)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        z = F.relu(y)
        y.add_(1)
        return y + z


class Before(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        y.add_(1)
        z = F.relu(y)
        y.mul_(2)
        return y + z


class Relu_(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        F.relu_(y)
        return y * 2


class Inplace(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        y = self.l(x)
        F.relu(y, inplace=True)
        return y * 2


RELU = Structure(lambda x: F.relu(x))


def _gelus(site: Site) -> None:
    for match in site.find(RELU):
        site.replace(match.root, F.gelu(match.bindings["x"]))


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (InPlace, lambda y: (y + 1) + F.gelu(y)),
        (Before, lambda y: (y + 1) * 2 + F.gelu(y + 1)),
        (Relu_, lambda y: F.gelu(y) * 2),
        (Inplace, lambda y: F.gelu(y) * 2),
    ],
)
def test_a_replacement_is_computed_where_the_operation_stood(kind: Any, wanted: Any) -> None:
    torch.manual_seed(0)
    model, x = kind(), torch.randn(2, 3)
    snapshot = Snapshot(model)
    want = wanted(model.l(x))
    before = model(x)
    apply_program(model, kind, _gelus, x)
    assert torch.equal(model(x), want) and torch.equal(model.train()(x), want)
    remove(model)
    assert torch.equal(model(x), before)
    assert not snapshot.differences(model)


# Matches that touch -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.a(x)
        return h + self.b(h)


ADD = Structure(lambda x, y: x + y)
SIGMOID = Structure(lambda x: torch.sigmoid(x))


class Thrice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(torch.sigmoid(torch.sigmoid(x)))


@pytest.mark.parametrize("backwards", [False, True])
def test_matches_that_touch_follow_each_other(backwards: bool) -> None:
    torch.manual_seed(0)

    def halved(site: Site) -> None:
        for match in list(site.find(ADD))[:: -1 if backwards else 1]:
            site.replace(match.root, match.bindings["x"] + 0.5 * match.bindings["y"])

    def exp(site: Site) -> None:
        for match in list(site.find(SIGMOID))[:: -1 if backwards else 1]:
            site.replace(match.root, torch.exp(match.bindings["x"]))

    block, x = Block(), torch.randn(2, 3)
    h = x + 0.5 * block.a(x)
    want = h + 0.5 * block.b(h)
    assert torch.equal(apply_program(block, Block, halved, x)(x), want)
    assert torch.equal(apply_program(Thrice(), Thrice, exp, x)(x), x.exp().exp().exp())


# Effects and randomness --------------------------------------------------------------------------------------------


def _in_regions(site: Site) -> Tensor:
    with torch.no_grad():
        frozen = site.input * 3.0
    with torch.autocast("cpu", torch.bfloat16):
        low = site.input @ site.input.mT
    with torch.enable_grad():
        return site.output + frozen + low.float().sum() + site.input * 5.0


def test_regions_hold() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    apply_program(model, nn.Linear, _in_regions)
    x = torch.randn(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        low = x @ x.mT
    want = F.linear(x, model.weight, model.bias) + (x * 3.0).detach() + low.float().sum() + x * 5.0
    assert torch.equal(model(x), want)
    gradient, wanted = (torch.autograd.grad(y.sum(), x)[0] for y in (model(x), want))
    assert torch.allclose(gradient, wanted)  # the order of the sums differs
    with torch.no_grad():
        assert model(x).requires_grad
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again(x), model(x))


def test_hooks_are_registered() -> None:
    def body(site: Site) -> Tensor:
        y = site.output * 1.0
        y.register_hook(_doubled)
        return y

    model = nn.Linear(3, 3)
    apply_program(model, nn.Linear, body)
    x = torch.randn(2, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(x).sum(), x)
    assert torch.allclose(gradient, 2 * model.weight.sum(0).expand(2, 3))


def _doubled(grad: Tensor) -> Tensor:
    return grad * 2


def test_index_assignment_and_in_place_operators() -> None:
    def body(site: Site) -> Tensor:
        y = site.output.clone()
        y[:, 0] = 7.0
        y += 1
        y[:, 1:] *= 2.0
        return y

    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    want = model(x).detach().clone()
    want[:, 0] = 7.0
    want += 1
    want[:, 1:] *= 2.0
    assert torch.equal(apply_program(model, nn.Linear, body)(x), want)


def test_planning_draws_nothing_and_calls_do() -> None:
    def body(site: Site) -> Tensor:
        noise = torch.rand(3)
        return site.output + noise + torch.rand_like(site.output)

    torch.manual_seed(0)
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    base, state = model(x), torch.random.get_rng_state()
    apply_program(model, nn.Linear, body)
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(1)
    output = model(x)
    torch.manual_seed(1)
    rand = torch.rand(3)
    assert torch.equal(output, base + rand + torch.rand_like(base))


# Decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda site: site.output if site.output.sum() > 0 else site.input, "can't branch on a value"),
        (lambda site: sum(row for row in site.output), "can't iterate over a value"),
        (lambda site: site.output * float(site.output.sum()), "can't turn a value into a Python number"),
    ],
)
def test_refusals_name_the_line_of_the_user(body: Any, message: str) -> None:
    linear = nn.Linear(3, 3)
    snapshot = Snapshot(linear)
    with pytest.raises(PlanError) as caught:
        apply_program(linear, nn.Linear, body)
    assert (
        message in str(caught.value) and "test_rewrites.py:" in str(caught.value) and "lambda site" in str(caught.value)
    )
    assert not snapshot.differences(linear)


def test_a_decision_on_a_size_without_an_example_asks_for_one() -> None:
    with pytest.raises(PlanError, match="pass example_inputs, in which sizes are known"):
        apply_program(nn.Linear(3, 3), nn.Linear, lambda site: site.output if site.input.shape[0] > 1 else site.input)


def test_values_of_another_site_are_refused() -> None:
    first: list[Any] = []

    def body(site: Site) -> Any:
        first.append(site.output)
        return site.output + first[0]

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    snapshot = Snapshot(model)
    with pytest.raises(PlanError, match="a rewrite uses a value of another rewrite") as caught:
        apply_program(model, nn.Linear, body)
    assert "where: 1" in str(caught.value) and "test_rewrites.py:" in str(caught.value)
    assert not snapshot.differences(model)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 1


def test_failures_at_the_call_say_what_is_probably_wrong() -> None:
    def mixed(site: Site) -> Any:
        return site.output + F.linear(site.input, site.param("w", (3, 3)))

    half, x = nn.Linear(3, 3).bfloat16(), torch.ones(2, 3)
    with pytest.raises(SurgeryError, match=r"fix: .* torch.float32, the module's are not: .* x\.to\(A\.dtype\)"):
        apply_program(half, nn.Linear, mixed, x.bfloat16())
    apply_program(half, nn.Linear, mixed)
    with pytest.raises(RuntimeError) as caught:
        half(x.bfloat16())
    assert [note.partition(":")[0] for note in caught.value.__notes__] == [
        "at the site (the model itself), a Linear rewritten by Program [default]",
        "hint",
    ]
    with pytest.raises(SurgeryError, match="fix: .*site.hidden is the one in it"):
        apply_program(nn.Sequential(Pair()), Pair, lambda site: site.output + site.input, x)


def test_a_decision_on_a_size_is_checked_at_each_call() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    apply_program(linear, nn.Linear, FACTORIES_ON["rows"], x)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias) * 2)
    with pytest.raises(
        Exception, match="a rewrite depends on a size or number that is 2 in the example and 5 in this call"
    ):
        linear(torch.randn(5, 3))
    block = Block()
    apply_program(block, Block, lambda site: _by_rows(site), x)
    for rows in (2, 5, 3):
        x = torch.randn(rows, 3)
        h = x + block.a(x)
        assert torch.equal(block(x), (h + block.b(h)) * rows)


def _by_rows(site: Site) -> Any:
    site.find(ADD)
    return site.output * int(site.input.shape[0])


FACTORIES_ON: dict[str, Callable[[Site], Any]] = {"rows": lambda site: site.output * int(site.input.shape[0])}


TWICE = Structure(lambda x: torch.sigmoid(torch.sigmoid(x)))


def test_matches_that_overlap_are_refused() -> None:
    def body(site: Site) -> None:
        for match in site.find(TWICE):
            site.replace(match.root, torch.exp(match.bindings["x"]))

    with pytest.raises(PlanError, match="matches that overlap"):
        apply_program(Thrice(), Thrice, body, torch.ones(2))

    def first(site: Site) -> None:
        match = site.find(TWICE)[0]
        site.replace(match.root, torch.exp(match.bindings["x"]))

    x = torch.randn(3)
    assert torch.equal(apply_program(Thrice(), Thrice, first, x)(x), torch.sigmoid(x.exp()))


def _by_mode(site: Site) -> Any:
    if site.training:
        return site.output * site.param("up", (1,), 2.0)
    return site.output - site.param("down", (1,), 3.0)


def test_a_rewrite_may_go_by_the_mode() -> None:
    torch.manual_seed(0)
    for kind in (nn.Linear(3, 3), Optional(), Block()):
        x = torch.randn(2, 3)
        base = kind(x).detach()
        model = apply_program(kind, type(kind), _by_mode)
        for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(each.train()(x), base * 2.0) and torch.equal(each.eval()(x), base - 3.0)
        assert sorted(n.rpartition(".")[2] for n, _ in model.named_parameters() if "adapters" in n) == ["down", "up"]
    block, x = Block(), torch.randn(2, 3)
    base = block(x).detach()
    apply_program(block, Block, _inside_by_mode, x)
    assert torch.equal(block.train()(x), base * 2.0) and torch.equal(block.eval()(x), base)


def test_names_that_are_too_few_are_an_error_of_the_call() -> None:
    model = apply_program(nn.Linear(3, 3), nn.Linear, _unpacked_rows)
    assert model(torch.randn(2, 3)).shape == (2, 3)
    with pytest.raises(ValueError, match="unpacks 2 values, and there are 3"):
        model(torch.randn(2, 4, 3))
    with pytest.raises(PlanError, match="can't take the length"):  # chunk may return fewer chunks than requested
        apply_program(nn.Linear(3, 3), nn.Linear, lambda site: site.output * len(site.output.chunk(2, -1)))


def _unpacked_rows(site: Site) -> Any:
    rows, columns = site.output.shape
    return site.output * rows / rows * columns / columns


def test_what_is_not_recorded_is_refused() -> None:
    with pytest.raises(PlanError, match="seeds"):
        apply_program(nn.Linear(3, 3), nn.Linear, lambda site: (torch.manual_seed(123456), site.output)[1])
    with pytest.raises(PlanError, match="block whose setting can't be recorded"):
        apply_program(nn.Linear(3, 3), nn.Linear, _with_kernel)


def _with_kernel(site: Site) -> Any:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return F.scaled_dot_product_attention(site.output, site.output, site.output)


def _inside_by_mode(site: Site) -> Any:
    site.find(ADD)
    return site.output * 2.0 if site.training else site.output * 1.0


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.a(x) * scale if scale > 0 else x
