"""Chooses the plan of a routed site: the function that the site runs instead of its forward.

- Rules that define `routed`: one joint rewrite for all rows (`RoutedRewrite`).
- Low-rank branches on the first input: two batched products for all rows (`LowRankRows`).
- Other edits: each adapter's edits on the rows of the adapter (`EditsByRows`).
- All rows with one adapter, or without edits: one class's forward (`WholeForward`).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.forward.own_forward import OwnForward, own_forward
from surgery.forward.tape import Layer
from surgery.routing.edits_by_rows import EditsByRows, edit_of, unweighted_layers
from surgery.routing.joint_rewrite import routed_layer, routes_itself
from surgery.routing.low_rank_rows import LowRankRows
from surgery.routing.routed_call import RoutedCall, Routing, bind_arguments
from surgery.routing.rows import RowOwners
from surgery.state.records import SiteState
from surgery.weaving.generated_class import generated_class
from surgery.weaving.term_graph import ROWS
from surgery.weaving.variant_building import function_of
from surgery.weaving.weave import weave

__all__ = ["plan_of"]


def plan_of(routing: Routing, module: nn.Module, site: SiteState) -> RoutedCall:
    """The plan of a site. Raises `SurgeryError` if the rules of the site can't be routed together."""
    by_adapter = {name: [applied for applied in site.applied if applied.adapter == name] for name in routing.names}
    by_adapter = {name: applied_rules for name, applied_rules in by_adapter.items() if applied_rules}
    if not by_adapter:
        return WholeForward(site.base)
    own = own_forward(module, site.base)
    if routing.alone:
        (applied_rules,) = by_adapter.values()
        return WholeForward(generated_class(own, unweighted_layers(applied_rules, module, site, own)))
    every_rule = [applied for applied_rules in by_adapter.values() for applied in applied_rules]
    if any(routes_itself(applied.rule) for applied in every_rule):
        return RoutedRewrite(own, routed_layer(module, site.path, own, every_rule), routing.rows)
    edits = {name: edit_of(name, applied_rules, module, site, own) for name, applied_rules in by_adapter.items()}
    branches = {name: edit.low_rank for name, edit in edits.items() if edit.low_rank is not None}
    if len(branches) == len(edits) and all(branch.input == own.inputs()[0] for branch in branches.values()):
        return LowRankRows(site.base, own, routing, branches, module)
    return EditsByRows(site.base, own, routing, edits)


class WholeForward:
    """A plan that runs all rows through the forward of one class: of the base, or with one adapter."""

    def __init__(self, cls: type[nn.Module]):
        self.cls: Any = cls

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.cls.forward(module, *args, **kwargs)


class RoutedRewrite:
    """A plan for rules that define `routed`: one forward for all rows, which gets the adapter of each row."""

    def __init__(self, own: OwnForward, layer: Layer, rows: RowOwners):
        self.own = own
        graphs = [weave(own, [layer], mode, lowered=False) for mode in (False, True)]
        reads_rows = any(node.target == ROWS for node in graphs[0].nodes if node.op == "placeholder")
        self.row_argument = (rows,) if reads_rows else ()
        self.functions = [function_of(graph, layer.label)[0] for graph in graphs]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        arguments = bind_arguments(self.own, args, kwargs)
        return self.functions[module.training](module, *self.row_argument, *arguments.values())
