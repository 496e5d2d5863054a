"""Traces, for rules that look into forwards, the graphs of the kinds of calls that the examples show.

Graphs are traced for evaluation and training, with and without gradients, once for equal modules. The first site of
each graph generates its variants at once, so errors of a rule in one mode show when it is applied. Other sites generate
their variants from the same graphs, without a trace, when they are called or compiled.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.state.records import site_state
from surgery.tracing.call_kind import describe_kind, kind_of_call
from surgery.tracing.example_call import Observation
from surgery.tracing.traced_forward import known_forwards, trace_anew
from surgery.transaction.neutral_context import ambient
from surgery.transaction.object_contents import copied
from surgery.weaving.variant_building import depth_for, make_ready

__all__ = ["Readiness", "trace_graphs", "prepare_sites"]


@dataclass(frozen=True)
class Readiness:
    """Whether there is a graph for a kind of call: the module's class, the kind in words, and `reason` if not."""

    type: str
    kind: str
    reason: str = ""


def trace_graphs(steps: Sequence[PlannedRule], observations: Sequence[Observation]) -> list[Readiness]:
    """Trace the graphs that rules need which look into forwards, for each kind of call of the examples."""
    readiness: dict[Readiness, None] = {}
    for step, arguments in _calls(steps, observations, by_rule=False):
        module, base = step.module, step.own.base
        for words in _modes(module):
            own, kind, reason = own_forward(module, base), kind_of_call(module, arguments), ""
            depth = depth_for([other for other in steps if other.module is module])
            if not any(traced.fits(module) for traced in known_forwards(module, own, kind, depth)):
                try:
                    trace_anew(module, own, arguments, kind, depth)
                except SurgeryError as error:
                    reason = error.why or error.what
            readiness[Readiness(base.__name__, words, reason)] = None
    return list(readiness)


def prepare_sites(
    steps: Sequence[PlannedRule], observations: Sequence[Observation], warned: Collection[str]
) -> list[str]:
    """Generate the variants of the first site of each graph; return what failed, as texts.

    `warned`: the plan's warnings, which are not repeated.
    """
    problems: dict[str, None] = {}
    for step, arguments in _calls(steps, observations, by_rule=True):
        module, state = step.module, site_state(step.module)
        assert state is not None
        for words in _modes(module):
            own, kind, depth = (
                own_forward(module, state.base),
                kind_of_call(module, arguments),
                depth_for(state.live()),
            )
            if not any(traced.fits(module) for traced in known_forwards(module, own, kind, depth)):
                continue  # the plan has a warning
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    make_ready(module, state, arguments)
                except SurgeryError as error:
                    why = f": {error.why}" if error.why else ""
                    problems[f"{step.rule.label} at {step.path} in calls in {words}: {error.what}{why}"] = None
            problems.update({text: None for warning in caught if (text := str(warning.message)) not in warned})
    return list(problems)


def _calls(
    steps: Iterable[PlannedRule], observations: Sequence[Observation], by_rule: bool
) -> Iterator[tuple[PlannedRule, tuple]]:
    """The example arguments of sites whose rules look into the forward: once for each graph and kind of call, and for
    each rule if `by_rule`."""
    marks = set[tuple]()
    for step in steps:
        for observation in observations if step.inside else ():
            if not observation.reached(step.module):
                continue
            args, kwargs, _ = observation.calls[id(step.module)]
            bound = step.own.signature.bind(*args, **kwargs)
            bound.apply_defaults()
            arguments = tuple(bound.arguments.values())
            mark = (id(step.own.graph), kind_of_call(step.module, arguments), step.rule.label if by_rule else None)
            if mark not in marks:
                marks.add(mark)
                yield step, copied(arguments)


def _modes(module: nn.Module) -> Iterator[str]:
    """The module in evaluation and training, with and without gradients, one after the other; each in words."""
    for training, gradients in itertools.product((False, True), (False, True)):
        with _mode(module, training), ambient(), torch.set_grad_enabled(gradients):
            yield describe_kind(kind_of_call(module, ()))


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
