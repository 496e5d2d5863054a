"""Describes an adapter by its settings and the headers of its tensors, without a model and without torch."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from surgery.adapter_files.entry import NAME, SURGERY, names_in
from surgery.adapter_files.plain_json import parse_json, read_json
from surgery.adapter_files.tensor_headers import Header, TensorHeader, read_header
from surgery.errors import SurgeryError
from surgery.peft_format.key_history import METHOD_KEY, PREFIX, current_keys

__all__ = ["describe_adapter", "our_place", "peft_keys", "peft_place", "sites_of", "totals"]

RESERVED = "adapters"  # the segment before an adapter's tensors in our own format
# Tensors that show a rank, in both formats: (name, number of axes) → the axis of the rank. None: any number of axes.
RANK_AXES: dict[tuple[str, int | None], int] = {
    ("A", None): 0, ("lora_A", None): 0, ("lora_embedding_A", None): 0,
    ("w1_b", None): 0, ("hada_w1_b", None): 0, ("w2_b", None): 0, ("lokr_w2_b", None): 0,
    ("d", 1): 0, ("vera_lambda_d", 1): 0, ("randlora_lambda", 2): 0,
    ("u", 2): 1, ("hra_u", 2): 1, ("R", 2): 0, ("block", 2): 0, ("miss_block", 2): 0,
}  # fmt: skip
SILENT = frozenset("peft_type peft_version base_model_name_or_path auto_mapping revision inference_mode".split())


def describe_adapter(folder: Path) -> dict[str, Any]:
    """The format, rules, sites and base of the adapter in a folder."""
    names = names_in(folder)
    if names is None:
        raise SurgeryError(f"there is no adapter in {folder}")
    file = folder / names[0]
    if file.suffix != ".safetensors":
        settings = _settings(folder, names[1], {})
        notes = [f"{file.name} is a pickle, which is not opened here; load_adapter reads it with weights_only"]
        found = {"format": "PEFT (a pickle)", "rules": _peft_rules(settings), "sites": [], "ranks": {}, "notes": notes}
        return {**found, "base": _base(settings, {}), "opens_with": ["surgery.load_adapter", "peft"]}
    header = read_header(file)
    extra = _extra(header)
    settings = _settings(folder, names[1], extra)
    ours = names[0] == SURGERY[0] or settings.get("format") == NAME
    sites = sites_of(header, ours)
    described: dict[str, Any] = {
        "format": "surgery" if ours else "PEFT" if names[1] else "diffusers",
        "base": _base(settings, settings.get("base") if ours else extra.get("base")),
        "rules": settings.get("rules", []) if ours else _peft_rules(settings),
        "ranks": dict(sorted(Counter(str(site["rank"]) for site in sites if site["rank"]).items())),
        "sites": sites,
        **totals(header),
        "licence": (settings if ours else extra).get("licence"),
        "metadata": (settings if ours else extra).get("metadata") or {},
    }
    programs = {"surgery": [], "PEFT": ["peft"], "diffusers": ["diffusers"]}[described["format"]]
    return {**described, "opens_with": ["surgery.load_adapter", *programs]}


def totals(header: Header) -> dict[str, Any]:
    """The number of parameters in a file, and of each dtype."""
    dtypes: Counter[str] = Counter()
    for tensor in header.tensors.values():
        dtypes[tensor.dtype] += tensor.numbers
    return {"parameters": dtypes.total(), "dtypes": dict(dtypes.most_common())}


def sites_of(header: Header, ours: bool) -> list[dict[str, Any]]:
    """The sites of a file in its order: path, tensors with their shapes, and the rank."""
    sites: dict[str, dict[str, TensorHeader]] = {}
    for today, key in ({key: key for key in header.tensors} if ours else peft_keys(header)).items():
        path, name = our_place(today) if ours else peft_place(today)
        sites.setdefault(path, {})[name] = header.tensors[key]
    return [
        {
            "path": path,
            "rank": _rank(tensors),
            "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()},
        }
        for path, tensors in sites.items()
    ]


def _rank(tensors: dict[str, TensorHeader]) -> int | None:
    for (name, axes), axis in RANK_AXES.items():
        shape = tensors[name].shape if name in tensors else ()
        if shape and axes in (None, len(shape)):
            return shape[axis]
    return None


def our_place(key: str) -> tuple[str, str]:
    path, _, name = f".{key}".rpartition(f".{RESERVED}.")
    return path.removeprefix("."), name


def peft_keys(header: Header) -> dict[str, str]:
    """PEFT's keys of today, as far as they need no model → the keys in the file."""
    try:
        spelt = current_keys(list(header.tensors), lambda: ())
    except SurgeryError:  # of several components: only a model tells which one is wanted
        return {key: key for key in header.tensors}
    return {**spelt.keys, **{key: key for key in spelt.others}}


def peft_place(key: str) -> tuple[str, str]:
    key = key.removeprefix(PREFIX)
    mark = re.search(METHOD_KEY, f".{key}")
    if mark:
        path, name = key[: max(0, mark.start() - 1)], key[mark.start() :]
        path = "" if path == PREFIX.partition(".")[0] else path  # what all sites share
        return path, name.removesuffix(".weight")
    path, _, name = key.rpartition(".")
    return path, name


def _extra(header: Header) -> dict[str, Any]:
    """What `save_adapter` wrote into the header, beside the settings."""
    data = parse_json(header.metadata["surgery"], "the header's metadata") if "surgery" in header.metadata else {}
    return data if isinstance(data, dict) else {}


def _settings(folder: Path, name: str | None, extra: dict[str, Any]) -> dict[str, Any]:
    if name is not None and (folder / name).is_file():
        data = read_json(folder / name)
    else:
        data = extra.get("settings", {})
    return data if isinstance(data, dict) else {}


def _peft_rules(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """PEFT's configuration as one rule: the method, and the fields that say something."""
    fields = {name: value for name, value in settings.items() if value not in (None, False, "", [], {})}
    shown = {name: value for name, value in fields.items() if name not in SILENT}
    return [{"rule": f"PEFT's {settings['peft_type']}", **shown}] if "peft_type" in settings else []


def _base(settings: dict[str, Any], base: Any) -> dict[str, str]:
    """The name and the class of the model that the adapter was made for, as far as the files say them."""
    mapping = settings.get("auto_mapping")
    kind = base.get("class") if isinstance(base, dict) else None
    kind = kind or (mapping.get("base_model_class") if isinstance(mapping, dict) else None)
    found = {"name": settings.get("base_model_name_or_path"), "class": kind}
    return {name: text for name, text in found.items() if isinstance(text, str) and text}
