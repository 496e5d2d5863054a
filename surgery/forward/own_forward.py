"""Records a module's own forward as a tape of operations, or as one opaque call if a tape might be wrong.

The forward runs once on a view of the module (`surgery.forward.parameter_view`) whose parameters and buffers are
recording values and whose children are leaves. Nothing is patched, and the module is not changed. Recording fails if
Python decides on a value, sets an attribute, or creates a tensor: a tape is either right or not created.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import SurgeryError, TraceError, qualified_name
from surgery.forward.function_watch import FunctionWatch
from surgery.forward.parameter_view import make_view
from surgery.forward.tape import Tape
from surgery.forward.values import Value
from surgery.packed.packed_map import packed_by_name
from surgery.transaction.user_frames import line_of, line_setting

__all__ = ["OwnForward", "own_forward", "record_own", "settings_of", "is_trusted"]


@dataclass(frozen=True)
class OwnForward:
    """A module's own forward: tapes, a graph, or an opaque call.

    `tapes`: one tape for evaluation and one for training, which may be the same object. Without tapes, the forward is
    opaque: one call of the class's own forward, for the reason `why`. `graph`: the operations for calls of one kind
    (`surgery.weaving.call_variants`). `packed`: the names of quantised weights, whose values are dequantised.
    """

    base: type[nn.Module]
    signature: inspect.Signature
    tapes: tuple[Tape, Tape] | None
    why: str = ""
    graph: fx.Graph | None = None
    packed: tuple[str, ...] = ()

    @property
    def opaque(self) -> bool:
        return self.tapes is None

    @property
    def key(self) -> tuple:
        return (self.base, self.tapes, self.graph, self.packed)

    @property
    def names_hold(self) -> bool:
        """Whether callers may pass the forward's arguments by the names in its signature."""
        return not _passes_call_on(self.base)

    def inputs(self) -> list[str]:
        return [name for name, parameter in self.signature.parameters.items() if parameter.kind not in _STARRED]


def own_forward(module: nn.Module, base: type[nn.Module]) -> OwnForward:
    """Returns the own forward of a site. Modules of the same class with equal attributes share it."""
    key = settings_of(module, base)
    own = _cache.get(key) if key is not None else None
    if own is None:
        own = _own_forward(module, base)
        if key is not None:
            _cache[key] = own
    return own


def record_own(module: nn.Module) -> OwnForward:
    """Record the module's forward in its present mode, even if a site would treat it as opaque."""
    base = getattr(module, "_surgery_base", type(module))
    signature = signature_of(base)
    tape = _record_tape(module, base, signature, module.training)
    return OwnForward(base, signature, (tape, tape))


def _own_forward(module: nn.Module, base: type[nn.Module]) -> OwnForward:
    signature = signature_of(base)
    if packed := tuple(packed_by_name(module)):
        return OwnForward(base, signature, None, f"its {' and '.join(packed)} is quantised", packed=packed)
    why = _why_opaque(module, base, list(signature.parameters.values()))
    if not why:
        try:
            evaluation, training = (_record_tape(module, base, signature, mode) for mode in (False, True))
            return OwnForward(base, signature, (evaluation, training))
        except SurgeryError as error:
            why = f"its forward can't be recorded at {error.where}" if error.where else error.why or error.what
    return OwnForward(base, signature, None, why)


def signature_of(base: type[nn.Module]) -> inspect.Signature:
    try:
        signature = inspect.signature(base.forward)
    except (TypeError, ValueError):  # a forward in C does not have a signature: accept any arguments
        signature = inspect.signature(lambda self, *args, **kwargs: None)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


@functools.cache
def _passes_call_on(base: type[nn.Module]) -> bool:
    """Whether the forward is a wrapper that calls other functions than the one whose signature it shows.

    An example is a wrapper that chooses among implementations, whose arguments may have other names.
    """
    wrapper = base.forward
    inner = getattr(wrapper, "__wrapped__", None)
    try:
        nonlocals = inspect.getclosurevars(wrapper).nonlocals
        tree = ast.parse(textwrap.dedent(inspect.getsource(wrapper.__code__)))
    except (OSError, TypeError, SyntaxError, ValueError, AttributeError):
        return False
    names = {name for name, value in nonlocals.items() if value is inner}
    called_names = {
        node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    return inner is not None and bool(names) and not names & called_names


def _why_opaque(module: nn.Module, base: type[nn.Module], parameters: list[inspect.Parameter]) -> str:
    """Returns why the forward must stay one call, or '' if a recording of it is always right."""
    optional = [p.name for p in parameters if p.default is not p.empty or p.kind in _STARRED]
    if optional:
        return f"its forward can be called in several ways: {', '.join(optional[:3])} may be left out"
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and type(tensor) not in (nn.Parameter, torch.Tensor):
            return f"its {name} is a {type(tensor).__name__}"
    return _why_untrusted(base)


def is_trusted(base: type[nn.Module]) -> bool:
    """Whether a class is a layer of torch without overridden methods, or has a forward that only computes."""
    return not _why_untrusted(base)


@functools.cache
def _why_untrusted(base: type[nn.Module]) -> str:
    """Why a recording of a class's forward may hold for some calls alone; '' for a class that is trusted."""
    for cls in base.__mro__:
        if cls.__module__.startswith("torch.nn.modules."):
            return ""
        overridden = {name for name, value in vars(cls).items() if callable(value)} - {"__init__"}
        if "forward" in overridden:
            return _why_not_straight(cls.forward)
        if names := sorted(name for name in overridden for parent in cls.__mro__[1:] if hasattr(parent, name)):
            return f"{cls.__name__} overrides {names[0]} of its base class"
    return "its class does not have a forward"


def _why_not_straight(function: Any) -> str:
    """Why a forward is not straight-line code: the first part of it that may take another way in another call."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return "its forward does not have Python source"
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef):
        return "its forward is not a plain function"
    if body.decorator_list:
        return f"its forward has the decorator {ast.unparse(body.decorator_list[0])}, which may do anything"
    allowed = (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Return, ast.Expr)
    if other := next((statement for statement in body.body if not isinstance(statement, allowed)), None):
        return f"its forward is not straight-line code: {_first_line(other)}"
    if choice := next((node for node in ast.walk(body) if isinstance(node, _DECIDES)), None):
        return f"its forward decides in Python: {_first_line(choice)}"
    if unknown := next(
        (node for node in ast.walk(body) if isinstance(node, ast.Call) and _calls_own_method(node)), None
    ):
        return f"its forward calls code that may decide in Python: {_first_line(unknown.func)}(…)"
    return ""


def _first_line(node: ast.AST) -> str:
    line = ast.unparse(node).splitlines()[0]
    return line if len(line) <= 80 else f"{line[:79]}…"


_DECIDES = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.NamedExpr, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
            ast.Await, ast.Yield, ast.YieldFrom, ast.Compare, ast.Starred, ast.JoinedStr)  # fmt: skip


def _calls_own_method(node: ast.Call) -> bool:
    # self.act(x) may call a child or a method; only a run shows which, and a method's code is unknown. The code of a
    # function with a bare name is unknown, too. torch.*, F.* and methods of tensors are known.
    if isinstance(node.func, ast.Name):
        return True
    root: ast.AST = node.func
    while isinstance(root, ast.Attribute):
        root = root.value
    direct = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name)
    return isinstance(root, ast.Name) and root.id == "self" and direct


def _record_tape(module: nn.Module, base: type[nn.Module], signature: inspect.Signature, training: bool) -> Tape:
    tape = Tape(qualified_name(base), strict=True)
    tensors = {
        name: tape.value("state", name)
        for named in (module._parameters, module._buffers)
        for name, tensor in named.items()
        if tensor is not None
    }
    stand_in = make_view(module, base, tensors)  # type: ignore[arg-type]  # values stand in for tensors here
    children = {name: child and _Leaf(tape, child, name) for name, child in module._modules.items()}
    stand_in.__dict__.update(_modules=children, training=training)
    before = dict(stand_in.__dict__)
    args, kwargs = [], {}
    for name, parameter in signature.parameters.items():
        if parameter.kind in _STARRED:
            continue
        value = tape.value("input", name) if parameter.default is parameter.empty else parameter.default
        if parameter.kind is parameter.KEYWORD_ONLY:
            kwargs[name] = value
        else:
            args.append(value)
    try:
        with FunctionWatch(tape):
            output = base.forward(stand_in, *args, **kwargs)
            tape.replace(tape.value("output", ""), output)
        tape = tape.intern()
    except Exception as error:
        raise _trace_error(error, base) from error
    if changed := [name for name, value in stand_in.__dict__.items() if before.get(name, stand_in) is not value]:
        raise TraceError(
            f"{base.__name__}.forward sets {', '.join(changed)} on the module",
            where=line_setting(base.forward, changed[0]),
            why="a graph holds what is computed, not what is remembered between calls",
        )
    return tape


def _trace_error(error: Exception, base: type[nn.Module]) -> TraceError:
    """Convert an exception to a `TraceError` with the line of the model's code that caused it."""
    why = error.what if isinstance(error, SurgeryError) else f"{type(error).__name__}: {error}"
    if isinstance(error, SurgeryError) and error.why:
        why = f"{why}: {error.why}"
    return TraceError(
        f"{base.__name__}.forward can't be held as a graph",
        where=line_of(error, base.forward),
        why=why,
        fix="rules that need only the module's inputs, outputs and parameters work without the graph",
    )


class _Leaf:
    """A child of the traced module: a call is one node, parameters are values, other attributes are the child's."""

    def __init__(self, tape: Tape, module: nn.Module, path: str):
        self.__dict__.update(_tape=tape, _module=module, _path=path)

    @property
    def __class__(self) -> type:  # for isinstance(self.child, nn.Linear)
        return type(self.__dict__["_module"])

    def __call__(self, *args: Any, **kwargs: Any) -> Value:
        return self._tape.call("module", self._path, args, kwargs)

    def _wrap(self, item: Any, name: str) -> Any:
        return _Leaf(self._tape, item, f"{self._path}.{name}") if isinstance(item, nn.Module) else item

    def __getattr__(self, name: str) -> Any:
        tensors = {**self._module._parameters, **self._module._buffers}
        if tensors.get(name) is not None:
            return self._tape.value("state", f"{self._path}.{name}")
        return self._wrap(getattr(self._module, name), name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise TraceError(f"the forward sets {name} on its child {self._path}")

    def __iter__(self) -> Any:
        names = {id(child): name for name, child in self._module._modules.items()}
        return iter([self._wrap(item, names.get(id(item), "")) for item in iter(self._module)])  # type: ignore[call-overload]

    def __len__(self) -> int:
        return len(self._module)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        item = self._module[key]  # type: ignore[index]
        names = {id(child): name for name, child in self._module._modules.items()}
        return self._wrap(item, names.get(id(item), str(key)))


def settings_of(module: nn.Module, base: type[nn.Module]) -> tuple | None:
    """Returns everything that a forward's graph may depend on, or None (no caching) for incomparable attributes."""
    parts: list[Any] = [base]
    for name, value in module.__dict__.items():
        if name in _NOT_READ or name.startswith("_surgery"):
            continue
        if isinstance(value, list):
            value = tuple(value)
        if not isinstance(value, _SIMPLE):
            return None
        parts.append((name, type(value), value))
    for named in (module._parameters, module._buffers):
        parts.append(tuple([(name, type(tensor)) for name, tensor in named.items()]))
    parts.append(tuple([(name, type(child)) for name, child in module._modules.items() if name != "adapters"]))
    settings = tuple(parts)
    try:
        hash(settings)
    except TypeError:
        return None
    return settings


_SIMPLE = (int, float, str, type(None), tuple, torch.dtype, torch.device)
_NOT_READ = frozenset(nn.Module().__dict__)
_STARRED = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_cache: dict[tuple, OwnForward] = {}
