"""Runs the examples of a plan and checks what its rules meet there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import MatchError, SurgeryError
from surgery.forward.tape import Layer
from surgery.forward.tape_steps import NOTHING
from surgery.planning.call_readiness import Readiness, trace_graphs
from surgery.planning.example_check import repeated_write, verify_graph
from surgery.planning.plan import Plan
from surgery.planning.resized_examples import observe_resized
from surgery.state.records import site_state
from surgery.tracing.example_call import observe

__all__ = ["check_examples"]


def check_examples(plan: Plan) -> None:
    """Run the examples: each step's module must be called, and its graph must give the bits of its forward."""
    for index, example in enumerate(plan.examples, 1):
        try:
            plan.observations.append(
                observe(plan.model, example, {id(s.module): s.module for s in plan.steps}.values())
            )
        except SurgeryError as error:
            if len(plan.examples) > 1:
                error.where = error.where or f"example {index} of {len(plan.examples)}"
            plan.problems.append(error)
            return
    verified: set[tuple] = set()
    for step in plan.steps:
        call = next(
            (
                observation.calls[id(step.module)]
                for observation in plan.observations
                if observation.reached(step.module)
            ),
            None,
        )
        if call is None:
            plan.problems.append(
                MatchError(
                    f"the example call never reaches a target of {step.rule.label}",
                    where=step.path,
                    why="the model does not call this module, or reads its parameters directly",
                    fix="exclude it, or pass an example that uses it",
                )
            )
        elif (problem := _repeated_write(step, plan, call)) is not None:
            plan.problems.append(problem)
        elif not step.own.opaque and step.own.key not in verified and site_state(step.module) is None:
            verified.add(step.own.key)
            try:
                verify_graph(step.module, step.own, call, step.path)
            except SurgeryError as error:
                plan.problems.append(error)
    compared = {id(step.module): step.module for step in plan.steps if step.rule.equivalence() is not None}
    for example in plan.examples if compared and not plan.problems else ():
        seed = " ".join(f"{step.rule.label} {step.path}" for step in plan.steps)
        plan.resized += observe_resized(plan.model, example, compared.values(), seed)
    if not plan.problems:
        plan.kinds += trace_graphs(plan.steps, plan.observations)
        plan.warnings += _unready(plan.kinds)


def _unready(kinds: Sequence[Readiness]) -> list[str]:
    """Warnings for the kinds of calls whose graph can't be traced."""
    kinds_by: dict[tuple[str, str], list[str]] = {}
    for readiness in kinds:
        if readiness.reason:
            kinds_by.setdefault((readiness.type, readiness.reason), []).append(readiness.kind)
    return [
        f"rules look into {name}.forward, which can't be held as a graph in calls in {'; '.join(words)}: {reason}"
        for (name, reason), words in kinds_by.items()
    ]


def _repeated_write(step: PlannedRule, plan: Plan, call: tuple[tuple, dict, Any]) -> SurgeryError | None:
    """The problem if a rule runs a module's forward more than once and the example shows that the forward writes."""
    own_calls = any(op.kind == "own" and op.kwargs == NOTHING for op in step.tape.steps)
    if not step.own.opaque or not own_calls:
        return None
    layer = Layer(plan.adapter, step.rule.label, step.tape)
    return repeated_write(step.module, step.own, layer, call, step.path)
