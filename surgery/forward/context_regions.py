"""Records the blocks of a rewrite, such as `torch.no_grad()` and `torch.autocast`, and runs calls inside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from surgery.errors import SiteError

__all__ = ["Block", "Inside", "Region"]

_DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Region:
    """The modes that blocks of a rewrite set around some of its lines. None means: as at the call.

    `autocast`: device type → the dtype's name, or "" for off.
    """

    gradients: bool | None = None
    autocast: tuple[tuple[str, str], ...] = ()
    inference: bool | None = None

    @property
    def word(self) -> str:
        """A word that identifies the region."""
        words = [{None: "", True: "with_gradients", False: "no_grad"}[self.gradients]]
        words += [f"autocast_{device}_{dtype or 'off'}" for device, dtype in self.autocast]
        words.append({None: "", True: "inference", False: "no_inference"}[self.inference])
        return "_".join(filter(None, words))

    def __call__(self, function: Callable[..., Any] | str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function, or a method of the first argument by its name, inside these blocks."""
        # Plain `with` statements, because torch.compile does not support ExitStack.
        if self.inference is not None:
            with torch.inference_mode(self.inference):
                return replace(self, inference=None)(function, args, kwargs)
        if self.gradients is not None:
            with torch.set_grad_enabled(self.gradients):
                return _within(self.autocast, function, args, kwargs)
        return _within(self.autocast, function, args, kwargs)


def _within(autocast: tuple[tuple[str, str], ...], function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    if autocast:
        device, dtype = autocast[0]
        with torch.autocast(device, getattr(torch, dtype) if dtype else None, enabled=bool(dtype)):
            return _within(autocast[1:], function, args, kwargs)
    if isinstance(function, str):
        return getattr(args[0], function)(*args[1:], **kwargs)
    return function(*args, **kwargs)


class Inside:
    """A function, or a method by its name, that runs inside a region: one node of a graph."""

    def __init__(self, region: Region, function: Any):
        self.region, self.function = region, function
        name = function if isinstance(function, str) else getattr(function, "__qualname__", function.__name__)
        if (module := getattr(function, "__module__", None)) not in (None, "torch", "_operator"):
            name = f"{module}_{name}"
        self.__name__ = f"{name}_{region.word}".replace(".", "_")  # a unique name for generated code

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.region(self.function, args, kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Inside) and (self.region, self.function) == (other.region, other.function)

    def __hash__(self) -> int:
        return hash((self.region, self.function))

    def __repr__(self) -> str:
        return f"{self.__name__} inside of {self.region}"


class Block:
    """Compares the present torch modes with those at the beginning of a rewrite."""

    def __init__(self) -> None:
        self.gradients, self.inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self.autocast, self.nesting, self.other_settings = _autocast(), _nesting(), _other_settings()
        self.enabled = False  # inside `torch.enable_grad()`, which has no effect while gradients are on

    def note_gradient_mode(self, enabled: bool) -> None:
        """Note that the gradient mode is set, which happens when a block is entered or left."""
        if enabled == self.gradients == torch.is_grad_enabled():
            self.enabled = not self.enabled

    @property
    def region(self) -> Region | None:
        if _other_settings() != self.other_settings:
            raise SiteError(
                "a rewrite computes inside a block whose setting can't be recorded",
                why="only torch.no_grad, enable_grad, inference_mode and autocast can be recorded",
                fix="enter the block in a function, and call it with site.apply(function, …)",
            )
        gradients, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        present = Region(
            gradients if gradients != self.gradients or self.enabled else None,
            self._autocast() if _nesting() != self.nesting else (),
            inference if inference != self.inference else None,
        )
        return None if present == _AS_CALLED else present

    def _autocast(self) -> tuple[tuple[str, str], ...]:
        now = _autocast()
        changed = tuple([pair for pair, before in zip(now, self.autocast, strict=True) if pair != before])
        return changed or now


def _autocast() -> tuple[tuple[str, str], ...]:
    def dtype(device: str) -> str:
        on = torch.is_autocast_enabled(device)
        return str(torch.get_autocast_dtype(device)).removeprefix("torch.") if on else ""

    return tuple([(device, dtype(device)) for device in _DEVICES])


def _other_settings() -> tuple[Any, ...]:
    """Returns further settings that blocks may change for the operations inside."""
    cuda, autograd = torch.backends.cuda, vars(torch._C)["_autograd"]
    hooks = getattr(autograd, "_top_saved_tensors_default_hooks", lambda _: None)
    kernels = cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled()
    checks = torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled()
    return (*kernels, *checks, torch.get_default_dtype(), hooks(False) is not None)


def _nesting() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


_AS_CALLED = Region()
