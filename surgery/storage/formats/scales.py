"""The ways in which formats say the scale of a change, each read and written. A format names one of them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surgery.adapter_files.plain_json import parse_json
from surgery.errors import SurgeryError
from surgery.patterns.paths import pattern_value
from surgery.peft_format.adapter_config import SILENT
from surgery.storage.formats.contents import Change, Contents
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.lokr_factor import lokr_fields

__all__ = ["KIND_OF", "SCALES", "Scale", "Written", "alpha_of", "peft_fields"]


@dataclass
class Written:
    """What is written beside the tensors: values for the template of the settings, and fields of the header."""

    values: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    header: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Scale(NamedTuple):
    """`read` sets the scale of every change. `write` says the scales, and folds into B what can't be said."""

    read: Callable[[Contents, Any, Mapping[str, Any]], None]
    write: Callable[[Contents, Written], None]


def alpha_of(scale: float, rank: int) -> float:
    """The alpha for which alpha / rank is the scale, to the bit if there is one."""
    alpha = scale * rank
    for value in (float(round(alpha)), alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, 0)):
        if rank and value / rank == scale:
            return int(value) if value == int(value) else value
    return alpha


def number(value: Any, what: str) -> float:
    """A number above 0 of a file."""
    try:
        result = float(value)
    except (TypeError, ValueError):
        result = 0.0
    if not 0 < result < math.inf or isinstance(value, bool):
        raise SurgeryError(f"{what}={str(value)[:40]!r} is not a number above 0")
    return result


# An alpha beside each module --------------------------------------------------------------------------------------

_HEADER_ALPHA = ("ss_network_alpha", "network_alpha", "lora_alpha")


def _read_alpha_keys(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    common = next((number(header[name], f"the header's {name}") for name in _HEADER_ALPHA if name in header), None)
    for component, changes in contents.changes.items():
        unsaid = [path for path, change in changes.items() if not _take_alpha(change, common)]
        if unsaid:
            count = f", for {len(unsaid)} modules such as {unsaid[0]}," if len(unsaid) < len(changes) else ""
            text = f"the file{count} does not say alpha: it is taken to be the rank, a scale of 1"
            contents.assumed_of.setdefault(component, []).append(text)
    if '"split_qkv": "True"' in str(header.get("ss_network_args", "")):
        contents.assumed.append(
            "the header says split_qkv: the scale is alpha / rank in the file, as every program computes it, and not "
            "that of the training, alpha / rank of one part"
        )


def _take_alpha(change: Change, common: float | None) -> bool:
    """Sets a change's scale by the alpha beside it, or by that of the header; returns whether one of them is there."""
    if change.kind == "oft":  # its alpha bounds a norm
        return True
    tensor = change.tensors.pop("alpha", None)
    if not change.rank:  # a change in full has no rank, and LyCORIS gives it the scale 1
        change.scale = 1.0
        return True
    if tensor is not None:
        values = tensor.read()
        if values.numel() != 1:
            raise SurgeryError("an alpha is not one number", where=tensor.key, why=f"its shape is {tensor.shape}")
        change.scale = number(values.item(), f"the alpha {tensor.key}") / change.rank
    elif common is not None:
        change.scale = common / change.rank
    return tensor is not None or common is not None


def _write_alpha_keys(contents: Contents, written: Written) -> None:
    for _, path, change in contents.each():
        if not change.rank and change.kind != "lokr":
            continue
        if change.kind == "lokr":
            _write_lokr_scale(path, change, written)
        dtype = next(iter(change.tensors.values())).dtype
        alpha = torch.tensor(alpha_of(change.scale, change.rank) if change.rank else 1.0, dtype=torch.float64)
        fits = dtype.is_floating_point and torch.equal(alpha.to(dtype).double(), alpha)
        change.tensors["alpha"] = FileTensor.of(alpha.to(dtype if fits else torch.float32))
    ranks, alphas = _counted(contents)
    written.values |= {"rank": ranks[0] if ranks else 0, "alpha": alphas[0] if alphas else 1}


def _write_lokr_scale(path: str, change: Change, written: Written) -> None:
    """LyCORIS gives factors in full the scale 1, and divides sizes so that the first factor is the smaller one."""
    tensors = change.tensors
    if {"lokr_w1", "lokr_w2"} <= set(tensors) and change.scale != 1:
        scale = change.scale
        tensors["lokr_w1"] = tensors["lokr_w1"].convert(lambda w1: _times(w1, scale))
        change.scale = 1.0
        written.notes.append(f"LyCORIS has no scale for a LoKr in full: at {path} it is multiplied into lokr_w1")
    if "lokr_w1" in tensors and "lokr_t2" not in tensors:
        halves = [tensors.get("lokr_w2") or tensors[f"lokr_w2_{name}"] for name in "ab"]
        second = [half.shape[axis] for axis, half in enumerate(halves)]
        if any(one > two for one, two in zip(tensors["lokr_w1"].shape, second, strict=True)):
            written.notes.append(f"LyCORIS itself does not open the LoKr at {path}: its first factor is the larger one")


def _counted(contents: Contents) -> tuple[list[int], list[float]]:
    """The ranks and the alphas of the changes, the most frequent first."""
    changes = [change for _, _, change in contents.each() if change.rank]
    ranks = Counter(change.rank for change in changes)
    alphas = Counter(alpha_of(change.scale, change.rank) for change in changes)
    return [rank for rank, _ in ranks.most_common()], [alpha for alpha, _ in alphas.most_common()]


# One number for all modules ---------------------------------------------------------------------------------------


def _read_one_scale(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    fields = settings.get("lora_parameters") if isinstance(settings, Mapping) else None
    if not isinstance(fields, Mapping) or "scale" not in fields:
        why = "the settings file is absent" if settings is None else "it has no lora_parameters with a scale"
        raise SurgeryError("the scale is not known", why=why, fix="put adapter_config.json beside the tensors")
    scale = number(fields["scale"], "the settings' scale")
    for _, _, change in contents.each():
        change.scale = scale
    if isinstance(dropout := fields.get("dropout"), (int, float)) and 0 < dropout < 1:
        contents.settings["dropout"] = float(dropout)
    kind = str(settings.get("fine_tune_type", "lora"))
    stored = {"dora" if "magnitude" in change.tensors else "lora" for _, _, change in contents.each()}
    if stored != {kind}:
        why = f"fine_tune_type={kind[:40]!r}, and the tensors are those of {' and '.join(sorted(stored))}"
        raise SurgeryError("the settings and the tensors differ in the method", why=why)


def _write_one_scale(contents: Contents, written: Written) -> None:
    scale = _fold(contents, written, "one scale", lambda change: change.scale, lambda value, change: value)
    ranks, _ = _counted(contents)
    if len(ranks) > 1:
        raise SurgeryError(
            f"the format has one rank for all modules, and the adapter has {', '.join(map(str, sorted(ranks)))}",
            fix="train with one rank, or choose another format",
        )
    kinds = {"dora" if "magnitude" in change.tensors else "lora" for _, _, change in contents.each()}
    if len(kinds) > 1:
        raise SurgeryError("the format holds LoRA or DoRA, and the adapter has both", fix="choose another format")
    paths = [path for _, path, _ in contents.each()]
    layers = {hit[1] for path in paths if (hit := re.search(r"\.(\d+)\.", path))}
    written.values |= {"scale": scale, "rank": ranks[0], "kind": kinds.pop(), "paths": paths, "layers": len(layers)}
    written.values["dropout"] = contents.settings.get("dropout", 0.0)


def _read_one_alpha(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    if "adapter.lora.alpha" not in header:
        raise SurgeryError("the file does not say alpha", why="it has no field adapter.lora.alpha")
    value = header["adapter.lora.alpha"]
    if float(value) == 0:  # llama.cpp then does not divide by the rank
        contents.assumed.append("the file's alpha is 0, which llama.cpp reads as a scale of 1")
    alpha = number(value, "adapter.lora.alpha") if float(value) else None
    for _, _, change in contents.each():
        change.scale = 1.0 if alpha is None else alpha / change.rank
    if tokens := header.get("adapter.alora.invocation_tokens"):
        contents.settings["invocation"] = [int(token) for token in tokens]


def _write_one_alpha(contents: Contents, written: Written) -> None:
    alpha = _fold(
        contents,
        written,
        "one alpha",
        lambda change: alpha_of(change.scale, change.rank),
        lambda v, change: v / change.rank,
    )
    rounded = torch.tensor(alpha, dtype=torch.float32).item()
    if rounded != alpha:
        written.notes.append(f"alpha {alpha!r} is rounded to float32, {rounded!r}")
    written.header["adapter.lora.alpha"] = rounded
    if tokens := contents.settings.get("invocation"):
        written.header["adapter.alora.invocation_tokens"] = list(tokens)


def _write_nothing(contents: Contents, written: Written) -> None:
    _fold(contents, written, "no scale", lambda change: 1.0, lambda value, change: 1.0)


def _read_nothing(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    contents.assumed.append("the format does not have a scale: it is 1")


def _fold(
    contents: Contents,
    written: Written,
    has: str,
    said: Callable[[Change], float],
    scale_for: Callable[[float, Change], float],
) -> float:
    """The number that is said; B of changes with another scale is multiplied by what is left."""
    common = Counter(said(change) for _, _, change in contents.each()).most_common(1)[0][0]
    folded: list[str] = []
    for _, path, change in contents.each():
        rest = change.scale / scale_for(common, change)
        if rest == 1:
            continue
        if change.kind != "lora":
            raise SurgeryError(f"the format has {has}, and this change another scale", where=path)
        change.tensors["B"] = change.tensors["B"].convert(lambda B, rest=rest: _times(B, rest))
        change.scale = scale_for(common, change)
        folded.append(path)
    if folded:
        written.notes.append(
            f"the format has {has}: the scale of {len(folded)} modules, such as {folded[0]}, is multiplied into B"
        )
    return common


def _times(tensor: Tensor, factor: float) -> Tensor:
    return (tensor.double() * factor).to(tensor.dtype)


# PEFT's configuration ---------------------------------------------------------------------------------------------

_ALPHA = {"LORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha"}
KIND_OF = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr"}
# Fields that choose modules, which the keys do as well, or that tell of the start of training.
_CHOOSING = frozenset(
    "target_modules exclude_modules layers_to_transform layers_pattern init_lora_weights init_weights fan_in_fan_out "
    "use_dora lora_bias ensure_weight_tying decompose_both decompose_factor use_effective_conv2d r rank_pattern "
    "alpha_pattern use_rslora alpha lora_alpha lora_dropout alora_invocation_tokens rank_dropout module_dropout "
    "corda_config arrow_config monteclora_config".split()
)


def _read_peft(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    if settings is None and "lora_adapter_metadata" not in header:
        if any("alpha" in change.tensors for _, _, change in contents.each()) or "peft_type" not in header:
            return _read_alpha_keys(contents, settings, header)
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
            raise SurgeryError(f"PEFT's field {', '.join(untaken)} can't be converted", why=why)
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


def _read_settings_alpha(contents: Contents, settings: Any, header: Mapping[str, Any]) -> None:
    if not isinstance(settings, Mapping):
        fix = "put adapter_config.json with r and lora_alpha beside the tensors, or pass config="
        raise SurgeryError("the scale is not known", why="the tensors do not say it", fix=fix)
    _read_peft(contents, settings, header)


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


def _write_peft(contents: Contents, written: Written) -> None:
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


def _write_peft_settings(contents: Contents, written: Written) -> None:
    _write_peft(contents, written)
    del written.header["lora_adapter_metadata"]


SCALES: dict[str, Scale] = {
    "alpha_key": Scale(_read_alpha_keys, _write_alpha_keys),
    "one_scale": Scale(_read_one_scale, _write_one_scale),
    "one_alpha": Scale(_read_one_alpha, _write_one_alpha),
    "none": Scale(_read_nothing, _write_nothing),
    "settings_alpha": Scale(_read_settings_alpha, _write_peft_settings),
    "peft": Scale(_read_peft, _write_peft_settings),
    "diffusers": Scale(_read_peft, _write_peft),
}
