"""Rules that can't share a site, or can't be live on it together, seen before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import SiteError, SurgeryError
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.state.records import Applied, site_state
from surgery.weaving.rewrite_recording import layer_of

__all__ = ["clashes", "hidden"]


def clashes(steps: Iterable[PlannedRule], beside: bool = True) -> list[SurgeryError]:
    """Rules that can't share a site: the same one twice, an exclusive one, one parameter replaced or named twice.

    `beside`: they are to be live beside those that are on the sites now.
    """
    found: list[SurgeryError] = []
    by_site: dict[int, list[PlannedRule]] = {}
    for step in steps:
        by_site.setdefault(id(step.module), []).append(step)
    for together in by_site.values():
        found += _at_site(together, beside)
    return found


def _at_site(steps: list[PlannedRule], beside: bool) -> list[SurgeryError]:
    found: list[SurgeryError] = []
    path, module = steps[0].path, steps[0].module
    if RESERVED in module._modules and not is_adapters(module._modules[RESERVED]):  # type: ignore[arg-type]
        found.append(
            SiteError(f"the module has a child {RESERVED!r} of its own", where=path, fix="target another module")
        )
    standing = site_state(module)
    claims: dict[Ref, str] = {}
    editing = any(_replaced_state(step.tape) for step in steps)
    if len(steps) == 1 and not editing:
        return found
    for applied in standing.applied if standing and editing and beside else []:
        if applied.live:
            for ref in _replaced_state(layer_of(applied, module, path, steps[0].own).tape):
                claims[ref] = f"{applied.rule.label} [{applied.adapter}]"
    counts = Counter(step.rule.name for step in steps)
    names: dict[str, str] = {}
    for step in steps:
        label = step.rule.label
        if counts[step.rule.name] > 1:
            found.append(
                _clash(f"two {label}s go to the same module", path, "an adapter holds one rule of a kind at a site")
            )
            break
        if step.rule.exclusive and len(steps) > 1:
            others = ", ".join(other.rule.label for other in steps if other is not step)
            found.append(_clash(f"{label} and {others} go to the same module", path, f"{label} takes the whole module"))
            break
        for ref in _replaced_state(step.tape):
            if ref in claims and _exclusive(step.tape, ref):
                found.append(
                    _clash(
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
                found.append(
                    _clash(
                        f"{label} and {names[spec.name]} both name a tensor {spec.name!r}",
                        path,
                        "an adapter's tensors need different names",
                    )
                )
            names[spec.name] = label
    return found


def _replaced_state(tape: Tape) -> list[Ref]:
    return [ref for ref in tape.replaced_refs() if ref.kind == "state"]


def hidden(applied: Iterable[Applied], module: nn.Module, path: str, own: OwnForward) -> SurgeryError | None:
    """Why rules of several adapters can't be live together: one puts a parameter of its own over another's change."""
    claims: dict[Ref, Applied] = {}
    for one in applied:
        tape = layer_of(one, module, path, own).tape
        for ref in tape.state_replacements:
            other = claims.get(ref)
            if other is not None and other.adapter != one.adapter and _exclusive(tape, ref):
                return SiteError(
                    f"{other.rule.label} [{other.adapter}] and {one.rule.label} [{one.adapter}] can't be live together",
                    where=path,
                    why=f"both replace {ref.key}: the later would hide the earlier",
                    fix="make one of them live at a time; combine(model, weights, into) makes one of both",
                )
            claims[ref] = one
    return None


def _exclusive(tape: Tape, ref: Ref) -> bool:
    """Whether a replacement ignores the value it replaces (W → T, not W → W + Δ)."""
    return not any(
        _mentions(part.args, ref) or _mentions(part.kwargs, ref) for part in tape.steps if part.kind != "replace"
    )


def _mentions(frozen: Any, ref: Ref) -> bool:
    if isinstance(frozen, Ref):
        return frozen == ref
    return isinstance(frozen, tuple) and any(_mentions(item, ref) for item in frozen)


def _clash(what: str, path: str, why: str, fix: str | None = None) -> SiteError:
    fix = fix or "exclude the module from one of the rules, or give them different adapters"
    return SiteError(what, where=path, why=why, fix=fix)
