"""Opens adapters of other programs' formats for a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter_files.entry import BARE, names_in
from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import SurgeryError
from surgery.storage.formats.base_facts import facts_of_model
from surgery.storage.formats.detection import format_of_keys, likely_format
from surgery.storage.formats.files import open_file, settings_beside
from surgery.storage.formats.hub import OnModel, on_model
from surgery.storage.formats.place import ENDINGS, adapter_file
from surgery.storage.formats.reading import read_contents
from surgery.storage.formats.table import AdapterFormat, format_named, formats

__all__ = ["OWN_READER", "OtherAdapter", "find_other", "read_other"]

OWN_READER = frozenset({"peft", "surgery", "diffusers", "diffusers-old"})  # which have readers of their own
_OF_PIPELINES = frozenset({"diffusers", "diffusers-old"})


@dataclass
class OtherAdapter:
    """A file of another program's format, before a model is known.

    `told_by`: what tells the format, "keys" or "name"; None: the caller.
    """

    path: Path
    file: TensorFile
    adapter_format: AdapterFormat
    told_by: str | None


def find_other(place: Path, name: str | None, pipeline: bool = False) -> OtherAdapter | None:
    """The adapter in a file or folder, if it has another format than those with readers of their own.

    `name`: the format's name; None: the keys tell it. `pipeline`: the model is several components of a pipeline, which
    diffusers' own reader takes one by one.
    """
    own_reader = OWN_READER - _OF_PIPELINES if pipeline else OWN_READER
    if name in own_reader:
        return None
    adapter_format = format_named(name) if name is not None else None
    if adapter_format is None and place.is_dir() and (names := names_in(place)) and names[0] not in BARE:
        return None
    path = adapter_file(place, adapter_format)
    if path is None or not path.is_file():
        if adapter_format is not None:
            files = ", ".join(adapter_format.files)
            raise SurgeryError(f"there is no adapter of the format {name!r} here", why=f"none of {files} is in it")
        return None
    file = open_file(path)
    if adapter_format is not None:
        return OtherAdapter(path, file, adapter_format, None)
    keys, containers = list(file.shapes), (ENDINGS[path.suffix],)
    adapter_format = format_of_keys(keys, containers) or likely_format(keys, containers)
    if adapter_format is None:
        return None
    for each in formats().values():  # keys of PEFT under the name of another program's file
        if path.name in each.files and adapter_format.name in each.contains and each.name not in own_reader:
            return OtherAdapter(path, file, each, "name")
    return None if adapter_format.name in own_reader else OtherAdapter(path, file, adapter_format, "keys")


def read_other(
    other: OtherAdapter, model: nn.Module, config: Mapping[str, Any] | None, component: str | None
) -> OnModel:
    """The adapter in PEFT's terms, for a model; `assumed` says of which format it was read."""
    settings = settings_beside(other.path, other.adapter_format) if config is None else dict(config)
    contents = read_contents(other.adapter_format, other.file, settings, facts_of_model(model))
    if other.told_by is not None:
        title = other.adapter_format.title
        contents.assumed.insert(
            0, f"by its {other.told_by}, the file has the format {other.adapter_format.name!r}: {title}"
        )
    try:
        return on_model(contents, model, component, other.file.metadata)
    except SurgeryError:
        raise
    except Exception as error:  # tensors of a file may have any sizes
        why = f"{type(error).__name__}: {error}"[:300]
        raise SurgeryError("the file's tensors do not fit together", why=why) from error
