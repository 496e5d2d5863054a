"""A structure is found with its names bound; a structure that is not in the graph is reported with its nearest miss."""

from __future__ import annotations

import operator
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import networkx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.proxy import GraphAppendingTracer

from surgery import ANY, Structure, SurgeryError, as_digraph, graph_of, having, module_of, one_of, trace
from surgery.testing import Snapshot
from surgery.transaction.object_contents import copied
from tests.benchmarks.patterns import attention_graph, pattern
from tests.support.families import FAMILIES


def attention(q: Any, k: Any, v: Any, mask: Any, bias: Any) -> Any:
    scores = q @ k.mT
    scores = one_of(scores * ANY, scores / ANY, scores)
    scores = one_of(scores + bias + mask, scores + mask, scores)
    return torch.softmax(scores, -1) @ v


ATTENTION = Structure(attention)


def trace_function(function: Callable[..., Any]) -> fx.GraphModule:
    return fx.symbolic_trace(function)


def names(nodes: Any) -> list[str]:
    return [str(node) for node in nodes]


# Spellings ------------------------------------------------------------------------------------------------------

SOFTMAX = Structure(lambda x: torch.softmax(x, -1))
MATMUL = Structure(lambda q, k: q @ k.mT)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.soft = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        return self.soft(x)


@pytest.mark.parametrize(
    "spelling",
    [
        lambda x: x.softmax(-1),
        lambda x: x.softmax(dim=-1),
        lambda x: torch.softmax(x, -1),
        lambda x: torch.softmax(input=x, dim=-1, dtype=torch.float64),
        lambda x: F.softmax(x, dim=-1),
        lambda x: torch.nn.functional.softmax(x, -1, _stacklevel=3),
        lambda x: torch.ops.aten.softmax.int(x, -1),
        lambda x: torch.ops.aten._softmax.default(x, -1, False),
        _Layer(),
    ],
)
def test_softmax_in_its_spellings(spelling: Any) -> None:
    for structure in (SOFTMAX, Structure(lambda x: x.softmax(-1)), Structure(lambda x: F.softmax(x, dim=-1))):
        matches = structure.find(trace_function(spelling))
        assert len(matches) == 1 and names(matches[0].bindings.values()) == ["x"]


@pytest.mark.parametrize(
    "spelling",
    [
        lambda q, k: q @ k.mT,
        lambda q, k: q @ k.transpose(-1, -2),
        lambda q, k: torch.matmul(q, k.transpose(-2, -1)),
        lambda q, k: torch.bmm(q, k.swapaxes(-1, -2)),
        lambda q, k: q.matmul(torch.transpose(k, -1, -2)),
        lambda q, k: q.matmul(torch.transpose(k, dim1=-1, dim0=-2)),
        lambda q, k: torch.mm(q, k.t()),
        lambda q, k: q @ k.permute(0, 1, 3, 2),
        lambda q, k: q @ torch.permute(k, (0, 2, 1)),
        lambda q, k: torch.ops.aten.matmul.default(q, torch.ops.aten.transpose.int(k, -1, -2)),
    ],
)
def test_products_with_a_transpose_in_their_spellings(spelling: Any) -> None:
    assert names(MATMUL.find(trace_function(spelling))[0].bindings.values()) == ["q", "k"]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda q, k: q @ k, "the pattern wants mT(k), and the graph has placeholder"),
        (lambda q, k: k.mT @ q, "nearest miss, 1 of 2"),
        (lambda q, k: q @ k.transpose(1, 0), "wants mT(k), and the graph has transpose"),
        (lambda q, k: q @ k.permute(1, 0, 2), "wants mT(k), and the graph has permute"),
        (lambda q, k: q * k.mT, "no user of it fits matmul(q, mT(k))"),
        (lambda q, k: q + k, "any of the pattern's operations: matmul(q, mT(k))"),
    ],
)
def test_what_is_no_such_product(function: Any, message: str) -> None:
    matches = MATMUL.find(trace_function(function))
    assert not matches and message in matches.reason, matches.reason


def test_dimensions_are_told_by_the_rank_where_it_is_known() -> None:
    class Scores(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.transpose(1, 2)).softmax(2)

    both = Structure(lambda x: (x @ x.mT).softmax(-1))
    positive = Structure(lambda x: (x @ x.mT).softmax(2))
    example = torch.randn(2, 3, 4)
    assert not both.find(trace_function(Scores()))  # without an example, 2 can be any dimension
    shaped = trace_function(Scores())
    ShapeProp(shaped).propagate(example)
    for graph in (trace(Scores(), example), shaped, torch.export.export(Scores(), (example,)).module()):
        assert len(both.find(graph)) == len(positive.find(graph)) == 1  # type: ignore[arg-type]
    assert not both.find(trace(Scores(), torch.randn(2, 3, 3, 3)))


def test_in_place_and_scaled_sums() -> None:
    added = Structure(lambda x, y: x + y)

    def in_place(x: Tensor, y: Tensor) -> Tensor:
        z = x.relu()
        z += y
        return z

    assert len(added.find(trace_function(in_place))) == 1
    assert len(added.find(trace_function(lambda x, y: x.add_(y)))) == 1
    assert not added.find(trace_function(lambda x, y: torch.add(x, y, alpha=2)))


# Features of patterns ------------------------------------------------------------------------------------------


def test_commutative_operations_match_either_way() -> None:
    gated = Structure(lambda x, y: x * torch.sigmoid(x) + y)
    for function in (
        lambda a, b: a * a.sigmoid() + b,
        lambda a, b: torch.sigmoid(a) * a + b,
        lambda a, b: b + a * a.sigmoid(),
        lambda a, b: torch.add(b, torch.mul(torch.sigmoid(a), a)),
    ):
        assert names(gated.find(trace_function(function))[0].bindings.values()) == ["a", "b"]
    assert not Structure(lambda x, y: x.relu() - y).find(trace_function(lambda a, b: b - a.relu()))


def test_a_name_that_occurs_twice_is_one_node() -> None:
    swish = Structure(lambda x: x * torch.sigmoid(x))
    assert swish.find(trace_function(lambda a, b: (a * b.sigmoid()) * a.sigmoid())).reason.startswith("x would be ")
    assert len(swish.find(trace_function(lambda a: a.float() * a.sigmoid()))) == 1  # the same value, passed on
    # Only the second operand order of a commutative operation may match.
    twice = Structure(lambda x, y: (x + y) * x.relu())
    assert names(twice.find(trace_function(lambda a, b: (b + a) * a.relu()))[0].bindings.values()) == ["a", "b"]


def test_a_shared_subexpression_is_one_node() -> None:
    def shared(x: Any) -> Any:
        y = x.exp()
        return y / (y + 1)

    structure = Structure(shared)
    assert names(structure.find(trace_function(shared))[0].nodes) == ["exp", "add", "truediv"]
    matches = structure.find(trace_function(lambda x: x.exp() / (x.exp() + 1)))
    assert not matches and matches.reason == "exp(x) would be exp at one place and exp_1 at another"


def test_alternatives_are_tried_in_turn() -> None:
    structure = Structure(lambda x: one_of(x.relu(), F.gelu(x)) * ANY)
    assert len(structure.find(trace_function(lambda x: x.relu() * 2 + F.gelu(x) * x.tanh()))) == 2
    either = Structure(lambda x: one_of(x.relu(), x.tanh()))
    assert names(o.root for o in either.find(trace_function(lambda x: x.tanh() + x.relu()))) == ["tanh", "relu"]


def test_unsaid_arguments_are_not_asked() -> None:
    mean = Structure(lambda x: x.mean(-1))
    assert len(mean.find(trace_function(lambda x: x.mean(-1, keepdim=True)))) == 1
    assert not Structure(lambda x: x.mean(-1, keepdim=False)).find(trace_function(lambda x: x.mean(-1, keepdim=True)))
    joined = Structure(lambda a, b: torch.cat((a, b.relu()), -1))
    assert len(joined.find(trace_function(lambda a, b: torch.cat([a, b.relu()], dim=-1)))) == 1
    assert not joined.find(trace_function(lambda a, b: torch.cat([a, b.relu(), a], dim=-1)))


def test_values_are_handed_on_between_operations() -> None:
    structure = Structure(lambda x: torch.softmax(x, -1) @ x)

    def forward(x: Tensor) -> Tensor:
        weights = F.dropout(torch.softmax(x, -1).float().to(x.dtype), 0.1).contiguous()
        return weights @ x

    (occurrence,) = structure.find(trace_function(forward))
    assert names(occurrence.nodes) == ["softmax", "float_1", "to", "dropout", "contiguous", "matmul"]
    # An operation in the pattern is not passed over.
    dropped = Structure(lambda x: F.dropout(torch.softmax(x, -1)) @ x)
    assert len(dropped.find(trace_function(forward))) == 1
    assert not dropped.find(trace_function(lambda x: torch.softmax(x, -1) @ x))


def test_a_node_with_other_users_is_told() -> None:
    def forward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT).softmax(-1)
        return weights @ v, weights.sum()

    (occurrence,) = ATTENTION.find(trace_function(forward))
    assert names(occurrence.shared) == ["softmax"] and str(occurrence.root) == "matmul_1"


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down, self.norm = (
            nn.Linear(4, 8),
            nn.GELU(),
            nn.Linear(8, 4, bias=False),
            nn.LayerNorm(4),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


def test_modules_by_class_and_by_name() -> None:
    graph = trace(_Net(), torch.randn(2, 4))
    mlp = Structure(lambda x: module_of(nn.Linear, module_of("GELU", module_of("torch.nn.modules.linear.Linear", x))))
    (occurrence,) = mlp.find(graph)
    assert names(occurrence.nodes) == ["up", "act", "down"] and str(occurrence.bindings["x"]) == "norm"
    assert len(Structure(lambda x: module_of(nn.Module, x, subclasses=True)).find(graph)) == 4
    up = Structure(lambda x: having(module_of(nn.Linear, x), path="up", shape=(ANY, 8), dtype=torch.float32))
    assert names(up.find(graph)[0].nodes) == ["up"]
    missed = Structure(lambda x: having(module_of(nn.Linear, x), shape=(ANY, 7))).find(graph)
    assert "its shape is (2, 8), and not (ANY, 7)" in missed.reason
    # Layers also match as the functions that they call, with their tensors by name.
    linear = Structure(lambda x, weight, bias: F.linear(x, weight, bias))
    assert [str(o.bindings["weight"]) for o in linear.find(graph)] == ["up.weight", "down.weight"]
    assert [str(o.bindings["bias"]) for o in linear.find(graph)] == ["up.bias", "None"]
    assert [str(o.root) for o in Structure(lambda x, w: F.linear(x, w)).find(graph)] == ["down"]
    assert len(Structure(lambda x: F.gelu(x)).find(graph)) == 1
    assert not Structure(lambda x: F.gelu(x, approximate="tanh")).find(graph)


def test_a_pattern_as_a_networkx_graph() -> None:
    digraph = networkx.DiGraph()
    digraph.add_node("q", binding="q")
    digraph.add_node("scores", operation="matmul")
    digraph.add_node("weights", operation="softmax", constants={1: -1})
    digraph.add_node("out", operation="matmul")
    digraph.add_edge("q", "scores", slot=0)
    digraph.add_edge("scores", "weights", slot=0)
    digraph.add_edge("weights", "out", slot=0)
    matches = Structure(digraph).find(trace_function(lambda q, k, v: (q @ k.mT).softmax(-1) @ v))
    assert names(matches[0].nodes) == ["matmul", "softmax", "matmul_1"] and names(matches[0].bindings.values()) == ["q"]
    assert not Structure(digraph).find(trace_function(lambda q, k, v: (q @ k.mT).softmax(0) @ v))


# Refusals -------------------------------------------------------------------------------------------------------


def test_patterns_that_can_not_be() -> None:
    cycle = networkx.DiGraph([("a", "b"), ("b", "a")])
    two = networkx.DiGraph([("a", "b"), ("a", "c")])
    wrong: list[tuple[Any, str]] = [
        (cycle, "cycle"),
        (two, "2 results"),
        (lambda x: x, "does not have an operation"),
        (lambda x: x.relu() if x else x, "branches"),
        (lambda x: torch.cat([*x], -1), "iterates over a value"),
        (lambda x: one_of(x.relu()), "fewer than two"),
        (lambda x: having(x, dtype=torch.float32).relu(), "having needs an operation"),
        ("softmax", "is not a structure"),
    ]
    for wrong_pattern, message in wrong:
        with pytest.raises(SurgeryError) as caught:
            Structure(wrong_pattern)
        assert message in str(caught.value)


def test_too_many_ways_to_read_a_pattern_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = Structure(lambda a, b: (a + b) * (b + a) * (a + b))
    graph = trace_function(lambda x, y, z: (x + y) * (y + z) * (z + x))
    assert "at one place" in structure.find(graph).reason
    monkeypatch.setattr("surgery.structures.structure._STEPS", 5)
    with pytest.raises(SurgeryError, match="too many ways"):
        structure.find(graph)


def test_what_is_no_graph() -> None:
    with pytest.raises(SurgeryError, match="a Linear is not a graph"):
        MATMUL.find(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_near_misses_are_told() -> None:
    scaled = Structure(lambda q, k, v, mask: torch.softmax(q @ k.mT * ANY + mask, -1) @ v)

    def reason(function: Any) -> str:
        matches = scaled.find(trace_function(function))
        assert not matches and len(matches) == 0
        return matches.reason

    assert "3 of 6" in reason(lambda q, k, v, m: torch.softmax(q @ k.mT / 8 + m, -1) @ v)
    assert reason(lambda q, k, v, m: torch.softmax(q @ k.mT * 8 + m, 0) @ v) == (
        "nearest miss, 5 of 6 operations: at softmax, argument 1 is 0, and not -1, in softmax(add(…, mask), -1)"
    )
    message = reason(lambda q, k, v, m: F.relu(q @ k.mT * 8 + m) @ v)
    assert message.endswith("add fits, and no user of it fits softmax(add(…, mask), -1)"), message
    assert "any of the pattern's operations" in reason(lambda q, k, v, m: q.relu())
    assert not scaled.find(fx.Graph())


def test_no_recursion_limits() -> None:
    depth = 2 * sys.getrecursionlimit()

    def long(x: Any) -> Any:
        x = x.tanh()
        for _ in range(depth):
            x = x.relu() + 1
        return x

    graph = fx.Graph()
    value: Any = graph.call_method("tanh", (graph.placeholder("x"),))
    for _ in range(depth):
        value = graph.call_function(operator.add, (1, graph.call_method("relu", (value,))))
    graph.output(value)
    assert len(Structure(long).find(graph)) == 1
    assert len(Structure(lambda x: (x + 1).relu()).find(graph)) == depth - 1


def test_one_match_a_block() -> None:
    matches = pattern().find(attention_graph(50))
    assert len(matches) == 50 and len({node for o in matches for node in o.nodes}) == sum(len(o.nodes) for o in matches)


# Models ---------------------------------------------------------------------------------------------------------


def model_of(name: str) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model: Any = FAMILIES[name].make().eval()
    model.set_attn_implementation("eager")
    return model, FAMILIES[name].inputs()


@pytest.mark.parametrize(
    ("name", "count", "query"),
    [
        ("bert", 2, "bert.encoder.layer.1.attention.self.query"),
        ("llama", 2, "model.layers.1.self_attn.q_proj"),
        ("t5", 6, "decoder.block.1.layer.1.EncDecAttention.q"),
        ("vit", 2, None),
        ("gpt2", 2, None),
        ("whisper", 6, "model.decoder.layers.1.encoder_attn.q_proj"),
        ("distilbert", 2, None),
        ("mixtral", 2, "model.layers.1.self_attn.q_proj"),
    ],
)
def test_attentions_of_models(name: str, count: int, query: str | None) -> None:
    model, inputs = model_of(name)
    if name in ("t5", "whisper"):
        inputs["use_cache"] = False
    graph = graph_of(model, inputs)
    assert not [data["reason"] for _, data in graph.nodes(data=True) if "reason" in data]
    assert networkx.is_directed_acyclic_graph(graph)
    matches = ATTENTION.find(graph)
    assert len(matches) == count, matches.reason
    for occurrence in matches:
        shapes = [graph.nodes[occurrence.bindings[key]]["shape"] for key in "qkv"]
        assert graph.nodes[occurrence.root]["shape"] == (*shapes[0][:-1], shapes[2][-1])
        assert shapes[1][-2] == shapes[2][-2]
    if query is not None:
        assert query in networkx.ancestors(graph, matches[-1].bindings["q"])


def test_attention_in_one_module() -> None:
    model, inputs = model_of("bert")
    module = model.bert.encoder.layer[0].attention.self
    example = {"hidden_states": torch.randn(2, 5, 32)}
    assert not ATTENTION.find(trace(module, example))  # the attention comes from a registry, and is one node
    (occurrence,) = ATTENTION.find(trace(module, example, leaves=False))
    assert isinstance(occurrence.root, fx.Node) and occurrence.bindings["q"].args[0].args[0].target == "query"
    assert names(occurrence.shared) == ["dropout"]  # the forward also returns the weights


SAMPLE = ("bert", "llama", "t5", "vit", "mamba", "deberta_v2", "swin", "whisper", "convnext", "clip", "longformer")
NAMES = list(FAMILIES) if os.environ.get("ALL_FAMILIES") else [name for name in SAMPLE if name in FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_every_call_of_a_layer_is_a_node(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = FAMILIES[name].make().eval(), FAMILIES[name].inputs()
    calls: Counter[str] = Counter()
    paths = {module: path for path, module in model.named_modules()}

    def count(module: nn.Module, args: Any) -> None:
        calls[paths[module]] += 1

    layers = [module for module in model.modules() if type(module) in (nn.Linear, nn.LayerNorm, nn.Conv2d)]
    with torch.no_grad():
        handles = [layer.register_forward_pre_hook(count) for layer in layers]
        torch.manual_seed(1)
        model(**copied(inputs))
        for handle in handles:
            handle.remove()
        torch.manual_seed(1)
        before = Snapshot(model)
        graph = graph_of(model, inputs)
    assert not before.differences(model)
    assert networkx.is_directed_acyclic_graph(graph)
    counts = Counter(data["path"] for _, data in graph.nodes(data=True) if data["op"] == "call_module")
    assert {path: counts[path] for path in calls} == dict(calls)


# A whole call ---------------------------------------------------------------------------------------------------


class _Refused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else x


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = _Net()

    def forward(self, x: Tensor, scale: float = 1.0, **more: Any) -> dict[str, Any]:
        y = self.net(x) * scale
        return {"first": y, "rest": (y.relu(), more["z"])}


class _Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pair, self.refused = _Pair(), _Refused()

    def forward(self, x: Tensor) -> Tensor:
        out = self.pair(x, z=x.exp())
        return self.refused((out["first"] + out["rest"][1]).abs()) + self.pair(out["rest"][0], z=x)["first"]


def test_a_whole_call_is_one_graph() -> None:
    graph = graph_of(_Whole(), torch.randn(3, 4))
    assert networkx.is_directed_acyclic_graph(graph)
    paths = [name for name, data in graph.nodes(data=True) if data["operation"] == "linear"]
    assert paths == ["pair.net.up", "pair.net.down", "refused.inner", "pair.net.up#2", "pair.net.down#2"]
    refused = graph.nodes["refused"]
    assert "decides on the content" in refused["reason"] and refused["type"] is _Refused
    assert list(graph.predecessors("refused")) == ["abs_1"] and graph.nodes["add"]["path"] == ""
    # Tuples of values do not appear in the graph: an item is the value itself.
    assert set(graph.predecessors("add")) == {"pair.mul", "exp"}
    assert set(graph.predecessors("pair.net.norm#2")) == {"pair.relu"}
    assert graph.nodes["pair.net.up"]["shape"] == (3, 8) and graph.nodes["pair.net.add"]["type"] is _Net
    residual = Structure(lambda x: x + module_of(nn.Linear, ANY))
    assert [str(o.root) for o in residual.find(graph)] == ["pair.net.add", "pair.net.add#2"]
    refused_model = _Refused()
    only = graph_of(refused_model, torch.ones(2, 4))
    assert "decides on the content" in only.nodes["_Refused"]["reason"]
    assert list(only) == ["_Refused", "inner.input_0", "inner"] and list(only.edges) == [("inner.input_0", "inner")]
    assert only.nodes["inner"]["operation"] == "linear" and only.nodes["inner.input_0"]["shape"] == (2, 4)
    assert not refused_model.inner._forward_hooks and not refused_model.inner._forward_pre_hooks


def test_importing_surgery_does_not_import_networkx() -> None:
    code = "import sys, surgery; sys.exit('networkx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_flat_graph_keeps_what_as_digraph_gives() -> None:
    graph = as_digraph(trace(_Net(), torch.randn(2, 4)))
    up = next(node for node in graph if str(node) == "up")
    assert graph.nodes[up]["type"] is nn.Linear and graph.nodes[up]["path"] == "up"
    assert [data["slots"] for _, _, data in as_digraph(trace_function(lambda x: x @ x)).edges(data=True)] == [
        (0, 1),
        (0,),
    ]


# Random patterns in graphs that contain them----------------------------------------------------------------------

UNARY: dict[str, list[Callable[[Any], Any]]] = {
    "relu": [lambda x: x.relu(), torch.relu, F.relu, lambda x: x.relu_()],
    "tanh": [lambda x: x.tanh(), torch.tanh],
    "neg": [operator.neg, lambda x: x.neg(), torch.neg],
    "softmax": [lambda x: x.softmax(-1), lambda x: torch.softmax(x, -1), lambda x: F.softmax(x, dim=-1)],
    "mT": [lambda x: x.mT, lambda x: x.transpose(-1, -2), lambda x: torch.transpose(x, -2, -1)],
}
BINARY: dict[str, list[Callable[[Any, Any], Any]]] = {
    "add": [operator.add, torch.add, lambda x, y: x.add(y), lambda x, y: y + x],
    "mul": [operator.mul, torch.mul, lambda x, y: x.mul(y), lambda x, y: torch.multiply(y, x)],
    "sub": [operator.sub, torch.sub, lambda x, y: x.sub(y)],
    "matmul": [operator.matmul, torch.matmul, torch.bmm, lambda x, y: x.matmul(y)],
}
HANDED_ON: list[Callable[[Any], Any]] = [lambda x: x.contiguous(), lambda x: x.double(), lambda x: F.dropout(x, 0.0)]
LEAVES = "abc"


def tree(draw: random.Random, depth: int) -> Any:
    if depth == 0 or draw.random() < 0.15:
        return draw.choice(LEAVES)
    if draw.random() < 0.35:
        return (draw.choice(list(UNARY)), tree(draw, depth - 1))
    return (draw.choice(list(BINARY)), tree(draw, depth - 1), tree(draw, depth - 1))


def compute_tree(tree: Any, values: dict[str, Any], draw: random.Random | None = None) -> Any:
    """Build a random tree of operations: in plain form, or in random spellings with passing operations in between."""
    if isinstance(tree, str):
        return values[tree]
    inner = [compute_tree(part, values, draw) for part in tree[1:]]
    spellings: list[Any] = (UNARY if len(inner) == 1 else BINARY)[tree[0]]
    if draw is None:
        return spellings[0](*inner)
    inner = [draw.choice(HANDED_ON)(value) if draw.random() < 0.2 else value for value in inner]
    return draw.choice(spellings)(*inner) if tree[0] != "relu" else spellings[draw.randrange(3)](*inner)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32))
def test_any_pattern_is_found_in_a_graph_that_holds_it(seed: int) -> None:
    draw = random.Random(seed)
    target_tree: Any = "a"
    while isinstance(target_tree, str):
        target_tree = tree(draw, draw.randint(1, 4))

    def noise(pool: list[Any], count: int) -> None:
        for _ in range(count):
            if draw.random() < 0.5:
                pool.append(draw.choice(UNARY[draw.choice(list(UNARY))][:2])(draw.choice(pool)))
            else:
                pool.append(BINARY[draw.choice(list(BINARY))][0](draw.choice(pool), draw.choice(pool)))

    graph = fx.Graph()
    tracer = GraphAppendingTracer(graph)
    pool: list[Any] = [fx.Proxy(graph.placeholder(name), tracer) for name in "xyz"]
    noise(pool, draw.randint(0, 8))
    planted = compute_tree(target_tree, {name: draw.choice(pool) for name in LEAVES}, draw)
    pool.append(planted)
    pool += [fx.Proxy(node, tracer) for node in graph.nodes]
    noise(pool, draw.randint(0, 8))
    graph.output(planted.node)

    structure = Structure(lambda a, b, c: compute_tree(target_tree, {"a": a, "b": b, "c": c}))
    matches = structure.find(graph)
    assert planted.node in [occurrence.root for occurrence in matches], matches.reason
    # Each match is right: the pattern, computed on the bound values, equals the value of the root.
    node_values: dict[Any, Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            node_values[n] = value = super().run_node(n)
            return value

    Watching(fx.GraphModule({}, graph)).run(*(torch.randn(2, 3, 3, dtype=torch.float64) for _ in "xyz"))
    for occurrence in matches:
        values = {name: node_values[node] for name, node in occurrence.bindings.items()}
        torch.testing.assert_close(
            compute_tree(target_tree, values), node_values[occurrence.root], rtol=1e-9, atol=1e-9, equal_nan=True
        )
    changed = Structure(lambda a, b, c: torch.erfinv(compute_tree(target_tree, {"a": a, "b": b, "c": c})) - 1)
    missed = changed.find(graph)
    assert not missed and missed.reason.startswith("nearest miss")
