"""Every verb on a model of many small layers and many adapters, to measure growth."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery import (
    activate,
    adapter_state_dict,
    adapters,
    apply_rules,
    base_state_dict,
    combine,
    copy_adapter,
    deactivate,
    explain,
    forget,
    hotswap,
    load_adapter,
    load_adapter_state_dict,
    merge,
    pad_rank,
    plan_rules,
    remove,
    rename_adapter,
    route,
    save_adapter,
    summary,
    unmerge,
    using,
)
from surgery.onnx.calls.example import ExampleCall
from surgery.onnx.graph.prepare import PREPARE, ExportSettings
from surgery.rules import LoraRule

LETTERS = "qkvogud"
WHOLE = ("torch: state_dict", "deepcopy", "pickle", "unpickle", "prepare slots", "prepare constant", "prepare merged")
WHOLE += ("adapters", "summary")  # they tell of, copy or write every adapter there is

Step = tuple[str, Callable[[], Any]]


class Layers(nn.Module):
    """Layers of seven Linears, each with a weight of its own."""

    def __init__(self, layers: int, width: int):
        super().__init__()
        rows = [{name: nn.Linear(width, width, bias=False) for name in LETTERS} for _ in range(layers)]
        self.layers = nn.ModuleList([nn.ModuleDict(row) for row in rows])
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            for name in LETTERS:
                x = layer[name](x)  # type: ignore[index]
        return x


def build_layers(layers: int, adapters: int, width: int = 16) -> Layers:
    """A model with this many adapters, of which `a0` is live."""
    model = Layers(layers, width)
    for index in range(adapters):
        apply_rules(model, rule(), adapter=f"a{index}")
        activate(model, "a0")
    return model


def rule(**fields: Any) -> LoraRule:
    return LoraRule(list(LETTERS), rank=2, init="random", **fields)


def each_layer(layers: int) -> list[LoraRule]:
    return [rule(layers=[index]) for index in range(layers)]


def steps(model: Layers, folder: Path) -> Iterator[Step]:
    """Calls in order, each with the name of its measurement; at the end the model is unchanged.

    Calls named "" only prepare the model.
    """
    layers = len(model.layers)
    states: dict[str, Any] = {}
    yield "plan_rules", lambda: plan_rules(model, rule(), adapter="x")
    yield "apply_rules", lambda: apply_rules(model, rule(), adapter="x")
    yield "activate", lambda: activate(model, "a0")
    yield "activate, known", lambda: activate(model, ["a0", "x"])
    yield "", lambda: activate(model, "a0")
    yield "using", lambda: _in(using(model, "x"))
    yield "deactivate", lambda: deactivate(model)
    yield "", lambda: activate(model)
    yield "route", lambda: _in(route(model, ["a0", "x"]))
    yield "save_adapter", lambda: save_adapter(model, folder / "ours", "x")
    yield "save_adapter, peft", lambda: save_adapter(model, folder / "peft", "x", format="peft")
    yield "hotswap", lambda: hotswap(model, "x", folder / "ours")
    yield "hotswap, peft", lambda: hotswap(model, "x", folder / "peft")
    yield "pad_rank", lambda: pad_rank(model, "x", 4)
    yield "remove", lambda: remove(model, "x")
    yield "load_adapter", lambda: load_adapter(model, folder / "ours", "x")
    yield "", lambda: remove(model, "x")
    yield "load_adapter, peft", lambda: load_adapter(model, folder / "peft", "x")
    yield "copy_adapter", lambda: copy_adapter(model, "x", "y")
    yield "rename_adapter", lambda: rename_adapter(model, "y", "z")
    yield "combine", lambda: combine(model, {"x": 0.5, "z": 0.5}, "y", method="linear")
    yield "", lambda: remove(model, ["x", "y", "z"])
    yield "apply_rules, one a layer", lambda: apply_rules(model, each_layer(layers), adapter="x")
    yield "activate, one a layer", lambda: activate(model, "a0")
    yield "save_adapter, one a layer", lambda: save_adapter(model, folder / "each", "x")
    yield "save_adapter, peft, one a layer", lambda: save_adapter(model, folder / "each-peft", "x", format="peft")
    yield "remove, one a layer", lambda: remove(model, "x")
    yield "load_adapter, one a layer", lambda: load_adapter(model, folder / "each", "x")
    yield "", lambda: remove(model, "x")
    yield "load_adapter, peft, one a layer", lambda: load_adapter(model, folder / "each-peft", "x")
    yield "copy_adapter, one a layer", lambda: copy_adapter(model, "x", "y")
    yield "combine, one a layer", lambda: combine(model, {"x": 0.5, "y": 0.5}, "z", method="linear")
    yield "", lambda: remove(model, ["x", "y", "z"])
    yield "apply_rules, PiSSA", lambda: apply_rules(model, LoraRule(list(LETTERS), rank=2, init="pissa"), adapter="x")
    yield "remove, PiSSA", lambda: remove(model, "x")
    yield "merge", lambda: merge(model)
    yield "unmerge", lambda: unmerge(model)
    yield "merge, safe, untied", lambda: merge(model, safe=True, untie=True)
    yield "", lambda: unmerge(model)
    yield "merge, copy", lambda: merge(model, keep="copy")
    yield "unmerge, copy", lambda: unmerge(model)
    yield "", lambda: activate(copy_adapter(model, "a0", "x"), "x")
    yield "", lambda: merge(model)
    yield "forget", lambda: forget(model)
    yield "", lambda: activate(model, "a0")
    yield "explain", lambda: explain(model, rule(), "layers.0.q")
    yield "summary", lambda: summary(model)
    yield "adapters", lambda: adapters(model)
    yield "adapter_state_dict", lambda: states.update(a0=adapter_state_dict(model, "a0"))
    yield "load_adapter_state_dict", lambda: load_adapter_state_dict(model, states["a0"], "a0")
    yield "base_state_dict", lambda: base_state_dict(model)
    yield from steps_of_any(model, tuple(PREPARE))


def steps_of_any(model: Layers, prepare: tuple[str, ...] = ("merged", "constant")) -> Iterator[Step]:
    """The calls that a model without adapters takes, too, and in which Python and torch go through all of it."""
    pickles: dict[str, bytes] = {}
    yield "torch: state_dict", lambda: model.state_dict()
    yield "deepcopy", lambda: copy.deepcopy(model)
    yield "pickle", lambda: pickles.update(bytes=pickle.dumps(model))
    yield "unpickle", lambda: pickle.loads(pickles["bytes"])
    call = ExampleCall.of(model, torch.ones(2, model.width))
    for kind in prepare:
        yield f"prepare {kind}", lambda kind=kind: PREPARE[kind](model, call, None, ExportSettings(kind))


def _in(block: Any) -> None:
    with block:
        pass
