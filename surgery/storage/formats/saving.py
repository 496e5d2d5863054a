"""Saves an adapter of a model in the format of another program, through PEFT's terms."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.adapter_files.process_group import writing
from surgery.adapter_files.tensor_files import TensorFile
from surgery.errors import SurgeryError, SurgeryWarning, abbreviate
from surgery.peft_format.writing import to_peft
from surgery.progress import Progress
from surgery.storage.formats import rows as _rows  # registers the formats
from surgery.storage.formats.base_facts import component_of, facts_of_model
from surgery.storage.formats.contents import BaseFacts, Change
from surgery.storage.formats.files import write_files
from surgery.storage.formats.reading import read_contents
from surgery.storage.formats.table import format_named
from surgery.storage.formats.writing import file_contents

__all__ = ["by_component", "check_modules", "save_other"]

_ROWS = _rows


def save_other(
    model: nn.Module,
    place: Path,
    adapter: str,
    format: str,
    component: str | None,
    config: Mapping[str, Any] | None,
    state_dict: Mapping[str, Tensor] | None,
    progress: Progress,
) -> Path:
    """Writes an adapter in a registered format. `SurgeryError` if the format can't hold it; nothing is written then."""
    adapter_format = format_named(format)
    facts = facts_of_model(model)
    # the base's own embeddings, which PEFT writes beside an adapter on them, do not belong to it
    fields, tensors = to_peft(model, adapter, False, state_dict, config, save_embedding_layers=False)
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
    peft = format_named("peft")
    contents = read_contents(peft, TensorFile(shapes, dtypes, {}, tensors.__getitem__), fields, facts)
    check_modules(contents.changes[""], model, facts.paths or ())
    if any(prefix.component for prefix in adapter_format.prefixes):
        contents.changes = by_component(contents.changes[""], component or component_of(facts.kind), facts)
    files = file_contents(adapter_format, contents, facts)
    with writing(place, files.tensors) if state_dict is None else nullcontext(True) as writes:
        if writes:
            write_files(place, adapter_format, files, progress)
    for note in files.notes:
        warnings.warn(note, SurgeryWarning, stacklevel=5)
    return place


def by_component(changes: dict[str, Change], component: str, facts: BaseFacts) -> dict[str, dict[str, Change]]:
    """The changes of each component, where the model is several of them in one module."""
    if component or not facts.parts:
        return {component: changes}
    result: dict[str, dict[str, Change]] = {}
    for path, change in changes.items():
        name, _, inner = path.partition(".")
        if name not in facts.parts:
            why = f"the model's components are {', '.join(facts.parts)}"
            raise SurgeryError("a module of the adapter is in none of the components", where=path, why=why)
        result.setdefault(name, {})[inner] = change
    return result


def check_modules(changes: Mapping[str, Any], model: nn.Module, paths: Any) -> None:
    """Raises where PEFT's tensors are not a change of the module's own weight."""
    if unknown := [path for path in changes if path not in paths]:
        why = "PEFT's keys for these tensors name a part of a module, which is not a module of the model"
        raise SurgeryError("the adapter can't be written in this format", where=abbreviate(unknown), why=why)
    grouped = [path for path in changes if getattr(model.get_submodule(path), "groups", 1) != 1]
    if grouped:
        why = "PEFT's tensors for a convolution with groups are not those of other programs"
        raise SurgeryError("the adapter can't be written in this format", where=abbreviate(grouped), why=why)
