"""Describes a model folder, or any file of tensors, by configuration and headers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_headers import read_header
from surgery.commands.adapter_description import RESERVED, totals
from surgery.commands.model_folder import CONFIG, class_in_config
from surgery.commands.weight_files import weight_files

__all__ = ["PICKLES", "describe_model", "describe_tensors"]

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


def describe_model(folder: Path) -> dict[str, Any]:
    """A model of transformers: its class, parameters, dtypes and shards."""
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    config = config if isinstance(config, dict) else {}
    files, missing = weight_files(folder)
    dtypes: Counter[str] = Counter()
    adapters = False
    for file in files:
        header = read_header(file)
        dtypes.update(totals(header)["dtypes"])
        adapters |= any(f".{RESERVED}." in f".{key}" for key in header.tensors)
    notes = []
    if pickled := sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
        notes.append(f"pickles, which are not opened here: {', '.join(pickled[:5])}")
    if adapters:
        notes.append("the weights hold adapters' tensors without their rules: apply the rules, then load_state_dict")
    if missing:
        notes.append(f"the index names files that are absent: {', '.join(missing[:5])}")
    kind = class_in_config(config)
    return {
        "format": "a model of transformers" if config else "weights of a model, without config.json",
        "class": kind,
        "model_type": config.get("model_type"),
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes.most_common()),
        "shards": len(files),
        "missing": missing,
        "notes": notes,
        "opens_with": [f"transformers.{kind or 'AutoModel'}.from_pretrained"] if config else ["safetensors"],
    }


def describe_tensors(file: Path) -> dict[str, Any]:
    """Any safetensors file: its tensors stand under the paths of their modules."""
    header = read_header(file)
    sites: dict[str, dict[str, list[int]]] = {}
    for key, tensor in header.tensors.items():
        path, _, name = key.rpartition(".")
        sites.setdefault(path, {})[name] = list(tensor.shape)
    listed = [{"path": path, "rank": None, "tensors": tensors} for path, tensors in sites.items()]
    return {
        "format": "safetensors",
        **totals(header),
        "metadata": {name: text[:200] for name, text in header.metadata.items()},
        "sites": listed,
        "opens_with": ["safetensors"],
    }
