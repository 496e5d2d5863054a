"""A model to export from: a copy that shares the model's memory, so that the model itself is never touched."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn

from surgery.errors import SurgeryError
from surgery.lifecycle.remove import remove
from surgery.lifecycle.switching import switch, weights_now
from surgery.merging.merge import ensure_unmerged
from surgery.onnx.calls.sliding_windows import whole_windows
from surgery.rewritten_model.verb_root import records_in
from surgery.state.records import _MODEL, _SITE, Sites, model_state, sites

__all__ = ["changing", "leave_live", "sharing_copy", "traced_path"]


def sharing_copy(model: nn.Module, *, folding: bool = False) -> nn.Module:
    """A copy in evaluation mode whose tensors are the model's own memory.

    What is written to in place has memory of its own: weights of sites that an adapter changed at its start, that are
    merged, or (`folding`) that are about to be, and running statistics, which differ with and without adapters.
    """
    own = {id(tensor) for tensor in _modified_tensors(model, folding)}
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in own:
            memo[id(tensor)] = _shared(tensor)
    try:
        with torch.no_grad():
            copied_model = copy.deepcopy(model, memo)
    except Exception as error:
        raise SurgeryError(
            f"this {type(model).__name__} can't be copied",
            why=f"{type(error).__name__}: {error}"[:300],
            fix="export works on a copy that shares the model's memory: let copy.deepcopy(model) succeed",
        ) from error
    _bring_records(model, copied_model, memo)
    for parameter in copied_model.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(False)
    return copied_model.eval()


def changing(model: nn.Module) -> list[str]:
    """The adapters that changed base weights at their start (PiSSA), and so are live as long as they are there."""
    return _changing(list(sites(model)))


def _changing(all_sites: Sites) -> list[str]:
    return list(
        dict.fromkeys(applied.adapter for _, _, site in all_sites for applied in site.applied if applied.changed)
    )


def leave_live(copy: nn.Module, names: Sequence[str], weights: Mapping[str, float] | None = None) -> None:
    """On a copy, let these adapters be live alone, unmerged; others that can't be idle are taken off it.

    `weights`: of those that have another than 1; by default as they are on the copy.
    """
    state = model_state(copy)
    if state is None:
        return
    weights = weights_now(state) if weights is None else weights
    all_sites = list(sites(copy))
    if any(site.merged is not None for _, _, site in all_sites):
        ensure_unmerged(copy)
    if gone := [name for name in _changing(all_sites) if name not in names]:
        remove(copy, gone, check=False)
    if model_state(copy) is not None:
        switch(copy, {name: weights.get(name, 1.0) for name in names})


def _shared(tensor: Tensor) -> Tensor:
    """The same numbers in an object of its own, whose flags may change."""
    if type(tensor) is nn.Parameter:
        return nn.Parameter(tensor.detach(), requires_grad=False)
    return tensor.detach() if type(tensor) is Tensor else tensor  # packed ones are shared as they are


def _modified_tensors(model: nn.Module, folding: bool) -> Iterator[Tensor]:
    for part in (records_in(model, nested=True) or {"": model}).values():
        for _, module, site in sites(part):
            if folding or site.merged is not None or any(applied.changed for applied in site.applied):
                yield from module.parameters()
                yield from module.buffers()
        state = model_state(part)
        for module in state.moving if state is not None else ():
            yield from module.buffers(recurse=False)


def _bring_records(model: nn.Module, copied_model: nn.Module, memo: Mapping[int, object]) -> None:
    """A GraphModule's own deepcopy leaves records behind that others take along."""
    for path, module in model.named_modules():
        if isinstance(module, fx.GraphModule):
            for name in (_MODEL, _SITE):
                record = module.__dict__.get(name)
                if record is not None:
                    copied_model.get_submodule(path).__dict__[name] = memo[id(record)]


@contextlib.contextmanager
def traced_path() -> Iterator[None]:
    """Without the kernel that nn.TransformerEncoder has for evaluation alone, which can't be exported.

    That one writes zeros at padded positions, where the path that training takes, and the file, has numbers. And
    with caches that keep all positions (`whole_windows`).
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with whole_windows():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
