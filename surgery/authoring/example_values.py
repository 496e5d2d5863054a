"""Sizes, ranks and flags of a rewrite's values in the example, so that Python may decide on them.

Shapes of the module's parameters are the same for every call. Shapes from the inputs are those of the example call, and
a step of the tape checks them at each call. Tensors are on the meta device, so only shapes are computed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref, refs_in, thaw
from surgery.forward.values import Value
from surgery.tracing.decisions import check_decision
from surgery.transaction.user_frames import line_running

__all__ = ["TapeSamples"]


class NoExample(Exception):
    """The example does not determine a value."""


class TapeSamples:
    """The example values of one tape. `of` gives values that are not steps: inputs, parameters, the output."""

    def __init__(self, tape: Tape, of: Callable[[Ref], Any], training: bool):
        self.tape, self.of, self.training = tape, of, training
        self.by_mode = False  # whether Python branched on the training flag
        self.samples: dict[Ref, Any] = {}

    def decide(self, value: Value, ref: Ref) -> Any:
        """Returns the example's value for a decision of Python, or None if it is unknown.

        The tape gets a check of the decision, unless the value is the same for every call.
        """
        try:
            sample = self._sample(ref)
        except Exception:  # any failure on the meta device means that the value is unknown
            return None
        if not isinstance(sample, _PLAIN):
            return None
        if not self._is_fixed(ref):
            self.tape.call("function", check_decision, (value, sample, line_running(with_text=True)), {})
        return sample

    def _sample(self, ref: Ref) -> Any:
        if ref.kind == "training":  # the rewrite is recorded for each mode
            self.by_mode = True
            return self.training
        ref = ref._replace(read="")
        if ref not in self.samples:
            with torch.no_grad():
                self.samples[ref] = self._run(ref) if ref.kind == "op" else tree_map_only(Tensor, _meta, self.of(ref))
        return self.samples[ref]

    def _run(self, ref: Ref) -> Any:
        step = self.tape.steps[int(ref.key)]
        args, kwargs = thaw(step.args, self._sample), thaw(step.kwargs, self._sample)
        if step.kind == "attribute":
            if step.target in ("device", "data", "grad", "requires_grad", "is_leaf"):
                raise NoExample
            return getattr(args[0], step.target)
        with torch.device("meta"):
            if step.kind == "method":
                return getattr(args[0], step.target)(*args[1:], **kwargs)
            if step.kind == "function":
                return step.target(*args, **kwargs)
        raise NoExample

    def _is_fixed(self, ref: Ref) -> bool:
        """Whether a value depends only on shapes of the module's own tensors."""
        waiting, visited = [(ref, False)], set[Ref]()
        while waiting:
            current, shape = waiting.pop()
            if current in visited:
                continue
            visited.add(current)
            if current.kind == "training":
                continue
            if current.kind in ("state", "param"):
                if not shape:
                    return False
                continue
            if current.kind != "op":
                return False
            step = self.tape.steps[int(current.key)]
            shape = shape or step.target in _SHAPES
            waiting += [(inner, shape) for inner in (*refs_in(step.args), *refs_in(step.kwargs))]
        return True


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


_PLAIN = (bool, int, float, str, torch.dtype, torch.Size, tuple)
_SHAPES = ("shape", "ndim", "dim", "size", "numel", "ndimension", "nelement", len)
