"""Structures and adapters in every order: a state machine drops, repeats and exchanges layers of a model.

After each step, the model equals plain arithmetic in float64 on a list of matrices. Invalid steps raise errors and
change nothing. At the end, the base has its bits. STATES and STATES_SEED are as in `test_state_machine.py`.
"""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from surgery import (
    SurgeryError,
    activate,
    active,
    adapters,
    apply_rules,
    commit,
    deactivate,
    load_surgery,
    merge,
    remove,
    rename_adapter,
    save_surgery,
    unmerge,
)
from surgery.rules import DropRule, LoraRule, ReorderRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.state_machines import EXAMPLES, configure

NAMES = ["a", "b", "c", "d", "e"]
SIZE, LAYERS = 4, 4
X = torch.randn(3, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Deep(nn.Module):
    """Layers with a residual stream."""

    def __init__(self, number: int = 0):
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.ModuleList(nn.Linear(SIZE, SIZE, dtype=torch.float64) for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@dataclass(eq=False)
class Layer:
    """A layer by hand: its tensors, and the change of each adapter on it."""

    weight: Tensor
    bias: Tensor
    changes: dict[str, Tensor] = field(default_factory=dict)
    from_copy: frozenset[str] = frozenset()  # adapters that came with the layer of which it is a copy


@dataclass
class Record:
    """A structural rule by hand: the lists of layers before and after it."""

    adapter: str
    before: list[Layer]
    after: list[Layer]


class Structures(RuleBasedStateMachine):
    @initialize(number=st.integers(0, 99))
    def begin(self, number: int) -> None:
        self.number, self.model = number, Deep(number).eval()
        self.plain = Snapshot(self.model)
        self.layers = [Layer(m.weight.detach().clone(), m.bias.detach().clone()) for m in self.model.layers]  # type: ignore[union-attr, operator]
        self.records: list[Record] = []
        self.weights: dict[str, float] = {}  # of live adapters with LoRA
        self.order: list[str] = []
        self.with_lora: set[str] = set()
        self.copied = False  # then the parameters are others than the base's

    # What the model must be --------------------------------------------------------------------------------------

    def wanted(self) -> Tensor:
        x = X
        for layer in self.layers:
            weight = layer.weight
            for name, change in layer.changes.items():
                weight = weight + self.weights.get(name, 0.0) * change
            x = x + torch.tanh(x @ weight.T + layer.bias)
        return x

    @property
    def structural(self) -> set[str]:
        return {*self.order} - self.with_lora

    def attempt(self, allowed: bool, step: Any) -> bool:
        if allowed:
            step()
            return True
        before, names = Snapshot(self.model), active(self.model)
        with pytest.raises(SurgeryError):
            step()
        assert before.differences(self.model) == [] and active(self.model) == names
        return False

    @invariant()
    def it_computes_what_it_should(self) -> None:
        if not hasattr(self, "layers"):
            return
        with torch.no_grad():
            torch.testing.assert_close(self.model(X), self.wanted(), atol=1e-9, rtol=1e-9)
        assert len(self.model.layers) == len(self.layers)
        assert active(self.model) == tuple(n for n in self.order if n in self.weights or n in self.structural)
        for name, adapter in adapters(self.model).items():
            places = [index for index, layer in enumerate(self.layers) if name in layer.changes]
            assert sorted(adapter.sites) == sorted(f"layers.{index}" for index in places)
        for parameter, layer in zip(self.model.layers, self.layers, strict=True):
            assert torch.equal(parameter.weight, layer.weight)  # type: ignore[arg-type]
            assert parameter.weight.requires_grad is not bool(self.with_lora)

    # Steps --------------------------------------------------------------------------------------------------------

    @rule(name=st.sampled_from(NAMES), data=st.data(), with_lora=st.booleans())
    def restructure(self, name: str, data: Any, with_lora: bool) -> None:
        count = len(self.layers)
        kind = data.draw(st.sampled_from(["drop", "repeat", "reorder"]))
        if kind == "drop":
            gone = data.draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=2))
            rules: list[Any] = [DropRule([f"layers.{index}" for index in gone])]
            order = [index for index in range(count) if index not in gone]
        elif kind == "repeat":
            order = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=6))
            rules = [RepeatRule("layers", order=order)]
        else:
            order = data.draw(st.permutations(range(count)))
            rules = [ReorderRule("layers", order=order)]
        rules += [LoraRule(nn.Linear, rank=2, init="random")] if with_lora else []
        if self.attempt(bool(order) and name not in self.order, lambda: apply_rules(self.model, rules, adapter=name)):
            before, self.layers = self.layers, self.reordered(order)
            self.records.append(Record(name, before, self.layers))
            self.order.append(name)
            if with_lora:
                self.adopt(name, range(len(order)))

    def reordered(self, order: list[int]) -> list[Layer]:
        layers: list[Layer] = []
        for index in order:
            layer = self.layers[index]
            if layer in layers:
                layer = Layer(layer.weight, layer.bias, dict(layer.changes), frozenset(layer.changes))
            layers.append(layer)
        return layers

    def adopt(self, name: str, places: Any) -> None:
        for index in places:
            box: Any = self.model.layers[index].adapters.get_submodule(name)  # type: ignore[index, union-attr]
            self.layers[index].changes[name] = 4 * (box.B @ box.A).detach()  # alpha / rank
        self.with_lora.add(name)
        self.weights[name] = 1.0

    @rule(name=st.sampled_from(NAMES), data=st.data())
    def apply_lora(self, name: str, data: Any) -> None:
        places = sorted(data.draw(st.sets(st.integers(0, len(self.layers) - 1), min_size=1)))
        new = LoraRule([f"layers.{index}" for index in places], rank=2, init="random")
        if self.attempt(name not in self.order, lambda: apply_rules(self.model, new, adapter=name)):
            self.order.append(name)
            self.adopt(name, places)

    @precondition(lambda self: self.order)
    @rule(data=st.data(), check=st.booleans())
    def remove(self, data: Any, check: bool) -> None:
        names = data.draw(st.lists(st.sampled_from(self.order), min_size=1, unique=True))
        if self.attempt(self.can_be_removed(names), lambda: remove(self.model, names, check=check)):
            self.record_removal(names)

    def can_be_removed(self, names: list[str]) -> bool:
        undone = [record for record in self.records if record.adapter in names]
        if any(record.adapter not in names for record in self.records[len(self.records) - len(undone) :]):
            return False
        gone = [layer for record in undone for layer in record.after if layer not in record.before]
        staying = {name for layer in gone for name in layer.changes if name not in layer.from_copy}
        return staying <= {*names}

    def record_removal(self, names: list[str]) -> None:
        everything = {id(layer): layer for layer in self.layers}
        for record in self.records:
            everything |= {id(layer): layer for layer in (*record.before, *record.after)}
        for record in reversed([record for record in self.records if record.adapter in names]):
            self.layers = record.before
            self.records.remove(record)
        for layer in everything.values():
            layer.changes = {name: change for name, change in layer.changes.items() if name not in names}
        self.order = [name for name in self.order if name not in names]
        self.with_lora -= {*names}
        self.weights = {name: weight for name, weight in self.weights.items() if name not in names}

    @precondition(lambda self: self.order)
    @rule(data=st.data(), new=st.sampled_from(NAMES))
    def rename(self, data: Any, new: str) -> None:
        old = data.draw(st.sampled_from(self.order))
        if not self.attempt(new == old or new not in self.order, lambda: rename_adapter(self.model, old, new)):
            return
        layers = {id(layer): layer for layer in self.layers}
        for record in self.records:
            layers |= {id(layer): layer for layer in (*record.before, *record.after)}
            record.adapter = new if record.adapter == old else record.adapter
        for layer in layers.values():
            layer.changes = {new if name == old else name: change for name, change in layer.changes.items()}
            layer.from_copy = frozenset(new if name == old else name for name in layer.from_copy)
        self.order = [new if name == old else name for name in self.order]
        self.with_lora = {new if name == old else name for name in self.with_lora}
        self.weights = {new if name == old else name: weight for name, weight in self.weights.items()}

    @precondition(lambda self: self.with_lora)
    @rule(data=st.data(), weight=st.sampled_from([1.0, 0.5, -1.0]))
    def activate(self, data: Any, weight: float) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.with_lora)), unique=True))
        activate(self.model, names, weights=weight) if names else deactivate(self.model)
        self.weights = dict.fromkeys(names, weight)

    @precondition(lambda self: self.order)
    @rule()
    def merge_and_unmerge(self) -> None:
        before = Snapshot(self.model)
        with torch.no_grad():
            output = self.model(X)
            merge(self.model)
            torch.testing.assert_close(self.model(X), output, atol=1e-9, rtol=1e-9)
            if any(name in layer.changes for layer in self.layers for name in self.weights):  # else on dropped layers
                if self.records:
                    with pytest.raises(SurgeryError, match="merged"):
                        remove(self.model, self.records[-1].adapter)
                unmerge(self.model)
        assert before.differences(self.model) == []

    # Copies of the model --------------------------------------------------------------------------------------------

    @precondition(lambda self: self.order)
    @rule()
    def commit_a_copy(self) -> None:
        other, idle = copy.deepcopy(self.model), self.with_lora - self.weights.keys()
        if idle:
            with pytest.raises(SurgeryError, match="is idle"):
                commit(other)
            return
        commit(other)
        with torch.no_grad():
            torch.testing.assert_close(other(X), self.model(X), atol=1e-9, rtol=1e-9)
        assert {*other.state_dict()} == {f"layers.{i}.{n}" for i in range(len(self.layers)) for n in ("weight", "bias")}
        assert not [key for module in other.modules() for key in vars(module) if "surgery" in key]
        assert all(type(module) is nn.Linear for module in other.layers)
        assert all(parameter.requires_grad for parameter in other.parameters())

    @precondition(lambda self: self.records)
    @rule(data=st.data())
    def commit_the_first_structures_of_a_copy(self, data: Any) -> None:
        """Those that come first can be final alone; what is above them can still be undone."""
        names = [record.adapter for record in self.records][: data.draw(st.integers(1, len(self.records)))]
        names = [name for name in names if name in self.structural]
        firsts = [record.adapter for record in self.records[: len(names)]]
        other = copy.deepcopy(self.model)
        if not names or names != firsts:
            return
        with torch.no_grad():
            output = other(X)
            commit(other, names)
            assert torch.equal(other(X), output)

    @precondition(lambda self: self.order)
    @rule()
    def save_and_load_the_surgery(self) -> None:
        folder = Path(tempfile.mkdtemp())
        try:
            save_surgery(self.model, folder)
        except SurgeryError as error:  # a structure below an adapter was removed, so its rules name other modules
            assert "can't be saved" in str(error)
            return
        else:
            other = load_surgery(Deep(self.number).eval(), folder)
            with torch.no_grad():
                assert torch.equal(other(X), self.model(X)) and active(other) == active(self.model)
            remove(other)
            assert len(other.layers) == LAYERS
        finally:
            shutil.rmtree(folder)

    @rule(how=st.sampled_from(["deepcopy", "pickle"]))
    def go_on_with_a_copy(self, how: str) -> None:
        before = Snapshot(self.model)
        other = copy.deepcopy(self.model) if how == "deepcopy" else pickle.loads(pickle.dumps(self.model))
        assert before.differences(self.model) == []
        self.model, self.copied = other, True

    def teardown(self) -> None:
        if not hasattr(self, "layers"):
            return
        if self.order:
            remove(self.model)
        base = Deep(self.number)
        assert all(torch.equal(tensor, base.state_dict()[key]) for key, tensor in self.model.state_dict().items())
        assert not [key for module in self.model.modules() for key in vars(module) if "surgery" in key]
        if not self.copied:
            assert self.plain.differences(self.model) == []


configure(Structures, EXAMPLES // 3, 25)


class TestStructures(Structures.TestCase):
    pass
