"""Rules that can't share a site, seen before anything is touched."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from surgery.errors import SiteError, SurgeryError
from surgery.match import RESERVED, is_adapters
from surgery.recording import Step, layer_of
from surgery.state import site_state
from surgery.tape import Ref, Tape

__all__ = ["clashes"]


def clashes(steps: Iterable[Step]) -> list[SurgeryError]:
    """Rules that can't share a site: the same one twice, an exclusive one, one parameter replaced or named twice."""
    found: list[SurgeryError] = []
    by_site: dict[int, list[Step]] = {}
    for step in steps:
        by_site.setdefault(id(step.module), []).append(step)
    for together in by_site.values():
        found += _at_site(together)
    return found


def _at_site(steps: list[Step]) -> list[SurgeryError]:
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
    for applied in standing.applied if standing and editing else []:
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
            if ref in claims and _exclusive(step, ref):
                found.append(
                    _clash(
                        f"{label} and {claims[ref]} both replace {ref.key}",
                        path,
                        "the later would hide the earlier",
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
    return [ref for ref in tape.replaced() if ref.kind == "state"]


def _exclusive(step: Step, ref: Ref) -> bool:
    """Whether a replacement ignores the value it replaces (W → T, not W → W + Δ)."""
    key = ref
    return not any(
        _mentions(part.args, key) or _mentions(part.kwargs, key) for part in step.tape.steps if part.kind != "replace"
    )


def _mentions(frozen: Any, ref: Ref) -> bool:
    if isinstance(frozen, Ref):
        return frozen == ref
    return isinstance(frozen, tuple) and any(_mentions(item, ref) for item in frozen)


def _clash(what: str, path: str, why: str) -> SiteError:
    return SiteError(
        what, where=path, why=why, fix="exclude the module from one of the rules, or give them different adapters"
    )
