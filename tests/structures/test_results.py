"""Structures with several results, and with modules as parameters."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from surgery import ANY, Structure, SurgeryError, module_of, trace


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.q(x), self.k(x), self.v(x)
        weights = (q @ k.mT).softmax(-1)
        return self.norm(self.conv((weights @ v).mT)), weights, self.q(v)


GRAPH = trace(Block().eval(), torch.randn(2, 3, 4))
BIAS: Any = ANY
LINEAR, CONV, NORM = module_of(nn.Linear), module_of(nn.Conv1d), module_of(nn.BatchNorm1d)


def test_results_that_share_a_name_are_different_nodes_in_the_graphs_order() -> None:
    (match,) = Structure(lambda x, q=LINEAR, k=LINEAR, v=LINEAR: (q(x), k(x), v(x))).find(GRAPH)
    assert [root.name for root in match.roots] == ["q", "k", "v"] and match.root is match.roots[0]
    assert {name: str(value) for name, value in match.bindings.items()} == {"x": "x", "q": "q", "k": "k", "v": "v"}
    pairs = Structure(lambda x, w, v, b: (F.linear(x, w, b), F.linear(x, v, BIAS))).find(GRAPH)
    assert [[root.name for root in match.roots] for match in pairs] == [["q", "k"]]  # none is in two matches


def test_a_result_may_be_an_operation_inside_another() -> None:
    (match,) = Structure(lambda q, k, v: ((weights := (q @ k.mT).softmax(-1)) @ v, weights)).find(GRAPH)
    assert [root.name for root in match.roots] == ["matmul_1", "softmax"] and not match.shared
    (alone,) = Structure(lambda q, k, v: (q @ k.mT).softmax(-1) @ v).find(GRAPH)
    assert [node.name for node in alone.shared] == ["softmax"]


def test_a_result_is_not_the_cast_through_which_the_match_reads_it() -> None:
    graph = fx.symbolic_trace(lambda x, y: (torch.relu((z := x + y).to(torch.float32)), z * 2))
    (match,) = Structure(lambda x, y: (torch.relu(total := x + y), total)).find(graph)
    assert [root.target for root in match.roots] == [torch.relu, operator.add]
    assert [node.name for node in match.passed] == ["to"]


def test_a_parameter_that_is_a_module_is_the_same_module_everywhere() -> None:
    (match,) = Structure(lambda x, conv=CONV, norm=NORM: norm(conv(x))).find(GRAPH)
    assert match.bindings["conv"] == "conv" and match.bindings["norm"] == "norm"
    twice = Structure(lambda x, y, linear=LINEAR: (linear(x), linear(y)))
    (match,) = twice.find(GRAPH)
    assert match.bindings["linear"] == "q" and [root.name for root in match.roots] == ["q", "q_1"]
    assert not Structure(lambda x, linear=LINEAR: linear(linear(x))).find(GRAPH)  # q(v(x)) has two modules
    assert Structure(lambda x, a=LINEAR, b=LINEAR: a(b(x))).find(GRAPH)


def test_why_nothing_is_found() -> None:
    reason = Structure(lambda x, conv=CONV, linear=LINEAR: (conv(x), linear(x))).find(GRAPH).reason
    assert reason == "conv fits the first result, and no node fits Linear(x) together with it"
    assert Structure(lambda x, y: x @ y).unused == [] and Structure(lambda x, y: x.relu()).unused == ["y"]


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (lambda x: (x.relu(), x), "a result of the structure is x"),
        (lambda x: (x.relu(), 1), "a result of the structure is 1"),
        (lambda x: (), "has no result"),
        (lambda x: x(1), "calls a value"),
    ],
)
def test_wrong_results(pattern: Any, why: str) -> None:
    with pytest.raises(SurgeryError, match=why):
        Structure(pattern)
