"""Trial calls leave no trace in models whose forward changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import apply_rules, explain, graph_of, merge, route
from surgery.rules import LoraRule
from surgery.tracing.example_call import call


class Changing(nn.Module):
    """With a short text or four rows, a call changes the model in all ways that a forward has."""

    marks: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other, self.kind = nn.Linear(6, 6), nn.Linear(6, 6), "sparse"
        self.scale = nn.Parameter(torch.ones(6))
        self.lengths, self.counts, self.kinds = [1], {"calls": 0}, {"sparse"}
        self.register_buffer("marks", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] < 6 or len(x) == 4:
            self.kind, self.other, self.more = "full", nn.Linear(6, 6), 1
            self.lengths.append(x.shape[1])
            self.counts["calls"] += 1
            self.kinds.add("full")
            self.marks += 1
            self.scale.data = self.scale * 2
        return self.inner((self.scale * self.other(x)).flatten(0, 1)).view(*x.shape)


def state(model: Changing) -> list[Any]:
    attributes = {name: value for name, value in vars(model).items() if not name.startswith("_")}
    tensors = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    return [list(attributes), repr(attributes), id(model.other), tensors]


WAYS: dict[str, Callable[[Any, Tensor], Any]] = {
    "call": call,
    "apply": lambda model, x: apply_rules(model, LoraRule("inner", rank=2), example_inputs=x, adapter="b"),
    "merge": lambda model, x: merge(model, example_inputs=x),
    "explain": lambda model, x: explain(model, LoraRule("inner", rank=2), "inner", example_inputs=x),
    "graph": graph_of,
}


@pytest.mark.filterwarnings("ignore:rounding")
@pytest.mark.parametrize("way", WAYS)
def test_a_short_example_leaves_no_trace(way: str) -> None:
    model, x = Changing(), torch.randn(2, 3, 6)
    if way == "merge":
        apply_rules(model, LoraRule("inner", rank=2))
    before = state(model)
    WAYS[way](model, x)
    after = state(model)
    if way == "apply":
        after[3] = {name: tensor for name, tensor in after[3].items() if "adapters" not in name}
    assert after == before


def test_the_rows_that_route_tries_leave_no_trace() -> None:
    model, x = Changing(), torch.randn(2, 7, 6)
    apply_rules(model, LoraRule("inner", rank=2, init="random"), adapter="a")
    calls: list[int] = []
    model.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    before, alone = state(model), model(x)
    with route(model, ["a", None]):
        rows = model(x)
    assert 4 in calls and state(model) == before and torch.allclose(rows[0], alone[0], atol=1e-6)
