# What `surgery` offers, and from which file each name comes: read by type checkers, and by `__init__.py`, which imports
# a name when it is first asked for.

from .activation import Adapter, activate, active, adapters, deactivate, using
from .base_rule import Rule
from .blend import Combination, Share
from .combining import combine
from .covering import Coverage, coverage
from .digraph import as_digraph, graph_of
from .engine import apply_rules, explain, plan_rules
from .entry import PeftEntry
from .errors import (
    LoadError,
    MatchError,
    MergeError,
    ParityError,
    PlanError,
    RuleError,
    SiteError,
    SurgeryError,
    SurgeryWarning,
    TraceError,
)
from .exact import LowRank, Rows
from .exported import with_layers
from .expression import ANY, Const, having, maybe, module_of, one_of
from .for_good import forget
from .guided import trace
from .hidden import hidden_of
from .hub_upload import push_adapter
from .live_site import LiveSite
from .load import load_adapter
from .load_report import LoadReport
from .many import load_adapters
from .members import Member
from .merged import merge_to
from .merging import MergeReport, merge, unmerge
from .named_rules import rule, rules_from_json, rules_from_yaml, rules_to_json, rules_to_yaml
from .naming import copy_adapter, rename_adapter
from .onnx.export import ExportReport, export_onnx
from .onnx.parity import ParityReport, verify_onnx
from .pattern import Pattern, Targets
from .peft_adapter_config import PeftConfig
from .peft_format import PeftMethod, PeftPart, PeftPlace, peft_method
from .plainer import folded_adapter
from .plan import Plan
from .registries import takes_functions
from .removal import remove
from .routing import route
from .save import save_adapter
from .showing import Summary, draw, show, summary
from .site import Site
from .site_module import SiteModule
from .spelling import class_of
from .state_dicts import adapter_state_dict, base_state_dict, load_adapter_state_dict, rules_of
from .structure import Found, Occurrence, Structure
from .swap import SwapReport, hotswap, pad_rank
from .tape import Value
from .view import call_own
from .weave import trace_site

__version__: str

__all__ = [
    "ANY",
    "Adapter",
    "Combination",
    "Const",
    "Coverage",
    "ExportReport",
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
    "ParityError",
    "ParityReport",
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
    "SiteModule",
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
    "export_onnx",
    "folded_adapter",
    "forget",
    "graph_of",
    "having",
    "hidden_of",
    "hotswap",
    "load_adapter",
    "load_adapter_state_dict",
    "load_adapters",
    "maybe",
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
    "verify_onnx",
    "with_layers",
]
