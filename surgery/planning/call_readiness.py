"""Kinds of calls are made ready when rules that look into forwards are applied.

The graphs of evaluation and training, with and without gradients, are traced for what the examples show: once for
modules that are alike. One site of each gets its variants, so that a rule that does something else in training is told
then. The other sites make theirs of the same graphs, without a trace, when they are called or compiled.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from surgery.errors import SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.state.records import site_state
from surgery.tracing.call_kind import kind_of_call, kind_told
from surgery.tracing.example_call import Observation, copied
from surgery.tracing.traced_forward import known_forwards, trace_anew
from surgery.transaction.neutral_context import ambient
from surgery.weaving.call_variants import leaves_of, make_ready
from surgery.weaving.recording import PlannedRule

__all__ = ["Readiness", "graphs_ready", "sites_ready"]


@dataclass(frozen=True)
class Readiness:
    """Whether the graph for calls of a kind is there: the module's class, the kind in words, and why it is not."""

    type: str
    kind: str
    reason: str = ""


def graphs_ready(steps: Sequence[PlannedRule], observations: Sequence[Observation]) -> list[Readiness]:
    """Trace what the rules that look into forwards need, for each kind of call that is to be expected."""
    found: dict[Readiness, None] = {}
    for step, given in _calls(steps, observations, by_rule=False):
        module, base = step.module, step.own.base
        for words in _modes(module):
            own, kind, reason = own_forward(module, base), kind_of_call(module, given), ""
            leaves = leaves_of([other for other in steps if other.module is module])
            if not any(held.fits(module) for held in known_forwards(module, own, kind, leaves)):
                try:
                    trace_anew(module, own, given, kind, leaves)
                except SurgeryError as error:
                    reason = error.why or error.what
            found[Readiness(base.__name__, words, reason)] = None
    return list(found)


def sites_ready(steps: Sequence[PlannedRule], observations: Sequence[Observation], told: Collection[str]) -> list[str]:
    """Make the variants of the first of the sites that share graphs; what went wrong, in words.

    `told`: what the plan warned of.
    """
    problems: dict[str, None] = {}
    for step, given in _calls(steps, observations, by_rule=True):
        module, state = step.module, site_state(step.module)
        assert state is not None
        for words in _modes(module):
            own, kind, leaves = own_forward(module, state.base), kind_of_call(module, given), leaves_of(state.live())
            if not any(held.fits(module) for held in known_forwards(module, own, kind, leaves)):
                continue  # told by the plan
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    make_ready(module, state, given)
                except SurgeryError as error:
                    why = f": {error.why}" if error.why else ""
                    problems[f"{step.rule.label} at {step.path} in calls in {words}: {error.what}{why}"] = None
            problems.update({text: None for one in caught if (text := str(one.message)) not in told})
    return list(problems)


def _calls(
    steps: Iterable[PlannedRule], observations: Sequence[Observation], by_rule: bool
) -> Iterator[tuple[PlannedRule, tuple]]:
    """The arguments in the examples of the sites whose rules look into the forward: one of each form, for sites that
    share the graph of the plan. `by_rule`: for each rule."""
    known = set[tuple]()
    for step in steps:
        for observation in observations if step.inside else ():
            if not observation.reached(step.module):
                continue
            args, kwargs, _ = observation.calls[id(step.module)]
            bound = step.own.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            given = tuple(bound.arguments.values())
            mark = (id(step.own.graph), kind_of_call(step.module, given), step.rule.label if by_rule else None)
            if mark not in known:
                known.add(mark)
                yield step, copied(given)


def _modes(module: nn.Module) -> Iterator[str]:
    """The module in evaluation and training, with and without gradients, one after the other; each in words."""
    for training, gradients in itertools.product((False, True), (False, True)):
        with _mode(module, training), ambient(), torch.set_grad_enabled(gradients):
            yield kind_told(kind_of_call(module, ()))


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(inner, inner.training) for inner in module.modules()]
    try:
        for inner, _ in before:
            inner.training = training
        yield
    finally:
        for inner, mode in before:
            inner.training = mode
