"""What goes with any of PEFT's methods: modules_to_save, and biases that are trained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from surgery import PeftConfig, PeftEntry, PeftPart, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules.bias import BiasRule, biases, trains_biases
from surgery.rules.experts import ExpertLoraRule
from surgery.rules.peft.tasks import HEADS, ending
from surgery.rules.peft.tied_modules import (
    NAMES,
    embedding_path,
    take_tying,
    tied_paths,
    weight_key,
    without_tied,
)
from surgery.rules.train import TrainRule


@peft_method
class Trained(PeftPart):
    rule, layer = TrainRule, "ModulesToSaveWrapper"

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        names = config.take("modules_to_save") or ()
        if isinstance(names, str) or not all(isinstance(name, str) for name in names):
            raise SurgeryError("PEFT's modules_to_save is not a list of names")
        paths = trained_modules(config)
        if together := take_tying(config, paths):
            left = ending(config.modules.by_path, [*without_tied(names, together[1:]), *_heads(config)])
            yield TrainRule(targets=config.regular([*dict.fromkeys([*left, *together])]), tied=True)
        elif paths:  # PEFT passes over names that fit none: its classification task adds "score" and "classifier"
            yield TrainRule(targets=config.regular(paths))

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        names = dict(place.module.named_parameters()) | dict(place.module.named_buffers())
        by_name = {name.replace(".", "_"): name for name in names}
        entries = {name: PeftEntry(by_name[name]) for name in place.names if name in by_name}
        embedding = embedding_path(place.modules)
        if place.file_keys and embedding and getattr(place.rule, "tied", False) and place.path != embedding:
            there, own = weight_key(embedding), weight_key(place.path)
            if own not in place.file_keys and there in place.file_keys and place.path in tied_paths(place.modules):
                entries["weight"] = PeftEntry(f"/{there}")  # the file has the shared copy once
        return entries

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        paths = [path for _, inner in placed for path in inner]
        if set(chosen := ending(modules.by_path, paths)) != set(paths):
            raise _other_modules(modules, paths, chosen)
        groups = [group for rule, inner in placed if rule.tied for group in _sharing(inner, modules)]
        if not groups:
            return {"modules_to_save": paths}
        embedding = embedding_path(modules)
        tied = tied_paths(modules)
        if len(groups) > 1 or not tied or set(groups[0]) != {embedding, *tied}:
            why = "PEFT ties the copies of the input embedding and of all modules that share its weight, and no others"
            raise SurgeryError("PEFT's format can't hold this TrainRule", where=" and ".join(groups[0]), why=why)
        kept = [path for path in paths if path not in tied]
        if not any(path.rpartition(".")[2] in NAMES for path in kept):  # by these names PEFT finds that it has to tie
            kept += [path for path in tied if path.rpartition(".")[2] in NAMES]
        return {"modules_to_save": kept, "ensure_weight_tying": True}


def _other_modules(modules: Any, paths: Sequence[str], chosen: Sequence[str]) -> SurgeryError:
    """The error for modules that PEFT would choose by the ends of their paths, other than those of the rules."""
    what, either = "PEFT's format can't hold this TrainRule", 'save_adapter(…, format="surgery") holds any rules'
    further = [path for path in chosen if path not in paths]
    if set(paths) - set(chosen):  # a path inside one that ends so
        return SurgeryError(what, why=f"PEFT would train {_some(further or chosen)} whole", fix=either)
    names = list(dict.fromkeys(path.rpartition(".")[2] for path in chosen))
    if {path for path in modules.by_path if path.rpartition(".")[2] in names} != set(chosen):
        names = list(chosen)
    why = f"PEFT would also train {_some(further)}: it compares the ends of paths, and not whole names"
    fix = f"train them, too: TrainRule({json.dumps(names)})" if len(names) <= 6 else "train them, too"
    return SurgeryError(what, why=why, fix=f"{fix}; {either}")


def _some(paths: Sequence[str]) -> str:
    rest = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3]) + rest


def _sharing(paths: Iterable[str], modules: Any) -> list[list[str]]:
    """The paths whose modules share their weight, by weight."""
    groups: dict[int, list[str]] = {}
    for path in paths:
        groups.setdefault(id(modules.by_path[path]._parameters.get("weight", path)), []).append(path)
    return [group for group in groups.values() if len(group) > 1]


def _heads(config: PeftConfig) -> list[str]:
    """The heads that are in the file because of its task: PEFT up to 0.6 did not name them in the configuration."""
    task, keys = config.data.get("task_type"), config.file.shapes if config.file is not None else ()
    heads = ending(config.modules.by_path, HEADS.get(task, ()) if isinstance(task, str) else ())
    starts = [(path, f"{start}{path}.") for path in heads for start in ("base_model.model.", "base_model.")]
    names = {path: [name for name, _ in config.modules.by_path[path].named_parameters()] for path in heads}
    return [path for path, start in starts if any(start + name in keys for name in names[path])]


def trained_modules(config: PeftConfig) -> list[str]:
    """The modules that a configuration trains as a whole: those that it names, and heads in the file."""
    names = config.data.get("modules_to_save") or ()
    return ending(config.modules.by_path, [*(name for name in names if isinstance(name, str)), *_heads(config)])


def targeted_parameters(config: PeftConfig) -> dict[str, list[str]]:
    """The parameters that `target_parameters` means, by their module's path."""
    named = config.data.get("target_parameters") or ()
    if not isinstance(named, (list, tuple)) or not all(isinstance(name, str) for name in named):
        raise SurgeryError("PEFT's target_parameters is not a list of names")
    return config.modules.parameters_of(named)


def biases_beside(config: PeftConfig) -> bool:
    """Whether the field `bias` is held by a BiasRule beside the method's own rule.

    LoRA's rule has the field itself; LoRA on parameters has another rule.
    """
    return config.data.get("peft_type") != "LORA" or bool(config.data.get("target_parameters"))


def _inner(modules: Any, paths: Iterable[str]) -> dict[str, nn.Module]:
    """These modules and all that are in them."""
    starts = tuple(f"{path}." for path in paths)
    return {path: module for path, module in modules.by_path.items() if f"{path}.".startswith(starts or ("\n",))}


@peft_method
class Biases(PeftPart):
    """The field `bias`: "all", or "<method>_only" for those of the method's targets."""

    rule = BiasRule

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        bias = config.data.get("bias")
        if bias in (None, "none") or not biases_beside(config):
            return
        config.take("bias")
        if bias == "all":
            inner = _inner(config.modules, trained_modules(config))
            if any(biases(module) for path, module in config.modules.by_path.items() if path not in inner):
                yield BiasRule()  # not on modules that are trained as a whole; without any, PEFT trains none either
        elif isinstance(bias, str) and bias.endswith("_only"):
            parameters = targeted_parameters(config)
            targeted = set[str]() if parameters and not config.data.get("target_modules") else config.targeted
            modules = config.modules.by_path
            paths = {path for path in targeted if biases(modules[path])}
            paths |= {path for path in parameters if modules[path]._parameters.get("bias") is not None}
            if paths:
                yield BiasRule(targets=config.regular(sorted(paths)))
        else:
            raise config.refuse("bias", 'it is neither "none" nor "all" nor of the kind of "lora_only"')

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        names = {name.replace(".", "_"): name for name, _ in place.module.named_parameters()}
        entries = {}
        for name in (name for name in place.names if name in names):  # the site may have LoRA's tensors, too
            full = names[name]
            if place.path in place.main:  # PEFT's layer stands around the module
                full = "base_layer." + re.sub(r"^out_proj\.", "out_proj.base_layer.", full)
            entries[name] = PeftEntry(full)
        return entries

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        return {}  # see `settle`

    def settle(self, config: Any, placed: Any, main: Any, modules: Any) -> dict[str, Any]:
        of_rules = {path for path, rule in placed if isinstance(rule, BiasRule)}
        whole = _inner(modules, [path for path, rule in placed if isinstance(rule, TrainRule)])
        there = {path for path, module in modules.by_path.items() if trains_biases(module) and path not in whole}
        method = str(config["peft_type"])
        if of_rules == there:
            return {"bias": "all"}
        stacks = {path for path, rule in placed if isinstance(rule, ExpertLoraRule)}
        own = {path for path in main if path not in stacks and biases(modules.by_path[path])}
        own |= {path for path in stacks if modules.by_path[path]._parameters.get("bias") is not None}
        if of_rules == own:
            return {"bias": f"{method.lower()}_only"}
        raise SurgeryError(
            "PEFT's format can't hold a BiasRule on some modules",
            why="its bias is of all modules, or of those of its method",
            fix='BiasRule() without targets; save_adapter(…, format="surgery") holds any rules',
        )
