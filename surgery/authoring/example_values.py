"""What the values of a rewrite are in an example, as far as Python may decide on it: sizes, ranks, flags.

Shapes of the module's parameters hold for every call. What comes from the inputs is taken from the example call, and
the tape gets a step that checks it at each call. Nothing is computed but shapes: tensors are on the meta device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from surgery.forward.tape import Ref, Tape, Value, refs_in, thawed
from surgery.tracing.decisions import check_decision
from surgery.transaction.user_frames import line_running

__all__ = ["TapeSamples"]


class Unknown(Exception):
    """There is no example of a value."""


class TapeSamples:
    """The samples of one tape. `of` gives those of values that are no steps: inputs, parameters, the output."""

    def __init__(self, tape: Tape, of: Callable[[Ref], Any], training: bool):
        self.tape, self.of, self.training = tape, of, training
        self.by_mode = False  # whether Python went by the training flag
        self.known: dict[Ref, Any] = {}

    def decided(self, value: Value, ref: Ref) -> Any:
        """What Python may go by, with a check of it on the tape unless it holds for every call; None where unknown."""
        try:
            found = self._sample(ref)
        except Exception:  # whatever fails on the meta device: nothing is known
            return None
        if not isinstance(found, _PLAIN):
            return None
        if not self._settled(ref):
            self.tape.call("function", check_decision, (value, found, line_running(with_text=True)), {})
        return found

    def _sample(self, ref: Ref) -> Any:
        if ref.kind == "training":  # the rewrite is recorded for either
            self.by_mode = True
            return self.training
        ref = ref._replace(read="")
        if ref not in self.known:
            with torch.no_grad():
                self.known[ref] = self._run(ref) if ref.kind == "op" else tree_map_only(Tensor, _meta, self.of(ref))
        return self.known[ref]

    def _run(self, ref: Ref) -> Any:
        step = self.tape.steps[int(ref.key)]
        args, kwargs = thawed(step.args, self._sample), thawed(step.kwargs, self._sample)
        if step.kind == "attribute":
            if step.target in ("device", "data", "grad", "requires_grad", "is_leaf"):
                raise Unknown
            return getattr(args[0], step.target)
        with torch.device("meta"):
            if step.kind == "method":
                return getattr(args[0], step.target)(*args[1:], **kwargs)
            if step.kind == "function":
                return step.target(*args, **kwargs)
        raise Unknown

    def _settled(self, ref: Ref) -> bool:
        """Whether it comes from shapes of the module's own tensors alone."""
        waiting, seen = [(ref, False)], set[Ref]()
        while waiting:
            now, shape = waiting.pop()
            if now in seen:
                continue
            seen.add(now)
            if now.kind == "training":
                continue
            if now.kind in ("state", "param"):
                if not shape:
                    return False
                continue
            if now.kind != "op":
                return False
            step = self.tape.steps[int(now.key)]
            shape = shape or step.target in _SHAPES
            waiting += [(inner, shape) for inner in (*refs_in(step.args), *refs_in(step.kwargs))]
        return True


def _meta(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


_PLAIN = (bool, int, float, str, torch.dtype, torch.Size, tuple)
_SHAPES = ("shape", "ndim", "dim", "size", "numel", "ndimension", "nelement", len)
