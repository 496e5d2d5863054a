"""Replaces operations of a woven graph by fast forms that compute the same. All fast forms are here.

A rule writes the low-rank branch as its paper does: `y + linear(linear(dropout(x), A), B) * scale`. This form takes
several passes over activations, and saves a dropped-out copy of the input for the backward. `lower` finds the branch
in a woven graph, with the linear layer that it is added to, and replaces both by one call. The call computes the
layer's output and adds the branch in place; its backward adds to one gradient of the input in place.

The call uses the plain form where the fast form would be wrong or would hide operations: under torch.compile,
torch.export and torch.jit.trace (they fuse operations themselves), autocast, mixed precision, torch.func transforms,
and for tensor subclasses. In a training step that torch.compile traces for the CPU, the plain form is two `mm` calls
instead of two `linear` calls, because inductor keeps the order of products that autograd chooses.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import fx

from surgery.forward.graph_functions import same_dtype, tensor_of
from surgery.forward.repeated_runs import check_skipped_forward
from surgery.weaving.low_rank_kernel import low_rank_linear

__all__ = ["LowRankEdit", "low_rank_edit", "lower"]


# Thin matrices have the rank as their first dimension: r long rows are several times faster than r long columns.


# Finding the branch -----------------------------------------------------------------------------------------


def lower(graph: fx.Graph) -> None:
    """Replace each linear layer with low-rank branches by the fast form, unless another node uses its output."""
    chains: dict[fx.Node, _Chain] = {}  # by each node that holds the layer's output with the branches so far
    for add in list(graph.nodes):
        if add.op == "call_function" and add.target is operator.add and len(add.args) == 2:
            y, scaled = add.args
            branch = _branch(scaled)
            if branch is None or not isinstance(y, fx.Node):
                continue
            chain = chains.get(y) or _Chain.of(y)
            if chain is not None and chain.layer.args[0] is branch[0] and chain.is_private(add):
                chain.extend(add, branch[1:])
                scaled.args[0].args[0].args[0].meta.pop("draws", None)  # now the fast form draws
                chains.update(dict.fromkeys(chain.values, chain))
    for chain in dict.fromkeys(chains.values()):
        chain.replace_nodes(graph)
    calls = graph.find_nodes(op="call_function", target=low_rank_linear)
    if calls:
        with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
            site = graph.create_node("get_attr", "_surgery_self", name="site")
        for tensor in dict.fromkeys(tensor for call in calls for tensor in call.all_input_nodes):
            _find_fast(graph, site, tensor)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or _effect(node))


_Branch = tuple[fx.Node, fx.Node, fx.Node, float, Any, Any]  # x, A, B, scale, dropout probability, training


class LowRankEdit(NamedTuple):
    """The parts of an edit y + linear(linear(dropout(x), A), B) * scale: the names of x, A and B, and the numbers."""

    input: str
    A: str
    B: str
    scale: float
    dropout: float


def low_rank_edit(graph: fx.Graph, output: str) -> LowRankEdit | None:
    """Returns the low-rank edit in a graph of `weave_edit`, or None if the graph contains anything else."""
    result = graph.output_node().args[0]
    add = result.args[0] if isinstance(result, fx.Node) and result.target is same_dtype else result
    if not (isinstance(add, fx.Node) and add.target is operator.add and len(add.args) == 2):
        return None
    y, scaled = add.args
    branch = _branch(scaled)
    if branch is None or not (isinstance(y, fx.Node) and y.op == "placeholder" and y.target == output):
        return None
    x, A, B, scale, p, _ = branch
    paths = [str(node.target).split(".") for node in (A, B) if node.op == "get_attr"]
    if x.op != "placeholder" or [path[:1] for path in paths] != [["adapters"]] * 2:
        return None
    return LowRankEdit(str(x.target), paths[0][-1], paths[1][-1], scale, p)


def _branch(scaled: Any) -> _Branch | None:
    """Returns the parts (x, A, B, scale, p, training) of a low-rank branch whose values have one user each, or None."""
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
    """A linear layer and the low-rank branches that are added to its output. One call replaces all of them.

    `values`: the nodes that hold the output with the branches so far: a sum, and its casts to the dtype of the layer's
    output. The fast form does these casts itself.
    """

    def __init__(self, layer: fx.Node):
        self.layer = layer
        self.branches: list[tuple[Any, ...]] = []  # the arguments of `low_rank_linear` for each branch
        self.values: list[fx.Node] = [layer]
        self.between: list[fx.Node] = []  # sums and casts of earlier branches

    @staticmethod
    def of(y: fx.Node) -> _Chain | None:
        linear = y.op == "call_function" and y.target is F.linear and not y.kwargs and len(y.args) in (2, 3)
        return _Chain(y) if linear else None

    def is_private(self, add: fx.Node) -> bool:
        """Whether only `add` uses the output, so that the layer can be computed at the place of `add`."""
        users = {user for value in self.values for user in value.users if user not in self.values}
        if not all(user is add or any(_casts(user, add, value) for value in self.values) for user in users):
            return False
        node = self.values[0].next
        while node is not add and (not _effect(node) or "draws" in node.meta):
            node = node.next
        return node is add

    def extend(self, add: fx.Node, branch: tuple) -> None:
        before, self.values = self.values, [add]
        self.values += [user for user in add.users if any(_casts(user, add, value) for value in before)]
        self.branches.append(branch)
        self.between += before

    def replace_nodes(self, graph: fx.Graph) -> None:
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
    """Whether a node only casts the sum to the dtype of y, which the fast form does itself."""
    return user.target is same_dtype and user.args == (add, y)


def _find_fast(graph: fx.Graph, site: fx.Node, tensor: fx.Node) -> None:
    """Replace the attribute access of a parameter of the site or its adapters by a call of `tensor_of`, the faster."""
    *path, name = str(tensor.target).split(".")
    if tensor.op != "get_attr" or name == "training" or path[:1] not in ([], ["adapters"]) or len(path) not in (0, 2):
        return
    with graph.inserting_before(tensor):
        args = (site, name, *path[1:])
        fast = graph.create_node("call_function", tensor_of, args, name="_".join((*path[1:], name)))
    fast.meta.update(tensor.meta)
    tensor.replace_all_uses_with(fast)


def _effect(node: fx.Node) -> bool:
    return node.target is check_skipped_forward or bool({"writes", "draws", "needed"} & node.meta.keys())
