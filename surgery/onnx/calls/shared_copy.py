"""Copies a model for the export. The copy shares the model's memory, and the model itself stays unchanged."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx, nn

from surgery.errors import SurgeryError
from surgery.lifecycle.remove import remove
from surgery.lifecycle.switching import switch, weights_now
from surgery.merging.merge import ensure_unmerged
from surgery.merging.packed_merge import plain_dtype
from surgery.onnx.calls.sliding_windows import full_length_caches
from surgery.packed.packed_stack import packed_stacks_of
from surgery.packed.packed_weight import PackedWeight, packed_weight_of
from surgery.patterns.module_walk import base_modules
from surgery.rewritten_model.verb_root import records_in
from surgery.state.records import _MODEL, _SITE, Sites, model_state, sites
from surgery.weaving.dequantised_linear import replace_packed

__all__ = ["changing", "leave_live", "packed_maps", "sharing_copy", "traced_path"]


def sharing_copy(
    model: nn.Module, *, folding: bool = False, dequantise: Literal["all", "rounding"] | None = None
) -> nn.Module:
    """Returns a copy in evaluation mode that shares the model's memory.

    Tensors that are written in place are copied: weights of sites that are merged or that an adapter changed at its
    start, all sites' weights with `folding`, and running statistics, which differ with and without adapters. The copy
    has the model's structure for good. `dequantise`: which quantised modules are plain Linears in the copy: "all" that
    are a plain map, or only those that also round their inputs ("rounding").
    """
    modified = {id(tensor) for tensor in _modified_tensors(model, folding, dequantise == "all")}
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in modified:
            memo[id(tensor)] = _alias(tensor)
    for part in records_in(model, nested=True).values():
        if (state := model_state(part)) is not None:
            memo[id(state.structure)] = []  # final in the copy: what removes adapters there leaves the structure
    try:
        with torch.no_grad():
            copied_model = copy.deepcopy(model, memo)
    except Exception as error:
        raise SurgeryError(
            f"this {type(model).__name__} can't be copied",
            why=f"{type(error).__name__}: {error}"[:300],
            fix="export works on a copy that shares the model's memory: let copy.deepcopy(model) succeed",
        ) from error
    _copy_records(model, copied_model, memo)
    for parameter in copied_model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    copied_model.eval()
    weights = packed_maps(copied_model) if dequantise else []
    chosen = [packed.module for packed in weights if dequantise == "all" or packed.activations is not None]
    if dequantise:  # no kernel of packed experts can be exported
        chosen += [module for _, module in base_modules(copied_model) if packed_stacks_of(module)]
    dtype = plain_dtype(copied_model) if chosen else None
    for module in chosen:
        replace_packed(module, into=dtype, config=getattr(copied_model, "config", None))  # a merge rounds to the dtype
    return copied_model


def packed_maps(model: nn.Module) -> list[PackedWeight]:
    """The packed weights of the quantised modules that are plain maps."""
    weights = [packed_weight_of(module) for _, module in base_modules(model)]
    return [packed for packed in weights if packed is not None and packed.is_plain_map]


def changing(model: nn.Module) -> list[str]:
    """Returns adapters that changed base weights at their start (PiSSA). They can't be idle."""
    return _changing(list(sites(model)))


def _changing(all_sites: Sites) -> list[str]:
    return list(
        dict.fromkeys(applied.adapter for _, _, site in all_sites for applied in site.applied if applied.changed)
    )


def leave_live(copy: nn.Module, names: Sequence[str], weights: Mapping[str, float] | None = None) -> None:
    """Makes exactly these adapters of a copy live and unmerged. Removes other adapters that can't be idle.

    `weights`: weights other than 1; default: the copy's current weights.
    """
    state = model_state(copy)
    if state is None:
        return
    weights = weights_now(state) if weights is None else weights
    all_sites = list(sites(copy))
    if any(site.merged is not None for _, _, site in all_sites):
        ensure_unmerged(copy)
    if removed := [name for name in _changing(all_sites) if name not in names]:
        remove(copy, removed, check=False)
    if model_state(copy) is not None:
        switch(copy, {name: weights.get(name, 1.0) for name in names})


def _alias(tensor: Tensor) -> Tensor:
    """Returns a tensor object that shares memory and has its own flags."""
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach() if type(tensor) is Tensor else tensor  # packed tensors have no flags to change


def _modified_tensors(model: nn.Module, folding: bool, dequantised: bool) -> Iterator[Tensor]:
    """Yields tensors that exporting writes in place. `dequantised`: folds go into plain weights of the copy's own."""
    for part in (records_in(model, nested=True) or {"": model}).values():
        for _, module, site in sites(part):
            in_base = site.merged is not None or any(applied.changed for applied in site.applied)
            if folding or in_base:
                packed = packed_weight_of(module) if dequantised and not in_base else None
                replaced = _stored_in(module, packed) if packed is not None and packed.is_plain_map else set()
                tensors = (*module.parameters(), *module.buffers())
                yield from (tensor for tensor in tensors if id(tensor) not in replaced)
        state = model_state(part)
        for module in state.moving if state is not None else ():
            yield from module.buffers(recurse=False)


def _stored_in(module: nn.Module, packed: PackedWeight) -> set[int]:
    """The ids of the tensors that hold a packed weight. They may be of a class that can't be copied."""
    return {id(tensor) for tensor in (module._parameters.get("weight"), *packed.tensors().values())}


def _copy_records(model: nn.Module, copied_model: nn.Module, memo: Mapping[int, object]) -> None:
    """Copies the records of GraphModules, whose deepcopy drops them."""
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            for name in (_MODEL, _SITE):
                record = module.__dict__.get(name)
                if record is not None:
                    copied_model.get_submodule(path).__dict__[name] = memo[id(record)]


@contextlib.contextmanager
def traced_path() -> Iterator[None]:
    """Disables the fast kernel of nn.TransformerEncoder, which can't be exported, and uses `full_length_caches`.

    The fast kernel writes zeros at padded positions. The path that training takes, and thus the file, computes values.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with full_length_caches():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
