# What `surgery` offers, and from which file each name comes: read by type checkers, and by `__init__.py`, which imports
# a name when it is first asked for.

from . import onnx as onnx
from . import peft as peft
from . import rules as rules
from . import testing as testing
from . import trainer as trainer
from .adapter_files.entry import PeftEntry
from .arithmetic.exact_fold import LowRank, Rows
from .authoring.combination import Combination, Share
from .authoring.equivalence import Equivalence
from .authoring.live_site import LiveSite
from .authoring.matched_module import MatchedModule
from .authoring.registry import rule, rules_from_json, rules_from_yaml, rules_to_json, rules_to_yaml
from .authoring.routed_site import Member
from .authoring.rule import Rule, SlotRule
from .authoring.site import Site
from .authoring.site_module import SiteModule
from .authoring.structure_rule import StructureRule
from .checkpoints.file_reports import FileMergeReport, FileUnmergeReport
from .checkpoints.merge_files import merge_files
from .checkpoints.unmerge_files import unmerge_files
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
from .forward.function_registries import takes_functions
from .forward.hidden_state import hidden_of
from .forward.parameter_view import call_own
from .forward.values import Value
from .inspection.coverage import Coverage, coverage
from .inspection.show import Summary, show, summary
from .lifecycle.activation import Adapter, activate, active, adapters, deactivate, using
from .lifecycle.apply import apply_rules, explain, plan_rules
from .lifecycle.combine import combine
from .lifecycle.commit import commit
from .lifecycle.forget import forget
from .lifecycle.remove import remove
from .lifecycle.rename_copy import copy_adapter, rename_adapter
from .lora_conversion.as_lora import as_lora
from .lora_conversion.extract import extract_lora
from .lora_conversion.report import LoraReport, LoraSite
from .merging.merge import MergeLoss, MergeReport, TensorLoss, merge, unmerge
from .merging.synced import synced
from .model_edits.model_edits import ModelEdits
from .onnx.checking.parity import ParityReport, verify_onnx
from .onnx.export import ExportReport, export_onnx
from .packed.packed_stack import PackedStack, packed_stacks_of
from .packed.packed_weight import PackedWeight, packed_weight_of, register_packed
from .patterns.module_class import class_of
from .patterns.pattern import Pattern
from .patterns.targets import Targets
from .peft_format.adapter_config import PeftConfig
from .peft_format.methods import PeftMethod, PeftPart, PeftPlace, peft_method
from .pictures.draw import Drawing, draw
from .pictures.report import report
from .planning.plan import Plan
from .rewritten_model.folded_values import folded_adapter
from .rewritten_model.state_dict import adapter_state_dict, base_state_dict, load_adapter_state_dict, rules_of
from .routing.route import route
from .serving.check import check_target
from .serving.known import target_profiles
from .serving.profile import TargetProfile, register_target
from .serving.push import push_adapter
from .serving.report import TargetReport, TargetSite
from .serving.save import save_adapter
from .storage.formats.conversion import ConversionReport, convert_adapter
from .storage.formats.known import adapter_formats
from .storage.formats.module_names import register_module_names
from .storage.formats.table import AdapterFormat, KeyPrefix, ModuleNames, NameRow, TensorKey, register_format
from .storage.hotswap import SwapReport, hotswap
from .storage.load import load_adapter
from .storage.load_many import load_adapters
from .storage.load_report import LoadReport
from .storage.load_surgery import load_surgery
from .storage.merged_checkpoint import merge_to
from .storage.rank_padding import pad_rank
from .storage.save_surgery import save_surgery
from .structures.expression import ANY, Const, having, maybe, module_of, one_of
from .structures.fx_digraph import as_digraph, graph_of
from .structures.structure import Found, Occurrence, Structure
from .tracing.exported_layers import with_layers
from .tracing.trace import trace
from .weaving.weave import trace_site

__version__: str

__all__ = [
    "ANY",
    "Adapter",
    "AdapterFormat",
    "Combination",
    "Const",
    "ConversionReport",
    "Coverage",
    "Drawing",
    "Equivalence",
    "ExportReport",
    "FileMergeReport",
    "FileUnmergeReport",
    "Found",
    "KeyPrefix",
    "LiveSite",
    "LoadError",
    "LoadReport",
    "LoraReport",
    "LoraSite",
    "LowRank",
    "MatchError",
    "MatchedModule",
    "Member",
    "MergeError",
    "MergeLoss",
    "MergeReport",
    "ModelEdits",
    "ModuleNames",
    "NameRow",
    "Occurrence",
    "PackedStack",
    "PackedWeight",
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
    "SlotRule",
    "Structure",
    "StructureRule",
    "Summary",
    "SurgeryError",
    "SurgeryWarning",
    "SwapReport",
    "TargetProfile",
    "TargetReport",
    "TargetSite",
    "Targets",
    "TensorKey",
    "TensorLoss",
    "TraceError",
    "Value",
    "activate",
    "active",
    "adapter_formats",
    "adapter_state_dict",
    "adapters",
    "apply_rules",
    "as_digraph",
    "as_lora",
    "base_state_dict",
    "call_own",
    "check_target",
    "class_of",
    "combine",
    "commit",
    "convert_adapter",
    "copy_adapter",
    "coverage",
    "deactivate",
    "draw",
    "explain",
    "export_onnx",
    "extract_lora",
    "folded_adapter",
    "forget",
    "graph_of",
    "having",
    "hidden_of",
    "hotswap",
    "load_adapter",
    "load_adapter_state_dict",
    "load_adapters",
    "load_surgery",
    "maybe",
    "merge",
    "merge_files",
    "merge_to",
    "module_of",
    "one_of",
    "packed_stacks_of",
    "packed_weight_of",
    "pad_rank",
    "peft_method",
    "plan_rules",
    "push_adapter",
    "register_packed",
    "register_target",
    "register_format",
    "register_module_names",
    "remove",
    "rename_adapter",
    "report",
    "route",
    "rule",
    "rules_from_json",
    "rules_from_yaml",
    "rules_of",
    "rules_to_json",
    "rules_to_yaml",
    "save_adapter",
    "save_surgery",
    "show",
    "summary",
    "synced",
    "takes_functions",
    "target_profiles",
    "trace",
    "trace_site",
    "unmerge",
    "unmerge_files",
    "using",
    "verify_onnx",
    "with_layers",
]
