"""Adapters that have structural rules alone, and rules at sites that structural rules took out, for all verbs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from surgery.errors import SurgeryError, SurgeryWarning, abbreviate
from surgery.rewritten_model.restructure import set_aside_sites
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.records import Applied, ModelState, site_state

__all__ = ["boxes_with_set_aside", "check_none_set_aside", "check_not_structural", "set_aside_rules", "warn_set_aside"]


def check_not_structural(state: ModelState, names: Iterable[str], action: str, fix: str) -> None:
    """Raise `SurgeryError` if one of these adapters has structural rules alone. `action`: "can't …"."""
    structural = state.structural
    for name in names:
        if name in structural:
            kinds = ", ".join(dict.fromkeys(rule.label for rule in state.adapters[name]))
            why = f"its rules ({kinds}) change the structure of the model, which is one for all adapters and calls"
            raise SurgeryError(f"the adapter {name!r} can't {action}", why=why, fix=fix)


def set_aside_rules(root: nn.Module, state: ModelState, adapter: str) -> list[tuple[nn.Module, list[Applied]]]:
    """The rules of an adapter at sites that structural rules took out of the model."""
    found: list[tuple[nn.Module, list[Applied]]] = []
    for module in set_aside_sites(root, state):
        site = site_state(module)
        if site is not None and (rules := [applied for _, applied in site.of((adapter,))]):
            found.append((module, rules))
    return found


def boxes_with_set_aside(root: nn.Module, state: ModelState, adapter: str) -> Sequence[AdapterTensors]:
    """The containers of an adapter's tensors, also those on modules that structural rules took out."""
    boxes = state.places[adapter].boxes
    if not state.structure:
        return boxes
    aside = [box_of(module, adapter) for module, _ in set_aside_rules(root, state, adapter)]
    return [*boxes, *(box for box in aside if box is not None)]


def warn_set_aside(root: nn.Module, state: ModelState, adapters: Iterable[str], new: str) -> None:
    """Warn that an adapter made of these has no tensors on layers that structural rules took out of the model."""
    modules = {id(module): module for name in adapters for module, _ in set_aside_rules(root, state, name)}
    if not modules:
        return
    paths = [site.path for module in modules.values() if (site := site_state(module)) is not None]
    makers = [r for r in state.structure if any(module in r.set_aside for module in modules.values())]
    by = ", ".join(dict.fromkeys(f"{record.rule.label} [{record.adapter}]" for record in makers))
    warnings.warn(
        f"the adapter {new!r} is not on layers that {by} took out ({abbreviate(paths, 'sites')}): if they come back, "
        "it has no effect there",
        SurgeryWarning,
        stacklevel=5,
    )


def check_none_set_aside(root: nn.Module, state: ModelState, adapters: Iterable[str], action: str) -> None:
    """Raise `SurgeryError` if a structural rule took a site of these adapters out: it would come back unchanged."""
    for name in adapters if state.structure else ():
        for module, _ in set_aside_rules(root, state, name):
            site = site_state(module)
            makers = [record for record in state.structure if module in record.set_aside]
            by = f"{makers[-1].rule.label} [{makers[-1].adapter}]" if makers else "a structural rule"
            raise SurgeryError(
                f"the adapter {name!r} can't {action}",
                where=site.path if site is not None else None,
                why=f"it has tensors on a layer that {by} took out, and the layer would come back with the old ones",
                fix="commit the structure first: commit(model, …); or remove the structural rule",
            )
