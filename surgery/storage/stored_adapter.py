"""Reads an adapter's files: the format, the rules, and the place of each tensor. Tensors are read later."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from surgery.adapter_files.entry import BARE, MODEL, NAME, OLD, PEFT, SURGERY, VERSION, Entry, names_in
from surgery.adapter_files.hub_download import download
from surgery.adapter_files.plain_json import parse_json, read_json
from surgery.adapter_files.tensor_files import TensorFile, open_tensors, previous_name
from surgery.authoring.planned_rule import PlannedRule
from surgery.authoring.rule import Rule
from surgery.errors import LoadError, RuleError, SurgeryError
from surgery.patterns.module_walk import RESERVED, tensor_key
from surgery.peft_format.adapter_config import kept_fields
from surgery.peft_format.header_settings import header_format
from surgery.peft_format.reading import read
from surgery.planning.plan import Plan
from surgery.storage.formats.base_facts import components_in
from surgery.storage.formats.place import ALONE, file_names
from surgery.storage.formats.stored import OtherAdapter, find_other, read_other
from surgery.storage.model_origin import origin_of

__all__ = ["Stored", "stored_adapter"]

AGAIN = "copy or download the adapter's files again, or save the adapter again"


@dataclass(frozen=True)
class Stored:
    """An adapter in files; its tensors are not yet read.

    `entry` returns a tensor's place, or None if the rule's fields determine the tensor. `unheld`: settings without a
    field in any rule; `notes`: notices; `assumed`: inferred facts; `ignored`: keys without an effect; `origin`: name
    and class of the base; `vocabulary`: its embeddings' numbers of rows, if the model has another number;
    `peft_fields`: fields of PEFT's configuration that no rule has, such as the task. `shares_structure`: whether
    structural rules that another adapter has put on the model are not repeated. `format`: the format's name.
    """

    rules: list[Rule]
    file: TensorFile
    entry: Callable[[Plan, PlannedRule, str], Entry | None]
    problems: list[SurgeryError] = field(default_factory=list)
    base: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    unheld: list[SurgeryError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()
    assumed: list[str] = field(default_factory=list)
    origin: Mapping[str, Any] = field(default_factory=dict)
    vocabulary: Set[int] = frozenset()
    peft_fields: Mapping[str, Any] = field(default_factory=dict)
    shares_structure: bool = False
    format: str = ""


def stored_adapter(
    model: nn.Module,
    source: str | Path | Stored,
    subfolder: str | None,
    revision: str | None,
    config: Mapping[str, Any] | None = None,
    component: str | None = None,
    format: str | None = None,
) -> Stored:
    """Opens an adapter from a folder, a file or a repository of the hub.

    `config`: replaces PEFT's configuration file; `component`: selects an adapter in the file of a pipeline; `format`:
    the format's name, if the keys do not tell it.
    """
    if isinstance(source, Stored):
        return source
    place = Path(source)
    try:
        if not place.exists():
            names = [*file_names(), *(f"*{ending}" for ending in ALONE if format is not None)]
            place = download(str(source), subfolder, revision, names)
        elif subfolder:
            place = place / subfolder
        if (other := find_other(place, format, component is None and bool(components_in(model)))) is not None:
            return _of_other(other, model, config, component)
        return _open_folder(model, place, config, component)
    except LoadError:
        raise
    except SurgeryError as error:
        error.where, error.fix = error.where or str(source), error.fix or AGAIN
        raise LoadError([error]) from error


def _open_folder(model: nn.Module, place: Path, config: Mapping[str, Any] | None, component: str | None) -> Stored:
    if place.is_dir():
        names = names_in(place)
        if names is None:
            raise _no_adapter(place)
    else:
        settings = {SURGERY[0]: SURGERY[1], PEFT[0]: PEFT[1], OLD: PEFT[1]}.get(place.name)
        names, place = (place.name, settings), place.parent
    file = open_tensors(place / names[0])
    metadata = _metadata_of(file)
    settings = _settings(place, names[1], metadata) if config is None or names[0] == SURGERY[0] else dict(config)
    if isinstance(settings, dict) and settings.get("format") == NAME:
        return _of_surgery(settings, file)
    adapter = read(model, settings, file, component)
    extra = {"base": metadata.get("base"), "origin": origin_of(settings, metadata.get("base")), **_labels(metadata)}
    findings: dict[str, Any] = {
        "unheld": adapter.unheld,
        "notes": adapter.notes,
        "ignored": adapter.ignored,
        "assumed": adapter.assumed,
    }
    findings |= {"vocabulary": adapter.vocabulary, "peft_fields": adapter.fields, "shares_structure": True}
    named = "peft" if names[1] is not None else header_format(file.shapes)
    return Stored(adapter.rules, file, adapter.entry, adapter.problems, format=named, **findings, **extra)


def _of_other(other: OtherAdapter, model: nn.Module, config: Mapping[str, Any] | None, component: str | None) -> Stored:
    """An adapter in the format of another program."""
    adapter = read_other(other, model, config, component)
    parts = adapter.adapters
    return Stored(
        [rule for part in parts for rule in part.rules],
        adapter.file,
        adapter.entry,
        [problem for part in parts for problem in part.problems],
        unheld=[problem for part in parts for problem in part.unheld],
        notes=list(dict.fromkeys(note for part in parts for note in part.notes)),
        assumed=adapter.assumed,
        format=other.adapter_format.name,
    )


def _no_adapter(place: Path) -> SurgeryError:
    what = "there is no adapter in this folder"
    inner = sorted(folder.name for folder in place.iterdir() if folder.is_dir() and names_in(folder))
    if inner:
        fix = f"load_adapter(…, subfolder={inner[0]!r}); load_adapters(model, folder) loads all of them"
        return SurgeryError(f"{what} itself", why=f"its subfolders hold {', '.join(inner[:8])}", fix=fix)
    if (place / MODEL[1]).is_file():
        fix = "load_surgery(base, folder) does it to a base again"
        return SurgeryError(what, why=f"its {MODEL[1]} is the surgery of a whole model", fix=fix)
    state_file = place / "model.safetensors"
    if state_file.is_file() and any(f".{RESERVED}." in f".{key}" for key in open_tensors(state_file).shapes):
        why = f"its {state_file.name} is a model's state dict: it has the tensors of adapters, but not their rules"
        fix = (
            "apply the rules that they were trained with, then model.load_state_dict(tensors, strict=False); a Trainer "
        )
        fix += "with callbacks=[AdapterCheckpoints()] writes folders that load_adapter opens"
        return SurgeryError(what, why=why, fix=fix)
    why = f"it does not contain {', '.join((SURGERY[0], PEFT[0], OLD, *BARE))}"
    return SurgeryError(what, why=why, fix="name the folder into which save_adapter or PEFT wrote")


def _metadata_of(file: TensorFile) -> dict[str, Any]:
    """Returns the metadata that `save_adapter` wrote into the file of the tensors."""
    if "surgery" not in file.metadata:
        return {}
    data = parse_json(file.metadata["surgery"], "the metadata of the tensors")
    return data if isinstance(data, dict) else {}


def _settings(place: Path, name: str | None, metadata: Mapping[str, Any]) -> Any:
    """Returns the settings file; after an interrupted save, the settings in the tensors' file, or the previous ones."""
    if name is None:
        return None
    if (place / name).is_file():
        return read_json(place / name)
    if "settings" in metadata:
        return metadata["settings"]
    if (place / previous_name(name)).is_file():
        return read_json(place / previous_name(name))
    if name == SURGERY[1]:
        raise SurgeryError(f"there is no {name} beside the tensors", fix="copy both files")
    return None


def _labels(data: Mapping[str, Any]) -> dict[str, Any]:
    metadata, licence = data.get("metadata"), data.get("licence")
    return {
        "metadata": metadata if isinstance(metadata, dict) else {},
        "licence": licence if isinstance(licence, str) else None,
    }


def _of_surgery(settings: Mapping[str, Any], file: TensorFile) -> Stored:
    version, listed = settings.get("version"), settings.get("rules")
    if type(version) is not int or version < 1:
        why = "versions are whole numbers from 1"
        raise SurgeryError(f"its version {version!r} is not a version of the format", why=why)
    if version > VERSION:
        raise SurgeryError(f"it has version {version} of the format", why="a later release wrote it", fix="update")
    rules, problems = list[Rule](), list[SurgeryError]()
    for data in _rules_in(listed):
        try:
            rules.append(Rule.from_dict(data))
        except SurgeryError as error:
            problems.append(error)
        except Exception as error:  # a rule's own checks may fail for fields of any type
            problems.append(RuleError(f"{str(data)[:200]} is not a rule", why=f"{type(error).__name__}: {error}"))
    entry: Any = lambda plan, step, name: Entry(tensor_key(step.path, name))  # noqa: E731
    origin = origin_of({}, settings.get("base"))
    peft = settings.get("peft")
    fields = kept_fields(peft) if isinstance(peft, Mapping) else {}
    return Stored(
        rules,
        file,
        entry,
        problems,
        settings.get("base"),
        origin=origin,
        peft_fields=fields,
        format="surgery",
        **_labels(settings),
    )


def _rules_in(listed: Any) -> Iterator[Any]:
    if not isinstance(listed, list) or not listed:
        raise SurgeryError("its settings list no rules", why=f'"rules" in {SURGERY[1]} is not a list with rules')
    yield from listed
