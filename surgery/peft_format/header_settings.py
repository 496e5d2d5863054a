"""Settings for tensors of LoRA without an `adapter_config.json`: what the file says of them, anywhere, and no guesses.

diffusers writes the configuration into the header (`lora_adapter_metadata`), each field behind the component that it is
of; other programs write an alpha beside each layer, or one into the header. Ranks are in the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from surgery.adapter_files.plain_json import parse_json
from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import SurgeryError
from surgery.patterns.paths import pattern_value
from surgery.peft_format.key_history import COMPONENTS, PREFIX, Spelt

__all__ = ["HeaderSettings", "alphas_of", "header_format", "settings_of"]

HEADER = "lora_adapter_metadata"
_ONE_ALPHA = ("lora_alpha", "network_alpha", "ss_network_alpha")  # header fields, for all layers


@dataclass
class HeaderSettings:
    """A configuration; what was `assumed`, since the file does not say it; keys that only said how."""

    config: dict[str, Any]
    assumed: list[str] = field(default_factory=list)
    passed_over: tuple[str, ...] = ()


def settings_of(spelt: Spelt, file: TensorFile) -> HeaderSettings:
    """A configuration of LoRA by the tensors, by what stands beside them, and by the file's header."""
    ranks: dict[str, int] = {}
    for key, there in spelt.keys.items():
        hit = re.fullmatch(r"base_model\.model\.(.+)\.(?:lora_A\.weight|lora_embedding_A)", key)
        if hit:
            ranks[hit[1]] = file.shapes[there][0] if file.shapes[there] else 0
    if not ranks:
        raise SurgeryError("there is no adapter_config.json beside the tensors", why="and the tensors are not LoRA's")
    targets = {"target_modules": "|".join(map(re.escape, ranks))}
    alphas, header = alphas_of(spelt, file), _header(spelt, file)
    alpha_keys = tuple(alphas)
    if header is not None:
        around = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        config = {"peft_type": "LORA", **header, **around, **targets}
        check_alphas(config, alphas, spelt, HEADER)
        return HeaderSettings(config, passed_over=alpha_keys)
    config = {"peft_type": "LORA", **targets, **_by_keys(spelt)}
    usual = max(set(ranks.values()), key=list(ranks.values()).count)
    config |= {"r": usual, "rank_pattern": {re.escape(path): r for path, r in ranks.items() if r != usual}}
    layer_alphas, assumed = _scales(ranks, alphas, spelt, file)
    most = max(set(layer_alphas.values()), key=list(layer_alphas.values()).count)
    others = {re.escape(path): alpha for path, alpha in layer_alphas.items() if alpha != most}
    return HeaderSettings(config | {"lora_alpha": most, "alpha_pattern": others}, assumed, alpha_keys)


def alphas_of(spelt: Spelt, file: TensorFile) -> dict[str, float]:
    """The alphas beside layers, by their keys in the file."""
    alphas: dict[str, float] = {}
    for key, there in spelt.keys.items():
        if key.startswith(PREFIX) and key.endswith(".alpha"):
            tensor = file.read(there)
            if tensor.numel() != 1 or not 0 < float(tensor) < float("inf"):
                raise SurgeryError("an alpha is not a number above 0", where=there)
            alphas[there] = float(tensor)
    return alphas


def check_alphas(config: Mapping[str, Any], alphas: Mapping[str, float], spelt: Spelt, source: str) -> None:
    """`SurgeryError` if the alpha beside a layer differs from the configuration's."""
    here = {there: key for key, there in spelt.keys.items()}
    for there, alpha in alphas.items():
        expected = pattern_value(config.get("alpha_pattern"), _layer(here[there]), config.get("lora_alpha", 8))
        if expected != alpha:
            why = f"{there} is {alpha:g}, and {source} says {expected}"
            raise SurgeryError("the file says two alphas for one layer", why=why, fix="take the wrong one out of it")


def _layer(key: str) -> str:
    return key.removeprefix(PREFIX).removesuffix(".alpha")


def _scales(
    ranks: Mapping[str, int], alphas: Mapping[str, float], spelt: Spelt, file: TensorFile
) -> tuple[dict[str, float], list[str]]:
    """The alpha of each layer, and what was assumed: without an alpha, it is the rank, which is a scale of 1."""
    here = {there: key for key, there in spelt.keys.items()}
    by_layer = {_layer(here[there]): alpha for there, alpha in alphas.items()}
    common = next((_number(file.metadata[name], name) for name in _ONE_ALPHA if name in file.metadata), None)
    unknown = [path for path in ranks if path not in by_layer] if common is None else []
    assumed = []
    if unknown:
        where = (
            "the file" if len(unknown) == len(ranks) else f"the file, for {len(unknown)} layers such as {unknown[0]},"
        )
        assumed = [f"{where} does not say alpha: it is taken to be the rank, a scale of 1"]
    return {path: by_layer.get(path, common if common is not None else rank) for path, rank in ranks.items()}, assumed


def _number(text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise SurgeryError(f"the header's {name}={text[:40]!r} is not a number above 0")
    return value


def _by_keys(spelt: Spelt) -> dict[str, Any]:
    """Variants of LoRA that the keys show."""
    forms = {"use_dora": ".lora_magnitude_vector", "lora_bias": ".lora_B.bias"}
    return {name: True for name, end in forms.items() if any(key.endswith(end) for key in spelt.keys)}


def header_format(keys: Iterable[str]) -> str:
    """The name of the format of tensors without a configuration: diffusers' of today, or the spelling of old."""
    old = re.compile(r"\.processor\.|(_|\.)lora\.(down|up)\.|lora_linear_layer")
    return "diffusers-old" if any(old.search(key) for key in keys) else "diffusers"


def _header(spelt: Spelt, file: TensorFile) -> dict[str, Any] | None:
    """The configuration in the header, for the component of the keys."""
    if HEADER not in file.metadata:
        return None
    data = parse_json(file.metadata[HEADER], f"the header's {HEADER}")
    if not isinstance(data, dict):
        raise SurgeryError(f"the header's {HEADER} is not a mapping")
    starts = [f"{spelt.component}."] if spelt.component else [f"{name}." for name in COMPONENTS]
    for start in (*starts, ""):
        fields = {name.removeprefix(start): value for name, value in data.items() if name.startswith(start)}
        if fields and not (start == "" and all("." in name for name in fields)):
            return fields
    raise SurgeryError(f"the header's {HEADER} says nothing of {spelt.component or 'this model'}")
