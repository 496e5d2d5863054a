"""The scale in PEFT's configuration: `r`, `lora_alpha`, patterns and rsLoRA, in a file or a header."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from surgery.adapter_files.plain_json import parse_json
from surgery.errors import SurgeryError
from surgery.patterns.paths import pattern_value
from surgery.peft_format.adapter_config import SILENT
from surgery.storage.formats.alpha_keys import read_alpha_keys
from surgery.storage.formats.contents import Change, Contents
from surgery.storage.formats.lokr_factor import lokr_fields
from surgery.storage.formats.scale_values import Written, alpha_of, number

__all__ = ["KIND_OF", "peft_fields", "read_peft", "read_settings_alpha", "write_peft", "write_peft_settings"]


_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
KIND_OF = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
# Fields that choose modules, which the keys do as well, or that tell of the start of training.
_CHOOSING = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights init_weights fan_in_fan_out "
    "use_dora lora_bias ensure_weight_tying decompose_both decompose_factor use_effective_conv2d r rank_pattern "
    "alpha_pattern use_rslora alpha lora_alpha lora_dropout alora_invocation_tokens rank_dropout module_dropout "
    "corda_config arrow_config monteclora_config".split()
)


def read_peft(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    if settings is None and "lora_adapter_metadata" not in header:
        if any("alpha" in change.tensors for _, _, change in contents.each()) or "peft_type" not in header:
            return read_alpha_keys(contents, settings, header)
    for component, changes in contents.changes.items():
        config = _config_of(component, settings, header)
        kind = config.get("peft_type", "LORA")
        if kind not in KIND_OF:
            raise SurgeryError(f"PEFT's {kind} has no place in this conversion", fix="load it onto a model")
        for name in ("rank_pattern", "alpha_pattern"):
            if not isinstance(config.get(name) or {}, Mapping):
                raise SurgeryError(f"PEFT's {name} is not a mapping from patterns to numbers")
        untaken = sorted(name for name in config if name not in SILENT | _CHOOSING and _says(config[name]))
        if untaken:
            why = "other formats do not have it, so the result would compute something else"
            fix = "load_adapter(model, source), as_lora(model), then save_adapter(model, target, format=…)"
            raise SurgeryError(f"PEFT's field {', '.join(untaken)} can't be converted", why=why, fix=fix)
        for path, change in changes.items():
            common = number(config.get(_ALPHA[kind], 8), f"PEFT's {_ALPHA[kind]}")
            alpha = pattern_value(config.get("alpha_pattern") or {}, path, common)
            stored = change.tensors.pop("alpha", None)
            if stored is not None and float(stored.read()) != float(alpha):
                why = f"{stored.key} is {float(stored.read()):g}, and the configuration says {alpha}"
                raise SurgeryError("the file says two alphas for one layer", where=path, why=why)
            stated = pattern_value(config.get("rank_pattern") or {}, path, config.get("r", 8))
            if change.kind != "lokr" and change.rank and stated != change.rank:
                why = f"its tensors have the rank {change.rank}, and the configuration says {stated}"
                raise SurgeryError("the ranks differ", where=change.key or path, why=why)
            rank = change.rank or stated
            change.scale = float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
        kept = {"dropout": config.get("lora_dropout"), "base": config.get("base_model_name_or_path")}
        kept |= {"task": config.get("task_type"), "invocation": config.get("alora_invocation_tokens")}
        contents.settings |= {name: value for name, value in kept.items() if value}


def read_settings_alpha(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    if not isinstance(settings, Mapping):
        fix = "put adapter_config.json with r and lora_alpha beside the tensors, or pass config="
        raise SurgeryError("the scale is not known", why="the tensors do not say it", fix=fix)
    read_peft(contents, settings, header)


def _says(value: Any) -> bool:
    return value not in (None, False, "", [], {}, "none", 0)


def _config_of(component: str, settings: Any, header: Mapping[str, Any]) -> Mapping[str, Any]:
    if settings is not None:
        if not isinstance(settings, Mapping):
            raise SurgeryError("the adapter's configuration is not a mapping")
        return settings
    data = parse_json(header["lora_adapter_metadata"], "the header's lora_adapter_metadata")
    if not isinstance(data, dict):
        raise SurgeryError("the header's lora_adapter_metadata is not a mapping")
    start = f"{component}." if component else ""
    fields = {name.removeprefix(start): value for name, value in data.items() if name.startswith(start)}
    if not fields:
        raise SurgeryError(f"the header's lora_adapter_metadata says nothing of {component}")
    return fields


def peft_fields(changes: Mapping[str, Change]) -> dict[str, Any]:
    """PEFT's fields for these changes, which are of one kind."""
    kinds = {change.kind for change in changes.values()}
    dora = {"magnitude" in change.tensors for change in changes.values()}
    (kind,) = kinds
    peft_type = next(name for name, each in KIND_OF.items() if each == kind)
    ranks = {path: change.rank or _full_rank(change) for path, change in changes.items()}
    alphas = {path: alpha_of(change.scale, ranks[path]) for path, change in changes.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config: dict[str, Any] = {"peft_type": peft_type, "r": rank, _ALPHA[peft_type]: alpha}
    config["target_modules"] = list(changes)
    config["rank_pattern"] = {_pattern(path, ranks): value for path, value in ranks.items() if value != rank}
    config["alpha_pattern"] = {_pattern(path, alphas): value for path, value in alphas.items() if value != alpha}
    if dora == {True}:
        config["use_dora"] = True
    if any("B_bias" in change.tensors for change in changes.values()):
        config["lora_bias"] = True
    if any({"hada_t1", "lokr_t2"} & set(change.tensors) for change in changes.values()):
        config["use_effective_conv2d"] = True
    if kind == "lokr":
        fields = {path: change.fields or lokr_fields(change) for path, change in changes.items()}
        first = next(iter(fields.values()))
        if others := [path for path, each in fields.items() if each != first]:
            why = f"decompose_factor and decompose_both are {first} for others, and {fields[others[0]]} here"
            raise SurgeryError("PEFT's format has one way to divide the sizes of LoKr", where=others[0], why=why)
        config |= first
    return config


def _pattern(path: str, values: Mapping[str, Any]) -> str:
    """A pattern for one path: anchored where the path is the end of another one with another value."""
    inner = any(other.endswith(f".{path}") for other in values)
    return f"^{re.escape(path)}" if inner else re.escape(path)


def _full_rank(change: Change) -> int:
    """A rank from which on LoKr holds its factors in full."""
    factors = [change.tensors[name] for name in ("lokr_w1", "lokr_w2") if name in change.tensors]
    return max((size for factor in factors for size in factor.shape[:2]), default=1)


def write_peft(contents: Contents, written: Written) -> None:
    for component, changes in contents.changes.items():
        kinds = {(change.kind, "magnitude" in change.tensors) for change in changes.values()}
        if len(kinds) > 1 or not kinds.issubset({(kind, dora) for kind in KIND_OF.values() for dora in (True, False)}):
            names = sorted({kind + (" with a magnitude" if dora else "") for kind, dora in kinds})
            raise SurgeryError(f"PEFT's format has one method per file, and this adapter has {' and '.join(names)}")
        config = peft_fields(changes)
        settings = contents.settings
        names = {"dropout": "lora_dropout", "base": "base_model_name_or_path", "task": "task_type"}
        names["invocation"] = "alora_invocation_tokens"
        config |= {theirs: settings[ours] for ours, theirs in names.items() if settings.get(ours)}
        written.settings = {**config, "inference_mode": True}
        start = f"{component}." if component else ""
        fields = json.loads(written.header.get("lora_adapter_metadata", "{}"))
        fields |= {start + name: value for name, value in config.items()}
        written.header["lora_adapter_metadata"] = json.dumps(fields)


def write_peft_settings(contents: Contents, written: Written) -> None:
    write_peft(contents, written)
    del written.header["lora_adapter_metadata"]
