"""`convert_adapter`: rewrites an adapter's files in another format, from its tensors alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter_files.entry import BARE, PEFT, SURGERY
from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import LoadError, SurgeryError
from surgery.peft_format.key_history import PREFIX, current_keys
from surgery.progress import Progress
from surgery.results import Report
from surgery.storage.formats.base_facts import base_facts
from surgery.storage.formats.contents import BaseFacts, Contents
from surgery.storage.formats.files import open_file, settings_beside, write_files
from surgery.storage.formats.place import adapter_file
from surgery.storage.formats.reading import read_contents
from surgery.storage.formats.stored import find_other
from surgery.storage.formats.table import format_named
from surgery.storage.formats.writing import file_contents

__all__ = ["ConversionReport", "convert_adapter", "read_file_contents"]


@dataclass
class ConversionReport(Report):
    """The result of `convert_adapter`.

    `path`: the file or folder that was written. `source_format`, `format`: names of the two formats. `modules`: the
    paths of the changed modules, after their component. `assumed`: facts that the source does not state. `notes`: what
    a person should know of the result, such as a scale that was multiplied into a tensor.
    """

    path: Path
    source_format: str
    format: str
    modules: list[str] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        first = f"{self.path}: {len(self.modules)} modules, {self.source_format} to {self.format}"
        return "\n".join([first, *(f"  {text}" for text in (*self.assumed, *self.notes))])


def convert_adapter(
    source: str | Path,
    target: str | Path,
    *,
    format: str,
    source_format: str | None = None,
    base: nn.Module | str | Path | Mapping[str, Any] | None = None,
    component: str | None = None,
    progress: Progress = False,
) -> ConversionReport:
    """Rewrite an adapter's files in another format. No model is in memory.

    >>> import tempfile
    >>> from torch import nn
    >>> from surgery import apply_rules, convert_adapter, save_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> folder = save_adapter(model, tempfile.mkdtemp())
    >>> report = convert_adapter(folder, tempfile.mkdtemp(), format="mlx")
    >>> report.source_format, report.modules
    ('peft', ['0'])

    Args:
        source: a folder or file of an adapter.
        target: the folder to write into, or a file with an ending of the format, such as `.safetensors`.
        format: name of the format to write; `adapter_formats` lists them.
        source_format: name of the source's format, if its keys are those of several; default None: the keys tell it.
        base: what the adapter is for: a model, its folder, or its configuration. Formats that name modules or order
            rows by the architecture need it. Default None.
        component: the component of a pipeline that a file of one model is ("unet"), for formats that write it; default
            None.
        progress: as in `apply_rules`; a step is a tensor. Default False.

    Returns:
        A report with the modules, and everything that was assumed or changed in form.

    Raises:
        LoadError: the source is damaged, or keys do not belong to its format.
        SurgeryError: the format can't hold the adapter. Nothing is written.

    Notes:
        Tensors of safetensors are read and written one at a time. Numbers and dtypes stay, except where the report's
        notes say so. One rename commits the result.
    """
    written = format_named(format)
    try:
        facts = base_facts(base)
        name, contents = read_file_contents(Path(source), source_format, facts)
    except LoadError:
        raise
    except SurgeryError as error:
        error.where = error.where or str(source)
        raise LoadError([error]) from error
    _set_component(contents, component)
    files = file_contents(written, contents, facts)
    write_files(Path(target), written, files, progress)
    modules = [f"{component}.{path}" if component else path for component, path, _ in contents.each()]
    return ConversionReport(
        Path(target), name, format, modules, contents.all_assumed(), [*contents.notes, *files.notes]
    )


def _set_component(contents: Contents, component: str | None) -> None:
    """Names the component of a file of one model."""
    if component is None:
        return
    if list(contents.changes) == [""]:
        contents.changes = {component: contents.changes[""]}
    elif component in contents.changes:
        contents.changes = {component: contents.changes[component]}
        contents.notes.append(f"of several components, {component} alone was converted")
    else:
        known = ", ".join(contents.changes)
        raise SurgeryError(f"the file has no component {component!r}", why=f"it holds {known}")


def read_file_contents(place: Path, name: str | None, base: BaseFacts) -> tuple[str, Contents]:
    """The format and the contents of an adapter's file, by its tensors alone."""
    if not place.exists():
        raise SurgeryError(f"{place} does not exist", fix="name a folder or a file")
    other = find_other(place, name)
    if other is not None:
        settings = settings_beside(other.path, other.adapter_format)
        return other.adapter_format.name, read_contents(other.adapter_format, other.file, settings, base)
    path = adapter_file(place)
    if path is None or not path.is_file():
        raise SurgeryError("there is no adapter here", fix="name its file")
    if path.name == SURGERY[0]:
        why = "its rules decide what the tensors mean, and rules act on a model"
        raise SurgeryError(
            "files of the format 'surgery' are not converted by their tensors alone",
            why=why,
            fix="load_adapter(model, source), then save_adapter(model, target, format=…)",
        )
    return _of_peft(path, base)


def _of_peft(path: Path, base: BaseFacts) -> tuple[str, Contents]:
    """PEFT's files and diffusers', under all names that have been in use."""
    file = open_file(path)
    settings_path = path.parent / PEFT[1]
    settings = read_json(settings_path) if path.name not in BARE and settings_path.is_file() else None
    starts = tuple(prefix.text for prefix in format_named("diffusers").prefixes)
    whole_pipeline = settings is None and all(key.startswith(starts) for key in file.shapes)
    # the paths of a base would choose one of the components, and take its name off the keys
    spelt = current_keys(list(file.shapes), lambda: () if whole_pipeline else base.paths or ())
    here = {key.removeprefix(PREFIX): there for key, there in spelt.keys.items()}
    if spelt.others:
        first = spelt.others[0]
        why = "they are of another component, or of no adapter"
        raise SurgeryError(f"{len(spelt.others)} keys have no place in an adapter", where=first, why=why)
    whole = [key for key in here if re.search(r"(embed\w*|wte|lm_head)(\.base_layer)?\.weight$", key)]
    if whole:
        raise SurgeryError(
            "the file holds embeddings of the base, which other formats do not have",
            where=here[whole[0]],
            why="only the model shows whether their rows are those of the base",
            fix="load_adapter(model, source), then save_adapter(model, target, format=…)",
        )
    of_pipeline = settings is None and all(key.startswith(starts) for key in here)
    name = "diffusers" if of_pipeline else "peft"
    start = "" if of_pipeline else PREFIX
    keys = {start + key: there for key, there in here.items()}
    renamed = TensorFile(
        {key: file.shapes[there] for key, there in keys.items()},
        {key: file.dtypes[there] for key, there in keys.items()},
        file.metadata,
        lambda key: file.read(keys[key]),
    )
    contents = read_contents(format_named(name), renamed, settings, base)
    if settings is None and not of_pipeline:
        contents.assumed.insert(0, "there is no adapter_config.json: ranks are those of the tensors")
    return name, contents
