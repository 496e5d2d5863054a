"""Which file of a folder is an adapter's. Needs no torch."""

from __future__ import annotations

from pathlib import Path

from surgery.adapter_files.entry import names_in
from surgery.errors import SurgeryError
from surgery.storage.formats import rows as _rows  # registers the formats
from surgery.storage.formats.table import AdapterFormat, formats

__all__ = ["ALONE", "ENDINGS", "adapter_file", "file_names", "has_known_file"]

_ROWS = _rows
ENDINGS = {
    ".safetensors": "safetensors",
    ".bin": "safetensors",
    ".pt": "safetensors",
    ".gguf": "gguf",
    ".onnx_adapter": "onnx_adapter",
}
ALONE = (".safetensors", ".gguf", ".onnx_adapter")  # endings by which a file of any name may be an adapter's
_OF_MODELS = ("model", "diffusion_pytorch_model", "consolidated")  # beginnings of files of whole models


def adapter_file(place: Path, adapter_format: AdapterFormat | None = None) -> Path | None:
    """The tensor file of an adapter: the file itself, or that of a folder; None if the folder has none.

    A file's name may be one of a format; otherwise it is the only one of the folder with an ending of adapter files.
    """
    if not place.is_dir():
        return place if place.suffix in ENDINGS else None
    if adapter_format is None and (names := names_in(place)) is not None:
        return place / names[0]
    among = [adapter_format] if adapter_format is not None else list(formats().values())
    for each in among:
        for name in each.files:
            if (place / name).is_file():
                return place / name
    files = [file for file in sorted(place.iterdir()) if file.suffix in ALONE and file.is_file()]
    files = [file for file in files if not file.name.startswith((*_OF_MODELS, "."))]
    if len(files) > 1 and adapter_format is not None:
        names = ", ".join(file.name for file in files[:8])
        raise SurgeryError(f"the folder {place.name} has {len(files)} adapter files", why=names, fix="name one of them")
    return files[0] if len(files) == 1 else None


def file_names() -> list[str]:
    """The names of the files of all formats."""
    names = [name for each in formats().values() for name in (*each.files, each.settings_file or each.files[0])]
    return list(dict.fromkeys(names))


def has_known_file(folder: Path) -> bool:
    """Whether a folder holds a tensor file with the name that a format gives it."""
    return any((folder / name).is_file() for each in formats().values() for name in each.files)
