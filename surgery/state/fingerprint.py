"""Base fingerprints: a few numbers of a base's weights, which tell bases apart in any precision."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.forward.offloaded_weights import value_at
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import is_offloaded
from surgery.state.layer_fingerprint import layer_differences, layer_numbers
from surgery.state.records import site_state
from surgery.transaction.gradient_flags import is_lazy

__all__ = ["brief_fingerprint", "differences", "fingerprint"]

TENSORS, NUMBERS = 16, 16
_TOLERANCE = 2.0**-7  # two roundings to bfloat16; fine-tuning changes some of 256 weights by more


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Returns sixteen numbers of each of sixteen parameters, spread over the model, and two numbers of each layer.

    Parameters that an adapter changed at its start, by merging, or replaced (such as a new head) are left out, and so
    are packed, sharded and meta parameters. Offloaded parameters are read where accelerate keeps them.
    """
    candidates = list(_comparable(model))
    matrices = [
        item for item in candidates if item[1].dim() > 1
    ] or candidates  # biases and norms are similar in all models
    chosen, numbers = [matrices[i] for i in _spread(len(matrices), TENSORS)], _reader(model)
    return {
        "class": class_of(model).__name__,
        "numbers": {name: {"shape": list(tensor.shape), "values": numbers(tensor)} for name, tensor in chosen},
        "layers": layer_numbers(model, matrices, numbers),
    }


def brief_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Returns a fingerprint of some hundred bytes: four numbers of each of three parameters, and lengths of lists."""
    whole = fingerprint(model)
    names = list(whole["numbers"])
    few = [names[i] for i in _spread(len(names), 3)]
    numbers = {name: {**whole["numbers"][name], "values": whole["numbers"][name]["values"][:4]} for name in few}
    layers = {path: {"count": entry["count"]} for path, entry in whole["layers"].items()}
    return {**whole, "numbers": numbers, "layers": layers}


def differences(model: nn.Module, expected: Any, ignored: Collection[Tensor] = ()) -> list[str]:
    """Returns how a base differs from the base of a fingerprint, as sentences. Empty if it can't be compared.

    `ignored`: tensors that may differ.
    """
    numbers = expected.get("numbers") if isinstance(expected, Mapping) else None
    if not isinstance(numbers, Mapping):
        return []
    compared_numbers = dict(list(numbers.items())[:TENSORS])
    own_tensors, problems, numbers_of = dict(_comparable(model, compared_numbers)), [], _reader(model)
    for name, stored in compared_numbers.items():
        if (
            name not in own_tensors
            or not isinstance(stored, Mapping)
            or any(own_tensors[name] is tensor for tensor in ignored)
        ):
            continue
        values, present = stored.get("values"), numbers_of(own_tensors[name])
        if list(own_tensors[name].shape) != stored.get("shape"):
            problems.append(f"{name} is {tuple(own_tensors[name].shape)} here and was {stored.get('shape')}")
        elif isinstance(values, list) and not all(map(_is_near, values, present)):
            problems.append(f"{name} has other values")

    def present_numbers(names: list[str]) -> dict[str, list[Any]]:
        tensors = dict(_comparable(model, names))
        return {
            name: numbers_of(tensors[name], 2)
            for name in names
            if name in tensors and not any(tensors[name] is tensor for tensor in ignored)
        }

    texts, others = layer_differences(model, expected.get("layers"), present_numbers, _is_near)
    if problems:
        compared = len([name for name in numbers if name in own_tensors])
        others = [f"{len(problems)} of {compared} weights differ ({'; '.join(problems[:3])})"]
    texts += others
    return [f"it was made on another base: {'; '.join(texts)}"] if texts else []


def _comparable(model: nn.Module, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yields the parameters that can be compared, each under its first name. `names`: only these parameters."""
    seen: set[int] = set()
    modules = dict(base_modules(model))
    records = [(path, state) for path, module in modules.items() if (state := site_state(module)) is not None]
    merged = tuple([f"{path}." if path else "" for path, state in records if state.merged is not None])
    ids = None if names is None else {id(tensor) for name in names for tensor in _tensors_named(modules, name)}
    for path, module in modules.items():
        if not module._parameters or f"{path}.".startswith(merged):
            continue
        for name, tensor in module._parameters.items():
            if tensor is None or id(tensor) in seen or (ids is not None and id(tensor) not in ids):
                continue
            if name in _excluded_names(module) or is_lazy(tensor) or not tensor.numel():
                continue
            seen.add(id(tensor))
            ordinary = type(tensor) is nn.Parameter and (not tensor.is_meta or is_offloaded(module))
            if ordinary and tensor.dtype in _COMPARED:
                yield ".".join(filter(None, (path, name))), tensor


_COMPARED = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128)


def _tensors_named(modules: Mapping[str, nn.Module], name: str) -> list[Tensor]:
    """Returns the parameter with a dotted name in a list, or an empty list."""
    path, _, last = name.rpartition(".")
    owner = modules.get(path)
    parameters = owner._parameters.items() if owner is not None else ()
    return [tensor for own, tensor in parameters if own == last and tensor is not None]


def _excluded_names(module: nn.Module) -> set[str]:
    """Returns the names of parameters that an adapter changed at its start, or replaces."""
    state = site_state(module)
    rules = state.applied if state is not None else []
    changing = [applied for applied in rules if applied.changed or applied.rule.exclusive]
    changed = {name for applied in changing for name, _ in applied.changed}
    return changed | {name for applied in changing if applied.rule.exclusive for name in applied.tensors}


def _spread(count: int, most: int) -> list[int]:
    return sorted({i * (count - 1) // max(1, most - 1) for i in range(most)}) if count else []


def _reader(model: nn.Module) -> Callable[..., list[Any]]:
    """Returns `_numbers` for tensors of this model, which may be offloaded."""
    kept = {
        id(tensor): (module, name)
        for _, module in base_modules(model)
        if is_offloaded(module)
        for name, tensor in module._parameters.items()
    }

    def numbers(tensor: Tensor, most: int = NUMBERS) -> list[Any]:
        return _numbers(value_at(*kept[id(tensor)]) if id(tensor) in kept else tensor, most)

    return numbers


def _numbers(tensor: Tensor, most: int = NUMBERS) -> list[Any]:
    """Some numbers of a tensor; NaN and infinity, which JSON does not have, as words."""
    flat = (torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()).reshape(-1)
    positions = torch.tensor(_spread(flat.numel(), most), device=flat.device)
    numbers = flat[positions].double().tolist()
    return [float(f"{number:.6g}") if math.isfinite(number) else str(number) for number in numbers]


def _is_near(expected: Any, number: Any) -> bool:
    if isinstance(number, str) or isinstance(expected, str):
        return expected == number
    if type(expected) not in (int, float):
        return False
    return abs(expected - number) <= _TOLERANCE * max(abs(expected), abs(number)) + 1e-6
