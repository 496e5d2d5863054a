"""Runs functions outside a compiler: in another thread, with real tensors in place of the compiler's fake tensors.

A rule's rewrite and the trace of a forward need real values. Torch's modes, the compiler's callback and hooks belong to
one thread, so they do not act in another thread. Placeholders with the same sizes and strides replace fake tensors.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from surgery.errors import TraceError
from surgery.forward.parameter_view import make_view
from surgery.transaction.object_contents import contents

__all__ = ["has_fakes", "replace_fakes", "replace_symbols", "run_in_thread"]

T = TypeVar("T")
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def run_in_thread(function: Callable[..., T], *args: Any) -> T:
    """Call a function in another thread, with the present gradient mode, autocast and device."""
    gradients = torch.is_grad_enabled()
    cast = [(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in ("cpu", "cuda")]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    outcome: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with ExitStack() as stack:
                if device is not None:
                    stack.enter_context(torch.cuda.device(device))
                for kind, dtype, on in cast:
                    if on:
                        stack.enter_context(torch.autocast(kind, dtype))
                if "torch._dynamo" in sys.modules:  # compiled code inside would wait for the compiler, which waits here
                    stack.enter_context(torch.compiler.set_stance("force_eager"))
                stack.enter_context(torch.set_grad_enabled(gradients))
                outcome.append(function(*args))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="surgery")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return outcome[0]


def is_fake(value: Any) -> bool:
    """Whether a tensor does not have values, as in a compiler or an exporter."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(value, (FakeTensor, FunctionalTensor))


def has_fakes(module: nn.Module, arguments: tuple) -> bool:
    """Whether a tensor of the module or of the arguments is fake."""
    tensors = (*module.parameters(), *module.buffers())
    return any(map(is_fake, tensors)) or any(
        is_fake(part) for value in arguments for part in contents(value, Tensor, *_SYMBOLS)
    )


def replace_symbols(value: Any) -> Any:
    """Replace symbolic numbers in a value by plain numbers. Tensors stay."""
    return _replace(value, {}, lambda tensor: tensor)


def replace_fakes(module: nn.Module, arguments: tuple) -> tuple[nn.Module, tuple]:
    """Replace fake tensors in a module and in arguments. A module without fake tensors is returned itself.

    Raises `TraceError` for an unknown size.
    """
    replacements: dict[int, Any] = {}
    named_tensors = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    tensors = {name: _replace(tensor, replacements) for name, tensor in named_tensors if is_fake(tensor)}
    view = make_view(module, type(module), tensors) if tensors else module
    return view, tuple([_replace(value, replacements) for value in arguments])


def _replace(value: Any, replacements: dict[int, Any], make: Callable[[Tensor], Tensor] | None = None) -> Any:
    """Replace fake tensors by real tensors, and symbolic numbers by plain numbers.

    `replacements`: id of a fake tensor → its replacement. `make`: creates a replacement.
    """
    if isinstance(value, _SYMBOLS):
        return _number(value)
    if isinstance(value, Tensor):
        if not is_fake(value):
            return value
        if id(value) not in replacements:
            replacements[id(value)] = (make or _placeholder)(value)
        return replacements[id(value)]
    if type(value) in (tuple, list):
        return type(value)(_replace(item, replacements, make) for item in value)
    if type(value) is torch.Size:
        return torch.Size([_number(size) for size in value])
    if type(value) is dict:
        return {key: _replace(item, replacements, make) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, nn.Module, type)):
        return value
    parts = {id(part): part for part in contents(value, Tensor, *_SYMBOLS)}
    if not any(isinstance(part, _SYMBOLS) or is_fake(part) for part in parts.values()):
        return value
    return copy.deepcopy(value, {key: _replace(part, replacements, make) for key, part in parts.items()})


def _number(value: Any) -> Any:
    """Returns the value of a symbolic number in the example, without a guard of the compiler."""
    if isinstance(value, (int, float)):
        return value
    node = value.node
    hint = node.hint if node.has_hint() else None
    if hint is None:
        raise TraceError(
            "a size is not known while the model is compiled or exported",
            why="it depends on the content of a tensor",
            fix="call the model once with such inputs before",
        )
    return hint


def _placeholder(fake: Tensor) -> Tensor:
    """Returns a real tensor: True for bools, 0 for integers (which may be indices), 0 to 1 for floats."""
    shape = [_number(size) for size in fake.shape]
    strides = [_number(stride) for stride in fake.stride()]
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    if fake.dtype.is_floating_point and fake.element_size() > 1:
        numbers = torch.rand(span, generator=torch.Generator().manual_seed(0))
    elif fake.dtype is torch.bool:
        numbers = torch.ones(span)
    else:
        numbers = torch.zeros(span)
    tensor = numbers.to(fake.device, fake.dtype).as_strided(shape, strides)
    return nn.Parameter(tensor, fake.requires_grad) if isinstance(fake, nn.Parameter) else tensor
