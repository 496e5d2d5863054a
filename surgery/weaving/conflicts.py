"""Finds rules that can't share a site, or can't be live on it together, before the model changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import SiteError, SurgeryError
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.state.records import Applied, site_state
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["find_conflicts", "find_hidden_rule", "find_live_conflict"]


def find_conflicts(steps: Iterable[PlannedRule], with_live: bool = True) -> list[SurgeryError]:
    """Returns an error for each conflict: a rule twice, an exclusive rule, a parameter replaced or named twice.

    `with_live`: compare also with the rules that are live on the sites now. Default True.
    """
    problems: list[SurgeryError] = []
    steps_by_site: dict[int, list[PlannedRule]] = {}
    for step in steps:
        steps_by_site.setdefault(id(step.module), []).append(step)
    for site_steps in steps_by_site.values():
        problems += _conflicts_at_site(site_steps, with_live)
    return problems


def _conflicts_at_site(steps: list[PlannedRule], with_live: bool) -> list[SurgeryError]:
    problems: list[SurgeryError] = []
    path, module = steps[0].path, steps[0].module
    if RESERVED in module._modules and not is_adapters(module._modules[RESERVED]):  # type: ignore[arg-type]
        problems.append(
            SiteError(f"the module has a child {RESERVED!r} of its own", where=path, fix="target another module")
        )
    state = site_state(module)
    claims: dict[Ref, str] = {}
    editing = any(_replaced_state(step.tape) for step in steps)
    if len(steps) == 1 and not editing:
        return problems
    for applied in state.applied if state and editing and with_live else []:
        if applied.live:
            for ref in _replaced_state(layer_of(applied, module, path, steps[0].own).tape):
                claims[ref] = f"{applied.rule.label} [{applied.adapter}]"
    counts = Counter(step.rule.name for step in steps)
    names: dict[str, str] = {}
    for step in steps:
        label = step.rule.label
        if counts[step.rule.name] > 1:
            problems.append(
                _conflict_error(
                    f"two {label}s go to the same module", path, "an adapter holds one rule of a kind at a site"
                )
            )
            break
        if step.rule.exclusive and len(steps) > 1:
            others = ", ".join(other.rule.label for other in steps if other is not step)
            problems.append(
                _conflict_error(f"{label} and {others} go to the same module", path, f"{label} takes the whole module")
            )
            break
        for ref in _replaced_state(step.tape):
            if ref in claims and _exclusive(step.tape, ref):
                problems.append(
                    _conflict_error(
                        f"{label} and {claims[ref]} both replace {ref.key}",
                        path,
                        "the later would hide the earlier",
                        "one of them at a time: deactivate(model), or remove it; or exclude the module"
                        if claims[ref].endswith("]")
                        else None,
                    )
                )
            claims[ref] = label
        for spec in step.specs:
            if spec.name in names:
                problems.append(
                    _conflict_error(
                        f"{label} and {names[spec.name]} both name a tensor {spec.name!r}",
                        path,
                        "an adapter's tensors need different names",
                    )
                )
            names[spec.name] = label
    return problems


def _replaced_state(tape: Tape) -> list[Ref]:
    return [ref for ref in tape.replaced_refs() if ref.kind == "state"]


def find_live_conflict(
    applied: Iterable[Applied], module: nn.Module, path: str, own: OwnForward
) -> SurgeryError | None:
    """Returns an error if one adapter's rule replaces a parameter that another adapter's rule changes, or None."""
    claims: dict[Ref, Applied] = {}
    for rule in applied:
        tape = layer_of(rule, module, path, own).tape
        for ref in tape.state_replacements:
            other = claims.get(ref)
            if other is not None and other.adapter != rule.adapter and _exclusive(tape, ref):
                first, second = (f"{record.rule.label} [{record.adapter}]" for record in (other, rule))
                return SiteError(
                    f"{first} and {second} can't be live together",
                    where=path,
                    why=f"both replace {ref.key}: the later would hide the earlier",
                    fix="make one of them live at a time; combine(model, weights, into) makes one of both",
                )
            claims[ref] = rule
    return None


def find_hidden_rule(live: Sequence[Applied], path: str, how: str = "live together") -> SurgeryError | None:
    """Returns an error if one adapter's rule says that it hides what an earlier adapter's rule does, or None.

    `how`: what these rules can't be, as the error says it.
    """
    for at, later in enumerate(live):
        if type(later.rule).hides is Declaration.hides:
            continue
        for earlier in live[:at]:
            why = None if earlier.adapter == later.adapter else later.rule.hides(earlier.rule)
            if why is not None:
                first, second = (f"{record.rule.label} [{record.adapter}]" for record in (earlier, later))
                return SiteError(
                    f"{first} and {second} can't be {how}",
                    where=path,
                    why=why,
                    fix="make one of them live at a time; combine(model, weights, into) makes one of both",
                )
    return None


def _exclusive(tape: Tape, ref: Ref) -> bool:
    """Whether a replacement ignores the value it replaces (W → T, not W → W + Δ)."""
    return not any(
        _mentions(part.args, ref) or _mentions(part.kwargs, ref) for part in tape.steps if part.kind != "replace"
    )


def _mentions(frozen: Any, ref: Ref) -> bool:
    """Whether frozen arguments of a step name this value."""
    if isinstance(frozen, Ref):
        return frozen == ref
    return isinstance(frozen, tuple) and any(_mentions(item, ref) for item in frozen)


def _conflict_error(what: str, path: str, why: str, fix: str | None = None) -> SiteError:
    """Returns the error for rules of one adapter that can't share a site."""
    fix = fix or "exclude the module from one of the rules, or give them different adapters"
    return SiteError(what, where=path, why=why, fix=fix)
