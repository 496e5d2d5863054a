"""The safetensors files of a model folder, with or without an index."""

from __future__ import annotations

from pathlib import Path

from surgery.adapter_files.plain_json import LARGE, read_json
from surgery.errors import SurgeryError

__all__ = ["INDEX", "weight_files"]

INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The safetensors files of a model, and the names in its index that are absent."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"], []
    if not (folder / INDEX).is_file():
        return sorted(folder.glob("*.safetensors")), []
    index = read_json(folder / INDEX, LARGE)
    mapping = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(mapping, dict) or not all(isinstance(name, str) for name in mapping.values()):
        raise SurgeryError(f"{INDEX} is damaged", where=str(folder), why="it has no weight_map of file names")
    names = sorted(set(mapping.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise SurgeryError(f"{INDEX} names a file outside of its folder", where=str(folder), why=outside[0][:200])
    return [folder / name for name in names if (folder / name).is_file()], [
        name for name in names if not (folder / name).is_file()
    ]
