"""Runs verbs independently of the caller's gradient mode, autocast and torch defaults.

A tensor that is created under `inference_mode` never trains, sums under autocast have other bits, and so on. Verbs run
outside these modes (`verb`, `neutral`). Only the user's own model is called inside them (`ambient`).
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
    """Decorator of a public function that changes a model: all or nothing, independent of the caller's torch modes.

    The garbage collector pauses meanwhile, because a verb creates many objects that stay.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with neutral(args[0] if args else None), Journal(), collector_waits():
            return function(*args, **kwargs)

    return run  # type: ignore[return-value]


def neutrally(*, collects: bool = False) -> Callable[[F], F]:
    """Decorator of a public function that does not change a model, independent of the caller's torch modes.

    `collects`: whether the garbage collector keeps running, for long functions that create cycles. Default False.
    """

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with neutral(args[0] if args else None), nullcontext() if collects else collector_waits():
                return function(*args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


class _Modes(NamedTuple):
    """The caller's torch modes around the outermost verb."""

    autocast: tuple[tuple[str, torch.dtype], ...]
    dtype: torch.dtype
    device: torch.device | None


class _ThreadContext(threading.local):
    around: _Modes | None = None


_thread = _ThreadContext()
_transforms: Any = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]
_DEVICES = ("cpu", "cuda", "mps", "xpu")


class neutral:
    """A context with torch's own defaults: no gradient mode, no autocast. Cheap if these already hold.

    Raises `SurgeryError` inside a transform of torch.func, and under FakeTensorMode for a model with real tensors,
    because a verb can't leave these.
    """

    def __init__(self, model: Any = None):
        self.model, self._stack = model, None

    def __enter__(self) -> None:
        _refuse(self.model)
        modes = _present_modes()
        if modes is not None:
            self._stack = ExitStack()
            _enter(self._stack, modes)

    def __exit__(self, *error: Any) -> None:
        if self._stack is not None:
            self._stack.close()


def _present_modes() -> _Modes | None:
    """Returns the present torch modes, or None if all are torch's defaults."""
    device = _default_device()
    dtype = torch.get_default_dtype()
    cast = torch._C._is_any_autocast_enabled()
    if torch.is_grad_enabled() and not torch.is_inference_mode_enabled() and not cast and device is None:
        if dtype is torch.float32:
            return None
    kinds = [(kind, torch.get_autocast_dtype(kind)) for kind in _DEVICES if cast and torch.is_autocast_enabled(kind)]
    return _Modes(tuple(kinds), dtype, device)


def _default_device() -> torch.device | None:
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return next((mode.device for mode in reversed(modes) if isinstance(mode, DeviceContext)), None)


def _enter(stack: ExitStack, modes: _Modes) -> None:
    """Enter torch's defaults. The caller's modes are stored by the outermost verb."""
    stack.callback(setattr, _thread, "around", _thread.around)
    if _thread.around is None:
        _thread.around = modes
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch.enable_grad())
    for kind, _ in modes.autocast:
        stack.enter_context(torch.autocast(kind, enabled=False))
    if modes.dtype is not torch.float32:
        stack.callback(torch.set_default_dtype, modes.dtype)
        torch.set_default_dtype(torch.float32)
    if modes.device is not None and modes.device.type != "cpu":
        stack.enter_context(torch.device("cpu"))


@contextmanager
def ambient() -> Iterator[None]:
    """Restore the caller's autocast and defaults, for a call of the user's own model inside a verb."""
    around = _thread.around
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
    """Raise `SurgeryError` inside a transform of torch.func, or under FakeTensorMode for a model with real tensors."""
    if _transforms() is not None:
        raise SurgeryError(
            "this is called inside a transform of torch.func",
            why="tensors created inside vmap, grad and similar transforms are wrappers that end with the transform",
            fix="call it before the transform, and pass the rewritten model to torch.func",
        )
    fake: Any = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)
    if fake is not None and isinstance(model, nn.Module):
        real = next((name for name, tensor in model.named_parameters() if not _is_fake(tensor)), None)
        if real is not None:
            raise SurgeryError(
                "this is called under FakeTensorMode, and the model's tensors are real",
                where=real,
                why="tensors that are created there do not have numbers",
                fix="call it outside, or with a model that was created under the same mode",
            )


def _is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)
