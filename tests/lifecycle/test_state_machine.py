"""Adapters in every order: a state machine takes random steps on a model.

After each step, the model equals a shadow that plain arithmetic computes (`tests/support/shadow.py`). Invalid steps
raise errors and change nothing. At the end, the base has its bits. STATES is the number of examples, and STATES_SEED
the seed: `make test` runs a few examples, and `make states` many.
"""

from __future__ import annotations

import copy
import io
import shutil
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor, nn

from surgery import (
    Rule,
    SurgeryError,
    SurgeryWarning,
    activate,
    active,
    adapter_state_dict,
    adapters,
    apply_rules,
    base_state_dict,
    combine,
    copy_adapter,
    deactivate,
    forget,
    hotswap,
    load_adapter,
    merge,
    remove,
    rename_adapter,
    route,
    save_adapter,
    unmerge,
    using,
)
from surgery import rule as surgery_rule
from surgery.rules import BottleneckRule, IA3Rule, LoraRule, TrainRule
from surgery.testing import Snapshot
from tests.support.shadow import LINEAR, SITES, Body, Entry, Held, Shadow
from tests.support.state_machines import EXAMPLES, configure

NAMES = ["a", "b", "c", "a b", "'1'"]
BAD_NAMES = ["", "x.y", "forward", "class", 'a"', "a\nb", None, 3]
WEIGHTS = st.sampled_from([1.0, 0.5, -1.0, 2, 0.0, 0.1])
IDS = torch.tensor(
    [[1, 2, 3], [0, 10, 4], [5, 5, 0]]
)  # as many words as rows, so shapes do not show which dimension is the batch
DONE: Counter[str] = Counter()


@surgery_rule("test-state-broken")
class Broken(Rule):
    """A rule that fails at its second site, at one of three stages."""

    at: str = "rewrite"

    def rewrite(self, site: Any) -> Tensor:
        if self.at == "rewrite" and site.path == "last":
            raise ValueError("on purpose")
        return site.output + site.param("shift", (site.out_features,))

    def initialise(self, site: Any) -> None:
        if self.at == "initialise" and site.path == "last":
            raise ValueError("on purpose")


def some(names: Any, least: int = 1) -> st.SearchStrategy[list[str]]:
    often = ["up"] * (2 * len(set(names))) if "up" in names else []  # so that several adapters are at one site
    return st.lists(st.sampled_from([*names, *often]), min_size=least, max_size=3, unique=True)


class Stack:
    """One or two rules, and their formulas at sites for the shadow model."""

    def __init__(self, rules: list[Rule], entries: list[Entry], dropout: bool):
        self.rules, self.entries, self.dropout = rules, entries, dropout

    def __repr__(self) -> str:
        descriptions = [f"{e.kind} at {e.path}{' (pissa)' * bool(e.start)}{' (dora)' * e.dora}" for e in self.entries]
        return f"<{', '.join(descriptions)}>"


@st.composite
def stacks(draw: Any) -> Stack:
    rules, entries, dropout = [], [], False
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        kind = draw(st.sampled_from(["lora", "lora", "lora", "pissa", "ia3", "train", "bottleneck"]))
        if kind in ("lora", "pissa"):
            form = draw(st.sampled_from(["plain", "plain", "dora", "bias"])) if kind == "lora" else "plain"
            places = [p for p in SITES if p != "norm" and (p != "embed" or form == "plain")]
            places = (
                [p for p in places if p != "head" or form != "bias"] if form != "dora" and kind == "lora" else LINEAR
            )
            targets = draw(some(places))
            rank, rslora, alpha = draw(st.sampled_from([2, 4])), draw(st.booleans()), draw(st.sampled_from([1, 3.5, 8]))
            low = draw(st.booleans()) and "down" in targets
            dropped = draw(st.booleans()) and kind == "lora" and "embed" not in targets and form == "plain"
            dropout = dropout or dropped
            init = kind if kind == "pissa" else draw(st.sampled_from(["random", "kaiming", "gaussian"]))
            rules.append(
                LoraRule(
                    targets, rank=rank, alpha=alpha, rslora=rslora, dora=form == "dora", lora_bias=form == "bias",
                    init=init, rank_pattern={"down": 1} if low else None, dropout=0.1 if dropped else 0.0,
                )
            )  # fmt: skip
            for path in targets:
                r = 1 if low and path == "down" else rank
                scale = alpha / (r**0.5 if rslora else r)
                entry = Entry("lora", path, scale, r, form == "dora", start="pissa" if kind == "pissa" else "")
                names = ["A", "B", *(["B_bias"] if form == "bias" else []), *(["magnitude"] if form == "dora" else [])]
                entries.append(_set_flags(entry, names))
        elif kind == "ia3":
            targets = draw(some(["up", "down", "conv", "head", "last"]))
            fed = draw(some(targets, 0))
            rules.append(IA3Rule(targets, feedforward=fed))
            entries += [_set_flags(Entry("ia3", path, fed=path in fed), ["scale"]) for path in targets]
        elif kind == "train":
            targets = draw(some(SITES))
            rules.append(TrainRule(targets))
            entries += [
                _set_flags(Entry("train", p), ["weight", "bias"][: 1 + (p not in ("embed", "head"))]) for p in targets
            ]
        else:
            targets, beside = draw(some(LINEAR)), draw(st.booleans())
            rules.append(BottleneckRule(targets, size=3, placement="parallel" if beside else "after"))
            names = ["down", "down_bias", "up", "up_bias"]
            entries += [_set_flags(Entry("bottleneck", path, fed=beside), names) for path in targets]
    return Stack(rules, entries, dropout)


def _set_flags(entry: Entry, names: list[str]) -> Entry:
    entry.flags = dict.fromkeys(names, True)
    return entry


class Adapters(RuleBasedStateMachine):
    @initialize(
        dtype=st.sampled_from([torch.float64, torch.float64, torch.float32, torch.bfloat16]),
        tied=st.booleans(),
        groups=st.sampled_from([1, 2]),
        padding=st.sampled_from([None, 0]),
        frozen=st.lists(st.sampled_from(SITES), max_size=3),
        number=st.integers(0, 999),
        first=stacks(),
        second=stacks(),
        freeze=st.sampled_from([None, False, False]),
    )
    def begin(
        self,
        dtype: torch.dtype,
        tied: bool,
        groups: int,
        padding: int | None,
        frozen: list[str],
        number: int,
        first: Stack,
        second: Stack,
        freeze: bool | None,
    ) -> None:
        torch.manual_seed(number)
        self.model: Any = Body(tied, groups, padding).to(dtype)
        for path in frozen:
            for parameter in self.model.get_submodule(path).parameters():
                parameter.requires_grad_(False)
        self.dtype, self.shadow = dtype, Shadow(copy.deepcopy(self.model))
        self.folder = Path(tempfile.mkdtemp())
        self.saved: dict[str, tuple[Held, list[str]]] = {}
        self.blocks: list[
            tuple[Any, Any]
        ] = []  # (context, the state to restore: weights of `using`, or rows of `route`)
        self.unmerged: Tensor | None = None  # the output before the merge, until something else changes
        self.identities()
        self.checked = True
        self.apply("a", first, freeze)
        self.apply("b", second)

    # Running steps -------------------------------------------------------------------------------------------

    def attempt(self, problem: str, step: Callable[[], Any]) -> bool:
        """Run the step, or check that it raises and changes nothing."""
        verb = sys._getframe(1).f_code.co_name
        if not problem:
            step()
            DONE["done"] += 1
            DONE[verb] += 1
            return True
        before, report, output = Snapshot(self.model), self.report(), self.run()
        with pytest.warns(SurgeryWarning) if problem == "so already" else pytest.raises(SurgeryError):
            step()
        DONE["refused"] += 1
        DONE["no " + verb] += 1
        assert not before.differences(self.model), f"refused ({problem}), and changed"
        assert self.report() == report and torch.equal(self.run(), output)
        return False

    def report(self) -> Any:
        return (active(self.model), adapters(self.model)) if self.shadow.adapters else None

    def run(self) -> Tensor:
        dropping = any(adapter.dropout for adapter in self.shadow.adapters.values())
        mode = self.model.training
        self.model.train(mode and not dropping)
        try:
            return self.model(IDS).detach()
        finally:
            self.model.train(mode)

    def wanted(self, leaves: Any = None) -> Tensor:
        rows = self.rows
        if rows is None:
            return self.shadow.output(IDS, leaves=leaves)
        each = [self.shadow.output(IDS, {} if name is None else {name: 1.0}, leaves) for name in rows]
        return torch.stack([output[i] for i, output in enumerate(each)])

    @property
    def rows(self) -> list[str | None] | None:
        return next((state for _, state in self.blocks if isinstance(state, list)), None)

    @property
    def routed(self) -> str:
        return "routed" if self.rows is not None else ""

    def identities(self) -> None:
        named = dict(self.model.named_parameters(remove_duplicate=False))
        self.ids = {name: id(named[name]) for name in dict(self.shadow.plain.named_parameters(remove_duplicate=False))}
        if self.shadow.tied:  # also while a merge unties them
            state = [name for name in self.shadow.merged_paths() if name in ("embed", "head")]
            whole = "embed.weight" if state == ["head"] else "head.weight"
            if state != ["embed", "head"]:
                self.ids["embed.weight"] = self.ids["head.weight"] = self.ids[whole]
            if len(state) == 2:
                self.ids["embed.weight"] = self.ids["head.weight"] = -1

    def adopt(self, name: str, entries: list[Entry], live: bool, dropout: bool, freezes: bool = True) -> None:
        """Copies of a new adapter's tensors; checks that no others exist."""
        tensors = adapter_state_dict(self.model, name)
        wanted = {f"{e.path}.adapters.{n}" for e in entries for n in e.flags}
        assert tensors.keys() == wanted, (tensors.keys(), wanted)
        for entry in entries:
            entry.tensors = {n: tensors[f"{entry.path}.adapters.{n}"].clone() for n in entry.flags}
        self.shadow.adapters[name] = Held(entries, live, 1.0, dropout, freezes)

    def disturb(self, name: str, amount: float = 0.3) -> None:
        tensors = adapter_state_dict(self.model, name)
        with torch.no_grad():
            for entry in self.shadow.adapters[name].entries:
                for key in entry.tensors:
                    tensor = tensors[f"{entry.path}.adapters.{key}"]
                    tensor.add_(torch.randn_like(tensor), alpha=amount)
                    entry.tensors[key] = tensor.clone()

    def record_start(self, entries: list[Entry]) -> None:
        """Record the base weights from which PiSSA subtracted the best approximation of its rank."""
        for entry in entries:
            if entry.start:
                key = f"{entry.path}.weight"
                now = base_state_dict(self.model)[key].clone()
                before = self.shadow.moved.get(key, dict(self.shadow.plain.named_parameters())[key].detach())
                u, s, vh = torch.linalg.svd(before.double())
                rest = before.double() - (u[:, : entry.rank] * s[: entry.rank]) @ vh[: entry.rank]
                near(now, rest, torch.float32, f"{key} without what PiSSA took")
                self.shadow.moved[key] = now

    def any_name(self, data: Any) -> str:
        return data.draw(st.sampled_from([*self.shadow.adapters, "unknown"]))

    def unknown(self, names: Any) -> str:
        return "unknown" if any(name not in self.shadow.adapters for name in names) else ""

    # New adapters ------------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from([*NAMES, *NAMES, *BAD_NAMES]),
        stack=stacks(),
        freeze=st.sampled_from([None, None, False, True]),
    )
    def apply_rules(self, name: Any, stack: Stack, freeze: bool | None) -> None:
        self.apply(name, stack, freeze)

    def apply(self, name: Any, stack: Stack, freeze: bool | None = None) -> None:
        entries = [entry.copied() for entry in stack.entries]
        problem = self.routed or self.shadow.cannot_apply(name, entries)
        if self.attempt(problem, lambda: apply_rules(self.model, stack.rules, adapter=name, freeze=freeze)):
            self.record_start(entries)
            self.adopt(name, entries, True, stack.dropout, freeze is not False)
            self.disturb(name)

    @rule(at=st.sampled_from(["rewrite", "initialise"]), name=st.sampled_from(NAMES))
    def apply_what_fails(self, at: str, name: str) -> None:
        broken = [LoraRule("up"), Broken(["down", "last"], at=at)]
        before, output = Snapshot(self.model), self.run()
        with pytest.raises((SurgeryError, ValueError)):
            apply_rules(self.model, broken, adapter=name)
        assert not before.differences(self.model) and torch.equal(self.run(), output)

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data(), new=st.sampled_from([*NAMES, *NAMES, *BAD_NAMES]))
    def copy_adapter(self, data: Any, new: Any) -> None:
        name = self.any_name(data)
        problem = self.routed or self.unknown([name]) or self.shadow.cannot_apply(new, [], idle=True)
        problem = problem or ("start" if self.shadow.adapters[name].changed else "")
        if self.attempt(problem, lambda: copy_adapter(self.model, name, new)):
            copied_adapter = self.shadow.adapters[new] = self.shadow.adapters[name].copied()
            copied_adapter.live, copied_adapter.weight = False, 1.0

    @precondition(lambda self: self.shadow.adapters)
    @rule(
        data=st.data(),
        method=st.sampled_from(["linear", "cat", "svd"]),
        into=st.sampled_from([*NAMES, *NAMES, *BAD_NAMES]),
    )
    def combine(self, data: Any, method: Any, into: Any) -> None:
        weights = {name: data.draw(WEIGHTS) for name in data.draw(some([*self.shadow.adapters, *self.shadow.adapters]))}
        problem = self.routed or self.shadow.cannot_combine(weights, into, method)
        if not self.attempt(problem, lambda: combine(self.model, weights, into, method)):
            return
        tensors, entries = adapter_state_dict(self.model, into), self.shadow.combined_entries(weights)
        dropout = any(self.shadow.adapters[name].dropout for name in weights)
        for entry in entries:
            shares = self.shadow.shares(weights, entry)
            alone = len(shares) == 1 and shares[0][0] == 1
            names = dict.fromkeys(name for _, e in shares for name in e.flags)
            if entry.kind == "lora" and not (alone and entry.dora):
                names.pop("magnitude", None)
                entry.scale, entry.dora = 1.0, False
                entry.rank = tensors[f"{entry.path}.adapters.A"].shape[0]
            entry.flags = dict.fromkeys(names, True)
        freezes = any(self.shadow.adapters[name].freezes for name in weights)
        self.adopt(into, entries, False, dropout, freezes)
        for entry in entries:
            for label, have, want in self.shadow.sums(weights, entry, method):
                near(have, want, self.dtype, f"{label} at {entry.path}")

    @precondition(lambda self: self.saved)
    @rule(data=st.data(), name=st.sampled_from([*NAMES, *BAD_NAMES]))
    def load(self, data: Any, name: Any) -> None:
        file = data.draw(st.sampled_from(sorted(self.saved)))
        saved_adapter, entries = self.saved[file][0], [entry.copied() for entry in self.saved[file][0].entries]
        problem = self.routed or self.shadow.cannot_apply(name, entries)
        if self.attempt(problem, lambda: load_adapter(self.model, self.folder / file, name)):
            for entry in entries:
                entry.flags = dict.fromkeys(entry.flags, True)
            self.record_start(entries)
            self.adopt(name, entries, True, saved_adapter.dropout)
            for entry, saved in zip(entries, saved_adapter.entries, strict=True):
                assert all(torch.equal(entry.tensors[n], saved.tensors[n]) for n in saved.tensors)

    # Switching adapters ----------------------------------------------------------------------------------------

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data(), how=st.sampled_from(["one", "list", "mapping", "number", "nan", "few", "twice", "other"]))
    def activate(self, data: Any, how: str) -> None:
        names = data.draw(some([*self.shadow.adapters, *self.shadow.adapters, "unknown"]))
        weights: Any = [data.draw(WEIGHTS) for _ in names]
        problem = self.routed or self.unknown(names)
        if how == "one":
            weights = None
        elif how == "mapping":
            weights = dict(zip(names, weights, strict=True))
        elif how == "number":
            weights = weights[0]
        elif how == "nan":
            weights, problem = [float("nan"), *weights[1:]], "nan"
        elif how == "few":
            weights, problem = weights[1:], "too few"
        elif how == "twice":
            names, weights, problem = [*names, names[0]], None, "twice"
        elif how == "other":
            weights, problem = {"unknown": 1.0}, "unknown"
        live = dict.fromkeys(names, 1.0) if weights is None else {}
        if not problem and weights is not None:
            listed = (
                list(weights.values())
                if isinstance(weights, dict)
                else [weights] * len(names)
                if how == "number"
                else weights
            )
            live = {name: float(weight) for name, weight in zip(names, listed, strict=True)}
        problem = problem or self.shadow.cannot_switch(live)
        if self.attempt(problem, lambda: activate(self.model, names, weights)):
            self.record_switch(live)

    def record_switch(self, live: dict[str, float]) -> None:
        self.unmerged = None
        for name, adapter in self.shadow.adapters.items():
            adapter.live, adapter.weight = name in live, live.get(name, 1.0)

    @precondition(lambda self: self.shadow.adapters)
    @rule()
    def deactivate(self) -> None:
        if self.attempt(self.routed or self.shadow.cannot_switch({}), lambda: deactivate(self.model)):
            self.record_switch({})

    @precondition(lambda self: self.shadow.adapters and len(self.blocks) < 3)
    @rule(data=st.data(), none=st.booleans())
    def enter_using(self, data: Any, none: bool) -> None:
        names = [] if none else data.draw(some([*self.shadow.adapters, *self.shadow.adapters, "unknown"]))
        live = {name: float(data.draw(WEIGHTS)) for name in names}
        problem = self.routed or self.unknown(names) or self.shadow.cannot_switch(live)
        context, before = using(self.model, None if none else names, None if none else live), self.shadow.live()
        if self.attempt(problem, context.__enter__):
            self.record_switch(live)
            self.blocks.append((context, before))

    @precondition(lambda self: self.shadow.adapters and len(self.blocks) < 3)
    @rule(data=st.data(), alone=st.booleans())
    def enter_route(self, data: Any, alone: bool) -> None:
        row_strategy = st.sampled_from([*self.shadow.adapters, *self.shadow.adapters, None, "unknown"])
        rows = [data.draw(row_strategy)] * 3 if alone else [data.draw(row_strategy) for _ in range(3)]
        problem = self.routed or self.unknown([name for name in rows if name]) or self.shadow.cannot_route(rows)
        context = route(self.model, rows)
        if self.attempt(problem, context.__enter__):
            self.blocks.append((context, rows))

    @precondition(lambda self: self.blocks)
    @rule(failing=st.booleans())
    def leave(self, failing: bool) -> None:
        context, state = self.blocks.pop()
        error = ValueError("on purpose") if failing else None
        if isinstance(state, list):
            assert not context.__exit__(type(error) if error else None, error, None)
            return
        live = {name: weight for name, weight in state.items() if name in self.shadow.adapters}
        problem = self.shadow.cannot_switch(live, explicit=False)
        step = lambda: context.__exit__(type(error) if error else None, error, None)  # noqa: E731
        if self.attempt(problem, step):
            self.record_switch(live)

    @precondition(lambda self: self.blocks and self.shadow.adapters)
    @rule(data=st.data())
    def meddle(self, data: Any) -> None:
        """Another thread can not change the model; nor can this thread inside a block."""
        name = data.draw(st.sampled_from(list(self.shadow.adapters)))
        verb = data.draw(st.sampled_from([activate, remove, merge]))
        refused = []

        def other() -> None:
            try:
                verb(self.model, name)
            except SurgeryError as error:
                refused.append(error)

        thread = threading.Thread(target=other)
        before = Snapshot(self.model)
        thread.start()
        thread.join()
        assert refused and not before.differences(self.model)
        self.attempt("a block is open", lambda: rename_adapter(self.model, name, "new"))

    # Merging ------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data(), keep=st.sampled_from(["record", "copy"]), untie=st.booleans(), safe=st.booleans())
    def merge(self, data: Any, keep: Any, untie: bool, safe: bool) -> None:
        all_live = data.draw(st.booleans())
        named = None if all_live else data.draw(some([*self.shadow.adapters, *self.shadow.adapters, "unknown"]))
        names = list(self.shadow.live()) if named is None else named
        problem = self.routed or self.unknown(names) or self.shadow.cannot_merge(names, untie)
        if problem == "merged" and set(names) == set(self.shadow.merged):
            problem = "so already"
        output = self.run()
        if self.attempt(problem, lambda: merge(self.model, named, keep=keep, untie=untie, safe=safe)):
            self.shadow.merged = tuple(name for name in self.shadow.adapters if name in names)
            self.unmerged = output if names and set(names) <= set(self.shadow.live()) else None
            classes = [type(self.model.get_submodule(path)) for path in self.shadow.merged_paths()]
            if set(self.shadow.live()) <= set(names):
                assert all(cls.__module__.startswith("torch.nn") for cls in classes)

    @precondition(lambda self: self.shadow.adapters)
    @rule()
    def unmerge(self) -> None:
        problem = self.routed or ("" if self.shadow.merged_paths() else "so already")
        if self.attempt(problem, lambda: unmerge(self.model)):
            self.shadow.merged = ()
            if self.unmerged is not None:
                assert torch.equal(self.run(), self.unmerged)
            self.unmerged = None

    @precondition(lambda self: self.shadow.merged)
    @rule(data=st.data())
    def unmerge_what_was_changed(self, data: Any) -> None:
        path = data.draw(st.sampled_from(sorted(self.shadow.merged_paths())))
        weight = self.model.get_submodule(path).weight
        weight_copy = weight.detach().clone()
        with torch.no_grad():
            weight.view(-1)[0] += 1
        self.attempt("changed while merged", lambda: unmerge(self.model))
        with torch.no_grad():
            weight.copy_(weight_copy)

    @precondition(lambda self: self.shadow.adapters)
    @rule()
    def forget(self) -> None:
        shadow, merged = self.shadow, self.shadow.merged
        paths = shadow.merged_paths()
        staying = {
            e.path
            for name, adapter in shadow.adapters.items()
            if name not in merged
            for e in adapter.entries
            if e.start
        }
        problem = self.routed or ("" if merged else "nothing is merged") or ("start" if staying & paths else "")
        output = None if problem else self.run()
        if not self.attempt(problem, lambda: forget(self.model)):
            return
        assert output is not None and torch.equal(self.run(), output)
        self.unmerged = None
        plain: Any = shadow.plain
        if shadow.tied and paths & {"embed", "head"}:
            plain.head.weight = nn.Parameter(plain.head.weight.detach().clone(), plain.head.weight.requires_grad)
        with torch.no_grad():
            for key, tensor in base_state_dict(self.model).items():
                if key.partition(".")[0] in paths:
                    plain.get_parameter(key).copy_(tensor)
                    shadow.moved.pop(key, None)
        for name in merged:
            del shadow.adapters[name]
        shadow.merged = ()
        self.saved.clear()  # the files are for another base
        self.identities()

    # Changing adapters ----------------------------------------------------------------------------------------------

    @rule()
    def train_a_step(self) -> None:
        """One step of SGD with gradients that the shadow model computes, too."""
        names = [name for name in self.rows or self.shadow.live() if name and name not in self.shadow.merged]
        entries = [(name, e) for name in dict.fromkeys(names) for e in self.shadow.adapters[name].entries]
        trained = [(name, e, key) for name, e in entries for key in e.tensors if e.flags[key]]
        leaves = {id(e.tensors[key]): e.tensors[key].double().requires_grad_() for _, e, key in trained}
        if not trained:
            return
        adapter_tensors = [
            getattr(getattr(self.model.get_submodule(e.path).adapters, name), key) for name, e, key in trained
        ]
        mode = self.model.training
        self.model.train(mode and not any(self.shadow.adapters[name].dropout for name in names))
        grads = torch.autograd.grad(self.model(IDS).square().sum(), adapter_tensors, allow_unused=True)
        self.model.train(mode)
        wanted = torch.autograd.grad(self.wanted(leaves).square().sum(), list(leaves.values()), allow_unused=True)
        for (_, entry, key), tensor, grad, want in zip(trained, adapter_tensors, grads, wanted, strict=True):
            grad, want = (torch.zeros(tensor.shape) if g is None else g for g in (grad, want))
            near(grad, want, self.dtype, f"gradient of {key} at {entry.path}")
            with torch.no_grad():
                tensor -= 0.05 * grad / (1 + grad.norm())
            entry.tensors[key] = tensor.detach().clone()
        self.unmerged = None

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data(), lacking=st.booleans())
    def hotswap(self, data: Any, lacking: bool) -> None:
        name = self.any_name(data)
        adapter = self.shadow.adapters.get(name, Held([]))
        new = {
            f"{e.path}.adapters.{n}": torch.randn_like(t) * 0.3 for e in adapter.entries for n, t in e.tensors.items()
        }
        if lacking and new:
            new.popitem()
        merged = name in self.shadow.merged and self.shadow.merged_paths()
        problem = self.routed or self.unknown([name]) or ("merged" if merged else "")
        problem = problem or ("start" if adapter.changed else "") or ("tensors lack" if lacking else "")
        if self.attempt(problem, lambda: hotswap(self.model, name, new)):
            for entry in adapter.entries:
                entry.tensors = {n: new[f"{entry.path}.adapters.{n}"] for n in entry.tensors}
            self.unmerged = None

    @precondition(lambda self: self.shadow.live() and not self.rows)
    @rule(data=st.data())
    def freeze_or_thaw(self, data: Any) -> None:
        name = data.draw(st.sampled_from(sorted(self.shadow.live())))
        choose = data.draw(st.sampled_from([min, max]))
        for entry in self.shadow.adapters[name].entries:
            key = choose(entry.flags)
            entry.flags[key] = not entry.flags[key]
            getattr(getattr(self.model.get_submodule(entry.path).adapters, name), key).requires_grad_(entry.flags[key])

    @rule()
    def other_mode(self) -> None:
        self.model.train(not self.model.training)
        self.shadow.plain.train(self.model.training)

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data(), new=st.sampled_from([*NAMES, *NAMES, *BAD_NAMES]))
    def rename(self, data: Any, new: Any) -> None:
        old = self.any_name(data)
        problem = self.unknown([old]) or ("" if new == old else self.shadow.cannot_apply(new, [], idle=True))
        problem = problem or ("a block is open" if self.blocks and new != old else "")
        if self.attempt(problem, lambda: rename_adapter(self.model, old, new)):
            self.shadow.adapters = {new if n == old else n: adapter for n, adapter in self.shadow.adapters.items()}
            self.shadow.merged = tuple(new if name == old else name for name in self.shadow.merged)

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data())
    def remove(self, data: Any) -> None:
        named = data.draw(some([*self.shadow.adapters, *self.shadow.adapters, "unknown"]) | st.none())
        names = list(self.shadow.adapters) if named is None else named
        problem = self.routed or self.unknown(names) or self.shadow.cannot_remove(names)
        if self.attempt(problem, lambda: remove(self.model, named)):
            self.record_removal(names)

    def record_removal(self, names: list[str]) -> None:
        self.unmerged = None
        for name in names:
            for entry in self.shadow.adapters.pop(name).entries:
                key, others = f"{entry.path}.weight", self.shadow.adapters.values()
                if entry.start and not any(
                    e.start and e.path == entry.path for adapter in others for e in adapter.entries
                ):
                    self.shadow.moved.pop(key, None)
                elif entry.start:
                    self.shadow.moved[key] = base_state_dict(self.model)[key].clone()

    # Models and files ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.shadow.adapters)
    @rule(data=st.data(), format=st.sampled_from(["auto", "surgery"]), file=st.sampled_from(["one", "two"]))
    def save(self, data: Any, format: Any, file: str) -> None:
        name = self.any_name(data)
        if self.attempt(
            self.unknown([name]), lambda: save_adapter(self.model, self.folder / file, name, format=format)
        ):
            self.saved[file] = self.shadow.adapters[name].copied(), sorted(self.shadow.adapters)

    @rule(how=st.sampled_from(["deepcopy", "torch.save"]))
    def go_on_with_a_copy(self, how: str) -> None:
        before = Snapshot(self.model)
        if how == "deepcopy":
            other = copy.deepcopy(self.model)
        else:
            file = io.BytesIO()
            torch.save(self.model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert not before.differences(self.model)
        self.close()
        self.model = other
        self.identities()

    def close(self) -> None:
        while self.blocks:
            context, _ = self.blocks.pop()
            try:
                context.__exit__(None, None, None)
            except SurgeryError:
                pass

    # Checks after each step -----------------------------------------------------------------------------------

    @invariant()
    def it_computes_what_it_should(self) -> None:
        if not hasattr(self, "checked"):
            return
        shadow, output = self.shadow, self.run()
        if self.dtype != torch.bfloat16:  # for bfloat16, only bits are compared
            near(output, self.wanted().detach(), self.dtype, "output")
        if not shadow.live() and not shadow.merged and not shadow.moved and not self.rows:
            mode = shadow.plain.training
            assert torch.equal(output, shadow.plain.train(self.model.training)(IDS)), "not the base's bits"
            shadow.plain.train(mode)

    @invariant()
    def it_tells_what_it_is(self) -> None:
        if not hasattr(self, "checked") or not self.shadow.adapters:
            return
        shadow, adapters_by_name = self.shadow, adapters(self.model)
        assert list(adapters_by_name) == list(shadow.adapters) and active(self.model) == tuple(shadow.live())
        for name, expected in shadow.adapters.items():
            adapter = adapters_by_name[name]
            assert (adapter.live, adapter.merged, adapter.weight) == (
                expected.live,
                name in shadow.merged,
                expected.weight,
            )
            assert set(adapter.sites) == expected.paths
            assert adapter.parameters == sum(t.numel() for e in expected.entries for t in e.tensors.values())

    @invariant()
    def its_tensors_are_what_they_were(self) -> None:
        if not hasattr(self, "checked"):
            return
        shadow = self.shadow
        flags = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        for name, adapter in shadow.adapters.items():
            tensors = adapter_state_dict(self.model, name)
            for entry in adapter.entries:
                for key, tensor in entry.tensors.items():
                    assert torch.equal(tensors[f"{entry.path}.adapters.{key}"], tensor), f"{name}: {entry.path} {key}"
                    training = (adapter.live or name in (self.rows or ())) and entry.flags[key]
                    assert flags[f"{entry.path}.adapters.{name}.{key}"] == training, f"{name}: {entry.path} {key}"
        plain = dict(shadow.plain.state_dict())
        base = base_state_dict(self.model)
        assert list(base) == list(plain)
        for key, tensor in base.items():
            if key.partition(".")[0] not in shadow.merged_paths():
                assert torch.equal(tensor, shadow.moved[key] if key in shadow.moved else plain[key]), key
        frozen = any(adapter.freezes for adapter in shadow.adapters.values())
        for name, parameter in shadow.plain.named_parameters():
            assert flags[name] == (parameter.requires_grad and not frozen), name

    def teardown(self) -> None:
        if not hasattr(self, "checked"):
            return
        self.close()
        if self.shadow.adapters:
            if self.shadow.merged_paths():
                unmerge(self.model)
            remove(self.model)
        expected, names = Snapshot(self.shadow.plain), self.ids
        for name, number in names.items():
            fact = expected.facts[f"parameter {name}"]
            if number != -1:
                expected.facts[f"parameter {name}"] = (number, *fact[1:])
            else:
                del expected.facts[f"parameter {name}"]
        differences = expected.differences(self.model)
        assert not [line for line in differences if " is new: " not in line or not line.startswith("parameter ")], (
            differences
        )
        assert (self.model.head.weight is self.model.embed.weight) == self.shadow.tied
        shutil.rmtree(self.folder, ignore_errors=True)
        DONE["examples"] += 1


_WITHIN = {torch.float64: 1e-9, torch.float32: 2e-3, torch.bfloat16: 1.0}


def near(actual: Tensor, wanted: Tensor, dtype: torch.dtype, label: str = "") -> None:
    """Compare by the norm: a small entry may be off by the rounding of the large entries."""
    if dtype == torch.bfloat16:
        return
    error = (actual.double() - wanted.double()).norm() / (1 + wanted.double().norm())
    assert error < _WITHIN[dtype], f"{label}: off by {error:.3g}"


configure(Adapters, EXAMPLES, 40)


class TestAdapters(Adapters.TestCase):
    @classmethod
    def tearDownClass(cls) -> None:
        print(dict(DONE))
