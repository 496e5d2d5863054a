"""Adapters in files: saved with the rules that made them, loaded whole or not at all."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from surgery import files
from surgery.engine import apply_rules, remove
from surgery.errors import LoadError, PlanError, RuleError, SurgeryError, SurgeryWarning
from surgery.files import TensorFile, open_tensors, parse_json, put_away, read_json
from surgery.fingerprint import differences, fingerprint
from surgery.match import RESERVED
from surgery.plan import Plan, make_plan
from surgery.recording import Step
from surgery.rule import Rule
from surgery.site import LiveSite, held
from surgery.state import adapter_names, adapter_state_dict, require_state, rules_of, sites, tensors_of

__all__ = ["Entry", "LoadReport", "load_adapter", "load_adapters", "save_adapter"]

SURGERY = ("adapter.safetensors", "rules.json")
PEFT = ("adapter_model.safetensors", "adapter_config.json")
OLD = "adapter_model.bin"
BARE = ("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin")  # diffusers': tensors without settings
NAME, VERSION = "model-surgery adapter", 1


class Entry(NamedTuple):
    """Where a tensor of an adapter stands in a file, and how the two are turned into each other."""

    key: str
    read: Callable[[Tensor], Tensor] = lambda tensor: tensor
    write: Callable[[Tensor], Tensor] = lambda tensor: tensor


@dataclass(frozen=True)
class Stored:
    """An adapter in files, its tensors not yet read. `entry` is None for what follows from a rule's fields alone."""

    rules: list[Rule]
    file: TensorFile
    entry: Callable[[Plan, Step, str], Entry | None]
    problems: list[SurgeryError] = field(default_factory=list)
    base: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None
    notes: list[str] = field(default_factory=list)
    ignored: tuple[str, ...] = ()


@dataclass
class LoadReport:
    """What a load did: the rules applied, and by key what was `loaded`, `missing`, `unexpected` or did not fit.

    Truth is that everything fitted, which `load_adapter` demands unless it is told otherwise by `strict=False`.
    """

    adapter: str
    rules: list[Rule] = field(default_factory=list)
    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)
    base: list[str] = field(default_factory=list)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    licence: str | None = None

    def __bool__(self) -> bool:
        return not (self.missing or self.unexpected or self.misfits or self.base)

    def __str__(self) -> str:
        lines = [f"adapter {self.adapter!r}: {len(self.loaded)} tensors loaded"]
        return "\n".join([*lines, *(f"  {problem}" for problem in self.problems())])

    def problems(self) -> list[str]:
        """What did not fit, one line a kind."""
        kinds = {"missing": self.missing, "not of this adapter": self.unexpected}
        told = [f"{_counted(keys)} {kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
        return [*told, *self.misfits, *self.base]


# Saving -------------------------------------------------------------------------------------------------------


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: str = "default",
    *,
    format: Literal["auto", "peft", "surgery"] = "auto",
    metadata: Mapping[str, Any] | None = None,
    licence: str | None = None,
) -> Path:
    """Write an adapter into a folder: its tensors, and the rules that made it. The base is not written.

    >>> import tempfile
    >>> from torch import nn
    >>> from surgery import apply_rules, load_adapter, save_adapter
    >>> from rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> folder = save_adapter(model, tempfile.mkdtemp())
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    `format` "peft" is what PEFT reads; "surgery" (`adapter.safetensors` and `rules.json`) holds any rules; "auto" is
    the first wherever it holds the adapter exactly, else the second. `metadata` is any data of JSON, `licence` a name;
    both come back in the report of `load_adapter`. A merged adapter is saved as it was trained.

    The folder is made where it is absent; other files in it stay. Killed at any moment, it holds the adapter that was
    there before or this one, whole. Where processes share a sharded model, all of them call this, and the first writes.
    Raises `SurgeryError` where PEFT's format can't hold the adapter, or a rule holds what is no data.
    """
    if format not in ("auto", "peft", "surgery"):
        raise SurgeryError(f"there is no format {format!r}", fix='"peft", "surgery", or "auto" for the first that fits')
    adapter_names(require_state(model), adapter)
    extra = {"base": fingerprint(model), "licence": licence, "metadata": _data(metadata)}
    if format != "surgery":
        from surgery.peft_format import written

        try:
            config, tensors = written(model, adapter)
        except SurgeryError:
            if format == "peft":
                raise
        else:
            return _put(folder, PEFT, tensors, config, extra, (*SURGERY, OLD))
    settings = {
        "format": NAME,
        "version": VERSION,
        "rules": [rule.to_dict() for rule in rules_of(model, adapter)],
        "sites": [path for path, module, _ in sites(model) if tensors_of(module, adapter)],
        **extra,
    }
    return _put(folder, SURGERY, _whole(adapter_state_dict(model, adapter)), settings, {}, (*PEFT, OLD))


def _put(
    folder: str | Path,
    names: tuple[str, str],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    gone: tuple[str, ...],
) -> Path:
    folder, text = Path(folder), json.dumps(settings, indent=2, sort_keys=not extra == {}) + "\n"
    if _rank() == 0:
        told = {"format": "pt", "surgery": json.dumps({"settings": settings, **extra})}
        writer = partial(files.write_safetensors, tensors=tensors, metadata=told)
        files.replace_files(folder, (names[0], writer), (names[1], text.encode()), gone)
    if _rank() is not None and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return folder


def _rank() -> int:
    distributed = torch.distributed
    return distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Sharded tensors gathered, which all processes take part in."""
    return {key: whole(tensor) for key, tensor in tensors.items()}


def whole(tensor: Tensor) -> Tensor:
    gather: Any = getattr(tensor, "full_tensor", None)
    return gather() if gather is not None else tensor


def _data(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SurgeryError(
            "the metadata can't be written", why=str(error), fix="numbers, strings, lists and mappings"
        ) from None


# Loading ------------------------------------------------------------------------------------------------------


def load_adapter(
    model: nn.Module,
    source: str | Path,
    adapter: str = "default",
    *,
    strict: bool = True,
    finite: bool = True,
    example_inputs: Any = None,
    subfolder: str | None = None,
    revision: str | None = None,
) -> LoadReport:
    """Put a saved adapter on a model: apply its rules, and fill their tensors from the files.

    >>> import tempfile
    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, load_adapter, remove, save_adapter
    >>> from rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2, init="random")])
    >>> x = torch.ones(1, 4)
    >>> adapted, folder = model(x), save_adapter(model, tempfile.mkdtemp())
    >>> print(load_adapter(remove(model), folder))
    adapter 'default': 2 tensors loaded
    >>> torch.equal(model(x), adapted)
    True

    `source` is a folder or file of `save_adapter`'s or PEFT's (also `.bin` and diffusers' LoRA files), or the name of
    a repository on the hub (with `revision`); `subfolder` is looked for in it. Rules are made by their registered
    names; no code and no path comes from a file, and pickle files are read with `weights_only`. `finite`: NaN and
    infinity are a problem. `example_inputs` as in `apply_rules`; prefixes need it.

    Whole or nothing: missing, unexpected and misshapen tensors, a damaged file, a rule or format of a later version,
    another base, and whatever `plan_rules` objects to are told at once in a `LoadError`, the model as it was.
    `strict=False` loads what fits, and the report tells the rest: missing tensors keep the values their rule starts
    with. Tensors go to their site's device, in the dtype the rule gives them; on a base on the meta device they are
    made on the CPU, and stay when `load_state_dict(…, assign=True)` fills the base.
    """
    stored = stored_adapter(model, source, subfolder, revision)
    plan = make_plan(model, stored.rules, adapter, example_inputs) if stored.rules else None
    report = LoadReport(adapter, stored.rules, metadata=stored.metadata, licence=stored.licence)
    problems = list(stored.problems)
    values: list[tuple[Step, str, Entry]] = []
    if plan is not None:
        problems += plan.problems
        values = _found(plan, stored, report, finite)
        if problems:
            report.unexpected = []  # of rules that could not be read or placed
    report.base = differences(model, stored.base)
    if strict:
        problems += [_problem(text) for text in report.problems()]
    if problems or plan is None:
        raise LoadError(problems or [RuleError("the files hold no rules")])
    for note in [*stored.notes, *([] if strict else report.problems())]:
        warnings.warn(note, SurgeryWarning, stacklevel=2)
    with torch.random.fork_rng(devices=[]):  # the starting values drawn here are overwritten
        apply_rules(model, stored.rules, adapter=adapter, example_inputs=example_inputs)
    try:
        _fill(model, adapter, values, stored.file)
    except BaseException:
        remove(model, adapter)
        raise
    report.loaded = [_key(step.path, name) for step, name, _ in values]
    return report


def load_adapters(model: nn.Module, folder: str | Path, **options: Any) -> dict[str, LoadReport]:
    """Load every adapter in a folder of many, each under its subfolder's name: PEFT's and ours side by side.

    >>> import tempfile
    >>> from torch import nn
    >>> from surgery import apply_rules, load_adapters, remove, save_adapter
    >>> from rules import LoraRule
    >>> model, folder = nn.Sequential(nn.Linear(4, 4)), tempfile.mkdtemp()
    >>> for name in ("news", "mail"):
    ...     _ = save_adapter(apply_rules(model, [LoraRule("0", rank=2)], adapter=name), f"{folder}/{name}", name)
    >>> list(load_adapters(remove(model), folder))
    ['mail', 'news']

    Files in the folder itself are the adapter "default". `options` are `load_adapter`'s. All or none: a `LoadError`
    tells what is wrong with any of them, and none stays on the model.
    """
    folder = Path(folder)
    found = {"default": folder} if _names_in(folder) else {}
    if folder.is_dir():
        found |= {inner.name: inner for inner in sorted(folder.iterdir()) if inner.is_dir() and _names_in(inner)}
    if not found:
        raise LoadError([_problem(f"{folder} holds no adapters", fix="name a folder of folders of adapters")])
    reports, problems = dict[str, LoadReport](), list[SurgeryError]()
    for name, inner in found.items():
        try:
            reports[name] = load_adapter(model, inner, name, **options)
        except PlanError as error:
            problems += [_problem(str(problem), where=str(inner)) for problem in error.problems]
    if problems:
        for name in reports:
            remove(model, name)
        raise LoadError(problems)
    return reports


def _found(plan: Plan, stored: Stored, report: LoadReport, finite: bool) -> list[tuple[Step, str, Entry]]:
    """The tensors of a plan that the file holds in their shapes; the report is told of all others."""
    file, used, found = stored.file, set[str](), list[tuple[Step, str, Entry]]()
    for step in plan.steps:
        for spec in step.specs:
            entry = stored.entry(plan, step, spec.name)
            if entry is None:
                continue
            if entry.key not in file.shapes:
                report.missing.append(entry.key)
                continue
            used.add(entry.key)
            misfit = _misfit(file, entry, spec.shape, spec.dtype, finite)
            if misfit:
                report.misfits.append(f"{entry.key} {misfit}")
            else:
                found.append((step, spec.name, entry))
    report.missing = list(dict.fromkeys(report.missing))
    report.unexpected = [key for key in file.shapes if key not in used and key not in stored.ignored]
    return found


def _misfit(file: TensorFile, entry: Entry, shape: tuple[int, ...], dtype: torch.dtype, finite: bool) -> str | None:
    """Why a stored tensor can't be a rule's; its shape is tried on the meta device before a number is read."""
    given, numbers = file.shapes[entry.key], file.dtypes[entry.key]
    try:
        read = tuple(entry.read(torch.empty(given, dtype=numbers, device="meta")).shape)
    except Exception:  # a rule's reshaping of a shape that it did not expect
        read = None
    if read != shape:
        return f"is {given}, which does not give the {shape} of this model"
    if numbers.is_floating_point != dtype.is_floating_point:
        return f"holds {str(numbers).removeprefix('torch.')}, and {str(dtype).removeprefix('torch.')} is needed"
    try:
        tensor = file.read(entry.key)
        entry.read(tensor)
        if finite and numbers.is_floating_point and not bool(torch.isfinite(tensor.float()).all()):
            return "holds NaN or infinity"
    except SurgeryError as error:
        return f"can't be taken over: {error.why or error.what}"
    except Exception as error:  # the file changed, or is not what its header says
        return f"can't be read: {str(error)[:200]}"
    return None


def _fill(model: nn.Module, adapter: str, values: list[tuple[Step, str, Entry]], file: TensorFile) -> None:
    with torch.no_grad():
        for module in {id(step.module): step.module for step, _, _ in values}.values():
            _realise(module, adapter)
        for step, name, entry in values:
            tensors_of(step.module, adapter)[name].copy_(entry.read(file.read(entry.key)))


def _realise(module: nn.Module, adapter: str) -> None:
    """Tensors on the meta device, made there beside a base that has no numbers yet, are made anew on the CPU."""
    box: Any = module._modules[RESERVED]._modules[adapter]  # type: ignore[union-attr]
    meta = [name for name, tensor in box.tensors().items() if tensor.is_meta]
    for name in meta:
        old = box.tensors()[name]
        new = torch.zeros_like(old, device="cpu")
        if name in box._parameters:
            box._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            box._buffers[name] = new
    if meta:
        _ = LiveSite, held


def _key(path: str, name: str) -> str:
    return ".".join(filter(None, (path, RESERVED, name)))


def _problem(text: str, **details: Any) -> SurgeryError:
    return SurgeryError(text, **details)


def _counted(keys: Sequence[str]) -> str:
    return "one tensor is" if len(keys) == 1 else f"{len(keys)} tensors are"


def _listed(keys: Sequence[str], most: int = 8) -> str:
    return ", ".join(key[:200] for key in keys[:most]) + (", …" if len(keys) > most else "")


# Finding the files --------------------------------------------------------------------------------------------


def stored_adapter(model: nn.Module, source: str | Path, subfolder: str | None, revision: str | None) -> Stored:
    """The adapter in a folder, a file, or a repository of the hub."""
    place = Path(source)
    try:
        if not place.exists():
            from surgery.hub import fetched

            place = fetched(str(source), subfolder, revision)
        elif subfolder:
            place = place / subfolder
        return _opened(model, place)
    except LoadError:
        raise
    except SurgeryError as error:
        error.where = error.where or str(source)
        raise LoadError([error]) from error


def _names_in(folder: Path) -> tuple[str, str | None] | None:
    """The names of the tensors and the settings of the adapter in a folder, or None."""
    for tensors, settings in (SURGERY, PEFT, (OLD, PEFT[1]), *((bare, None) for bare in BARE)):
        if (folder / tensors).is_file():
            return tensors, settings
    return None


def _opened(model: nn.Module, place: Path) -> Stored:
    if place.is_dir():
        names = _names_in(place)
        if names is None:
            listed = ", ".join((SURGERY[0], PEFT[0], OLD, *BARE))
            raise SurgeryError("there is no adapter in this folder", why=f"it holds none of {listed}")
    else:
        settings = {SURGERY[0]: SURGERY[1], PEFT[0]: PEFT[1], OLD: PEFT[1]}.get(place.name)
        names, place = (place.name, settings), place.parent
    file = open_tensors(place / names[0])
    told = _told(file)
    settings = _settings(place, names[1], told)
    if isinstance(settings, dict) and settings.get("format") == NAME:
        return _own(settings, file)
    from surgery.peft_format import read

    found = read(model, settings, file)
    extra = {"base": told.get("base"), **_labels(told)}
    return Stored(found.rules, file, found.entry, found.problems, notes=found.notes, ignored=found.ignored, **extra)


def _told(file: TensorFile) -> dict[str, Any]:
    """What `save_adapter` wrote into the tensors' own file."""
    if "surgery" not in file.metadata:
        return {}
    told = parse_json(file.metadata["surgery"], "the metadata of the tensors")
    return told if isinstance(told, dict) else {}


def _settings(place: Path, name: str | None, told: Mapping[str, Any]) -> Any:
    """The settings beside the tensors; where a save was killed half-way, those in the tensors' file, or the old ones."""
    if name is None:
        return None
    if (place / name).is_file():
        return read_json(place / name)
    if "settings" in told:
        return told["settings"]
    if (place / put_away(name)).is_file():
        return read_json(place / put_away(name))
    if name == SURGERY[1]:
        raise SurgeryError(f"there is no {name} beside the tensors", fix="copy both files")
    return None


def _labels(told: Mapping[str, Any]) -> dict[str, Any]:
    metadata, licence = told.get("metadata"), told.get("licence")
    return {
        "metadata": metadata if isinstance(metadata, dict) else {},
        "licence": licence if isinstance(licence, str) else None,
    }


def _own(settings: Mapping[str, Any], file: TensorFile) -> Stored:
    version, listed = settings.get("version"), settings.get("rules")
    if type(version) is not int or version < 1:
        raise SurgeryError(f"its version {version!r} is no version of the format")
    if version > VERSION:
        raise SurgeryError(f"it has version {version} of the format", why="a later release wrote it", fix="update")
    rules, problems = list[Rule](), list[SurgeryError]()
    for data in _rules_in(listed):
        try:
            rules.append(Rule.from_dict(data))
        except SurgeryError as error:
            problems.append(error)
        except Exception as error:  # fields of any type may meet a rule's own checks
            problems.append(RuleError(f"{str(data)[:200]} is no rule", why=f"{type(error).__name__}: {error}"))
    entry: Any = lambda plan, step, name: Entry(_key(step.path, name))  # noqa: E731
    return Stored(rules, file, entry, problems, settings.get("base"), **_labels(settings))


def _rules_in(listed: Any) -> Iterator[Any]:
    if not isinstance(listed, list) or not listed:
        raise SurgeryError("its settings list no rules")
    yield from listed
