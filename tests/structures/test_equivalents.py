"""A structure matches all equivalent spellings: einsum, addmm and similar, linear layers, written-out softmaxes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from surgery import ANY, Const, Structure, SurgeryError, having, maybe, module_of, one_of, trace

A, B = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
Q, K = torch.randn(2, 3, 4), torch.randn(2, 5, 4)
M, N, C = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
W, BIAS = torch.randn(5, 4), torch.randn(5)
X = torch.randn(2, 3, 4)


def names(nodes: Any) -> list[str]:
    return [str(node) for node in nodes]


def trace_with_shapes(function: Callable[..., Any], *inputs: Tensor) -> fx.GraphModule:
    graph = fx.symbolic_trace(function)
    ShapeProp(graph).propagate(*inputs)
    return graph


def _over(powers: Any) -> Any:
    return powers / torch.sum(powers, dim=(-1,), keepdim=True)


# Families of equivalent functions: each matches all others.
FAMILIES: dict[str, tuple[tuple[Tensor, ...], list[Callable[..., Any]]]] = {
    "product": (
        (A, B),
        [
            lambda a, b: a @ b,
            lambda a, b: torch.bmm(a, b),
            lambda a, b: torch.einsum("bij,bjk->bik", a, b),
            lambda a, b: torch.einsum("bjk,bij->bik", b, a),
            lambda a, b: torch.einsum("xyz,xzw->xyw", a, b),
            lambda a, b: torch.einsum("...ij,...jk->...ik", a, b),
            lambda a, b: torch.einsum("b i j, b j k -> b i k", [a, b]),
        ],
    ),
    "scores": (
        (Q, K),
        [
            lambda q, k: q @ k.mT,
            lambda q, k: torch.matmul(q, k.transpose(-1, -2)),
            lambda q, k: torch.einsum("bid,bjd->bij", q, k),
            lambda q, k: torch.einsum("bjd,bid->bij", k, q),
            lambda q, k: torch.einsum("...qd,...kd->...qk", q, k),
        ],
    ),
    "plain product": (
        (M, N),
        [
            lambda a, b: a @ b,
            lambda a, b: torch.mm(a, mat2=b),
            lambda a, b: torch.einsum("ij,jk->ik", a, b),
            lambda a, b: torch.einsum("ij,jk", a, b),
        ],
    ),
    "with a vector": (
        (M, torch.randn(4)),
        [lambda a, b: a @ b, lambda a, b: torch.mv(a, b), lambda a, b: torch.einsum("ij,j->i", a, b)],
    ),
    "sum with a product": (
        (C, M, N),
        [
            lambda c, a, b: c + a @ b,
            lambda c, a, b: torch.einsum("ij,jk->ik", a, b) + c,
            lambda c, a, b: torch.addmm(c, a, b),
            lambda c, a, b: torch.addmm(c, mat1=a, mat2=b, alpha=1.0),
            lambda c, a, b: c.addmm(a, b, beta=1),
        ],
    ),
    "sum with products": (
        (torch.randn(2, 3, 5), A, B),
        [
            lambda c, a, b: c + torch.bmm(a, b),
            lambda c, a, b: torch.baddbmm(c, a, b),
            lambda c, a, b: torch.baddbmm(input=c, batch1=a, batch2=b, beta=1, alpha=1),
        ],
    ),
    "scaled sum": (
        (torch.randn(2, 3, 5), A, B),
        [
            lambda c, a, b: 0.5 * (a @ b) + c,
            lambda c, a, b: torch.baddbmm(c, a, b, alpha=0.5),
            lambda c, a, b: torch.einsum("bij,bjk->bik", a, b) * 0.5 + c,
        ],
    ),
    "scaled product": (
        (torch.randn(2, 3, 5), A, B),
        [lambda c, a, b: (a @ b) * 0.5 + c * 0.25, lambda c, a, b: torch.baddbmm(c, a, b, beta=0.25, alpha=0.5)],
    ),
    "sum over the batch": (
        (C, A, B),
        [lambda c, a, b: (a @ b).sum(0) + c, lambda c, a, b: torch.addbmm(c, a, b)],
    ),
    "sum with a vector": (
        (torch.randn(3), M, torch.randn(4)),
        [lambda c, a, b: c + a @ b, lambda c, a, b: torch.addmv(c, a, b)],
    ),
    "linear": (
        (X, W, BIAS),
        [
            lambda x, w, b: F.linear(x, w, b),
            lambda x, w, b: x @ w.t() + b,
            lambda x, w, b: b + torch.matmul(x, w.T),
        ],
    ),
    "linear without a bias": ((X, W), [lambda x, w: F.linear(x, w), lambda x, w: x @ w.T, lambda x, w: x @ w.mT]),
    "a flat linear": (
        (M, W, BIAS),
        [
            lambda x, w, b: F.linear(x, w, b),
            lambda x, w, b: torch.addmm(b, x, w.t()),
            lambda x, w, b: torch.einsum("ij,kj->ik", x, w) + b,
        ],
    ),
    "softmax": (
        (X,),
        [
            lambda x: torch.softmax(x, -1),
            lambda x: x.exp() / x.exp().sum(-1, keepdim=True),
            lambda x: _over(torch.exp(x - x.amax(-1, keepdim=True))),
            lambda x: _over(torch.exp(x - torch.max(x, dim=-1, keepdim=True)[0])),
            lambda x: _over(torch.exp(x - torch.max(x, dim=-1, keepdim=True).values)),
            lambda x: _over((x - x.max().detach()).exp()),
            lambda x: torch.exp(x - x.logsumexp(-1, keepdim=True)),
            lambda x: torch.exp(F.log_softmax(x, -1)),
        ],
    ),
}
PAIRS = [
    (family, first, second)
    for family, (_, functions) in FAMILIES.items()
    for first, second in itertools.product(range(len(functions)), repeat=2)
]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_called_the_same_is_the_same(family: str) -> None:
    inputs, functions = FAMILIES[family]
    for function in functions[1:]:
        torch.testing.assert_close(function(*inputs), functions[0](*inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "first", "second"), PAIRS)
def test_each_spelling_is_found_by_each(family: str, first: int, second: int) -> None:
    inputs, functions = FAMILIES[family]
    graph = trace_with_shapes(functions[second], *inputs)
    matches = Structure(functions[first]).find(graph)
    assert len(matches) == 1, matches.reason
    assert matches[0].root is next(node for node in graph.graph.nodes if node.op == "output").args[0]
    bound = matches[0].bindings
    assert names(bound.values()) == list(bound)  # each name is bound to the input with the same name
    computed = {node for node in graph.graph.nodes if node.op not in ("placeholder", "output")}
    assert computed == set(matches[0].nodes)


OTHERS: list[tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = [
    (lambda a, b: a @ b, lambda a, b: torch.einsum("bij,bkj->bik", a, b), (Q, K)),
    (lambda a, b: a @ b, lambda a, b: torch.einsum("bij,bjk->bki", a, b), (A, B)),
    (lambda a, b: a @ b, lambda a, b: torch.einsum("bij,bjk->ik", a, b), (A, B)),
    (lambda a, b: a @ b, lambda a, b: torch.einsum("bij,cjk->bcik", a, b), (A, B)),
    (lambda a, b: a @ b, lambda a, b: torch.einsum("bij,bij->bij", a, b), (A, A)),
    (lambda a, b: a @ b, lambda a, b: torch.einsum("ibj,jbk->ibk", a, b), (torch.randn(3, 2, 4), torch.randn(4, 2, 5))),
    (lambda a, b: a @ b, lambda a, b: torch.einsum("ii,ik->ik", a, b), (torch.randn(4, 4), N)),
    (lambda c, a, b: c + a @ b, lambda c, a, b: torch.addmm(c, a, b, alpha=2), (C, M, N)),
    (lambda c, a, b: c + a @ b, lambda c, a, b: torch.addmm(c, a, b, beta=0), (C, M, N)),
    (lambda x, w: F.linear(x, w), lambda x, w: x @ w.mT, (Q, K)),  # a batch of matrices, which is not a weight
    (lambda x: torch.softmax(x, -1), lambda x: x.exp() / x.exp().sum(0, keepdim=True), (X,)),
    (lambda x: torch.softmax(x, -1), lambda x: x.exp() / x.exp().sum(-1), (torch.randn(4, 4),)),
    (lambda x: torch.softmax(x, -1), lambda x: x.exp() / x.relu().exp().sum(-1, keepdim=True), (X,)),
    (lambda x: torch.softmax(x, -1), lambda x: x.exp() / (x.exp().sum(-1, keepdim=True) + 1e-6), (X,)),
    (lambda x: torch.softmax(x, 1), lambda x: (x - x.logsumexp(-1, True)).exp(), (X,)),
]


@pytest.mark.parametrize("index", range(len(OTHERS)))
def test_what_means_something_else_is_not_found(index: int) -> None:
    pattern, function, inputs = OTHERS[index]
    matches = Structure(pattern).find(trace_with_shapes(function, *inputs))
    assert not matches and matches.reason


def test_a_maximum_of_another_dimension_stays_where_it_is() -> None:
    """Another subtraction is not a part of the softmax: the softmax of the difference matches."""

    def forward(x: Tensor) -> Tensor:
        y = (x - x.amax(0, keepdim=True)).exp()
        return y / y.sum(-1, keepdim=True)

    (occurrence,) = Structure(lambda x: torch.softmax(x, -1)).find(trace_with_shapes(forward, X))
    assert names(occurrence.bindings.values()) == ["sub"] and "amax" not in names(occurrence.nodes)


def test_written_out_attention_as_older_models_write_it() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor, alibi: Tensor) -> Tensor:
        scores = torch.baddbmm(alibi, q, k.transpose(1, 2), beta=1.0, alpha=0.5)
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        weights = F.dropout(weights / weights.sum(-1, keepdim=True), 0.1)
        return torch.einsum("bqk,bkd->bqd", weights, v)

    def attention(q: Any, k: Any, v: Any, mask: Any, scale: Any = Const()) -> Any:
        return torch.softmax(maybe(maybe(q @ k.mT * scale) + mask), -1) @ v

    graph = trace_with_shapes(forward, Q, K, torch.randn(2, 5, 4), torch.randn(2, 3, 5))
    (occurrence,) = Structure(attention).find(graph)
    assert names(occurrence.bindings.values()) == ["q", "k", "v", "alibi", "0.5"]
    assert names(occurrence.passed) == ["dropout"] and str(occurrence.root) == "einsum"
    assert names(occurrence.shared) == []


def test_layers_and_parameters_of_a_module() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.weight = nn.Linear(4, 5), nn.Parameter(torch.randn(5, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.up(x) @ self.weight.t()

    graph = trace(Net(), X)
    linear = Structure(lambda x, w: F.linear(x, w))
    assert names(o.root for o in linear.find(graph)) == ["matmul"]
    linear = Structure(lambda x, w, b: x @ w.mT + b)
    assert names(linear.find(graph)[0].bindings.values()) == ["x", "up.weight", "up.bias"]
    assert len(Structure(lambda x, y: x @ y).find(graph)) == 1  # a layer has no node for its transpose
    both = Structure(lambda x, w, v, b: F.linear(F.linear(x, w, b), v))
    assert names(both.find(graph)[0].nodes) == ["up", "t", "matmul"]
    half = Structure(lambda x, w, b: having(x @ w.mT + b, dtype=torch.float16))
    assert "its dtype is torch.float32" in half.find(graph).reason


# Constants that bind, optional parts, order -------------------------------------------------------------------------


def test_constants_bind() -> None:
    scaled = Structure(lambda x, scale=Const(): torch.softmax(x * scale, Const("dim")))
    for function in (lambda x: torch.softmax(x * 0.5, -1), lambda x: (0.5 * x).softmax(dim=-1)):
        assert scaled.find(fx.symbolic_trace(function))[0].bindings["scale"] == 0.5
        bound = scaled.find(trace_with_shapes(function, X))[0].bindings
        assert list(bound) == ["x", "scale", "dim"] and bound["dim"] in (-1, 2) and type(bound["dim"]) is int
    missed = scaled.find(fx.symbolic_trace(lambda x: torch.softmax(x * x.shape[-1], -1)))
    assert not missed and "Const(scale)" in missed.reason


def test_a_constant_by_its_value() -> None:
    small = Structure(lambda x: torch.layer_norm(x, ANY, ANY, ANY, Const("eps", lambda value: value < 1e-4)))  # type: ignore[arg-type]
    assert small.find(fx.symbolic_trace(nn.Sequential(nn.LayerNorm(4))))[0].bindings["eps"] == 1e-5
    assert not small.find(fx.symbolic_trace(nn.Sequential(nn.LayerNorm(4, eps=1e-3))))
    # A value that the function can't test does not match.
    assert not Structure(lambda x: F.gelu(x, approximate=Const("how", lambda v: v < 1))).find(
        fx.symbolic_trace(lambda x: F.gelu(x))
    )


def test_one_name_is_one_constant() -> None:
    twice = Structure(lambda x: x * Const("a") + x.relu() * Const("a"))
    assert twice.find(fx.symbolic_trace(lambda x: 2 * x + x.relu() * 2))[0].bindings["a"] == 2
    assert "2 at one place and 3 at another" in twice.find(fx.symbolic_trace(lambda x: 2 * x + x.relu() * 3)).reason


def test_optional_operations() -> None:
    def attention(q: Any, k: Any, v: Any, mask: Any, scale: Any = Const()) -> Any:
        scores = q @ k.mT
        scores = maybe(one_of(scores * scale, scores / scale))
        return F.dropout(torch.softmax(maybe(scores + mask), -1)) @ v

    structure = Structure(attention)
    for scale, mask in itertools.product((None, 8), (False, True)):

        def forward(q: Tensor, k: Tensor, v: Tensor, m: Tensor, scale: Any = scale, mask: bool = mask) -> Tensor:
            scores = q @ k.mT
            scores = scores if scale is None else scores / scale
            scores = m + scores if mask else scores
            return F.dropout(torch.softmax(scores, -1), 0.5) @ v

        graph = fx.symbolic_trace(forward, concrete_args={"scale": scale, "mask": mask})
        (occurrence,) = structure.find(graph)
        assert occurrence.bindings.get("scale") == scale and ("mask" in occurrence.bindings) == mask
        assert occurrence.passed == ()  # the pattern names the dropout
    for wrong in (lambda x: maybe(x).relu(), lambda x: maybe(2.0) * x):
        with pytest.raises(SurgeryError, match="maybe"):
            Structure(wrong)


@pytest.mark.parametrize(
    ("pattern", "function"),
    [
        (lambda x, y: torch.maximum(x.relu(), y), lambda x, y: torch.max(y, x.relu())),
        (lambda x, y: torch.minimum(x.relu(), y), lambda x, y: torch.min(y, other=x.relu())),
        (lambda x, y: torch.logical_and(x.relu(), y), lambda x, y: torch.logical_and(y, x.relu())),
        (lambda x, y: x.relu() & y, lambda x, y: torch.bitwise_and(y, x.relu())),
        (lambda x, y: torch.add(x.relu(), y, alpha=1), lambda x, y: y + x.relu()),
        (lambda x, y: torch.add(x.relu(), y, alpha=Const("a")), lambda x, y: torch.add(x.relu(), y, alpha=3)),
        (lambda x, y: x.relu() - y, lambda x, y: torch.rsub(y, x.relu())),
    ],
)
def test_operands_in_either_order(pattern: Any, function: Any) -> None:
    (occurrence,) = Structure(pattern).find(fx.symbolic_trace(function))
    assert names(occurrence.bindings.values())[:2] == ["x", "y"]


def test_order_counts_where_it_means_something() -> None:
    assert not Structure(lambda x, y: x.relu() - y).find(fx.symbolic_trace(lambda x, y: torch.rsub(x.relu(), y)))
    scaled = Structure(lambda x, y: torch.add(x.relu(), y, alpha=2))
    assert not scaled.find(fx.symbolic_trace(lambda x, y: torch.add(y, x.relu(), alpha=2)))


# Exact classes ------------------------------------------------------------------------------------------------------


class NormAct(nn.BatchNorm2d):
    """A norm followed by an activation, like timm's BatchNormAct2d."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


def test_a_subclass_is_another_class() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    graph = trace(net, torch.randn(1, 3, 2, 2))
    for kind in (nn.BatchNorm2d, "BatchNorm2d"):
        assert [o.root.target for o in Structure(_norm(kind)).find(graph)] == ["3"]
        assert len(Structure(_norm(kind, subclasses=True)).find(graph)) == 2
    only = trace(nn.Sequential(nn.Conv2d(3, 4, 1), NormAct(4)), torch.randn(1, 3, 2, 2))
    reason = Structure(_norm(nn.BatchNorm2d)).find(only).reason
    assert "is a NormAct, a subclass of BatchNorm2d: module_of(BatchNorm2d, …, subclasses=True)" in reason
    exact = Structure(lambda x: having(module_of("Module", x, subclasses=True), type=nn.BatchNorm2d, subclasses=False))
    assert len(exact.find(graph)) == 1


def _norm(kind: Any, **options: bool) -> Callable[[Any], Any]:
    return lambda x: module_of(kind, x, **options)


def test_a_layer_with_a_live_adapter_is_of_its_own_class() -> None:
    from surgery import apply_rules
    from surgery.rules import LoraRule

    net = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), LoraRule("0", rank=2))
    linear = Structure(lambda x: module_of(nn.Linear, x))
    assert len(linear.find(trace(net, torch.randn(2, 4)))) == 1
