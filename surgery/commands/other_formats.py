"""Describes adapters in formats of other programs by the headers of their tensors, without torch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_headers import Header, TensorHeader, read_header
from surgery.commands.adapter_description import totals
from surgery.errors import SurgeryError
from surgery.storage.formats.detection import format_of_keys
from surgery.storage.formats.place import ENDINGS
from surgery.storage.formats.split import split_keys
from surgery.storage.formats.table import AdapterFormat

__all__ = ["describe_other"]

SHOWN = 200  # letters of a header's text


def describe_other(file: Path) -> dict[str, Any] | None:
    """The format, modules and ranks of an adapter in another program's format; None if it is not one of these."""
    if file.suffix not in (".safetensors", ".gguf"):
        return None
    header = read_header(file) if file.suffix == ".safetensors" else _gguf_header(file)
    try:
        adapter_format = format_of_keys(list(header.tensors), (ENDINGS[file.suffix],))
    except SurgeryError as error:  # several formats have these keys
        return {"format": "an adapter", **totals(header), "sites": [], "notes": [str(error)], "opens_with": []}
    if adapter_format is None:
        return None
    sites = _sites(adapter_format, header)
    return {
        "format": adapter_format.title,
        "ranks": dict(sorted(Counter(str(site["rank"]) for site in sites if site["rank"]).items())),
        "rules": _settings(file, adapter_format),
        **totals(header),
        "metadata": {name: text[:SHOWN] for name, text in header.metadata.items()},
        "sites": sites,
        "opens_with": [f"surgery.load_adapter(…, format={adapter_format.name!r})"],
    }


def _gguf_header(file: Path) -> Header:
    """The header of a GGUF file; the package gguf reads it."""
    from surgery.storage.formats.gguf_file import open_gguf

    opened = open_gguf(file)
    names = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}
    tensors = {
        key: TensorHeader(names[str(opened.dtypes[key]).removeprefix("torch.")], shape, 0, 0)
        for key, shape in opened.shapes.items()
    }
    return Header(tensors, {name: str(value) for name, value in opened.metadata.items()}, 0, 0)


def _sites(adapter_format: AdapterFormat, header: Header) -> list[dict[str, Any]]:
    sites: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, (prefix, text, tensor_key) in split_keys(adapter_format, header.tensors)[0].items():
        shape = header.tensors[key].shape
        turned = tensor_key.layout == "transposed"
        sites.setdefault(prefix.text + text, {})[tensor_key.part] = shape[::-1] if turned else shape
    return [
        {
            "path": path,
            "rank": next((parts[name][0] for name in ("A", "hada_w1_b", "lokr_w2_b") if parts.get(name)), None),
            "tensors": {part: list(shape) for part, shape in parts.items()},
        }
        for path, parts in sites.items()
    ]


def _settings(file: Path, adapter_format: AdapterFormat) -> list[dict[str, Any]]:
    """The settings file as one entry of the list of rules."""
    name = adapter_format.settings_file
    settings = read_json(file.parent / name) if name and (file.parent / name).is_file() else None
    if not isinstance(settings, dict):
        return []
    return [
        {"rule": adapter_format.title, **{key: settings[key] for key in adapter_format.settings if key in settings}}
    ]
