"""What a module's own forward makes of its weight: the plain map, the map with a factor around it, or something else.

torch's own forward is the plain map. A forward that somebody wrote is run on small inputs, and what comes of the
weight is followed through every torch function. A number that agrees on those inputs proves nothing (a clamp far away
would not show), so an operation that is not known to keep the form is a reason to edit the weight itself.
"""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from surgery import call_own

Form = Literal["plain", "scaled", "other"]

PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def torchs_own(module: nn.Module) -> bool:
    """Whether torch's own code runs, with none of its methods overridden; or that of transformers' Conv1D."""
    for cls in getattr(type(module), "_surgery_base", type(module)).__mro__:
        if cls in PLAIN or f"{cls.__module__}.{cls.__name__}" == "transformers.pytorch_utils.Conv1D":
            return True
        if any(name in vars(cls) for name in ("forward", "_conv_forward", "__getattr__", "weight", "bias")):
            return False
    return False


def packed(module: nn.Module) -> bool:
    """Whether the weight is not the map's own numbers: of a class of its own, or in a dtype that a forward unpacks."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter:
        return True
    numbers = weight.is_floating_point() or weight.is_complex()
    return not (numbers and weight.element_size() > 1) and not torchs_own(module)


def why_not_packed(module: nn.Module) -> str | None:
    """Why a module whose weight is packed is not the plain map: somebody's forward does more than its base class's.

    A quantised layer's own forward is its library's, which is taken to be the plain map.
    """
    for cls in _base(module).__mro__:
        if cls in PLAIN:
            break
        if "forward" in vars(cls):
            kind = type(module._parameters.get("weight")).__name__
            more = _adds_to_supers(vars(cls)["forward"])
            return f"its forward does more than its base class's, and its weight is a {kind}" if more else None
    return None


def form_of(module: nn.Module, weight: Tensor, samples: Callable[[], Sequence[Tensor]]) -> Form:
    """ "plain": W x + b. "scaled": c · (W g(x) + b), with c one number and g anything. "other": neither is sure.

    `weight`: a small one to try; `samples`: inputs of all shapes that the module may be called with.
    """
    key = _settings(module)
    known = _found.setdefault(_base(module), {})
    if key is None or key not in known:
        alone = not module._modules.keys() - {"adapters"}  # a child may note what it is called with
        form = _proven(module, weight, samples()) if alone and _takes_one_input(_base(module)) else "other"
        if key is None:
            return form
        known[key] = form
    return known[key]


_found: weakref.WeakKeyDictionary[type, dict[tuple, Form]] = weakref.WeakKeyDictionary()


def _base(module: nn.Module) -> type[nn.Module]:
    return getattr(type(module), "_surgery_base", type(module))


def _settings(module: nn.Module) -> tuple | None:
    """What the form may depend on, or None where that can't be compared."""
    apart = {*nn.Module().__dict__, "_surgery"}
    held = {k: v for k, v in module.__dict__.items() if k not in apart and not k.startswith("_surgery")}
    if not all(isinstance(value, (int, float, str, bytes, tuple, type(None))) for value in held.values()):
        return None
    tensors = [(name, None if t is None else (t.dtype, t.numel() == 1)) for name, t in _tensors(module)]
    found = (*((name, type(value), value) for name, value in held.items()), *tensors)
    try:
        hash(found)
    except TypeError:
        return None
    return found


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor | None]]:
    yield from module._parameters.items()
    yield from module._buffers.items()


def _takes_one_input(cls: type[nn.Module]) -> bool:
    """Whether a call has one input, however it is given. Further ones may do anything to the map."""
    for base in cls.__mro__:
        if base in PLAIN:
            return True
        if "forward" not in vars(base):
            continue
        try:
            parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
        except (TypeError, ValueError):
            return False
        stars = {p.name for p in parameters if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
        named = [p for p in parameters if p.name not in stars]
        if len(named) > 1 or any(p.kind is p.KEYWORD_ONLY for p in named):
            return False
        handed = _handed_on(vars(base)["forward"], stars) if stars else ""
        if handed is None or (named and handed and "*" in handed):
            return False
        if not handed:
            return bool(named) or "*" in {"*" for p in parameters if p.kind is p.VAR_POSITIONAL}
    return False


def _handed_on(forward: Any, stars: set[str]) -> str | None:
    """Which of its starred inputs a forward hands on to its base class's: "", "*", "**", "***"; None where it uses
    them in another way than that, or than by taking the first."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return None
    allowed: set[int] = set()
    found = ""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _is_supers(node.func):
            for argument in node.args:
                if isinstance(argument, ast.Starred):
                    allowed.add(id(argument.value))
                    found += "*"
            for word in node.keywords:
                if word.arg is None:
                    allowed.add(id(word.value))
                    found += "**"
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value == 0:
            allowed.add(id(node.value))
    used = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id in stars]
    return found if all(id(node) in allowed for node in used) else None


def _adds_to_supers(forward: Any) -> bool:
    """Whether a forward calls its base class's and is more than that call."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _is_supers(node.func)]
    if not calls:
        return False
    body = getattr(tree.body[0], "body", [])
    last = body[-1] if body else None
    given = [*calls[0].args, *(word.value for word in calls[0].keywords)]
    plain = all(isinstance(one.value if isinstance(one, ast.Starred) else one, ast.Name) for one in given)
    texts = [node for node in body[:-1] if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    return bool(texts) or not (isinstance(last, ast.Return) and last.value is calls[0] and plain)


def _is_supers(function: ast.expr) -> bool:
    """`super().forward`, or `super(…).forward`."""
    return (
        isinstance(function, ast.Attribute)
        and function.attr == "forward"
        and isinstance(function.value, ast.Call)
        and isinstance(function.value.func, ast.Name)
        and function.value.func.id == "super"
    )


def _proven(module: nn.Module, weight: Tensor, samples: Sequence[Tensor]) -> Form:
    forms: set[Form] = set()
    for training in (False, True):
        for x in samples:
            form = _followed(module, weight, x, training)
            if form is not None:
                forms.add(form)
    return "other" if not forms or "other" in forms else "scaled" if "scaled" in forms else "plain"


def _followed(module: nn.Module, weight: Tensor, x: Tensor, training: bool) -> Form | None:
    """The form for one input; None where the module takes no such input at all."""
    held = {n: t.detach().clone() for n, t in _tensors(module) if t is not None and n != "weight"}
    own = dict(held)
    if held.get("bias") is not None and not isinstance(module, nn.Embedding):
        held["bias"] = held["bias"].new_zeros(len(weight))
    stand_in = object.__new__(type(module))
    mutable = {k: copy.copy(v) for k, v in module.__dict__.items() if isinstance(v, (list, set, dict)) and k[:1] != "_"}
    stand_in.__dict__.update(module.__dict__, training=training, **mutable)
    flow = _Flow(weight, held.get("bias"), x)
    versions = {name: tensor._version for name, tensor in held.items()}
    state = torch.get_rng_state()
    try:
        with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(training):
            with flow:
                output = call_own(stand_in, x, weight=weight, **held)
            drawn = not torch.equal(state, torch.get_rng_state())
    except Exception:
        return "other" if flow.lost or _runs(stand_in, x, own) else None
    written = any(tensor._version != versions[name] for name, tensor in held.items())
    return "other" if drawn or written else flow.form(output)


def _runs(module: nn.Module, x: Tensor, held: dict[str, Tensor]) -> bool:
    """Whether the module takes such an input with the weight that it has."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            call_own(module, x, **{name: tensor.clone() for name, tensor in held.items()})
    except Exception:
        return False
    return True


class _Lost(Exception):
    """The form is not one that is known."""


class _Flow(TorchFunctionMode):
    """Follows what is made of a weight: which tensors are it ("W"), the bias ("b"), or c · (W g(x) + b) ("y")."""

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
        made = function(*args, **kwargs)
        if not isinstance(made, Tensor) or (mark == "y" and name in _TIMES and made.shape != self._y(args).shape):
            self._lose()
        if not (made.is_floating_point() or made.is_complex()) or made.element_size() < 2:
            self._lose()
        self.marks[id(made)] = (made, mark)
        return made

    def _after(self, function: Any, name: str, args: Any, kwargs: Any) -> str:
        if function in _MAPS:
            given = _given_to(function, args, kwargs)
            if self._mark(given[0]) or self._mark(given[1]) != "W" or self._mark(given[2]) not in ("b", ""):
                self._lose()
            if given[2] is not None and self._mark(given[2]) != "b":
                self._lose()
            self.plain = self.plain and given[0] is self.x
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
        raise _Lost


def _given_to(function: Any, args: Any, kwargs: Any) -> list[Any]:
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
# What Python decides on a value holds for the sample alone.
_DECIDES = frozenset(
    "__bool__ __int__ __float__ __index__ __complex__ item tolist numpy equal allclose is_nonzero __contains__"
    " __array__".split()
)
_SAME = frozenset("to float double half bfloat16 type_as contiguous __pos__ positive".split())
_OVER = frozenset("div div_ true_divide true_divide_ __truediv__ __itruediv__ divide".split())
_TIMES = _OVER | frozenset("mul mul_ multiply __mul__ __rmul__ __imul__".split())
