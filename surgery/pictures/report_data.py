"""Collects what a report shows, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.authoring.registry import rules_to_json, rules_to_yaml
from surgery.authoring.rule import Rule
from surgery.errors import MatchError, RuleError
from surgery.inspection.show import Summary, show, summary
from surgery.patterns.module_walk import every_path
from surgery.patterns.wrappers import unwrap
from surgery.pictures.figure import SiteFigure
from surgery.pictures.output_changes import OutputChange, output_changes
from surgery.pictures.site_figure import site_figure
from surgery.pictures.tree import TreeRow, tree_rows
from surgery.rewritten_model.state_dict import rules_of
from surgery.rewritten_model.verb_root import records_in
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import SiteState, model_state, site_state
from surgery.weaving.generated_class import recipe_of

__all__ = ["ReportData", "SiteGroup", "report_data"]

MOST = 200  # groups of sites with a picture


@dataclass
class SiteGroup:
    """Sites that run the same code on tensors of the same shapes. `figure`, `code`, `generated`: of the first one."""

    paths: list[str]
    figure: SiteFigure | None = None
    code: str = ""
    generated: str = ""


@dataclass(frozen=True)
class ReportData:
    """What a report shows. `rules`: for each adapter its rules as text, and the language of the text."""

    title: str
    summary: Summary
    rows: list[TreeRow]
    groups: list[SiteGroup]
    rules: list[tuple[str, str, str]]
    changes: list[OutputChange] = field(default_factory=list)


def report_data(model: nn.Module, example_inputs: Any, title: str | None) -> ReportData:
    counts = summary(model)
    records = records_in(unwrap(model), nested=True)
    changes = output_changes(model, example_inputs) if example_inputs is not None else []
    rules = []
    for path, root in records.items():
        state = model_state(root)
        for name in state.adapters if state is not None else ():
            rules.append((f"{path}: {name}" if path else name, *_text(rules_of(root, name))))
    return ReportData(
        title=title or type(unwrap(model)).__name__,
        summary=counts,
        rows=tree_rows(model),
        groups=_groups(model),
        rules=rules,
        changes=changes,
    )


def _text(rules: Sequence[Rule]) -> tuple[str, str]:
    """Rules as YAML, or as JSON without PyYAML; a rule that is not data, such as one with a function, as Python."""
    try:
        data = rules_to_json(rules)
    except RuleError:
        return "\n".join(map(repr, rules)), "Python"
    try:
        return rules_to_yaml(rules), "YAML"
    except RuleError:
        return data, "JSON"


def _groups(model: nn.Module) -> list[SiteGroup]:
    groups: dict[Any, SiteGroup] = {}
    places = {id(module): (path, module) for path, module in reversed(list(every_path(model)))}
    for path, module in reversed(places.values()):
        if (state := site_state(module)) is None:
            continue
        group = groups.setdefault(_key(module, state), SiteGroup([]))
        if not group.paths and len(groups) <= MOST:
            group.figure = site_figure(module, state, path)
            group.code = show(model, path)
            try:
                group.generated = show(model, path, generated=True)
            except MatchError:  # no rule is live
                group.generated = ""
        group.paths.append(path)
    return list(groups.values())


def _key(module: nn.Module, state: SiteState) -> tuple:
    """Equal for sites that look the same in a report."""
    recipe = recipe_of(type(module))
    sources = tuple(dict.fromkeys([recipe.source, *(v.source for v in state.variants)])) if recipe is not None else ()
    shapes = tuple((name, tuple(p.shape)) for name, p in module._parameters.items() if p is not None)
    rules = tuple(
        (
            *(applied.adapter, repr(applied.rule), applied.live, applied.weight, applied.trained),
            *((name, tuple(tensor.shape)) for name, tensor in tensors_of(module, applied.adapter).items()),
        )
        for applied in state.applied
    )
    merged = state.merged.adapters if state.merged is not None else ()
    return state.base, sources, shapes, rules, merged
