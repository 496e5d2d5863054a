"""PEFT's options for an adapter's tensors: `autocast_adapter_dtype`, `low_cpu_mem_usage` and `is_trainable`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from surgery.patterns.module_walk import tensor_key
from surgery.rewritten_model.verb_root import rewritten, root_of
from surgery.state.adapter_tensors import AdapterTensors, box_of
from surgery.state.records import base_parameters, sites
from surgery.transaction.undo_log import Journal

__all__ = ["keep_base_dtype", "materialise", "move_to_meta", "require_gradients", "requires_gradients"]


def keep_base_dtype(model: nn.Module, adapter: str, journal: Journal) -> None:
    """Give an adapter's tensors the dtype of their module's weights (`autocast_adapter_dtype=False`).

    Integer and quantised weights have no dtype for an adapter: its tensors keep theirs there.
    """
    replaced = _Replaced()
    for _, module, box in _boxes(model, adapter):
        dtype = next((weight.dtype for _, weight in base_parameters(module) if weight.is_floating_point()), None)
        if dtype is None:
            continue
        _keep(box, journal)
        for name, parameter in box._parameters.items():
            if parameter is not None and parameter.is_floating_point() and parameter.dtype != dtype:
                box._parameters[name] = replaced.get(parameter, parameter.detach().to(dtype))
        for name, buffer in box._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                box._buffers[name] = buffer.to(dtype)


def move_to_meta(model: nn.Module, adapter: str, journal: Journal) -> None:
    """Move an adapter's parameters to the device meta, where they take no memory (`low_cpu_mem_usage=True`).

    `set_peft_model_state_dict` puts real tensors in their places. Buffers stay: they are constants, which a state dict
    may not have.
    """
    replaced = _Replaced()
    for _, _, box in _boxes(model, adapter):
        _keep(box, journal)
        for name, parameter in box._parameters.items():
            if parameter is not None:
                box._parameters[name] = replaced.get(parameter, parameter.detach().to("meta"))


def materialise(model: nn.Module, adapter: str, keys: Iterable[str], journal: Journal) -> None:
    """Make parameters of these keys that are on the device meta on the device of their module, without values."""
    wanted, replaced = set(keys), _Replaced()
    chosen = {  # at all of their sites, of which a state dict may have one
        id(parameter)
        for path, _, box in _boxes(model, adapter)
        for name, parameter in box._parameters.items()
        if parameter is not None and parameter.is_meta and tensor_key(path, name) in wanted
    }
    for _, module, box in _boxes(model, adapter):
        device = next((weight.device for _, weight in base_parameters(module)), torch.device("cpu"))
        _keep(box, journal)
        for name, parameter in box._parameters.items():
            if parameter is not None and id(parameter) in chosen:
                box._parameters[name] = replaced.get(parameter, torch.empty_like(parameter, device=device))


def require_gradients(model: nn.Module, adapter: str, required: bool, journal: Journal) -> None:
    """Let the trained tensors of an idle adapter require gradients (`is_trainable=True`), or not."""
    state = rewritten(model)[1]
    for module, rules in state.places[adapter] if adapter in state.places else ():
        if (box := box_of(module, adapter)) is None:
            continue
        tensors = box.tensors()
        for name in {name for applied in rules for name in applied.trained}:
            if tensors[name].requires_grad != required:
                journal.undo(tensors[name].requires_grad_, not required)
                tensors[name].requires_grad_(required)


def requires_gradients(model: nn.Module, adapter: str) -> bool:
    """Whether an adapter's trained tensors require gradients, by the first of them: they are switched together."""
    places = rewritten(model)[1].places
    for module, rules in places[adapter] if adapter in places else ():
        if (box := box_of(module, adapter)) is not None:
            tensors = box.tensors()
            for name in (name for applied in rules for name in applied.trained):
                return tensors[name].requires_grad
    return False


class _Replaced:
    """New parameters in place of old ones. Sites that share a parameter share the new one."""

    def __init__(self) -> None:
        self._new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old one, whose id stays its own

    def get(self, old: nn.Parameter, value: Tensor) -> nn.Parameter:
        if id(old) not in self._new:
            self._new[id(old)] = old, nn.Parameter(value, old.requires_grad)
        return self._new[id(old)][1]


def _boxes(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module, AdapterTensors]]:
    for path, module, _ in sites(root_of(model)):
        if (box := box_of(module, adapter)) is not None:
            yield path, module, box


def _keep(box: AdapterTensors, journal: Journal) -> None:
    journal.keep(box._parameters, box._buffers)
