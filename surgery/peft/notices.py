"""What PEFT refuses or warns of when a configuration goes on a model, in PEFT's sentences."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from surgery.errors import MergeError, PlanError, RuleError, SiteError, SurgeryError, SurgeryWarning
from surgery.patterns.module_class import class_of
from surgery.patterns.own_entries import own_parameter
from surgery.patterns.paths import pattern_matcher, pattern_value, select_targets
from surgery.patterns.wrappers import unwrap
from surgery.peft.base_config import PeftConfig
from surgery.peft.configuration import targeted_parameters
from surgery.peft.errors import PeftRuntimeWarning, as_builtin
from surgery.peft_format.base_embeddings import Save, embedding_notes
from surgery.peft_format.methods import method_of, part_of
from surgery.peft_format.targets import Modules, chosen_by
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.records import Applied, sites

__all__ = [
    "check_fields",
    "check_merge",
    "check_together",
    "fields_for_rules",
    "warn_of_changed_base",
    "warn_of_embeddings",
    "warn_of_fields",
    "warn_of_names",
]

_EMBEDDINGS = ("embed_tokens", "lm_head")  # the names by which PEFT knows a tied module
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)  # modules that no code calls
_LOW_RANK = ("LORA", "ADALORA", "RANDLORA")
_MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but "
_HARM = (
    "This can lead to complications, for example when merging the adapter or converting your model to other formats."
)


def check_fields(config: PeftConfig, model: nn.Module) -> None:
    """Raises PEFT's error for a field that a targeted module can't have."""
    data: Any = config.to_dict()
    bias = data.get("bias")
    if not (bias in (None, "none", "all") or (isinstance(bias, str) and bias.endswith("_only"))):
        raise as_builtin(PlanError([RuleError(f"Requested bias: {bias}, is not implemented.")]), NotImplementedError)
    modules = Modules.of(model)
    _check_copies(data, modules)
    chosen = chosen_by(data, modules) if data.get("target_modules") else set[str]()
    problem_of, parameters = _PROBLEMS.get(str(config.method)), data.get("target_parameters")
    wrapped = {name.rpartition(".")[0] for name in targeted_parameters(parameters, modules)}
    problems: list[SurgeryError] = []
    for path in (path for path in modules.by_path if path in chosen):
        module, rank = modules.by_path[path], pattern_value(data.get("rank_pattern"), path, data.get("r"))
        what = _of_mamba(config, model, path)
        if problem_of is not None and what is None:
            what = problem_of(data, module, rank if isinstance(rank, int) else 0)
        if path in wrapped:
            kind = class_of(module).__name__
            what = f"Trying to wrap an `nn.Parameter` of layer '{path}' of type {kind}, which is not a valid target. "
            what += "`target_modules` names it, too: with `target_modules=[]`, or without this name, it does not."
        if what is not None:
            problems.append(RuleError(what, where=path))
    if problems:
        raise as_builtin(PlanError(problems))


def _check_copies(data: Mapping[str, Any], modules: Modules) -> None:
    """Raises PEFT's error where `modules_to_save` names a container, or an embedding whose rows are trained."""
    names, rows = data.get("modules_to_save"), data.get("trainable_token_indices")
    twice = [name for name in rows if name in (names or ())] if isinstance(rows, Mapping) else []
    if twice:
        what = "The embedding layer is already marked to be trained fully"
        fix = f"name {twice[0]!r} in `modules_to_save` or in `trainable_token_indices`, but not in both"
        raise as_builtin(PlanError([RuleError(what, where=twice[0], fix=fix)]))
    ends = tuple(name for name in names or () if isinstance(name, str))
    for path, module in modules.by_path.items():
        if isinstance(module, _CONTAINERS) and path.endswith(ends):
            what = f"modules_to_save cannot be applied to modules of type {class_of(module)}"
            inner = ", ".join(f"{path}.{name}" for name, _ in module.named_children())
            fix = f"name the modules in it: {inner}" if inner else "name the module whose forward reads its parameters"
            raise as_builtin(PlanError([RuleError(what, where=path, fix=fix)]), TypeError)


def check_together(model: nn.Module, adapters: Iterable[str]) -> None:
    """Raises PEFT's error where several adapters have a copy of one module, or a row of one token."""
    for path, first, second in _pairs(model, adapters):
        wrapper, why = None, second.rule.hides(first.rule)
        if why is not None:
            wrapper = "TrainableTokensWrapper"  # of the rules that PEFT's format has, those of rows alone hide
        elif first.adapter != second.adapter and all(_is_copy(applied.rule) for applied in (first, second)):
            wrapper, why = "ModulesToSaveWrapper", "each has a copy of the module"
        if wrapper is not None:
            what = f"Only one adapter can be set at a time for {wrapper}, got {first.adapter} and {second.adapter}"
            raise as_builtin(SiteError(what, where=path, why=why, fix="combine them into one adapter"))


def check_merge(model: nn.Module, adapters: Iterable[str]) -> None:
    """Raises PEFT's error where two adapters, to be merged, have a row of one token."""
    for path, first, second in _pairs(model, adapters):
        why = second.rule.hides(first.rule)
        if why is not None:
            what = f"Token indices of adapter {second.adapter} are already defined and would result in undefined "
            fix = "merge one of them, or combine them into one adapter"
            raise as_builtin(MergeError(f"{what}merging behavior.", where=path, why=why, fix=fix))


def _pairs(model: nn.Module, adapters: Iterable[str]) -> Iterator[tuple[str, Applied, Applied]]:
    """Each two rules of these adapters that are at one site, with its path; those of the first adapters first."""
    order = {name: number for number, name in enumerate(adapters)}
    if len(order) < 2 or not records_in(unwrap(model)):
        return
    for path, _, site in sites(rewritten(model)[0]):
        rules = [applied for applied in site.applied if applied.adapter in order]
        for first, second in itertools.combinations(sorted(rules, key=lambda rule: order[rule.adapter]), 2):
            yield path, first, second


def _is_copy(rule: Any) -> bool:
    part = part_of(rule)
    return part is not None and part.layer == "ModulesToSaveWrapper"


def fields_for_rules(config: PeftConfig, model: nn.Module) -> dict[str, Any]:
    """The configuration's fields, without those that have no effect on this model and of which PEFT only warns.

    They are targets that match nothing beside others that match, and `ensure_weight_tying` where nothing is tied.
    """
    data = config.to_dict()
    if vars(config).get("own_mask_fn") is not None:  # it is called when the adapter is there
        data["mask_type"] = "random"
    if data.get("target_modules") and data.get("target_parameters"):
        modules = Modules.of(model)
        paths, parameters = chosen_by(data, modules), [*targeted_parameters(data["target_parameters"], modules)]
        if bool(paths) != bool(parameters):
            data["target_parameters" if paths else "target_modules"] = None
    if not data.get("ensure_weight_tying"):
        return data
    tied, rows = _tied_modules(model), data.get("trainable_token_indices")
    if tied and _names_embeddings(data):
        return data
    what = "no tied modules were found in the model"
    if tied:
        what = "no tied modules are added in either `modules_to_save` or `target_modules`"
    _warn(f"You have requested `ensure_weight_tying`, but {what}")
    if rows and not getattr(getattr(model, "config", None), "tie_word_embeddings", False):
        text = "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). "
        _warn(f"{text}Weight tying will not be applied for trainable_token_indices.")
    return data if rows else {**data, "ensure_weight_tying": False}  # rows of tokens are tied without such names


def warn_of_changed_base(configs: Iterable[PeftConfig]) -> None:
    """Warns of PiSSA and OLoRA beside another adapter, for they change the base's weights."""
    starts = [str(getattr(config, "init_lora_weights", "")).lower() for config in configs]
    for name in ("PiSSA", "OLoRA"):
        if len(starts) > 1 and any(start.partition("_niter")[0] == name.lower() for start in starts):
            text = f"{name} changes the base weights of the model and should thus not be used with other adapters. "
            _warn(f"{text}It can't be inactive: deactivating it, or activating another adapter alone, is an error.")
            return


def warn_of_embeddings(config: Mapping[str, Any], model: nn.Module, save: Save) -> None:
    """Warns, as PEFT does, where `save_embedding_layers` saves embeddings of itself, or finds none to save."""
    for note in embedding_notes(config, Modules.of(model), save):
        warnings.warn(note, SurgeryWarning, stacklevel=4)


def warn_of_fields(config: PeftConfig, model: nn.Module) -> None:
    """Warns of fields that have no effect on this model, and of adapters on tied weights."""
    data, modules = config.to_dict(), Modules.of(model)
    if not method_of(config.method).targeted or "target_modules" not in data:
        return
    paths = chosen_by(data, modules) if data["target_modules"] else set[str]()
    parameters = list(targeted_parameters(data.get("target_parameters"), modules))
    excluded = data.get("exclude_modules")
    if excluded and len(select_targets({"target_modules": ".*", "exclude_modules": excluded}, modules.by_path)) == len(
        modules.by_path
    ):
        _warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "  # type: ignore[attr-defined]
            "Please check that exclude_modules was set correctly."
        )
    if data["target_modules"] and not paths:
        text = f"target_modules={config.target_modules} were set but no module was matched."  # type: ignore[attr-defined]
        _warn(text, PeftRuntimeWarning)
    if data.get("target_parameters") and not parameters:
        _warn(
            f"target_parameters={data['target_parameters']} were set but no parameter was matched.", PeftRuntimeWarning
        )
    names = [*paths, *parameters]
    for name in ("rank_pattern", "alpha_pattern"):
        unmatched = sorted(key for key in data.get(name) or {} if not any(map(pattern_matcher(key), names)))
        if unmatched and config.method != "ADALORA":
            text = f"The following {name} keys did not match any targeted module and were ignored: {unmatched}."
            _warn(text, PeftRuntimeWarning)
    bias = data.get("bias")
    where = modules.by_path if bias == "all" else paths
    if bias not in (None, "none") and not any(getattr(modules.by_path[p], "bias", None) is not None for p in where):
        _warn(f"bias={bias!r} trains nothing: no such module has a bias.", PeftRuntimeWarning)
    if data.get("lora_bias"):
        _warn_of_missing_biases([modules.by_path[path] for path in modules.by_path if path in paths])
    if not data.get("ensure_weight_tying") and _names_embeddings(data) and _tied_modules(model):
        why = "`ensure_weight_tying` is not set to True. "
        if "ensure_weight_tying" not in data:
            why = "no implementation exists to tie the adapters. "
        _warn(_TIED + why + _HARM)


def warn_of_names(config: Any, model: Any, adapter_name: str, old: str | None) -> None:
    """Warns of an adapter's name that PEFT's tensors have, and of a configuration that named another base, `old`."""
    method = method_of(getattr(config.peft_type, "value", config.peft_type))
    names = [*method.marks, *method.tensors.values()]
    prefix = names[0].partition("_")[0] + "_" if names and "_" in names[0] else None
    if prefix is not None and adapter_name in prefix:
        _warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{prefix}'. "
            "This may lead to reinitialization of the adapter weights during loading."
        )
    new = model.__dict__.get("name_or_path") or None
    if old is not None and old != new:
        config.base_model_name_or_path = new
        _warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old}' to '{new}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint."
        )


def _warn_of_missing_biases(modules: list[nn.Module]) -> None:
    kinds = {class_of(module).__name__: None for module in modules if getattr(module, "bias", None) is None}
    for kind in kinds:
        _warn(
            f"`lora_bias=True` was passed but the targeted layer of type {kind} has no bias. "
            "This means that merging LoRA weights won't be possible."
        )


def _names_embeddings(data: Mapping[str, Any]) -> bool:
    """Whether the configuration names a module that PEFT takes for one of a tied pair."""
    targets = data.get("target_modules") or ()
    if isinstance(targets, str) and any(re.fullmatch(targets, name) for name in _EMBEDDINGS):
        return True
    named = [*(() if isinstance(targets, str) else targets), *(data.get("modules_to_save") or ())]
    return any(name.rpartition(".")[2] in _EMBEDDINGS for name in named)


def _tied_modules(model: Any) -> list[str]:
    """The modules that share the input embedding's weight, where the model says as in PEFT that it has tied weights."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    config = getattr(model, "config", None)
    if weight is None or getattr(config, "tie_word_embeddings", None) is False or not _says_tied(model):
        return []
    return [
        path
        for path, module in Modules.of(model).by_path.items()
        if module is not embedding and own_parameter(module, "weight") is weight
    ]


def _says_tied(model: Any) -> bool:
    return bool(getattr(model, "_tied_weights_keys", None))


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a Linear or a Conv1D of transformers."""
    weight: Any = own_parameter(module, "weight")
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return (weight.shape[1], weight.shape[0]) if class_of(module).__name__ == "Conv1D" else None


def _of_mamba(config: PeftConfig, model: Any, path: str) -> str | None:
    """Kernels of these models read the parameters of two modules without calling the modules."""
    kind, name = getattr(getattr(model, "config", None), "model_type", None), path.rpartition(".")[2]
    if config.method not in _LOW_RANK or kind not in _MAMBA or name not in ("out_proj", "conv1d"):
        return None
    text = f"[PEFT:{config.method}] Module '{name}' is incompatible with Mamba-based models (model_type='{kind}'). "
    return f"{text}Please remove it from `target_modules`: a fused kernel reads its weight and does not call it."


def _of_lora(data: Mapping[str, Any], module: nn.Module, rank: int) -> str | None:
    start, weight = data["init_lora_weights"], getattr(module, "weight", None)
    if data["lora_bias"] and isinstance(module, nn.Embedding):
        return "lora_bias=True is not supported for Embedding."
    if start == "orthogonal" and rank % 2:
        return f"Orthogonal initialization requires the LoRA rank to be even, got {rank} instead."
    if isinstance(start, str) and start.lower() == "mica" and weight is not None and rank > min(weight.shape[:2]):
        return (
            f"MiCA requires `r` <= min(in_features, out_features) but got r={rank} for a layer with weight shape "
            f"{tuple(weight.shape)} (max usable r is {min(weight.shape[:2])})."
        )
    return None


def _of_miss(data: Mapping[str, Any], module: nn.Module, rank: int) -> str | None:
    sizes = _sizes(module)
    if sizes is not None and rank > sizes[1]:
        return f"`r` ({rank}) must be less than or equal to in_features ({sizes[1]})"
    return None


def _of_c3a(data: Mapping[str, Any], module: nn.Module, rank: int) -> str | None:
    size = data["block_size"]
    for name, number in zip(("output", "input"), _sizes(module) or (), strict=False):
        if not data["block_size_pattern"] and isinstance(size, int) and size > 0 and number % size:
            begin = f"The block size should be a factor of the {name} size. However, "
            return f"{begin}the {name} size is {number} and the block size is {size}"
    return None


def _of_road(data: Mapping[str, Any], module: nn.Module, rank: int) -> str | None:
    sizes, group = _sizes(module), data["group_size"]
    if sizes is None:
        only = "Currently, only the following modules are supported: `torch.nn.Linear`."
        return f"Target module {module} is not supported. {only}"
    if sizes[0] % group:
        what = "The out_features of the base layer must be divisible by group_size"
        return f"{what} ({group}) when using RoadLayer."
    return None


_PROBLEMS: dict[str, Callable[[Mapping[str, Any], nn.Module, int], str | None]] = {
    "LORA": _of_lora,
    "MISS": _of_miss,
    "C3A": _of_c3a,
    "ROAD": _of_road,
}


def _warn(text: str, kind: type[SurgeryWarning] = SurgeryWarning) -> None:
    warnings.warn(text, kind, stacklevel=4)
