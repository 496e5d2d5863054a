"""The check after insertion: the rewritten model runs on the examples, and `identity` rules leave its outputs."""

from __future__ import annotations

import inspect
import traceback

from surgery.errors import SurgeryError
from surgery.planning.plan import Plan
from surgery.tracing.example_call import call, equal
from surgery.weaving.error_hints import HINT

__all__ = ["check_outputs"]


def check_outputs(plan: Plan) -> None:
    """Run the rewritten model on the examples. If all rules say `identity = True`, the outputs must be the same."""
    names = ", ".join(dict.fromkeys(step.rule.label for step in plan.steps))
    for example, observation in zip(plan.examples, plan.observations, strict=True):
        try:
            output = call(plan.model, example, observation.random)
        except SurgeryError as error:
            notes = getattr(error.__cause__ or error, "__notes__", [])
            own = error.__cause__ is None  # raised inside of the forward, and not by the call
            raise SurgeryError(
                f"the model rewritten by {names} fails on the example call",
                where="; ".join([*notes[:1], *_rewrite_lines(plan, error)]) or None,
                why=": ".join(filter(None, (error.what, error.why))) if own else error.why,
                fix=next((note for note in notes if note.startswith(HINT)), "").removeprefix(HINT)
                or "correct the rule's rewrite, such as the shapes of its tensors",
            ) from error
        if all(step.rule.identity for step in plan.steps) and not equal(output, observation.output):
            raise SurgeryError(
                f"{names} changed the model's output at initialisation",
                why="the rule says identity = True, and on the example call the output differs",
                fix="correct the rule's initial values, or remove identity = True from the rule",
            )


def _rewrite_lines(plan: Plan, error: SurgeryError) -> list[str]:
    """The generated line that failed, and where the rewrite of its rule begins in the user's code."""
    frames = traceback.extract_tb((error.__cause__ or error).__traceback__)
    line = next((frame.line for frame in reversed(frames) if frame.filename.startswith("<surgery ")), None) or ""
    code, _, label = line.rpartition("  # ")
    for step in plan.steps:
        if code and label == f"{step.rule.label} [{plan.adapter}]":
            rewrite = inspect.unwrap(type(step.rule).rewrite).__code__
            statement = code.partition(";")[0].strip()
            return [f"`{statement}` in {label.split()[0]}.rewrite ({rewrite.co_filename}:{rewrite.co_firstlineno})"]
    return []
