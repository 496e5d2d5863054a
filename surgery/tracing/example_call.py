"""One example call of the model: which modules it reaches, and whether held graphs give the same bits."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.neutral_context import ambient
from surgery.transaction.object_contents import contents

__all__ = [
    "Observation",
    "call",
    "dummy",
    "equal",
    "evaluating",
    "examples_in",
    "observe",
    "outermost_calls",
    "random_state",
]


class Observation:
    """What an example call showed: its output, the random state it began from, and the first call of each watched
    module."""

    def __init__(self) -> None:
        self.output: Any = None
        self.random = random_state()
        self.calls: dict[int, tuple[tuple, dict, Any]] = {}

    def reached(self, module: nn.Module) -> bool:
        return id(module) in self.calls


def observe(model: nn.Module, example_inputs: Any, watched: Iterable[nn.Module]) -> Observation:
    """Run the example once in evaluation mode without gradients, and note the calls of the watched modules.

    The model's modes, hooks, buffers and the random state are afterwards as they were.
    """
    found = Observation()

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if id(module) not in found.calls:
            found.calls[id(module)] = (copied(args), copied(kwargs), _RUNNING)

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        given = found.calls.get(id(module))
        if given is not None and given[2] is _RUNNING:
            found.calls[id(module)] = (given[0], given[1], copied(output))

    handles = []
    try:
        for module in watched:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        found.output = call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def outermost_calls(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> list[tuple[str, nn.Module, tuple, dict[str, Any]]]:
    """The calls that a module itself makes of modules in it, in order: path, module, copies of the arguments.

    It is run once more on copies, in its present mode.
    """
    found: list[tuple[str, nn.Module, tuple, dict[str, Any]]] = []
    depth = 0
    handles = []

    def enter(path: str, inner: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal depth
        if depth == 0:
            found.append((path, inner, copied(args), copied(kwargs)))
        depth += 1

    def leave(inner: nn.Module, args: tuple, output: Any) -> None:
        nonlocal depth
        depth -= 1

    try:
        for path, inner in module.named_modules():
            if inner is not module and not isinstance(inner, torch.jit.ScriptModule):
                handles.append(inner.register_forward_pre_hook(partial(enter, path), with_kwargs=True))
                handles.append(inner.register_forward_hook(leave))
        type(module).forward(module, *copied(args), **copied(kwargs))
    finally:
        for handle in handles:
            handle.remove()
    return found


def call(model: nn.Module, example_inputs: Any, random: list[Tensor] | None = None) -> Any:
    """The model's output on the example, in evaluation mode, without gradients, leaving no trace on the model.

    `random` is a state to draw from, as `random_state` gave it: some models draw numbers in evaluation mode, too, and
    two calls are to draw the same.
    """
    args, kwargs = arguments(example_inputs)
    with ambient(), torch.no_grad(), torch.random.fork_rng(), evaluating(model):
        if random is not None:
            torch.set_rng_state(random[0])
            torch.cuda.set_rng_state_all(random[1:])
        try:
            return copied(model(*copied(args), **copied(kwargs)))
        except SurgeryError:
            raise
        except Exception as error:
            raise SurgeryError(
                "the example call fails",
                why=f"{type(error).__name__}: {error}",
                fix="pass example_inputs as a tensor, a tuple of arguments, or a dict of keyword arguments",
            ) from error


def dummy(model: Any) -> dict[str, Tensor] | None:
    """The example call that a model of transformers offers of itself, on its device; None for others."""
    given = getattr(model, "dummy_inputs", None)
    if not isinstance(given, dict):
        return None
    device = next((parameter.device for parameter in model.parameters()), None)
    found = {name: tensor.to(device) for name, tensor in given.items() if isinstance(tensor, Tensor)}
    if getattr(model.config, "is_encoder_decoder", False) and "input_ids" in found:
        found.setdefault("decoder_input_ids", found["input_ids"])
    return found


def random_state() -> list[Tensor]:
    """The state of torch's generators: the CPU's, then one for each CUDA device."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def examples_in(example_inputs: Any) -> list[Any]:
    """The examples that `example_inputs` holds: a list may hold several, anything else is one."""
    if example_inputs is None:
        return []
    return list(example_inputs) if type(example_inputs) is list else [example_inputs]


def arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """A tensor is one argument, a tuple or list the positional ones, a mapping the keywords."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and nothing asks for gradients: torch.matmul picks its kernel by a weight's `requires_grad`, so
    a base gives other last bits before it is frozen than after."""
    modes = [(module, module.training) for module in model.modules()]
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def back() -> None:
        for module, mode in modes:
            module.training = mode
        for parameter in asking:
            set_flag(parameter, True)

    try:
        try:
            for module, _ in modes:
                module.training = False
            for parameter in asking:
                set_flag(parameter, False)
            yield
        finally:
            back()
    finally:  # once more, where it was broken off
        back()


def copied(value: Any) -> Any:
    """A copy that later in-place work can't reach: tensors cloned, containers rebuilt, other objects deep-copied."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    if isinstance(value, dict) and type(value) is dict:
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (str, int, float, type(None), nn.Module)):
        return value
    # Tensors first: what an object holds of a graph, such as a KV cache, is not copied by deepcopy itself.
    memo: dict[int, Any] = {id(tensor): tensor.detach().clone() for tensor in contents(value, Tensor)}
    return copy.deepcopy(value, memo)


def equal(one: Any, other: Any) -> bool:
    """The same structure with the same bits (NaN equals NaN)."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        return torch.equal(one, other) or bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))
    if hasattr(one, "__dict__") and type(one) is type(other):
        return equal(vars(one), vars(other))
    return type(one) is type(other) and (one is other or bool(one == other))


_RUNNING = object()
