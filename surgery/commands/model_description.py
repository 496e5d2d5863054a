"""Describes a model folder, or any file of tensors, by configuration and headers."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_headers import read_header
from surgery.commands.adapter_description import RESERVED, totals
from surgery.commands.model_folder import CONFIG, class_in_config
from surgery.errors import SurgeryError

__all__ = ["INDEX", "PICKLES", "describe_model", "describe_tensors", "weight_files"]

INDEX = "model.safetensors.index.json"
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


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a model, and the names in its index that are absent."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], []
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors")), []
    index = read_json(folder / INDEX)
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise SurgeryError(f"{INDEX} is damaged", where=str(folder), why="it has no weight_map of file names")
    names = sorted(set(mapping.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise SurgeryError(f"{INDEX} names a file outside of its folder", where=str(folder), why=outside[0][:200])
    return [folder / name for name in names if (folder / name).is_file()], [
        name for name in names if not (folder / name).is_file()
    ]


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
