"""Writes the files of an evaluated adapter, or raises what the program does not take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from surgery.adapter_files.entry import OLD, PEFT, SURGERY
from surgery.adapter_files.tensor_files import replace_files, write_safetensors
from surgery.errors import SurgeryError
from surgery.progress import Progress
from surgery.serving.check import refusal, report_of
from surgery.serving.evaluation import Evaluation
from surgery.serving.source import AdapterSource
from surgery.storage.formats.file_tensor import LazyTensors
from surgery.storage.formats.files import write_files
from surgery.storage.formats.table import format_named

__all__ = ["write_target"]


def write_target(
    result: Evaluation, source: AdapterSource, place: Path, labels: Mapping[str, Any], progress: Progress
) -> None:
    """Writes into a folder, or as the file that `place` names. `labels`: licence and metadata.

    Raises `SurgeryError` if the program does not take the adapter; nothing is written then.
    """
    files, profile = result.files, result.profile
    if files is None:
        raise refusal(result, report_of(result, source))
    adapter_format = format_named(profile.format)
    if adapter_format.name != "peft":
        if any(labels.values()):
            what = f"the format {adapter_format.name!r} has no place for metadata and licence"
            raise SurgeryError(what, fix="leave them out")
        write_files(place, adapter_format, files, progress)
        return
    if place.exists() and not place.is_dir() or place.suffix == ".safetensors":
        raise SurgeryError(f"{place} is not a folder", fix=f"{profile.title} reads a folder with two files")
    settings = files.settings or {}
    header = {"settings": settings, "base": source.fingerprint(), **labels}
    data = {"format": "pt", "surgery": json.dumps({name: value for name, value in header.items() if value})}
    write = partial(write_safetensors, tensors=LazyTensors(files.tensors), metadata=data, progress=progress)
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    replace_files(place, (PEFT[0], write), (PEFT[1], text.encode()), (*SURGERY, OLD))
