"""One canonical name for each operation: operators, methods, torch and aten functions, torch's own layers.

`x.softmax(-1)`, `torch.softmax(x, dim=-1)`, `F.softmax`, `aten.softmax.int` and a call of `nn.Softmax(-1)` are all
`softmax(x, -1)`. Graphs and patterns use the same table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from surgery.patterns.module_class import class_of
from surgery.structures.equivalent_ops import equation_of

__all__ = [
    "COMMUTATIVE",
    "Dim",
    "LayerTensor",
    "Implied",
    "ModulePath",
    "NodeName",
    "PASSING",
    "CanonicalOp",
    "arguments_in",
    "flatten",
    "freeze",
    "is_node",
    "canonicalise",
]


class CanonicalOp(NamedTuple):
    """An operation with its arguments: by position where the table knows their names, the others by name."""

    operation: str
    operands: tuple[Any, ...]
    keywords: Mapping[str, Any]


class Dim(int):
    """A dimension of a tensor of known rank: the last one equals both -1 and rank - 1."""

    rank: int = 0

    def is_dim(self, other: Any) -> bool:
        return other in (int(self), int(self) - self.rank)


class LayerTensor(str):
    """The path of a layer's parameter: an operand that is not a node."""


class ModulePath(str):
    """The path of a module that a pattern's parameter stands for."""


class NodeName(str):
    """The name of a node in a flat graph. Operands that are other strings are plain values."""


class Implied:
    """An operation inside a node that has no node of its own, such as the transpose in an einsum."""

    __slots__ = ("operation", "owner")

    def __init__(self, operation: str, owner: Any):
        self.operation, self.owner = operation, owner

    def __str__(self) -> str:
        return f"{self.operation} in {self.node}"

    @property
    def node(self) -> Any:
        owner = self.owner
        while isinstance(owner, Implied):
            owner = owner.owner
        return owner


def is_node(operand: Any) -> bool:
    return isinstance(operand, (fx.Node, NodeName))


# Operations that pass a value on, except for its dtype, its layout or dropped entries.
PASSING = frozenset(
    "dropout to contiguous float double half bfloat16 type type_as clone detach alias identity lift_fresh_copy".split()
)
COMMUTATIVE = frozenset("add mul maximum minimum eq ne and or xor logical_and logical_or logical_xor".split())

_NAMES = {
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "bmm": "matmul",
    "mm": "matmul", "_to_copy": "to", "special_softmax": "softmax", "swapaxes": "transpose", "swapdims": "transpose",
    "concat": "cat", "concatenate": "cat", "unsafe_view": "view", "absolute": "abs", "negative": "neg", "t": "mT",
    "adjoint": "mH", "swish": "silu",
    "special_log_softmax": "log_softmax", "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div",
    "imatmul": "matmul", "ipow": "pow", "clip": "clamp", "reshape": "view", "mv": "matmul", "dot": "matmul",
    "iand": "and", "ior": "or", "ixor": "xor", "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor",
    "special_logsumexp": "logsumexp",
}  # fmt: skip

# The arguments that patterns can constrain, in order. Other arguments (a dtype, an eps) are ignored.
_SIGNATURES: dict[str, tuple[str, ...]] = {
    name: tuple(arguments.split())
    for name, arguments in {
        "softmax": "input dim", "log_softmax": "input dim", "transpose": "input dim0 dim1",
        "matmul": "input other", "mul": "input other",
        "addmm": "input mat1 other beta alpha", "addmv": "input mat vec beta alpha",
        "baddbmm": "input batch1 batch2 beta alpha", "addbmm": "input batch1 batch2 beta alpha",
        "add": "input other", "sub": "input other", "maximum": "input other", "minimum": "input other",
        "div": "input other", "pow": "input exponent", "linear": "input weight bias", "embedding": "input weight",
        "dropout": "input", "gelu": "input approximate", "silu": "input", "relu": "input", "sigmoid": "input",
        "tanh": "input", "exp": "input", "rsqrt": "input", "sqrt": "input", "neg": "input", "erf": "input",
        "layer_norm": "input normalized_shape weight bias eps", "rms_norm": "input normalized_shape weight eps",
        "mean": "input dim keepdim", "sum": "input dim keepdim", "var": "input dim", "amax": "input dim keepdim",
        "max": "input dim keepdim", "logsumexp": "input dim keepdim", "cat": "tensors dim",
        "unsqueeze": "input dim", "squeeze": "input dim", "masked_fill": "input mask value",
        "where": "condition input other", "chunk": "input chunks dim", "split": "input split_size dim",
        "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal",
    }.items()
}  # fmt: skip
_OTHER_NAMES = {"self": "input", "q": "query", "split_size_or_sections": "split_size", "split_sizes": "split_size",
                "mat2": "other", "tensor": "other", "indices": "input"}  # fmt: skip
_DEFAULTS = {("gelu", "approximate"): "none", ("cat", "dim"): 0}
_DIMS = frozenset({"dim", "dim0", "dim1"})

# torch's own layers: the function, and the attributes that are its further arguments.
_LAYERS: dict[type[nn.Module], tuple[str, tuple[str, ...]]] = {
    nn.Linear: ("linear", ("weight", "bias")),
    nn.Softmax: ("softmax", ("dim",)),
    nn.LogSoftmax: ("log_softmax", ("dim",)),
    nn.GELU: ("gelu", ("approximate",)),
    nn.SiLU: ("silu", ()),
    nn.ReLU: ("relu", ()),
    nn.Sigmoid: ("sigmoid", ()),
    nn.Tanh: ("tanh", ()),
    nn.LayerNorm: ("layer_norm", ("normalized_shape", "weight", "bias", "eps")),
    nn.Embedding: ("embedding", ("weight",)),
    nn.Dropout: ("dropout", ()),
    nn.Identity: ("identity", ()),
}


def canonicalise(
    op: str,
    target: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    module: nn.Module | None = None,
    rank: int | None = None,
) -> CanonicalOp:
    """Convert a node to its canonical operation.

    >>> import operator
    >>> from surgery.structures.op_aliases import canonicalise
    >>> canonicalise("call_method", "transpose", ("k", 2, 3), {}, rank=4)
    CanonicalOp(operation='mT', operands=('k',), keywords={})
    >>> canonicalise("call_function", operator.truediv, ("x", 8), {})
    CanonicalOp(operation='div', operands=('x', 8), keywords={})

    `op`, `target`, `args` and `kwargs` are those of the fx node, `module` the module that it calls, `rank` the rank of
    its input.
    """
    args = freeze(args)
    kwargs = {name: freeze(value) for name, value in kwargs.items()}
    if op == "call_module":
        kind = class_of(module) if module is not None else None
        if kind not in _LAYERS or module is None:
            return CanonicalOp(kind.__name__ if kind else str(target), args, kwargs)
        operation, attributes = _LAYERS[kind]
        args = (*args, *kwargs.values(), *(_attribute(module, str(target), name) for name in attributes))
        return CanonicalOp(operation, _dims(operation, args, rank), {})
    if op not in ("call_function", "call_method"):
        return CanonicalOp(op, args, kwargs)
    name = _name(target)
    if name == "in_region" and len(args) > 1:  # a call under the forward's own autocast or no_grad
        name, args = _name(args[1]), args[2:]
    attribute = next(iter(args[1:]), None)
    if name == "getattr" and attribute in ("mT", "mH", "T", "H"):
        name, args = attribute, args[:1]
    if name == "square":
        name, args = "pow", (*args, 2)
    if name == "rsub" and len(args) > 1:  # torch.rsub(a, b) is b - a
        name, args = "sub", (args[1], args[0], *args[2:])
    if name in ("max", "min") and ("other" in kwargs or len(args) == 2 and not isinstance(args[1], int)):
        name += "imum"  # of two tensors
    if name == "einsum" and args:
        args = (equation_of(args[0]), *(args[1] if len(args) == 2 and isinstance(args[1], tuple) else args[1:]))
    if name in ("add", "sub") and kwargs.get("alpha", 1) != 1:
        name += "_scaled"
    if name in ("view", "permute") and len(args) == 2 and isinstance(args[1], tuple):
        args = (args[0], *args[1])
    if name in ("permute", "view") and ("dims" in kwargs or "shape" in kwargs):
        args = (*args, *(kwargs.pop("dims", None) or kwargs.pop("shape")))
    args, kwargs = _by_position(name, args, kwargs)
    if name in ("T", "H") and rank == 2 or name == "permute" and _swaps(args[1:]):
        name, args = ("mH" if name == "H" else "mT"), args[:1]
    if name == "transpose" and len(args) == 3:
        dims = sorted(_dims(name, args, rank)[1:], key=lambda dim: str(dim))
        ends = {dim - rank if rank and isinstance(dim, int) and dim >= 0 else dim for dim in args[1:]}
        return CanonicalOp("mT", args[:1], kwargs) if ends == {-1, -2} else CanonicalOp(name, (args[0], *dims), kwargs)
    return CanonicalOp(name, _dims(name, args, rank), kwargs)


def _name(target: Any) -> str:
    schema = getattr(target, "_schema", None)  # torch.ops.aten.softmax.int and its like
    name = schema.name.partition("::")[2] if schema is not None else target
    name = name if isinstance(name, str) else getattr(target, "__name__", str(target))
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    name = _NAMES.get(name, name)
    stripped = name.strip("_")  # in-place spellings, and aten's own `_softmax`
    return _NAMES.get(stripped, stripped)


def _by_position(name: str, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    names = _SIGNATURES.get(name)
    if names is None:
        first = ("input", "self")
        if not args and (input_name := next((key for key in first if key in kwargs), None)):
            return (kwargs[input_name],), {key: value for key, value in kwargs.items() if key != input_name}
        return args, kwargs
    arguments = dict(zip(names, args, strict=False))
    arguments |= {_OTHER_NAMES.get(key, key): value for key, value in kwargs.items()}
    for (operation, key), value in _DEFAULTS.items():
        if operation == name:
            arguments.setdefault(key, value)
    last = max((index for index, key in enumerate(names) if key in arguments), default=-1)
    return tuple(arguments.get(key) for key in names[: last + 1]), {}


def _dims(name: str, args: tuple, rank: int | None) -> tuple:
    """Convert the arguments that are dimensions to `Dim`."""
    names = _SIGNATURES.get(name, ())
    if rank is None or not _DIMS & set(names):
        return args
    return tuple(_dim(arg, rank) if key in _DIMS else arg for key, arg in zip(names, args, strict=False))


def _dim(value: Any, rank: int) -> Any:
    if type(value) is not int:
        return value
    dim = Dim(value if value >= 0 else value + rank)
    dim.rank = rank
    return dim


def _swaps(dims: tuple) -> bool:
    last = len(dims)
    return last > 1 and all(type(dim) is int for dim in dims) and [dim % last for dim in dims] == [
        *range(last - 2), last - 1, last - 2
    ]  # fmt: skip


def _attribute(module: nn.Module, path: str, name: str) -> Any:
    value = getattr(module, name, None)
    return LayerTensor(f"{path}.{name}") if isinstance(value, torch.Tensor) else freeze(value)


def arguments_in(node: fx.Node) -> tuple[Any, ...]:
    """Returns a node's arguments. For a call in a region, the attribute is replaced by the called function."""
    called = node.meta.get("called")
    return node.args if called is None else (node.args[0], called, *node.args[2:])


def freeze(value: Any) -> Any:
    """Convert arguments to hashable values: containers become tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(freeze(item) for item in value)
    if isinstance(value, slice):
        return ("slice", freeze(value.start), freeze(value.stop), freeze(value.step))
    if isinstance(value, dict):
        return ("dict", *((key, freeze(item)) for key, item in value.items()))
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def flatten(value: Any) -> Iterator[Any]:
    """Yields the items of an operand that may be a nested tuple."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, tuple):
            waiting.extend(reversed(item))
        else:
            yield item
