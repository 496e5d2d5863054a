"""`Plan`: which rule goes to which module, what it creates there, and every problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.authoring.site_facts import INLINED
from surgery.errors import PlanError, SurgeryError, abbreviate, collapse_similar
from surgery.packed.packed_map import packed_by_name
from surgery.patterns.wrappers import submodule
from surgery.planning.call_readiness import Readiness
from surgery.planning.rank_check import rank_notes
from surgery.results import Displayed, Report, Table
from surgery.state.adapter_tensors import is_adapter_key
from surgery.state.records import model_state
from surgery.state.restructuring import Restructuring
from surgery.state.running_statistics import module_names
from surgery.tracing.example_call import Observation, observe
from surgery.transaction.object_contents import copied

__all__ = ["Plan"]


@dataclass
class Plan(Displayed, Report):
    """The steps, warnings and problems of a call of `apply_rules`.

    `print(plan)` shows a table. `to_dict()`, `to_json()` and `to_rows()` give plain data. A plan is true if it does not
    have problems.

    Attributes:
        steps: one rule at one site, each with its tensors.
        problems: every reason why `apply_rules` would fail.
        warnings: texts that `apply_rules` warns with.
        added, trainable: the numbers of parameters that the rules add, and of those that train.
        freeze: the argument of the call.
        freezes: whether the adapter freezes the base.
        switches: attributes that are set while adapted, so that an inference fast path does not bypass a site.
        statistics: the base's modules whose running statistics training changes; `remove` restores them.
        structure: the structural rules with their edits, in order.
        kinds: for rules that look into forwards, the kinds of calls with a graph, and the reason for those without.
    """

    model: nn.Module
    adapter: str
    rules: tuple[Rule, ...] = ()
    steps: list[PlannedRule] = field(default_factory=list)
    problems: list[SurgeryError] = field(default_factory=list)
    switches: dict[str, tuple[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    examples: list[Any] = field(default_factory=list)
    freeze: bool | None = None
    seen: dict[tuple[type, int], Observation] = field(default_factory=dict)
    kinds: list[Readiness] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    whole_graphs: list[Any] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    resized: list[tuple[str, Observation]] = field(default_factory=list)
    claims: dict[int, dict[str, str]] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    structure: list[Restructuring] = field(default_factory=list)

    def __bool__(self) -> bool:
        return not self.problems

    @property
    def added(self) -> int:
        stored = (tensor for record in self.structure for tensor in record.tensors)
        return sum(step.added for step in self.steps) + sum(math.prod(tensor.shape) for tensor in stored)

    @property
    def trainable(self) -> int:
        shared = {tie: spec for step in self.steps for spec in step.specs if (tie := spec.tie(step.rule)) is not None}
        own = (spec for step in self.steps for spec in step.specs if spec.tied is None)
        trained = [spec.shape for spec in (*own, *shared.values()) if spec.trainable]
        return sum(map(math.prod, (*trained, *self._trained_structure)))

    @property
    def _trained_structure(self) -> list[tuple[int, ...]]:
        """The shapes of the trained tensors that structural rules make."""
        return [tensor.shape for record in self.structure for tensor in record.tensors if tensor.trainable]

    @property
    def freezes(self) -> bool:
        """Whether the adapter freezes the base: `freeze` if given, otherwise whether a rule adds something to train."""
        if self.freeze is not None:
            return self.freeze
        return bool(self._trained_structure) or any(spec.trainable for step in self.steps for spec in step.specs)

    @property
    def frozen_by(self) -> list[str]:
        """The adapters on the model that freeze the base."""
        state = model_state(self.model) if isinstance(self.model, nn.Module) else None
        return state.freezing if state is not None else []

    @property
    def notes(self) -> list[str]:
        """Hints that are neither problems nor warnings."""
        notes = rank_notes(self.steps)
        frozen = self.freezes or self.frozen_by
        if not self.steps or self.trainable or not frozen or _trains(self.model):
            return notes
        return [
            *notes,
            "nothing trains: the base is frozen, and these rules add no parameter that trains; "
            "add a rule that trains, or unfreeze base parameters after applying",
        ]

    def example_of(self, module: nn.Module) -> tuple[tuple, dict[str, Any]] | None:
        """Copies of a module's arguments in the first example that calls it; one run for all modules of a class."""
        kind = type(module)
        for index in range(len(self.examples)):
            if (kind, index) not in self.seen:
                alike = [other for other in self.model.modules() if type(other) is kind]
                self.seen[kind, index] = self.observed(index, alike)
            observation = self.seen[kind, index]
            if observation.reached(module):
                return copied(observation.calls[id(module)][:2])
        return None

    def observed(self, index: int, watched: Iterable[nn.Module]) -> Observation:
        """Run one example and observe modules; an error names the example if there are several."""
        try:
            return observe(self.model, self.examples[index], watched)
        except SurgeryError as error:
            if len(self.examples) > 1:
                error.where = error.where or f"example {index + 1} of {len(self.examples)}"
            raise

    def owners_of(self, path: str) -> tuple[nn.Module, ...]:
        """The modules that contain the module at a path, the model first."""
        names = path.split(".") if path else []
        return tuple(submodule(self.model, ".".join(names[:depth])) for depth in range(len(names)))

    def raise_problems(self) -> None:
        if self.problems:
            raise PlanError(self.problems) from next((p.__cause__ for p in self.problems if p.__cause__), None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data: adapter, steps, counts, notes, warnings and problems."""
        return {
            "adapter": self.adapter,
            "steps": [
                {
                    "rule": step.rule.name,
                    "site": step.path,
                    "type": type(step.module).__name__,
                    "aliases": list(step.aliases),
                    "kind": "opaque" if step.own.opaque else "traced",
                    "why_opaque": step.own.why,
                    "tensors": {spec.name: list(spec.shape) for spec in step.specs},
                    "added": step.added,
                    "trainable": step.trainable,
                    "matches": [list(match.nodes) for match in step.matches],
                    "inlined": list(step.facts.get(INLINED, ())),
                }
                for step in self.steps
            ],
            "structure": [
                {"rule": record.rule.name, "site": path, "type": kind, "change": change}
                for record in self.structure
                for path, kind, change in record.steps
            ],
            "added": self.added,
            "trainable": self.trainable,
            "freezes": self.freezes,
            "notes": self.notes,
            "statistics": list(self.statistics),
            "kinds": [
                {"type": readiness.type, "kind": readiness.kind, "reason": readiness.reason} for readiness in self.kinds
            ],
            "warnings": list(self.warnings),
            "problems": [str(problem) for problem in self.problems],
        }

    def to_rows(self) -> list[dict[str, Any]]:
        """A row for each rule at each site: rule, site, type, kind, tensors, added, trainable."""
        columns = ("rule", "site", "type", "kind", "tensors", "added", "trainable")
        data = self.to_dict()
        rows = [{name: step[name] for name in columns} for step in data["steps"]]
        rows = [
            {**row, "tensors": " ".join(f"{name}{shape}" for name, shape in row["tensors"].items())} for row in rows
        ]
        structure = [{**step, "kind": "structure", "tensors": step["change"]} for step in data["structure"]]
        return [{name: row.get(name, 0) for name in columns} for row in structure] + rows

    def _display_parts(self) -> list[str | Table]:
        structure = [
            (record.rule.label, path or "(the model itself)", kind, change, f"{trained:,}")
            for record in self.structure
            for (path, kind, change), trained in zip(record.steps, _trained_in(record), strict=True)
        ]
        edits = len(self.steps) + len(structure)
        head = f"adapter {self.adapter!r}: {edits} edits, {self.trainable:,} trainable parameters"
        head += f"; the base {self._base_state()}"
        parts: list[str | Table] = [
            head,
            Table(["rule", "site", "type", "tensors", "trainable"], structure + _rows(self.steps)),
        ]
        parts += collapse_similar(_matches(self.steps))
        shared = [f"{step.path} is also {', '.join(step.aliases)}" for step in self.steps if step.aliases]
        parts += [f"shared: {line}" for line in collapse_similar(list(dict.fromkeys(shared)))]
        switched = [(".".join(filter(None, (path, name))), value) for path, (name, value) in self.switches.items()]
        parts += [f"set while adapted: {name} = {value!r}" for name, value in switched]
        ready: dict[str, list[str]] = {}
        for readiness in self.kinds:
            if not readiness.reason:
                ready.setdefault(readiness.type, []).append(readiness.kind)
        parts += [f"ready: calls of {name} in {'; '.join(kinds)}" for name, kinds in ready.items()]
        parts += [f"note: {note}" for note in self.notes]
        if self.statistics:
            names = module_names(self.statistics)
            parts.append(f"training moves the running statistics of {names}: remove puts them back")
        parts += [f"warning: {warning}" for warning in self.warnings]
        parts += [f"problem: {problem}" for problem in self.problems]
        return parts

    __repr__ = Displayed.__str__  # instead of the dataclass's

    def _base_state(self) -> str:
        if self.freezes:
            return "is frozen"
        by = abbreviate(self.frozen_by, "adapters")
        return f"stays frozen by {by}" if by else "is not frozen"


def _matches(steps: Sequence[PlannedRule]) -> list[str]:
    """A line for each site with replaced matches: what is replaced, what stays, and which children are inlined."""
    lines = []
    for step in steps:
        if step.matches:
            parts = [f"replaces {', '.join(match.nodes)}" for match in step.matches]
            kept = dict.fromkeys(name for match in step.matches for name in match.shared)
            parts += [f"still computes {', '.join(kept)} for other users"] if kept else []
            inlined = step.facts.get(INLINED, ())
            parts += [f"inlines {abbreviate(inlined)}"] if inlined else []
            lines.append(f"{step.rule.label} at {step.path or 'the model itself'}: {'; '.join(parts)}")
    return lines


def _rows(steps: Sequence[PlannedRule]) -> list[tuple[str, str, str, str, str]]:
    """The rows of a plan's table: one for each site, or one for more than five equal sites of a rule."""
    groups: dict[tuple, list[PlannedRule]] = {}
    for step in steps:
        kind = type(step.module).__name__ + _form_of(step)
        tensors = " ".join(f"{spec.name}{list(spec.shape)}" for spec in step.specs)
        groups.setdefault((id(step.rule), step.rule.label, kind, tensors), []).append(step)
    rows: list[tuple[int, tuple[str, str, str, str, str]]] = []
    order = {id(step): index for index, step in enumerate(steps)}
    for (_, label, kind, tensors), alike in groups.items():
        for some in [alike] if len(alike) > 5 else [[step] for step in alike]:
            where = abbreviate([step.path or "(the model itself)" for step in some])
            trained = f"{sum(step.trainable for step in some):,}"
            rows.append((order[id(some[0])], (label, where, kind, tensors, trained)))
    return [row for _, row in sorted(rows)]


def _form_of(step: PlannedRule) -> str:
    if packed := packed_by_name(step.module):
        return f" ({next(iter(packed.values())).layout})"
    return " (opaque)" if step.own.opaque else ""


def _trained_in(record: Restructuring) -> list[int]:
    """How many trained parameters each step of a structural rule makes: those below its path, or on its first line."""
    counts = [0] * len(record.steps)
    for tensor in record.tensors:
        if tensor.trainable and counts:
            near = [index for index, (path, *_) in enumerate(record.steps) if tensor.key.startswith(f"{path}.")]
            counts[near[0] if near else 0] += math.prod(tensor.shape)
    return counts


def _trains(model: nn.Module) -> bool:
    """Whether an adapter on the model has parameters that train."""
    return any(parameter.requires_grad and is_adapter_key(model, name) for name, parameter in model.named_parameters())
