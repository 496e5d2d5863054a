"""The model to export: what wraps it is taken off, and what is around a rewritten one is exported with its adapters."""

from __future__ import annotations

from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.onnx.calls.shared_copy import sharing_copy
from surgery.patterns.wrappers import submodule, unwrap
from surgery.rewritten_model.verb_root import check_all_present, records_in, root_of
from surgery.state.records import _MODEL, ModelState, model_state, sites

__all__ = ["check_names", "rooted"]


def rooted(model: Any) -> nn.Module:
    """The model with the record of its rules on itself: where that is on a part, a copy that shares all memory.

    So slots, manifests and initialisers have the names that the exported module has for its sites. Of several parts
    that were rewritten, each by itself, no copy is made.
    """
    model = unwrap(model)
    check_all_present(model)
    parts = records_in(model)
    if len(parts) != 1 or "" in parts:
        return model
    copy = sharing_copy(model)
    _raise_record(copy, next(iter(parts)))
    return copy


def check_names(model: nn.Module, names: Any) -> None:
    """`SurgeryError` where adapters are named, and the model has none, or several of its parts have some."""
    if names is not None and model_state(model) is None:
        root_of(model)
        raise SurgeryError("no rules were applied to this model", fix="leave names out")


def _raise_record(model: nn.Module, path: str) -> None:
    """Have the record of a part on the model, with the model's paths."""
    part = submodule(model, path)
    state: ModelState = part.__dict__.pop(_MODEL)
    for _, _, site in sites(model):
        site.path = _below(path, site.path)
    state.flags = {_below(path, name): flag for name, flag in state.flags.items()}
    state.ignored_on_save = [(_below(path, at), value) for at, value in state.ignored_on_save]
    state.switched = [(_below(path, at), name, idle, live) for at, name, idle, live in state.switched]
    untied = state.untied
    untied.flags = [(_below(path, at), inside) for at, inside in untied.flags]
    untied.attributes = [(_below(path, at), name, was) for at, name, was in untied.attributes]
    untied.parameters = [(_below(path, at), name, was) for at, name, was in untied.parameters]
    state.links = None
    model.__dict__[_MODEL] = state


def _below(path: str, name: str) -> str:
    return f"{path}.{name}" if name else path
