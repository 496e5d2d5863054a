"""Follows a weight through every torch function in a run of a user's forward.

Equal numbers on some inputs prove nothing: a clamp at a distant value would not show. So an operation that is not known
to keep the form c · (W g(x) + b) ends the form.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import call_own

Form = Literal["plain", "scaled", "other"]


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def prove_form(module: nn.Module, weight: Tensor, samples: Sequence[Tensor]) -> Form:
    forms: set[Form] = set()
    for training in (False, True):
        for x in samples:
            form = _form_for_input(module, weight, x, training)
            if form is not None:
                forms.add(form)
    return "other" if not forms or "other" in forms else "scaled" if "scaled" in forms else "plain"


def _form_for_input(module: nn.Module, weight: Tensor, x: Tensor, training: bool) -> Form | None:
    """Returns the form for one input, or None if the module does not take such an input."""
    tensors = {n: t.detach().clone() for n, t in tensors_of(module) if t is not None and n != "weight"}
    own = dict(tensors)
    if tensors.get("bias") is not None and not isinstance(module, nn.Embedding):
        tensors["bias"] = tensors["bias"].new_zeros(len(weight))
    stand_in = object.__new__(type(module))
    mutable = {k: copy.copy(v) for k, v in module.__dict__.items() if isinstance(v, (list, set, dict)) and k[:1] != "_"}
    stand_in.__dict__.update(module.__dict__, training=training, **mutable)
    flow = _Flow(weight, tensors.get("bias"), x)
    versions = {name: tensor._version for name, tensor in tensors.items()}
    state = torch.get_rng_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
            with flow:
                output = call_own(stand_in, x, weight=weight, **tensors)
            drawn = not torch.equal(state, torch.get_rng_state())
    except Exception:
        return "other" if flow.lost or _runs(stand_in, x, own) else None
    modified = any(tensor._version != versions[name] for name, tensor in tensors.items())
    return "other" if drawn or modified else flow.form(output)


def _runs(module: nn.Module, x: Tensor, tensors: dict[str, Tensor]) -> bool:
    """Whether the module takes such an input with its own weight."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            call_own(module, x, **{name: tensor.clone() for name, tensor in tensors.items()})
    except Exception:
        return False
    return True


class _UnknownForm(Exception):
    """The form of the forward is not known."""


class _Flow(TorchFunctionMode):
    """Marks the tensors that are the weight ("W"), the bias ("b") or c · (W g(x) + b) ("y")."""

    def __init__(self, weight: Tensor, bias: Tensor | None, x: Tensor):
        super().__init__()
        self.x = x
        self.marks: dict[int, tuple[Tensor, str]] = {id(weight): (weight, "W")}
        if bias is not None:
            self.marks[id(bias)] = (bias, "b")
        self.plain, self.lost = True, False

    def form(self, output: Any) -> Form:
        if self.lost or self.marks.get(id(output), (None, ""))[1] != "y":
            return "other"
        return "plain" if self.plain else "scaled"

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        if name == "__get__" and getattr(function.__self__, "__name__", "") in _ABOUT or name in _ABOUT:
            return function(*args, **kwargs)
        if name in _DECIDES:
            self._lose()
        marks = [self._mark(value) for value in _flat((args, kwargs))]
        if not any(marks):
            return function(*args, **kwargs)
        mark = self._after(function, name, args, kwargs)
        result = function(*args, **kwargs)
        if not isinstance(result, Tensor) or (mark == "y" and name in _TIMES and result.shape != self._y(args).shape):
            self._lose()
        if not (result.is_floating_point() or result.is_complex()) or result.element_size() < 2:
            self._lose()
        self.marks[id(result)] = (result, mark)
        return result

    def _after(self, function: Any, name: str, args: Any, kwargs: Any) -> str:
        if function in _MAPS:
            operands = _operands_of(function, args, kwargs)
            if self._mark(operands[0]) or self._mark(operands[1]) != "W" or self._mark(operands[2]) not in ("b", ""):
                self._lose()
            if operands[2] is not None and self._mark(operands[2]) != "b":
                self._lose()
            self.plain = self.plain and operands[0] is self.x
            return "y"
        if name in ("to", "type_as") and not self._mark(args[0]) and isinstance(args[0], Tensor):
            return ""  # another value, in the dtype of the weight
        if name in _SAME and not any(self._mark(value) for value in _flat((args[1:], kwargs))):
            return self._mark(args[0])
        if name in _TIMES and len(args) == 2 and not kwargs:
            first, second = (self._mark(value) for value in args)
            other = args[1] if first == "y" else args[0]
            number = isinstance(other, (int, float, complex)) or (isinstance(other, Tensor) and other.numel() == 1)
            if {first, second} == {"y", ""} and number and (first == "y" or name not in _OVER):
                self.plain = False
                return "y"
        return self._lose()

    def _y(self, args: Any) -> Tensor:
        return next(value for value in args if self._mark(value) == "y")

    def _mark(self, value: Any) -> str:
        return self.marks.get(id(value), (None, ""))[1] if isinstance(value, Tensor) else ""

    def _lose(self) -> Any:
        self.lost = True
        raise _UnknownForm


def _operands_of(function: Any, args: Any, kwargs: Any) -> list[Any]:
    """Input, weight and bias of a call of one of `_MAPS`."""
    names = ("input", "weight", None) if function is F.embedding else ("input", "weight", "bias")
    return [None if name is None else args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    elif isinstance(value, dict):
        yield from _flat(list(value.values()))
    else:
        yield value


_MAPS = frozenset({F.linear, F.embedding, torch.conv1d, torch.conv2d, torch.conv3d})
_ABOUT = frozenset(
    "shape dtype device ndim dim size numel nelement layout requires_grad is_cuda is_meta is_floating_point is_complex"
    " element_size stride is_contiguous is_sparse is_quantized is_nested names grad_fn get_device is_mps is_xpu".split()
)
# A decision of Python on a value holds only for the sample.
_DECIDES = frozenset(
    "__bool__ __int__ __float__ __index__ __complex__ item tolist numpy equal allclose is_nonzero __contains__"
    " __array__".split()
)
_SAME = frozenset("to float double half bfloat16 type_as contiguous __pos__ positive".split())
_OVER = frozenset("div div_ true_divide true_divide_ __truediv__ __itruediv__ divide".split())
_TIMES = _OVER | frozenset("mul mul_ multiply __mul__ __rmul__ __imul__".split())
