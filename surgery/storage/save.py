"""Saves an adapter in files, with the rules that made it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from surgery.adapter_files import tensor_files
from surgery.adapter_files.entry import NAME, OLD, PEFT, SURGERY, VERSION
from surgery.adapter_files.process_group import writing
from surgery.authoring.rule import Rule
from surgery.authoring.rule_names import check_named
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.patterns.module_walk import base_modules
from surgery.peft_format.adapter_config import kept_fields
from surgery.peft_format.base_structure import described_structure, records_from
from surgery.peft_format.writing import to_peft
from surgery.progress import Progress
from surgery.rewritten_model.restructure import structure_undone
from surgery.rewritten_model.state_dict import adapter_state_dict
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.absent_values import without_values
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of, whole
from surgery.state.fingerprint import fingerprint
from surgery.state.records import ModelState, site_state, sites
from surgery.state.restructuring import Restructuring
from surgery.state.running_statistics import changed_modules, changing_buffers, module_names
from surgery.storage.formats.saving import save_other
from surgery.storage.formats.table import formats
from surgery.storage.path_check import check_targets
from surgery.transaction.neutral_context import neutrally

__all__ = ["json_data", "later_structure", "save_adapter", "structure_since"]


@neutrally()
def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: str = "default",
    *,
    format: str = "auto",
    metadata: Mapping[str, Any] | None = None,
    licence: str | None = None,
    config: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    component: str | None = None,
    progress: Progress = False,
) -> Path:
    """Writes an adapter into a folder in a format; `surgery.serving.save` documents the public function."""
    other = format not in ("auto", "peft", "surgery")
    if other and format not in formats():
        known = ", ".join(('"auto"', '"surgery"', *map(repr, formats())))
        raise SurgeryError(f"there is no format {format!r}", fix=known)
    model, state = rewritten(model)
    adapter_names(state, adapter)
    for rule in state.adapters[adapter]:
        check_named(type(rule))
    all_sites = list(sites(model))
    _check_structure(state, adapter)
    check_targets(model, state, all_sites, adapter)
    if state_dict is None and any(map(without_values, state.places[adapter].boxes)):
        why = "its tensors came from the meta device by to_empty"
        raise SurgeryError(f"the adapter {adapter!r} has no values yet", why=why, fix="load them first")
    if Path(folder).exists() and not Path(folder).is_dir() and not other:
        raise SurgeryError(f"{folder} is not a folder", fix="an adapter is saved into a folder of its own")
    _warn_of_statistics(model, state, adapter)
    if other:
        return save_other(model, Path(folder), adapter, format, component, config, state_dict, progress)
    with structure_undone(structure_since(state, adapter)):
        base = fingerprint(model)  # of the model on which the adapter can be loaded
    extra = {"base": base, "licence": licence, "metadata": json_data(metadata)}
    alone = state_dict is not None
    if format != "surgery":
        try:
            config_fields, tensors = to_peft(
                model, adapter, format == "auto", state_dict, config, save_embedding_layers
            )
        except SurgeryError as error:
            if format == "peft":
                raise
            if config is not None:
                _warn_of_format(adapter, error, config)
        else:
            if undone := records_from(model, described_structure(model, config_fields)):
                with structure_undone(undone):  # it may be another adapter's
                    extra["base"] = fingerprint(model)
            return _write_files(folder, PEFT, tensors, config_fields, extra, (*SURGERY, OLD), alone, progress)
    settings = {
        "format": NAME,
        "version": VERSION,
        "rules": [_in_files(rule).to_dict() for rule in state.adapters[adapter]],
        "sites": [path for path, module, _ in all_sites if tensors_of(module, adapter)],
        **extra,
        **(
            {"peft": fields}
            if (fields := kept_fields({**state.peft_fields.get(adapter, {}), **(config or {})}))
            else {}
        ),
    }
    tensors = _whole(adapter_state_dict(model, adapter, state_dict))
    return _write_files(folder, SURGERY, tensors, settings, {}, (*PEFT, OLD), alone, progress)


def _check_structure(state: ModelState, adapter: str) -> None:
    """Raises `SurgeryError` if other adapters changed the structure after this one did: loading would not do so."""
    if (later := later_structure(state, adapter)) is not None:
        raise SurgeryError(
            f"the adapter {adapter!r} can't be saved alone",
            why=f"{later.rule.label} [{later.adapter}] changed the structure after it, and its tensors' names",
            fix="save_surgery(model, folder) writes all adapters in their order",
        )


def later_structure(state: ModelState, adapter: str) -> Restructuring | None:
    """The first structural rule of another adapter after those of an adapter that is on modules, or None."""
    if not state.places[adapter].modules:
        return None
    return next((record for record in structure_since(state, adapter) if record.adapter != adapter), None)


def structure_since(state: ModelState, adapter: str) -> list[Restructuring]:
    """The structural rules from the first of an adapter on."""
    own = [index for index, record in enumerate(state.structure) if record.adapter == adapter]
    return state.structure[own[0] :] if own else []


def _warn_of_format(adapter: str, error: SurgeryError, config: Mapping[str, Any]) -> None:
    """Warns that the files are not PEFT's, although fields of PEFT's configuration are given."""
    kept = ", ".join(kept_fields(config)) or "nothing"
    parts = [error.what, error.where and f"at {error.where}", error.why and f"because {error.why}"]
    reason = " ".join(filter(None, parts))
    remedy = f". Fix: {error.fix}" if error.fix else ""
    warnings.warn(
        f"the adapter {adapter!r} is saved in the format of this library, which PEFT does not read: {reason}{remedy}. "
        f"Of config, the files keep {kept}",
        SurgeryWarning,
        stacklevel=5,
    )


def _warn_of_statistics(model: nn.Module, state: ModelState, adapter: str) -> None:
    """Warns of moved running statistics of the base that no rule of the adapter replaces: the files lack them."""
    moved = [module for module in changed_modules(state.moving) if not _replaces_statistics(module, adapter)]
    if not moved:
        return
    moved_ids = {id(module) for module in moved}
    names = module_names([path for path, module in base_modules(model) if id(module) in moved_ids])
    warnings.warn(
        f"training moved the running statistics of {names}. They belong to the base, so the files of {adapter!r} do "
        "not have them, and a model that loads the adapter computes with other statistics. Train with StatisticsRule() "
        "in the adapter, which keeps them, or with StatisticsRule(frozen=True)",
        SurgeryWarning,
        stacklevel=5,
    )


def _replaces_statistics(module: nn.Module, adapter: str) -> bool:
    site = site_state(module)
    if site is None:  # also a scripted module, which can't hold an adapter
        return False
    layers = [applied.layer for _, applied in site.of([adapter])]
    replaced = {str(ref.key) for layer in layers if layer is not None for ref in layer.tape.replaced_refs()}
    return {*changing_buffers(module)} <= {*tensors_of(module, adapter), *replaced}


def _write_files(
    folder: str | Path,
    names: tuple[str, str],
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    obsolete: tuple[str, ...],
    alone: bool,
    progress: Progress,
) -> Path:
    """Writes the two files; `extra` goes into the header of the tensors, which PEFT ignores."""
    folder, text = Path(folder), json.dumps(settings, indent=2, sort_keys=bool(extra)) + "\n"
    with nullcontext(True) if alone else writing(folder, tensors) as writes:
        if writes:
            metadata = {"format": "pt", "surgery": json.dumps({"settings": settings, **extra})}
            writer = partial(tensor_files.write_safetensors, tensors=tensors, metadata=metadata, progress=progress)
            tensor_files.replace_files(folder, (names[0], writer), (names[1], text.encode()), obsolete)
    return folder


def _in_files(rule: Rule) -> Rule:
    return rule.in_files() if isinstance(rule, StructureRule) else rule


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathers sharded tensors; all processes take part."""
    return {key: whole(tensor) for key, tensor in tensors.items()}


def json_data(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Metadata as JSON data."""
    try:
        return json.loads(json.dumps(dict(metadata or {}), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise SurgeryError(
            "the metadata can't be written", why=str(error), fix="numbers, strings, lists and mappings"
        ) from None
