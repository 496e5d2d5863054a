"""How a rewrite runs: fast forms of what rules say plainly, with the same mathematics. The only place for them.

A rule writes the low-rank branch as it is in the paper: `y + linear(linear(dropout(x), A), B) * scale`. Run so, it
costs several passes over activations and keeps a dropped-out copy of the input for the backward. `lower` finds the
branch in a woven graph, with the linear layer it is added to, and puts one call in their place. That call makes the
layer's output itself and adds into it before anybody sees it; its backward adds into the one gradient of the input.
It takes the plain form wherever the fast one would be wrong or unseen: under torch.compile, torch.export and
torch.jit.trace (they do their own fusing), autocast, mixed precision, torch.func transforms, and tensor subclasses.
In a training step that torch.compile traces for the CPU, the plain form is two `mm` calls instead of two `linear`
calls, because inductor keeps the order of products that autograd chooses.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.autograd import forward_ad

from surgery.complexes import is_number
from surgery.errors import SiteError
from surgery.repeated import left_out

__all__ = [
    "LowRankEdit",
    "detached",
    "in_dtype",
    "layers_by",
    "low_rank_edit",
    "lower",
    "low_rank_linear",
    "same_dtype",
    "tensor_of",
    "weighted",
]

# A, B, scale, the chance of dropout, and whether it drops: y + linear(linear(dropout(x), A), B) * scale
Branch = tuple[Tensor, Tensor, float, float, bool]


def same_dtype(new: Any, old: Any) -> Any:
    """`new` in the dtype of `old`, where both are floating-point or both complex tensors; anything else as it is."""
    if isinstance(new, Tensor) and isinstance(old, Tensor) and new.dtype != old.dtype:
        if is_number(new) and new.is_complex() == old.is_complex() and is_number(old):
            return new.to(old.dtype)
    return new


def in_dtype(value: Any, dtype: torch.dtype) -> Any:
    """A floating-point tensor in a dtype, a complex one in a complex dtype; anything else as it is."""
    if (
        isinstance(value, Tensor)
        and value.dtype != dtype
        and is_number(value)
        and value.is_complex() == dtype.is_complex
    ):
        return value.to(dtype)
    return value


def detached(value: Any) -> Any:
    """A tensor without its history, as under `torch.no_grad`; anything else as it is."""
    return value.detach() if isinstance(value, Tensor) else value


def weighted(old: Any, new: Any, weight: float) -> Any:
    """`new`, with its difference from `old` multiplied; in tuples, lists and mappings, each tensor of it."""
    if new is old or new is None:
        return new
    if isinstance(new, Tensor):
        if not (isinstance(old, Tensor) and old.shape == new.shape and is_number(new)):
            raise SiteError(
                f"an adapter's weight is {weight}, and what it changes can't be multiplied",
                why=f"a tensor {tuple(new.shape)} of {new.dtype} stands in the place of {_told(old)}",
                fix="activate it with weight 1, or say scalable = False in the rule",
            )
        return torch.lerp(old.to(new.dtype), new, weight)
    if isinstance(new, (tuple, list)):
        items = [weighted(one, other, weight) for one, other in zip(old, new, strict=True)]
        return type(new)(*items) if hasattr(new, "_fields") else type(new)(items)
    if isinstance(new, Mapping):
        found = {name: weighted(old[name], value, weight) for name, value in new.items()}
        return found if type(new) is dict else type(new)(**found)  # type: ignore[call-arg]
    return new


def _told(value: Any) -> str:
    return f"one {tuple(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def tensor_of(site: nn.Module, name: str, adapter: str | None = None) -> Tensor:
    """`site.<name>` or `site.adapters.<adapter>.<name>`: the same tensor, found in a tenth of the time.

    nn.Module looks an attribute up in Python after the ordinary way has failed, a microsecond each. Where a tensor is
    no parameter at the moment (in DataParallel's replicas, or sharded), the ordinary way finds it.
    """
    owner: Any = site if adapter is None else site._modules["adapters"]._modules[adapter]  # type: ignore[union-attr]
    found = owner._parameters.get(name)
    return found if found is not None else getattr(owner, name)


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *branches: Branch) -> Tensor:
    """`linear(x, weight, bias)` with low-rank branches added, in the dtype of the layer's own output.

    Shapes: x (…, in), weight (out, in), bias (out), A (r, in), B (out, r).
    """
    if not _fast(x, weight, bias, branches):
        return _plain(x, weight, bias, branches)
    if torch.is_grad_enabled() and _trained(x, weight, bias, branches):
        settings = tuple((scale, p if training else 0.0) for _, _, scale, p, training in branches)
        factors = [tensor for A, B, *_ in branches for tensor in (A, B)]
        return _LowRankLinear.apply(settings, x, weight, bias, *factors)  # type: ignore[no-any-return]
    y = F.linear(x, weight, bias)
    for A, B, scale, p, training in branches:
        given = F.dropout(x, p, True) if training and p > 0.0 else x
        if x.numel() == x.shape[-1]:  # one token: matrix times vector
            y.view(-1).addmv_(B, A.mv(given.reshape(-1)), alpha=scale)
        else:
            _add(y, _down(given, A), B, scale)
    return y


def _plain(x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]) -> Tensor:
    if _one is not None and not any(training and p > 0.0 for _, _, _, p, training in branches):
        factors = [tensor for A, B, *_ in branches for tensor in (A, B)]
        return _one(x, weight, bias, factors, [scale for _, _, scale, *_ in branches])
    y = F.linear(x, weight, bias)
    for A, B, scale, p, training in branches:
        branch = x.to(A.dtype)
        if training and p > 0.0:
            branch = F.dropout(branch, p, True)
        y = same_dtype(y + _low_rank(branch, A, B, scale), y)
    return y


def _low_rank(x: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """linear(linear(x, A), B) * scale."""
    if not _compiled_training(x, A, B):
        branch = F.linear(F.linear(x, A), B)
        return branch if scale == 1.0 else branch * scale
    # The gradient of a product is ordered by the strides of its factors. With these strides the rank leads in the
    # gradients, too. The scale goes on B, which is small: no pass over the output or its gradient.
    up = (B.t() if scale == 1.0 else B.t() * scale).contiguous()
    return _down(x, A).t().mm(up).reshape(*x.shape[:-1], len(B))


def _compiled_training(*tensors: Tensor) -> bool:
    """Whether torch.compile traces a training step for the CPU, where the order of thin products matters."""
    if not is_dynamo_compiling() or is_exporting() or not torch.is_grad_enabled():
        return False
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # loaded by then

    return all(
        type(tensor) in _ORDINARY
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and guard_or_false(tensor.numel() > 0)  # autograd looks at the strides, which an unknown size leaves open
        for tensor in tensors
    )


# The layer with its branches as one operation, (x, weight, bias, [A, B, A, B, …], scales), while a model is exported.
One = Callable[[Tensor, Tensor, Tensor | None, list[Tensor], list[float]], Tensor]
_one: One | None = None


@contextmanager
def layers_by(operation: One) -> Iterator[None]:
    """Plain forms inside of the block are one operation each, for an exporter that knows it."""
    global _one
    before, _one = _one, operation
    try:
        yield
    finally:
        _one = before


def _fast(x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]) -> bool:
    # After a large product Python runs with cold caches, so each look here costs a decoder's step: few and plain.
    if is_compiling() or is_autocast() or interpreters() is not None or forward_ad._current_level >= 0 or traced():
        return False
    dtype = x.dtype
    if type(x) not in _ORDINARY or x.layout is not torch.strided or x.is_nested:
        return False
    if not dtype.is_floating_point or weight.dtype is not dtype or type(weight) not in _ORDINARY:
        return False
    if bias is not None and (bias.dtype is not dtype or type(bias) not in _ORDINARY):
        return False
    for A, B, *_ in branches:
        if A.dtype is not dtype or B.dtype is not dtype or type(A) not in _ORDINARY or type(B) not in _ORDINARY:
            return False
    return True


def _trained(x: Tensor, weight: Tensor, bias: Tensor | None, branches: tuple[Branch, ...]) -> bool:
    if x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad):
        return True
    return any(A.requires_grad or B.requires_grad for A, B, *_ in branches)


_ORDINARY = (Tensor, nn.Parameter)
is_compiling, is_autocast = torch.compiler.is_compiling, torch._C._is_any_autocast_enabled
is_dynamo_compiling, is_exporting = torch.compiler.is_dynamo_compiling, torch.compiler.is_exporting
interpreters = torch._C._functorch.peek_interpreter_stack  # type: ignore[attr-defined]  # torch.func's
traced = torch._C._get_tracing_state


# The rank leads wherever a thin matrix is made: r rows of many columns are several times faster than the reverse.


def _down(x: Tensor, A: Tensor) -> Tensor:
    """A xᵀ: (r, tokens)."""
    return A.mm(x.reshape(-1, x.shape[-1]).t())


def _add(y: Tensor, down: Tensor, B: Tensor, scale: float) -> None:
    """y += (B · down)ᵀ · scale, in place."""
    y.view(-1, y.shape[-1]).addmm_(down.t(), B.t(), alpha=scale)


def _dropped(x: Tensor, p: float) -> tuple[Tensor, Tensor, float]:
    """x with entries dropped, the mask, and what the rest is still to be scaled by. The draw is F.dropout's own, so
    that a seed gives the same masks in either form."""
    if x.device.type != "cpu":
        dropped, mask = torch.native_dropout(x, p, True)
        return dropped, mask, 1.0
    noise = torch.empty_like(x).bernoulli_(1.0 - p)
    mask = noise.bool()
    return noise.mul_(x), mask, 1.0 / (1.0 - p)


class _LowRankLinear(torch.autograd.Function):
    """Keeps x and A xᵀ for the backward and, with dropout, one byte an entry of x instead of a dropped-out copy."""

    @staticmethod
    def forward(ctx: Any, settings: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        _, _, need_weight, _, *need_factors = ctx.needs_input_grad
        downs: list[Tensor | None] = []
        masks: list[Tensor | None] = []
        for (scale, p), A, B, need_B in zip(settings, factors[::2], factors[1::2], need_factors[1::2], strict=True):
            given, mask, gain = _dropped(x, p) if p > 0.0 else (x, None, 1.0)
            down = _down(given, A)
            _add(y, down, B, scale * gain)
            downs.append(down if need_B else None)
            masks.append(mask)
        kept = x if need_weight or any(need_factors[::2]) else None
        ctx.settings = settings
        ctx.save_for_backward(kept, weight, bias, *factors, *downs, *masks)
        # A view made in here could not be written to by whoever gets it, which a layer's output can be.
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return _differentiable(ctx, grad)
        if torch._C._is_any_autocast_enabled():
            with torch.autocast(grad.device.type, enabled=False):
                return _gradients(ctx, grad)
        return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, _, *saved = ctx.saved_tensors
    _, need_x, need_weight, need_bias, *need_factors = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    inputs: Any = None if x is None else x.reshape(-1, x.shape[-1])  # there wherever A or W is trained
    grad_x = rows.mm(weight) if need_x else None
    grad_factors: list[Tensor | None] = []
    for index, (scale, p, A, B, down, mask) in enumerate(_branches(ctx.settings, saved)):
        need_A, need_B = need_factors[2 * index : 2 * index + 2]
        scale = scale / (1.0 - p)
        grad_A = grad_B = None
        if need_B:
            grad_B = down.mm(rows).mul_(scale).t()
        if need_A or grad_x is not None:
            up = B.t().mm(rows.t()).t().contiguous().mul_(scale)
            keep = None if mask is None else mask.reshape(-1, A.shape[1]).to(grad.dtype)
            if grad_x is not None:
                grad_x = grad_x.addmm_(up, A) if keep is None else grad_x.addcmul_(up.mm(A), keep)
            if need_A:
                grad_A = up.t().mm(inputs if keep is None else keep.mul_(inputs))
        grad_factors += [grad_A, grad_B]
    return (
        None,
        None if grad_x is None else grad_x.view(*grad.shape[:-1], weight.shape[1]),
        rows.t().mm(inputs) if need_weight else None,
        rows.sum(0) if need_bias else None,
        *grad_factors,
    )


def _differentiable(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients for create_graph=True: through the plain form, with the masks that were drawn."""
    x, weight, bias, *saved = ctx.saved_tensors
    if x is None:
        raise RuntimeError("gradients of gradients need the layer's input, which is kept only where A or W is trained")
    y = F.linear(x, weight, bias)
    for scale, p, A, B, _, mask in _branches(ctx.settings, saved):
        given = x if mask is None else x * mask.to(x.dtype) / (1.0 - p)
        y = y + F.linear(F.linear(given, A), B) * scale
    count = 2 * len(ctx.settings)
    tensors: tuple[Any, ...] = (None, x, weight, bias, *saved[:count])
    wanted = [tensor for tensor, need in zip(tensors, ctx.needs_input_grad, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return tuple(next(found) if need else None for need in ctx.needs_input_grad)


def _branches(settings: Any, saved: list[Any]) -> Iterator[tuple[float, float, Tensor, Tensor, Any, Any]]:
    """Each branch's scale, p, A, B, A xᵀ and mask."""
    count = len(settings)
    factors, downs, masks = saved[: 2 * count], saved[2 * count : 3 * count], saved[3 * count :]
    for (scale, p), A, B, down, mask in zip(settings, factors[::2], factors[1::2], downs, masks, strict=True):
        yield scale, p, A, B, down, mask


# Finding the branch -----------------------------------------------------------------------------------------


def lower(graph: fx.Graph) -> None:
    """Put the fast form in the place of every linear layer with low-rank branches that nothing else looks at."""
    chains: dict[fx.Node, _Chain] = {}  # by each node that is the layer's output with the branches so far
    for add in list(graph.nodes):
        if add.op == "call_function" and add.target is operator.add and len(add.args) == 2:
            y, scaled = add.args
            branch = _branch(scaled)
            if branch is None or not isinstance(y, fx.Node):
                continue
            chain = chains.get(y) or _Chain.of(y)
            if chain is not None and chain.layer.args[0] is branch[0] and chain.private(add):
                chain.extend(add, branch[1:])
                scaled.args[0].args[0].args[0].meta.pop("draws", None)  # the fast form draws instead of the dropout
                chains.update(dict.fromkeys(chain.values, chain))
    for chain in dict.fromkeys(chains.values()):
        chain.put(graph)
    calls = graph.find_nodes(op="call_function", target=low_rank_linear)
    if calls:
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            site = graph.create_node("get_attr", "_surgery_self", name="site")
        for tensor in dict.fromkeys(tensor for call in calls for tensor in call.all_input_nodes):
            _find_fast(graph, site, tensor)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _effect(node))


class LowRankEdit(NamedTuple):
    """A layer's whole edit of an output y: y + linear(linear(dropout(x), A), B) * scale, by the names of its parts."""

    input: str
    A: str
    B: str
    scale: float
    dropout: float


def low_rank_edit(graph: fx.Graph, output: str) -> LowRankEdit | None:
    """What a graph of `woven_edit` does to its input `output`, where that is one low-rank branch and nothing else."""
    made = graph.output_node().args[0]
    add = made.args[0] if isinstance(made, fx.Node) and made.target is same_dtype else made
    if not (isinstance(add, fx.Node) and add.target is operator.add and len(add.args) == 2):
        return None
    y, scaled = add.args
    branch = _branch(scaled)
    if branch is None or not (isinstance(y, fx.Node) and y.op == "placeholder" and y.target == output):
        return None
    x, A, B, scale, p, _ = branch
    held = [str(node.target).split(".") for node in (A, B) if node.op == "get_attr"]
    if x.op != "placeholder" or [path[:1] for path in held] != [["adapters"]] * 2:
        return None
    return LowRankEdit(str(x.target), held[0][-1], held[1][-1], scale, p)


def _branch(scaled: Any) -> tuple | None:
    """The parts (x, A, B, scale, p, training) of a low-rank branch, each of whose values has one user."""
    if not (_is(scaled, operator.mul) and type(scaled.args[1]) in (int, float)):
        return None
    up = scaled.args[0]
    if not (_is(up, F.linear) and _without_bias(up)):
        return None
    down, B = up.args[:2]
    if not (_is(down, F.linear) and _without_bias(down)):
        return None
    x, A = down.args[:2]
    p, training = 0.0, False
    if _is(x, F.dropout) and len(x.args) == 1 and not x.kwargs.get("inplace"):
        p, training = x.kwargs.get("p", 0.5), x.kwargs.get("training", True)
        x = x.args[0]
    if not (_is(x, "to") and len(x.args) == 2 and _is(x.args[1], getattr) and x.args[1].args == (A, "dtype")):
        return None
    return x.args[0], A, B, scaled.args[1], p, training


def _without_bias(linear: fx.Node) -> bool:
    return not linear.kwargs and (len(linear.args) == 2 or linear.args[2] is None)


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target == target and len(node.users) == 1


class _Chain:
    """A linear layer with the low-rank branches that are added to it one after the other: one call in the end.

    `values`: the nodes that hold the layer's output with the branches so far: a sum, and its casts to the dtype of
    the layer's output, which the fast form makes itself.
    """

    def __init__(self, layer: fx.Node):
        self.layer = layer
        self.branches: list[tuple] = []
        self.values: list[fx.Node] = [layer]
        self.between: list[fx.Node] = []  # sums and casts of earlier branches

    @staticmethod
    def of(y: fx.Node) -> _Chain | None:
        linear = y.op == "call_function" and y.target is F.linear and not y.kwargs and len(y.args) in (2, 3)
        return _Chain(y) if linear else None

    def private(self, add: fx.Node) -> bool:
        """Whether only `add` uses the output, which could as well be made there."""
        users = {user for value in self.values for user in value.users if user not in self.values}
        if not all(user is add or any(_casts(user, add, value) for value in self.values) for user in users):
            return False
        now = self.values[0].next
        while now is not add and (not _effect(now) or "draws" in now.meta):
            now = now.next
        return now is add

    def extend(self, add: fx.Node, branch: tuple) -> None:
        before, self.values = self.values, [add]
        self.values += [user for user in add.users if any(_casts(user, add, value) for value in before)]
        self.branches.append(branch)
        self.between += before

    def put(self, graph: fx.Graph) -> None:
        add = self.values[0]
        args = (*self.layer.args, None) if len(self.layer.args) == 2 else self.layer.args
        with graph.inserting_before(add):
            fast = graph.call_function(low_rank_linear, (*args, *self.branches))
        rules = [node.meta.get("surgery") for node in (*self.between, add)]
        fast.meta["surgery"] = ", ".join(dict.fromkeys(filter(None, rules)))
        for value in self.values:
            value.replace_all_uses_with(fast)
        for value in (*reversed(self.values), *reversed(self.between)):
            graph.erase_node(value)


def _casts(user: fx.Node, add: fx.Node, y: fx.Node) -> bool:
    """Whether it only gives the sum the dtype of y, which the fast form does itself."""
    return user.target is same_dtype and user.args == (add, y)


def _find_fast(graph: fx.Graph, site: fx.Node, tensor: fx.Node) -> None:
    """Have a parameter of the site or of its adapters looked up by `tensor_of`."""
    *path, name = str(tensor.target).split(".")
    if tensor.op != "get_attr" or name == "training" or path[:1] not in ([], ["adapters"]) or len(path) not in (0, 2):
        return
    with graph.inserting_before(tensor):
        args = (site, name, *path[1:])
        fast = graph.create_node("call_function", tensor_of, args, name="_".join((*path[1:], name)))
    fast.meta.update(tensor.meta)
    tensor.replace_all_uses_with(fast)


def _effect(node: fx.Node) -> bool:
    return node.target is left_out or bool({"writes", "draws", "needed"} & node.meta.keys())
