"""Finds the model to export: removes wrappers, and moves a submodule's record to the exported root."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.onnx.calls.shared_copy import sharing_copy
from surgery.patterns.wrappers import submodule, unwrap
from surgery.rewritten_model.verb_root import check_all_present, records_in, root_of
from surgery.state.records import _MODEL, ModelState, model_state, sites

__all__ = ["check_names", "exported_root"]


def exported_root(model: Any) -> nn.Module:
    """Returns the model, or, if the record is on a submodule, a copy that shares memory and has the record itself.

    Thus slots, manifests and initialisers have the exported module's paths. With records on several submodules the
    model is returned unchanged.
    """
    model = unwrap(model)
    check_all_present(model)
    parts = records_in(model)
    if len(parts) != 1 or "" in parts:
        return model
    copy = sharing_copy(model)
    _move_record_to_root(copy, next(iter(parts)))
    return copy


def check_names(model: nn.Module, names: Any) -> None:
    """Raises `SurgeryError` if adapters are named and the model has no record, or several submodules have one."""
    if names is not None and model_state(model) is None:
        root_of(model)
        raise SurgeryError("no rules were applied to this model", fix="leave names out")


def _move_record_to_root(model: nn.Module, path: str) -> None:
    """Moves the record of a submodule to the model, and prefixes its paths."""
    part = submodule(model, path)
    state: ModelState = part.__dict__.pop(_MODEL)
    for _, _, site in sites(model):
        site.path = _below(path, site.path)
    state.flags = {_below(path, name): flag for name, flag in state.flags.items()}
    state.ignored_on_save = [(_below(path, owner), value) for owner, value in state.ignored_on_save]
    state.switched = [(_below(path, owner), name, idle, live) for owner, name, idle, live in state.switched]
    untied = state.untied
    untied.flags = [(_below(path, owner), inside) for owner, inside in untied.flags]
    untied.attributes = [(_below(path, owner), name, previous) for owner, name, previous in untied.attributes]
    untied.parameters = [(_below(path, owner), name, previous) for owner, name, previous in untied.parameters]
    state.links = None
    model.__dict__[_MODEL] = state


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
