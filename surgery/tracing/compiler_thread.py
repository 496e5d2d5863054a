"""Work outside of a compiler: in a thread of its own, on real tensors in the place of a compiler's fake ones.

A rule's rewrite and the trace of a forward need real values. Modes, the compiler's callback and hooks belong to one
thread; so another thread sees none of them. Fake tensors are replaced by made-up ones of their sizes and strides.
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

__all__ = ["apart", "concrete", "holds_fakes", "without_symbols"]

T = TypeVar("T")
_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def apart(function: Callable[..., T], *args: Any) -> T:
    """Call a function in another thread, under this one's gradient mode, autocast and device."""
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
    """Whether a tensor stands for a value that is not known: a compiler's or an exporter's."""
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return isinstance(value, (FakeTensor, FunctionalTensor))


def holds_fakes(module: nn.Module, given: tuple) -> bool:
    """Whether the module's tensors or the arguments are fake ones."""
    tensors = (*module.parameters(), *module.buffers())
    return any(map(is_fake, tensors)) or any(
        is_fake(part) for value in given for part in contents(value, Tensor, *_SYMBOLS)
    )


def without_symbols(value: Any) -> Any:
    """A value with numbers in the place of symbolic ones; its tensors are the same."""
    return made_up(value, {}, lambda tensor: tensor)


def concrete(module: nn.Module, given: tuple) -> tuple[nn.Module, tuple]:
    """The module and the arguments with made-up tensors in the place of fake ones; the same ones where there are none.

    `TraceError` where a size is not known.
    """
    known: dict[int, Any] = {}
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    tensors = {name: made_up(tensor, known) for name, tensor in named if is_fake(tensor)}
    shown = make_view(module, type(module), tensors) if tensors else module
    return shown, tuple([made_up(value, known) for value in given])


def made_up(value: Any, known: dict[int, Any], make: Callable[[Tensor], Tensor] | None = None) -> Any:
    """A value with real tensors in the place of fake ones, and numbers in the place of symbolic ones.

    `known`: those made already, by the ids of the fake ones. `make`: what makes a tensor.
    """
    if isinstance(value, _SYMBOLS):
        return _number(value)
    if isinstance(value, Tensor):
        if not is_fake(value):
            return value
        if id(value) not in known:
            known[id(value)] = (make or _tensor)(value)
        return known[id(value)]
    if type(value) in (tuple, list):
        return type(value)(made_up(item, known, make) for item in value)
    if type(value) is torch.Size:
        return torch.Size([_number(size) for size in value])
    if type(value) is dict:
        return {key: made_up(item, known, make) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, float, str, nn.Module, type)):
        return value
    parts = {id(part): part for part in contents(value, Tensor, *_SYMBOLS)}
    if not any(isinstance(part, _SYMBOLS) or is_fake(part) for part in parts.values()):
        return value
    return copy.deepcopy(value, {key: made_up(part, known, make) for key, part in parts.items()})


def _number(value: Any) -> Any:
    """The number that a symbolic one is in the example; no guard comes of it."""
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


def _tensor(fake: Tensor) -> Tensor:
    """Ones in truth values, zeros in whole numbers (any of them may be an index), and numbers between 0 and 1."""
    shape = [_number(size) for size in fake.shape]
    strides = [_number(stride) for stride in fake.stride()]
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if 0 not in shape else 0
    if fake.dtype.is_floating_point and fake.element_size() > 1:
        numbers = torch.rand(span, generator=torch.Generator().manual_seed(0))
    elif fake.dtype is torch.bool:
        numbers = torch.ones(span)
    else:
        numbers = torch.zeros(span)
    laid = numbers.to(fake.device, fake.dtype).as_strided(shape, strides)
    return nn.Parameter(laid, fake.requires_grad) if isinstance(fake, nn.Parameter) else laid
