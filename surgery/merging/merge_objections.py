"""Reasons against a merge, gathered for each site before anything changes."""

from __future__ import annotations

from torch import nn

from surgery.errors import MergeError, SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.packed.packed_map import packed_by_name
from surgery.packed.packed_parameters import UNPACKED, is_packed
from surgery.packed.packed_stack import packed_stacks_of
from surgery.packed.packed_weight import packed_weight_of
from surgery.state.absent_values import without_values
from surgery.state.adapter_tensors import box_of
from surgery.state.records import Applied, Merged, SiteState
from surgery.weaving.class_objections import reason_against
from surgery.weaving.conflicts import find_hidden_rule, find_live_conflict

__all__ = ["already_merged", "objections_to_merge"]


def objections_to_merge(
    path: str,
    module: nn.Module,
    site: SiteState,
    chosen: list[Applied],
    counted: list[Applied],
    quantised: str = "refuse",
) -> list[SurgeryError]:
    """Why the chosen rules can't be merged at a site. `counted`: the chosen rules and the other live rules there."""
    problems: list[SurgeryError] = []
    refusal = reason_against(module)
    if refusal is not None:
        problems.append(MergeError("the site can't be merged", where=path, why=refusal[0], fix=refusal[1]))
    for name in dict.fromkeys(applied.adapter for applied in chosen):
        if (box := box_of(module, name)) is not None and without_values(box):
            why = "its tensors came from the meta device by to_empty"
            problems.append(
                MergeError(f"the adapter {name!r} has no values yet", where=path, why=why, fix="load them first")
            )
    for applied in chosen:
        rule = applied.rule
        if not rule.mergeable:
            why = rule.why_not_merged
            problems.append(MergeError(f"{rule.label} can't be merged", where=path, why=why, fix="keep it unmerged"))
    if len(chosen) < len(counted) and not all(applied.rule.additive for applied in counted):
        remaining = ", ".join(
            f"{a.rule.label} [{a.adapter}]" for a in counted if a.adapter not in {applied.adapter for applied in chosen}
        )
        why = f"{remaining} is on the same site, and its effect depends on the order"
        problems.append(
            MergeError(
                "part of a stack can't be merged here",
                where=path,
                why=why,
                fix="make the adapters to merge live alone: activate(model, …); or merge all live ones: merge(model)",
            )
        )
    if not problems and len(chosen) > 1:
        problem = find_hidden_rule(chosen, site.path, "merged together")
        problem = problem or find_live_conflict(chosen, module, site.path, own_forward(module, site.base))
        problems += [problem] if problem is not None else []
    if not problems and (quantised == "refuse" or not packed_by_name(module)):
        problems += _packed(path, module, site, chosen)
    return problems


def _packed(path: str, module: nn.Module, site: SiteState, chosen: list[Applied]) -> list[SurgeryError]:
    weight = module._parameters.get("weight")
    packed = packed_weight_of(module)
    if stacks := packed_stacks_of(module):
        layout = next(iter(stacks.values())).layout
        why = f"its {' and '.join(stacks)} are packed ({layout}): quantised, so a sum would be rounded away"
        fix = f"keep it unmerged, {_WAYS}"
        return [MergeError(f"{chosen[0].rule.label} can't be merged here", where=path, why=why, fix=fix)]
    if packed is None and (weight is None or not (hasattr(weight, "device_mesh") or is_packed(weight))):
        return []
    what = f"a {type(weight).__name__} of {weight.dtype}" if weight is not None else f"packed ({packed.layout})"  # type: ignore[union-attr]
    why, fix = f"its weight is {what}", "keep it unmerged"
    if packed is not None:
        why, fix = f"{why}: quantised, so a sum would be rounded away", f"keep it unmerged, {_WAYS}"
    elif is_packed(weight):
        why, fix = f"{why}: quantised, so a sum would be rounded away", f"keep it unmerged, or {UNPACKED}"
    return [MergeError(f"{chosen[0].rule.label} can't be merged here", where=path, why=why, fix=fix)]


_WAYS = (
    'or merge(model, quantised="dequantise"), which makes the module plain (quantised="requantise": new '
    f"codes, if they lose little); or {UNPACKED}"
)


def already_merged(path: str, merged: Merged) -> MergeError:
    """The error for a model that is merged with other adapters."""
    adapters = ", ".join(merged.adapters)
    return MergeError(
        "the model is merged already", where=path, why=f"its weights hold {adapters}", fix="unmerge(model) first"
    )
