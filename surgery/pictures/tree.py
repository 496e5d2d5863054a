"""The data of a model's tree: a row for each module, with repeated layers folded into one row."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn

from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.patterns.own_entries import own_parameter
from surgery.patterns.wrappers import unwrap
from surgery.pictures.figure import Owner
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import site_state
from surgery.transaction.gradient_flags import is_lazy

__all__ = ["Mark", "TreeRow", "owners_in", "tree_rows"]


@dataclass(frozen=True)
class Mark:
    """A rule at a site. `state`: "live", "idle" or "merged". `added`, `trained`: numbers in its tensors."""

    owner: Owner
    state: str
    added: int
    trained: int


@dataclass(frozen=True)
class TreeRow:
    """A module of the tree.

    `path`: of the first module of the row; `name`: as shown, "layer.0–11" for a folded row; `repeats`: the modules that
    the row stands for. `numbers`: of the base's parameters, `trained`: those of them that train, both with the modules
    below. `folded`: modules below that are not shown, because they have neither rules nor trained parameters.
    """

    path: str
    depth: int
    name: str
    type: str
    repeats: int
    shape: str
    numbers: int
    trained: int
    marks: tuple[Mark, ...]
    folded: int = 0


@dataclass(frozen=True)
class _Node:
    """A module with all below it; two with equal `key` look the same."""

    path: str
    name: str
    key: tuple
    row: TreeRow
    children: tuple[_Node, ...]

    @property
    def busy(self) -> bool:
        """Whether rules or trained parameters are here or below."""
        return bool(self.row.marks or self.row.trained or any(child.busy for child in self.children))


def tree_rows(model: nn.Module) -> list[TreeRow]:
    """The rows of a model's tree, from the model down. Parts without rules are one row if other parts have some."""
    root = _node(model, "", "")
    marked = any(row.marks for row in _rows(root, 0, False))
    return list(_rows(root, 0, marked))


def owners_in(rows: Sequence[TreeRow]) -> list[Owner]:
    """The rules of adapters in a tree, in order."""
    return list(dict.fromkeys(mark.owner for row in rows for mark in row.marks))


def _node(module: nn.Module, path: str, name: str) -> _Node:
    module = unwrap(module)
    children = tuple(
        _node(child, f"{path}.{child_name}" if path else child_name, child_name)
        for child_name, child in module._modules.items()
        if child is not None and not (child_name == RESERVED and is_adapters(child))
    )
    own = [parameter for parameter in module._parameters.values() if parameter is not None and not is_lazy(parameter)]
    row = TreeRow(
        path=path,
        depth=0,
        name=name or "model",
        type=type(module).__name__,
        repeats=1,
        shape=_shape(module),
        numbers=sum(p.numel() for p in own) + sum(child.row.numbers for child in children),
        trained=sum(p.numel() for p in own if p.requires_grad) + sum(child.row.trained for child in children),
        marks=tuple(_marks(module)),
    )
    key = (row.type, row.shape, row.numbers, row.trained, row.marks, tuple((c.name, c.key) for c in children))
    return _Node(path, name, key, row, children)


def _shape(module: nn.Module) -> str:
    weight = own_parameter(module, "weight")
    if weight is None or is_lazy(weight):
        return ""
    if isinstance(module, nn.Linear) and weight.ndim == 2:
        return f"{weight.shape[1]} → {weight.shape[0]}"
    return "×".join(map(str, weight.shape))


def _marks(module: nn.Module) -> Iterator[Mark]:
    state = site_state(module)
    merged = state.merged.adapters if state is not None and state.merged is not None else ()
    for applied in state.applied if state is not None else ():
        tensors = tensors_of(module, applied.adapter)
        ours = {name: tensors[name] for name in applied.tensors if name in tensors}
        status = "merged" if applied.adapter in merged else "live" if applied.live else "idle"
        added = sum(tensor.numel() for tensor in ours.values() if isinstance(tensor, nn.Parameter))
        trained = sum(tensor.numel() for tensor in ours.values() if tensor.requires_grad and status != "merged")
        yield Mark(Owner(applied.adapter, applied.rule.label), status, added, trained)


def _rows(node: _Node, depth: int, marked: bool) -> Iterator[TreeRow]:
    """The row of a node and those below. `marked`: leave out what is below nodes without rules."""
    while not node.row.marks and len(node.children) == 1 and node.path and not node.row.shape:
        (child,) = node.children  # a container of one module shares its row
        child_row = replace(child.row, name=f"{node.row.name}.{child.row.name}")
        node = replace(child, row=child_row)
    if marked and node.children and not node.busy:
        count = sum(1 for _ in _below(node))
        yield replace(node.row, depth=depth, folded=count)
        return
    yield replace(node.row, depth=depth)
    for (digits, _), group in itertools.groupby(node.children, key=lambda n: (n.name.isdigit(), n.key)):
        nodes = list(group)
        if not digits or len(nodes) == 1:
            for child in nodes:
                yield from _rows(child, depth + 1, marked)
            continue
        first, *more = _rows(nodes[0], depth + 1, marked)
        yield replace(
            first, name=f"{nodes[0].name}–{first.name.replace(nodes[0].name, nodes[-1].name, 1)}", repeats=len(nodes)
        )
        yield from more


def _below(node: _Node) -> Iterator[_Node]:
    for child in node.children:
        yield child
        yield from _below(child)
