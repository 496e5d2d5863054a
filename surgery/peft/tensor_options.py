"""PEFT's options for an adapter's tensors: `autocast_adapter_dtype`, `low_cpu_mem_usage` and `is_trainable`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from surgery.patterns.module_walk import tensor_key
from surgery.rewritten_model.verb_root import rewritten, root_of
from surgery.state.adapter_tensors import AdapterTensors, box_of, tensors_of
from surgery.state.records import base_parameters, sites
from surgery.transaction.undo_log import Journal

__all__ = ["keep_base_dtype", "materialise", "move_to_meta", "require_idle_gradients"]


def keep_base_dtype(model: nn.Module, adapter: str) -> None:
    """Give an adapter's tensors the dtype of their module's weights (`autocast_adapter_dtype=False`).

    Integer and quantised weights have no dtype for an adapter: its tensors keep theirs there.
    """

    def dtype_of(module: nn.Module) -> torch.dtype | None:
        return next((weight.dtype for _, weight in base_parameters(module) if weight.is_floating_point()), None)

    def cast(module: nn.Module, tensor: Tensor) -> Tensor | None:
        dtype = dtype_of(module) if tensor.is_floating_point() else None
        return None if dtype in (None, tensor.dtype) else tensor.detach().to(dtype)

    with Journal() as journal:
        _replace_parameters(model, adapter, cast)
        for _, module, box in _boxes(model, adapter):
            journal.keep(box._buffers)
            for name, buffer in box._buffers.items():
                if buffer is not None and (value := cast(module, buffer)) is not None:
                    box._buffers[name] = value


def move_to_meta(model: nn.Module, adapter: str) -> None:
    """Move an adapter's parameters to the device meta, where they take no memory (`low_cpu_mem_usage=True`).

    `set_peft_model_state_dict` puts real tensors in their places. Buffers stay: they are constants, which a state dict
    may not have.
    """
    _replace_parameters(model, adapter, lambda module, parameter: parameter.detach().to("meta"))


def materialise(model: nn.Module, adapter: str, keys: Iterable[str]) -> None:
    """Make parameters of these keys that are on the device meta on the device of their module, without values."""
    wanted = set(keys)
    chosen = {  # at all of their sites, of which a state dict may have one
        id(parameter)
        for path, _, box in _boxes(model, adapter)
        for name, parameter in box._parameters.items()
        if parameter is not None and parameter.is_meta and tensor_key(path, name) in wanted
    }

    def on_device(module: nn.Module, parameter: Tensor) -> Tensor | None:
        if id(parameter) not in chosen:
            return None
        device = next((weight.device for _, weight in base_parameters(module)), torch.device("cpu"))
        return torch.empty_like(parameter, device=device)

    _replace_parameters(model, adapter, on_device)


def require_idle_gradients(model: nn.Module, adapter: str, required: bool) -> None:
    """Let the trained tensors of an idle adapter require gradients (`is_trainable=True`), or not.

    They are switched together: where the first is as required, all are.
    """
    state = rewritten(model)[1]
    if adapter not in state.places:
        return
    with Journal() as journal:
        for module, rules in state.places[adapter]:
            tensors = tensors_of(module, adapter)
            for name in {name for applied in rules for name in applied.trained}:
                if tensors[name].requires_grad == required:
                    return
                journal.undo(tensors[name].requires_grad_, not required)
                tensors[name].requires_grad_(required)


def _replace_parameters(
    model: nn.Module, adapter: str, value_for: Callable[[nn.Module, Tensor], Tensor | None]
) -> None:
    """Put new parameters in the places of those for which there is a value. Sites that share one share the new one."""
    new: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}  # with the old parameter, whose id stays its own
    with Journal() as journal:
        for _, module, box in _boxes(model, adapter):
            journal.keep(box._parameters)
            for name, parameter in box._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in new and (value := value_for(module, parameter)) is not None:
                    new[id(parameter)] = parameter, nn.Parameter(value, parameter.requires_grad)
                if id(parameter) in new:
                    box._parameters[name] = new[id(parameter)][1]


def _boxes(model: nn.Module, adapter: str) -> Iterator[tuple[str, nn.Module, AdapterTensors]]:
    for path, module, _ in sites(root_of(model)):
        if (box := box_of(module, adapter)) is not None:
            yield path, module, box
