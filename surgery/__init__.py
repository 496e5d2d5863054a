"""Declarative model surgery for PyTorch: rules match modules, rewrite their graphs, and are taken out to the bit.

    from surgery import apply_rules, merge, remove, save_adapter
    from surgery.rules import LoraRule

    apply_rules(model, LoraRule(["query", "value"], rank=8))     # the same object, rewritten in place
    save_adapter(model, "topics")                                # PEFT's files where PEFT can hold the adapter
    remove(model)                                                # the base, to the bit

`help(surgery.apply_rules)` documents a function. The public names:

    rules               apply_rules, plan_rules, explain, remove, forget, Plan
    rules as data       rules_of, rules_from_json, rules_from_yaml, rules_to_json, rules_to_yaml
    several adapters    adapters, active, activate, deactivate, using, route, combine, rename_adapter, copy_adapter,
                        hotswap, pad_rank, as_lora, extract_lora, Adapter, SwapReport, LoraReport, LoraSite
    merging             merge, unmerge, synced, merge_to, commit, folded_adapter, MergeReport, MergeLoss, TensorLoss
    checkpoints         merge_files, unmerge_files, FileMergeReport, FileUnmergeReport
    files               save_adapter, load_adapter, load_adapters, push_adapter, adapter_state_dict, base_state_dict,
                        load_adapter_state_dict, save_surgery, load_surgery, LoadReport
    formats of files    convert_adapter, adapter_formats, register_format, register_module_names, AdapterFormat,
                        KeyPrefix, TensorKey, ModuleNames, NameRow, ConversionReport
    other programs      check_target, target_profiles, register_target, TargetProfile, TargetReport, TargetSite
    looking             show, draw, report, summary, coverage, trace, trace_site, graph_of, as_digraph, class_of,
                        Drawing, Summary, Coverage
    ONNX                export_onnx, verify_onnx, ExportReport, ParityReport
    where a rule goes   Targets, Pattern, Structure, ANY, Const, having, maybe, module_of, one_of, Found, Occurrence,
                        MatchedModule
    writing a rule      rule, Rule, SlotRule, Site, LiveSite, SiteModule, Value, Member, Combination, Share, LowRank,
                        Rows, Equivalence, StructureRule, ModelEdits, call_own, hidden_of, takes_functions, with_layers
    quantised weights   packed_weight_of, packed_stacks_of, register_packed, PackedWeight, PackedStack
    PEFT's files        peft_method, PeftMethod, PeftPart, PeftConfig, PeftPlace, PeftEntry
    errors              SurgeryError, PlanError, LoadError, RuleError, MatchError, SiteError, MergeError, TraceError,
                        ParityError, SurgeryWarning

Packages: `surgery.rules` (the rule library), `surgery.onnx`, `surgery.peft`, `surgery.testing`, `surgery.trainer`. They
are imported at their first use: `help(surgery.rules)`. The
command `surgery` (`python -m surgery --help`) does the same for files.
"""

import lazy_loader

from surgery.short_help import shorten_help

__version__ = "0.1.0"

# The names are listed in `__init__.pyi`; nothing is imported before it is asked for, so that parts which need no torch
# (`surgery.onnx.runtime.runner`) work without it. The packages are attributes, too, and `import *` does not load them.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in __all__ if name not in ("onnx", "peft", "rules", "testing", "trainer")]
shorten_help(globals())
