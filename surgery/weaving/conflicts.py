"""Finds rules that can't share a site, or can't be live on it together, before the model changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import SiteError, SurgeryError
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.patterns.paths import regex_for
from surgery.state.records import Applied, site_state
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["find_conflicts", "find_hidden_rule", "find_live_conflict"]


Excludable = Callable[[Rule, str], bool]


def find_conflicts(
    steps: Iterable[PlannedRule],
    with_live: bool = True,
    excludable: Excludable = lambda rule, path: False,
    adapter: str | None = None,
) -> list[SurgeryError]:
    """Returns an error for each conflict: a rule twice, an exclusive rule, a parameter replaced or named twice.

    `with_live`: compare also with the rules that are live on the sites now. Default True. `excludable`: whether a
    rule's field `exclude` can leave out a path, for the fix. Default: no rule's. `adapter`: the name of the adapter
    that the rules are of, for the texts. Default None: not told.
    """
    problems: list[SurgeryError] = []
    steps_by_site: dict[int, list[PlannedRule]] = {}
    for step in steps:
        steps_by_site.setdefault(id(step.module), []).append(step)
    alone = [steps for steps in steps_by_site.values() if _can_share(steps)]
    sites = Counter(id(step.rule) for site_steps in alone for step in site_steps)
    for site_steps in steps_by_site.values():
        problems += _conflicts_at_site(site_steps, with_live, sites, excludable, adapter)
    return problems


def _can_share(steps: Sequence[PlannedRule]) -> bool:
    """Whether these rules of one adapter, by their kinds, can be at one site."""
    exclusive = len(steps) > 1 and any(step.rule.exclusive for step in steps)
    return not exclusive and max(_counts(steps).values(), default=0) < 2


def _counts(steps: Sequence[PlannedRule]) -> Counter[str]:
    """How many rules of each kind there are, without kinds of which a site may have several."""
    return Counter(step.rule.name for step in steps if not step.rule.repeatable)


def _fix(steps: Sequence[PlannedRule], excludable: Sequence[PlannedRule], sites: Counter[int]) -> str:
    """What makes the rules of one adapter fit at a site.

    `excludable`: steps whose rule can exclude the site. `sites`: how many sites without a conflict each rule has.
    """
    path = steps[0].path
    elsewhere = [step.rule.label for step in excludable if sites[id(step.rule)]]
    if elsewhere and path:
        excluded = path if "." in path else regex_for([path])  # a short name may be the last part of other paths
        fix = f'exclude the module from one of the rules: {elsewhere[-1]}(…, exclude="{excluded}")'
    elif excludable:
        fix = "leave out one of the rules"
    else:
        fix = "name other targets in one of the rules"
    return f"{fix}, or give them different adapters" if _separable(steps) else fix


def _separable(steps: Sequence[PlannedRule]) -> bool:
    """Whether the rules can be live together as rules of different adapters."""
    replaced = set[Ref]()
    for at, step in enumerate(steps):
        refs = _replaced_state(step.tape)
        hidden = any(step.rule.hides(earlier.rule) for earlier in steps[:at])
        if hidden or any(ref in replaced and _exclusive(step.tape, ref) for ref in refs):
            return False
        replaced.update(refs)
    return True


def _conflicts_at_site(
    steps: list[PlannedRule], with_live: bool, sites: Counter[int], excludable: Excludable, adapter: str | None
) -> list[SurgeryError]:
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
    fix = _fix(steps, [step for step in steps if excludable(step.rule, step.path)], sites) if len(steps) > 1 else None
    counts = _counts(steps)
    names: dict[str, str] = {}
    for step in steps:
        label = step.rule.label
        if counts[step.rule.name] > 1:
            problems.append(
                SiteError(
                    f"two {label}s go to the same module",
                    where=path,
                    why="an adapter holds one rule of a kind at a site",
                    fix=fix,
                )
            )
            break
        if step.rule.exclusive and len(steps) > 1:
            others = ", ".join(other.rule.label for other in steps if other is not step)
            problems.append(
                SiteError(
                    f"{label} and {others} go to the same module",
                    where=path,
                    why=f"{label} takes the whole module",
                    fix=fix,
                )
            )
            break
        hidden: dict[str, list[str]] = {}  # the names of parameters, by the earlier rule
        for ref in _replaced_state(step.tape):
            if ref in claims and _exclusive(step.tape, ref):
                hidden.setdefault(claims[ref], []).append(str(ref.key))
            claims[ref] = label
        problems += [_both_replace(step, adapter, earlier, keys, fix) for earlier, keys in hidden.items()]
        for spec in step.specs:
            if spec.name in names:
                problems.append(
                    SiteError(
                        f"{label} and {names[spec.name]} both name a tensor {spec.name!r}",
                        where=path,
                        why="an adapter's tensors need different names",
                        fix=fix,
                    )
                )
            names[spec.name] = label
    return problems


def _both_replace(
    step: PlannedRule, adapter: str | None, earlier: str, keys: Sequence[str], fix: str | None
) -> SiteError:
    """The error for parameters that a rule and an earlier one replace. `earlier`: the label, and a live adapter."""
    label = step.rule.label
    if earlier.endswith("]"):
        label = f"{label} [{adapter}]" if adapter else label
        fix = "one of them at a time: deactivate(model), or remove it; or exclude the module"
    what = f"{label} and {earlier} both replace {' and '.join(keys)}"
    return SiteError(what, where=step.path, why="the later would hide the earlier", fix=fix)


def _replaced_state(tape: Tape) -> list[Ref]:
    return [ref for ref in tape.replaced_refs() if ref.kind == "state"]


def find_live_conflict(
    applied: Iterable[Applied], module: nn.Module, path: str, own: OwnForward
) -> SurgeryError | None:
    """Returns an error if one adapter's rule replaces a parameter that another adapter's rule changes, or None."""
    claims: dict[Ref, Applied] = {}
    for rule in applied:
        tape = layer_of(rule, module, path, own).tape
        hidden: list[tuple[Applied, str]] = []  # earlier rules, each with a parameter that both replace
        for ref in tape.state_replacements:
            other = claims.get(ref)
            if other is not None and other.adapter != rule.adapter and _exclusive(tape, ref):
                hidden.append((other, str(ref.key)))
        if hidden:
            other = hidden[0][0]
            keys = [key for earlier, key in hidden if earlier is other]
            first, second = (f"{record.rule.label} [{record.adapter}]" for record in (other, rule))
            return SiteError(
                f"{first} and {second} can't be live together",
                where=path,
                why=f"both replace {' and '.join(keys)}: the later would hide the earlier",
                fix="make one of them live at a time; combine(model, weights, into) makes one of both",
            )
        claims |= dict.fromkeys(tape.state_replacements, rule)
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
