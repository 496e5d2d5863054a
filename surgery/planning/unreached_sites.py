"""Finds sites inside a module whose own forward does not run, because a rule computes in its place."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.errors import abbreviate
from surgery.planning.plan import Plan
from surgery.state.records import sites

__all__ = ["unreached_sites"]


def unreached_sites(plan: Plan) -> Iterator[str]:
    """Yield a warning for each rule that does nothing at some of its sites: another rule took a module around them out
    of the computation.
    """
    discarding, inner = dict[str, str](), list[tuple[str, str]]()
    for step in plan.steps:
        inner.append((step.path, step.rule.label))
        if step.tape.discards_forward:
            discarding[step.path] = step.rule.label
    for path, _, site in sites(plan.model):
        for applied in site.live():
            label = f"{applied.rule.label} [{applied.adapter}]"
            inner.append((path, label))
            if applied.layer is not None and applied.layer.tape.discards_forward:
                discarding[path] = label
    unreached: dict[tuple[str, str, str], list[str]] = {}
    for path, label in inner if discarding else ():
        outer = next((above for above in _above(path) if above in discarding), None)
        if outer is not None:
            unreached.setdefault((label, outer, discarding[outer]), []).append(path)
    for (label, outer, by), paths in unreached.items():
        place = outer or "the model itself"
        yield f"{label} does nothing at {abbreviate(paths)}: {by} at {place} computes in the place of what is inside"


def _above(path: str) -> Iterator[str]:
    """The paths of the modules around a path, the model's first."""
    names = path.split(".") if path else []
    for depth in range(len(names)):
        yield ".".join(names[:depth])
