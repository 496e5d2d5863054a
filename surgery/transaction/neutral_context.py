"""What is around a verb's call does not change what the verb does: gradient modes, autocast, defaults.

A tensor that is made under `inference_mode` never trains, sums under autocast have other bits, and so on. Verbs run
outside of all this (`verb`, `neutral`). Only the user's own model is called as the user would call it (`ambient`).
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from surgery.errors import SurgeryError
from surgery.transaction.garbage_collection import collector_waits
from surgery.transaction.undo_log import Journal

__all__ = ["ambient", "neutral", "neutrally", "verb"]

F = TypeVar("F", bound=Callable[..., Any])


def verb(function: F) -> F:
    """A public function that changes a model: all of it or nothing, and the same whatever is around the call.

    Python's garbage collector waits meanwhile: a verb makes many objects that stay, and its notes of how to undo them.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with neutral(args[0] if args else None), Journal(), collector_waits():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def neutrally(*, collects: bool = False) -> Callable[[F], F]:
    """A public function that changes no model, and does the same whatever is around the call.

    `collects`: Python's garbage collector does not wait meanwhile, for a function that runs long and leaves cycles.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with neutral(args[0] if args else None), nullcontext() if collects else collector_waits():
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


class _Around(NamedTuple):
    """What was around the outermost verb."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    dtype: torch.dtype
    device: torch.device | None


class _ThreadContext(threading.local):
    around: _Around | None = None


_here = _ThreadContext()
_transforms: Any = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]
_DEVICES = ("cpu", "cuda", "mps", "xpu")


class neutral:
    """A context without gradient modes, autocast, or other defaults than torch's own; quick where there are none.

    Raises `SurgeryError` for what can't be left for the time of a verb: transforms of torch.func, and fake tensors
    around a model that has real ones.
    """

    def __init__(self, model: Any = None):
        self.model, self._stack = model, None

    def __enter__(self) -> None:
        _refuse(self.model)
        found = _found()
        if found is not None:
            self._stack = ExitStack()
            _enter(self._stack, found)

    def __exit__(self, *error: Any) -> None:
        if self._stack is not None:
            self._stack.close()


def _found() -> _Around | None:
    """What is around now, or None where everything is as it is at torch's start."""
    device = _default_device()
    dtype = torch.get_default_dtype()
    cast = torch._C._is_any_autocast_enabled()
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not cast and device is None:
        if dtype is torch.float32:
            return None
    kinds = [(kind, torch.get_autocast_dtype(kind)) for kind in _DEVICES if cast and torch.is_autocast_enabled(kind)]
    return _Around(tuple(kinds), dtype, device)


def _default_device() -> torch.device | None:
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)


def _enter(stack: ExitStack, found: _Around) -> None:
    stack.callback(setattr, _here, "around", _here.around)
    if _here.around is None:
        _here.around = found
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for kind, _ in found.autocast:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if found.dtype is not torch.float32:
        stack.callback(torch.set_default_dtype, found.dtype)
        torch.set_default_dtype(torch.float32)
    if found.device is not None and found.device.type != "cpu":
        stack.enter_context(torch.device("cpu"))


@contextmanager
def ambient() -> Iterator[None]:
    """Autocast and defaults as they are around the verb, for a call of the user's own model."""
    around = _here.around
    if around is None:
        yield
        return
    with ExitStack() as stack:
        for kind, dtype in around.autocast:
            stack.enter_context(torch.autocast(kind, dtype=dtype))
        if around.dtype is not torch.get_default_dtype():
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(around.dtype)
        if around.device is not None and _default_device() != around.device:
            stack.enter_context(around.device)
        yield


def _refuse(model: Any) -> None:
    if _transforms() is not None:
        raise SurgeryError(
            "this is called inside of a transform of torch.func",
            why="tensors made inside of vmap, grad and their like are not plain ones, and end with it",
            fix="call it before, and hand torch.func the rewritten model",
        )
    fake: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if fake is not None and isinstance(model, nn.Module):
        real = next((name for name, tensor in model.named_parameters() if not _is_fake(tensor)), None)
        if real is not None:
            raise SurgeryError(
                "this is called under FakeTensorMode, and the model's tensors are real",
                where=real,
                why="tensors that are made there have no numbers",
                fix="call it outside, or with a model that was made under the same mode",
            )


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
