"""Collects the figures of one site: its own forward, and the forward with the live rules."""

from __future__ import annotations

import inspect
import warnings

from torch import nn

from surgery.errors import SurgeryWarning
from surgery.forward.own_forward import own_forward
from surgery.inspection.variable_names import variable_names
from surgery.pictures.figure import Owner, SiteFigure
from surgery.pictures.flow import figure_of
from surgery.state.records import SiteState
from surgery.weaving.variant_building import last_traced_forward, layer_at
from surgery.weaving.weave import weave

__all__ = ["site_figure"]


def site_figure(module: nn.Module, state: SiteState, path: str, *, before: bool = True) -> SiteFigure:
    """The figures of a site. Rules that look into the forward are drawn in the forward of the last call."""
    live = state.live()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)  # `apply_rules` has already given these warnings
        own = last_traced_forward(module, state) if any(applied.inside for applied in live) else None
        traced = own is not None
        own = own or own_forward(module, state.base)
        # Training shows all parts of a rule, such as its dropout.
        training = state.variants[0].kind[0] if traced else True
        layers = [layer_at(applied, module, state, own, None, training if traced else None) for applied in live]
        names = variable_names(live, layers, module, state.path, own, training if traced else None)
        letters = {step: name.text for step, name in names.items() if len(name.text) == 1 and name.assigned}
        after = figure_of(weave(own, layers, training, lowered=False), module, state, letters)
        base = figure_of(weave(own, [], training, lowered=False), module, state, {}) if before else None
    formulas = {Owner(applied.adapter, applied.rule.label): _formula(type(applied.rule)) for applied in live}
    return SiteFigure(
        path=path,
        module=state.base.__name__,
        before=base,
        after=after,
        formulas=tuple((owner, text) for owner, text in formulas.items() if text),
        notes=tuple(_notes(state)),
    )


def _formula(rule: type) -> str:
    """The first line of a rule's docstring, which says what the rule computes."""
    if not rule.__doc__ or rule.__doc__.startswith(f"{rule.__name__}("):  # a dataclass's own text
        return ""
    return inspect.cleandoc(rule.__doc__).partition("\n")[0]


def _notes(state: SiteState) -> list[str]:
    merged = state.merged.adapters if state.merged is not None else ()
    notes = []
    for applied in state.applied:
        name = f"{applied.rule.label} [{applied.adapter}]"
        if applied.adapter in merged:
            notes.append(f"merged into the weights: {name}")
        elif not applied.live:
            notes.append(f"idle: {name}")
        elif applied.weight != 1.0:
            notes.append(f"{name} has the weight {applied.weight:g}")
    return list(dict.fromkeys(notes))
