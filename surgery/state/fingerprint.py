"""What tells one base from another: a few numbers of its weights, which survive another precision."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.state.records import site_state
from surgery.transaction.gradient_flags import is_lazy

__all__ = ["differences", "fingerprint"]

TENSORS, NUMBERS = 16, 16
_SLACK = 2.0**-7  # two roundings to bfloat16; fine-tuning moves some of 256 weights by more


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Sixteen numbers of each of sixteen parameters, spread over the model. Parameters that an adapter changed at its
    start, or by merging, are left out, and those that it has its own in the place of (a new head's numbers are chance);
    as are packed, sharded and meta ones."""
    held = list(_comparable(model))
    matrices = [item for item in held if item[1].dim() > 1] or held  # biases and norms are alike everywhere
    chosen = [matrices[i] for i in _spread(len(matrices), TENSORS)]
    return {
        "class": class_of(model).__name__,
        "numbers": {name: {"shape": list(tensor.shape), "values": _numbers(tensor)} for name, tensor in chosen},
    }


def differences(model: nn.Module, expected: Any, aside: Collection[Tensor] = ()) -> list[str]:
    """How a base differs from the one whose fingerprint this is; nothing where it can't be told. `aside`: tensors that
    need not be the same."""
    numbers = expected.get("numbers") if isinstance(expected, Mapping) else None
    if not isinstance(numbers, Mapping):
        return []
    asked = dict(list(numbers.items())[:TENSORS])
    own, told = dict(_comparable(model, asked)), []
    for name, held in asked.items():
        if name not in own or not isinstance(held, Mapping) or any(own[name] is tensor for tensor in aside):
            continue
        values, found = held.get("values"), _numbers(own[name])
        if list(own[name].shape) != held.get("shape"):
            told.append(f"{name} is {tuple(own[name].shape)} here and was {held.get('shape')}")
        elif isinstance(values, list) and not all(map(_near, values, found)):
            told.append(f"{name} has other values")
    if told:
        compared = len([name for name in numbers if name in own])
        return [f"it was made on another base: {len(told)} of {compared} weights differ ({'; '.join(told[:3])})"]
    return []


def _comparable(model: nn.Module, asked: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """What can be compared, each under its first name. `asked`: of those under these names alone."""
    seen: set[int] = set()
    modules = dict(base_modules(model))
    records = [(path, state) for path, module in modules.items() if (state := site_state(module)) is not None]
    merged = tuple([f"{path}." if path else "" for path, state in records if state.merged is not None])
    wanted = None if asked is None else {id(tensor) for name in asked for tensor in _called(modules, name)}
    for path, module in modules.items():
        if not module._parameters or f"{path}.".startswith(merged):
            continue
        for name, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen or (wanted is not None and id(tensor) not in wanted):
                continue
            if name in _left_out(module) or is_lazy(tensor) or not tensor.numel():
                continue
            seen.add(id(tensor))
            plain = type(tensor) is nn.Parameter and not tensor.is_meta
            if plain and tensor.dtype in _COMPARED:
                yield ".".join(filter(None, (path, name))), tensor


_COMPARED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def _called(modules: Mapping[str, nn.Module], name: str) -> list[Tensor]:
    path, _, last = name.rpartition(".")
    owner = modules.get(path)
    parameters = owner._parameters.items() if owner is not None else ()
    return [tensor for own, tensor in parameters if own == last and tensor is not None]


def _left_out(module: nn.Module) -> set[str]:
    """Parameters that an adapter's start changed, or that an adapter has its own of."""
    state = site_state(module)
    rules = state.applied if state is not None else []
    here = [applied for applied in rules if applied.changed or applied.rule.exclusive]
    changed = {name for applied in here for name, _ in applied.changed}
    return changed | {name for applied in here if applied.rule.exclusive for name in applied.tensors}


def _spread(count: int, most: int) -> list[int]:
    return sorted({i * (count - 1) // max(1, most - 1) for i in range(most)}) if count else []


def _numbers(tensor: Tensor) -> list[float]:
    flat = (torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()).reshape(-1)
    at = torch.tensor(_spread(flat.numel(), NUMBERS), device=flat.device)
    return [float(f"{number:.6g}") for number in flat[at].double().tolist()]


def _near(expected: Any, number: float) -> bool:
    if type(expected) not in (int, float):
        return False
    return abs(expected - number) <= _SLACK * max(abs(expected), abs(number)) + 1e-6
