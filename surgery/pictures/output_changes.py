"""Runs a model on an example with and without its adapters, and measures where outputs change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.lifecycle.activation import using
from surgery.patterns.module_walk import every_path
from surgery.rewritten_model.verb_root import rewritten_if_any
from surgery.state.records import merged_adapters, site_state
from surgery.tracing.example_call import call, random_state

__all__ = ["OutputChange", "output_changes"]


@dataclass(frozen=True)
class OutputChange:
    """How far a module's output on the example is from its output without adapters.

    `norm`: the norm of the output without adapters; `change`: the norm of the difference, None if the shapes differ.
    `site`: whether rules are on the module. A module that is called several times counts with all its calls.
    """

    path: str
    type: str
    site: bool
    norm: float
    change: float | None

    @property
    def relative(self) -> float | None:
        """The change as a part of the norm; None if the shapes differ."""
        if self.change is None:
            return None
        return self.change / self.norm if self.norm else float(self.change > 0)


def output_changes(model: nn.Module, example_inputs: Any) -> list[OutputChange]:
    """The changes of the sites, of repeated layers and of the model, in the order of the calls.

    The model is called twice, in evaluation mode and without gradients, on the same random numbers. A model without
    adapters is called once: nothing changes. Raises `SurgeryError` if an adapter is merged: its weights are not those
    of the base.
    """
    found = rewritten_if_any(model)
    if found is not None and (merged := merged_adapters(found[0])):
        raise SurgeryError(
            f"outputs without {', '.join(merged)} can't be computed",
            why="the weights hold what was merged",
            fix="unmerge(model) first, or leave out example_inputs",
        )
    watched = {path: module for path, module in every_path(model) if _is_shown(path, module)}
    random = random_state()
    live = _outputs(model, watched, example_inputs, random)
    base = live
    if found is not None:
        with using(model, None):
            base = _outputs(model, watched, example_inputs, random)
    changes = []
    for path in live:
        module = watched[path]
        pairs = list(zip(base.get(path, []), live[path], strict=False))
        same = len(base.get(path, [])) == len(live[path]) and all(a.shape == b.shape for a, b in pairs)
        change = _norm([b.double() - a.double() for a, b in pairs]) if same else None
        state_here = site_state(module)
        kind = state_here.base if state_here is not None else type(module)
        norm = _norm([a.double() for a in base.get(path, [])])
        changes.append(OutputChange(path, kind.__name__, state_here is not None, norm, change))
    return changes


def _is_shown(path: str, module: nn.Module) -> bool:
    return not path or path.rpartition(".")[2].isdigit() or site_state(module) is not None


def _outputs(
    model: nn.Module, watched: Mapping[str, nn.Module], example_inputs: Any, random: list[Tensor]
) -> dict[str, list[Tensor]]:
    """The first floating-point tensor of each call of the watched modules, in the order in which they return."""
    outputs: dict[str, list[Tensor]] = {}

    def note(path: str, module: nn.Module, args: Any, output: Any) -> None:
        tensor = next(_tensors(output), None)
        if tensor is not None:
            outputs.setdefault(path, []).append(tensor.detach().clone())

    handles = []
    try:
        for path, module in watched.items():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(partial(note, path)))
        call(model, example_inputs, random)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def _tensors(value: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a value; those of a mapping or an object in its order."""
    if isinstance(value, Tensor):
        yield from [value] if value.is_floating_point() else []
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _norm(tensors: list[Tensor]) -> float:
    return float(sum((tensor.square().sum() for tensor in tensors), torch.zeros((), dtype=torch.float64)).sqrt())
