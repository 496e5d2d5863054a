"""Runs an example call of the model: notes the modules that it reaches, and compares results bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.tracing.state_restoration import restore_state
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.neutral_context import ambient
from surgery.transaction.object_contents import copied

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
    """The results of an example call: its output, the random state at its start, and the modules' first calls."""

    def __init__(self) -> None:
        self.output: Any = None
        self.random = random_state()
        self.calls: dict[int, tuple[tuple, dict, Any]] = {}  # id of a module → args, kwargs and output

    def reached(self, module: nn.Module) -> bool:
        return id(module) in self.calls


def observe(model: nn.Module, example_inputs: Any, watched: Iterable[nn.Module]) -> Observation:
    """Run the example once in evaluation mode without gradients, and note the first calls of the watched modules.

    The model and the random states are restored.
    """
    observation = Observation()

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if id(module) not in observation.calls:
            observation.calls[id(module)] = (copied(args), copied(kwargs), _RUNNING)

    def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        entry = observation.calls.get(id(module))
        if entry is not None and entry[2] is _RUNNING:
            observation.calls[id(module)] = (entry[0], entry[1], copied(output))

    handles = []
    try:
        for module in watched:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        observation.output = call(model, example_inputs)
    finally:
        for handle in handles:
            handle.remove()
    return observation


def outermost_calls(
    module: nn.Module, args: tuple, kwargs: dict[str, Any]
) -> list[tuple[str, nn.Module, tuple, dict[str, Any]]]:
    """Run a module on copies of the arguments. Returns its own calls of inner modules: path, module, args, kwargs.

    The module runs in its present mode. Calls inside an inner module are not listed.
    """
    calls: list[tuple[str, nn.Module, tuple, dict[str, Any]]] = []
    depth = 0
    handles = []

    def enter(path: str, inner: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal depth
        if depth == 0:
            calls.append((path, inner, copied(args), copied(kwargs)))
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
    return calls


def call(model: nn.Module, example_inputs: Any, random: list[Tensor] | None = None) -> Any:
    """Returns the model's output on the example, in evaluation mode, without gradients. The model is not changed.

    `random`: a result of `random_state`, from which the call draws. Some models also draw numbers in evaluation mode,
    and two calls with the same state draw the same numbers.
    """
    args, kwargs = arguments(example_inputs)
    with ambient(), torch.no_grad(), restore_state(model), evaluating(model):
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
    """Returns the `dummy_inputs` of a transformers model, on the model's device; None for other models."""
    dummy_inputs = getattr(model, "dummy_inputs", None)
    if not isinstance(dummy_inputs, dict):
        return None
    device = next((parameter.device for parameter in model.parameters()), None)
    tensors = {name: tensor.to(device) for name, tensor in dummy_inputs.items() if isinstance(tensor, Tensor)}
    if getattr(model.config, "is_encoder_decoder", False) and "input_ids" in tensors:
        tensors.setdefault("decoder_input_ids", tensors["input_ids"])
    return tensors


def random_state() -> list[Tensor]:
    """Returns the states of torch's generators: of the CPU, then of each CUDA device."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def examples_in(example_inputs: Any) -> list[Any]:
    """Returns the examples in `example_inputs`. A list contains several examples; any other value is one example."""
    if example_inputs is None:
        return []
    return list(example_inputs) if type(example_inputs) is list else [example_inputs]


def arguments(example_inputs: Any) -> tuple[tuple, dict[str, Any]]:
    """Convert an example to args and kwargs: a tensor is one argument, a tuple or list is args, a mapping is kwargs."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    return (example_inputs,), {}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode, and `requires_grad` to False, for the block.

    torch.matmul chooses its kernel by a weight's `requires_grad`, so a frozen base differs from an unfrozen base in its
    last bits.
    """
    modes = [(module, module.training) for module in model.modules()]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def restore() -> None:
        for module, mode in modes:
            module.training = mode
        for parameter in trainable:
            set_flag(parameter, True)

    try:
        try:
            for module, _ in modes:
                module.training = False
            for parameter in trainable:
                set_flag(parameter, False)
            yield
        finally:
            restore()
    finally:  # again, in case an interrupt stopped the first restore
        restore()


def equal(a: Any, b: Any) -> bool:
    """Whether two values have the same structure and the same bits. NaN equals NaN."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    if hasattr(a, "__dict__") and type(a) is type(b):
        return equal(vars(a), vars(b))
    return type(a) is type(b) and (a is b or bool(a == b))


_RUNNING = object()
