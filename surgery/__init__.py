"""Declarative model surgery for PyTorch: rules match modules, rewrite their graphs, and are taken out to the bit."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from surgery.activation import Adapter, activate, active, adapters, deactivate, using
from surgery.coverage import Coverage, coverage
from surgery.digraph import as_digraph, graph_of
from surgery.engine import apply_rules, explain, plan_rules, remove
from surgery.errors import (
    LoadError,
    MatchError,
    MergeError,
    PlanError,
    RuleError,
    SiteError,
    SurgeryError,
    SurgeryWarning,
    TraceError,
)
from surgery.exact import LowRank, Rows
from surgery.expression import ANY, having, module_of, one_of
from surgery.guided import trace
from surgery.hidden import hidden_of
from surgery.members import Member
from surgery.merge import MergeReport, merge, unmerge
from surgery.pattern import Pattern, Targets
from surgery.plan import Plan
from surgery.registries import takes_functions
from surgery.rule import Rule, rule, rules_from_json, rules_from_yaml, rules_to_json, rules_to_yaml
from surgery.show import Summary, draw, show, summary
from surgery.site import LiveSite, Site
from surgery.spelling import class_of
from surgery.state import adapter_state_dict, base_state_dict, load_adapter_state_dict, rules_of
from surgery.structure import Found, Occurrence, Structure
from surgery.tape import Value
from surgery.view import call_own
from surgery.weave import trace_site

if TYPE_CHECKING:
    from surgery.blend import Combination, Share
    from surgery.checkpoint import LoadReport, load_adapter, save_adapter
    from surgery.combining import combine
    from surgery.exported import with_layers
    from surgery.for_good import forget
    from surgery.hub import push_adapter
    from surgery.many import load_adapters
    from surgery.merged import merge_to
    from surgery.naming import copy_adapter, rename_adapter
    from surgery.peft_format import PeftConfig, PeftMethod, PeftPart, PeftPlace, peft_method
    from surgery.plainer import folded_adapter
    from surgery.routing import route
    from surgery.stored import Entry as PeftEntry
    from surgery.swap import SwapReport, hotswap, pad_rank

# Imported when they are first asked for.
_LATER = {
    "Combination": ("surgery.blend", "Combination"),
    "Share": ("surgery.blend", "Share"),
    "LoadReport": ("surgery.checkpoint", "LoadReport"),
    "load_adapter": ("surgery.checkpoint", "load_adapter"),
    "load_adapters": ("surgery.many", "load_adapters"),
    "save_adapter": ("surgery.checkpoint", "save_adapter"),
    "combine": ("surgery.combining", "combine"),
    "with_layers": ("surgery.exported", "with_layers"),
    "forget": ("surgery.for_good", "forget"),
    "SwapReport": ("surgery.swap", "SwapReport"),
    "hotswap": ("surgery.swap", "hotswap"),
    "pad_rank": ("surgery.swap", "pad_rank"),
    "push_adapter": ("surgery.hub", "push_adapter"),
    "merge_to": ("surgery.merged", "merge_to"),
    "copy_adapter": ("surgery.naming", "copy_adapter"),
    "rename_adapter": ("surgery.naming", "rename_adapter"),
    "PeftConfig": ("surgery.peft_format", "PeftConfig"),
    "PeftMethod": ("surgery.peft_format", "PeftMethod"),
    "PeftPart": ("surgery.peft_format", "PeftPart"),
    "PeftPlace": ("surgery.peft_format", "PeftPlace"),
    "peft_method": ("surgery.peft_format", "peft_method"),
    "folded_adapter": ("surgery.plainer", "folded_adapter"),
    "PeftEntry": ("surgery.stored", "Entry"),
    "route": ("surgery.routing", "route"),
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _LATER[name]
    found = globals()[name] = getattr(importlib.import_module(module), attribute)
    return found


__all__ = [
    "ANY",
    "Adapter",
    "Combination",
    "Coverage",
    "Found",
    "LiveSite",
    "LoadError",
    "LoadReport",
    "LowRank",
    "MatchError",
    "Member",
    "MergeError",
    "MergeReport",
    "Occurrence",
    "Pattern",
    "PeftConfig",
    "PeftEntry",
    "PeftMethod",
    "PeftPart",
    "PeftPlace",
    "Plan",
    "PlanError",
    "Rows",
    "Rule",
    "RuleError",
    "Share",
    "Site",
    "SiteError",
    "Structure",
    "Summary",
    "SurgeryError",
    "SurgeryWarning",
    "SwapReport",
    "Targets",
    "TraceError",
    "Value",
    "activate",
    "active",
    "adapter_state_dict",
    "adapters",
    "apply_rules",
    "as_digraph",
    "base_state_dict",
    "call_own",
    "class_of",
    "combine",
    "copy_adapter",
    "coverage",
    "deactivate",
    "draw",
    "explain",
    "folded_adapter",
    "forget",
    "graph_of",
    "having",
    "hidden_of",
    "hotswap",
    "load_adapter",
    "load_adapter_state_dict",
    "load_adapters",
    "merge",
    "merge_to",
    "module_of",
    "one_of",
    "pad_rank",
    "peft_method",
    "plan_rules",
    "push_adapter",
    "remove",
    "rename_adapter",
    "route",
    "rule",
    "rules_from_json",
    "rules_from_yaml",
    "rules_of",
    "rules_to_json",
    "rules_to_yaml",
    "save_adapter",
    "show",
    "summary",
    "takes_functions",
    "trace",
    "trace_site",
    "unmerge",
    "using",
    "with_layers",
]
