"""What a site runs while rows are routed: one plan for each site and routing, made from the tapes of the rules.

Low-rank branches of all rows are two batched products. Any other edit runs on its adapter's rows by themselves: the
edit alone where it changes only the output, else the site's whole forward. Rules that route themselves get one rewrite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import attrgetter
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.forward.own_forward import OwnForward, own_forward
from surgery.forward.tape import Layer, Tape
from surgery.routing.joint_rewrite import routed_layer, routes_itself
from surgery.routing.rows import RowOwners, join_rows, take_rows
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import Applied, SiteState
from surgery.weaving.call_variants import function_of
from surgery.weaving.generated_class import generated_class
from surgery.weaving.low_rank_kernel import is_autocast
from surgery.weaving.lowering import LowRankEdit, low_rank_edit
from surgery.weaving.rewrite_recording import layer_of
from surgery.weaving.term_graph import OUTPUT, ROWS
from surgery.weaving.weave import woven, woven_edit

__all__ = ["RoutedCall", "plan_of"]


class RoutedCall(Protocol):
    """What runs in the place of a site's forward."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any: ...


class Routing(Protocol):
    """What plans need of a routing."""

    names: tuple[str, ...]
    rows: RowOwners
    alone: bool

    def size_of(self, module: nn.Module, value: Tensor) -> int: ...


def plan_of(routing: Routing, module: nn.Module, site: SiteState) -> RoutedCall:
    """The plan of a site. Raises where its rules can't be routed."""
    applied = {name: [one for one in site.applied if one.adapter == name] for name in routing.names}
    applied = {name: rules for name, rules in applied.items() if rules}
    if not applied:
        return _Whole(site.base)
    own = own_forward(module, site.base)
    if routing.alone:
        (rules,) = applied.values()
        return _Whole(generated_class(own, _layers(rules, module, site, own)))
    every = [one for rules in applied.values() for one in rules]
    if any(routes_itself(one.rule) for one in every):
        return _Together(own, routed_layer(module, site.path, own, every), routing.rows)
    edits = {name: _edit_of(name, rules, module, site, own) for name, rules in applied.items()}
    branches = {name: edit.low_rank for name, edit in edits.items() if edit.low_rank is not None}
    if len(branches) == len(edits) and all(branch.input == own.inputs()[0] for branch in branches.values()):
        return _LowRankRows(site.base, own, routing, branches, module)
    return _ByRows(site.base, own, routing, edits)


def _layers(rules: Sequence[Applied], module: nn.Module, site: SiteState, own: OwnForward) -> list[Layer]:
    return [layer_of(one, module, site.path, own)._replace(weight=1.0) for one in rules]


class _Whole:
    """All rows run one class's forward: the base's, or one adapter's."""

    def __init__(self, cls: type[nn.Module]):
        self.cls: Any = cls

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.cls.forward(module, *args, **kwargs)


class _Together:
    """Rules that route themselves: one forward, which is told whose rows are which."""

    def __init__(self, own: OwnForward, layer: Layer, rows: RowOwners):
        self.own = own
        graphs = [woven(own, [layer], mode, lowered=False) for mode in (False, True)]
        asks = any(node.target == ROWS for node in graphs[0].nodes if node.op == "placeholder")
        self.first = (rows,) if asks else ()
        self.forms = [function_of(graph, layer.label)[0] for graph in graphs]

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.forms[module.training](module, *self.first, *_bound(self.own, args, kwargs).values())


# Edits by rows ------------------------------------------------------------------------------------------------


class _Edit:
    """One adapter's edits at sites that are alike: a low-rank branch, a function of the output, or a whole forward."""

    def __init__(self, own: OwnForward, layers: tuple[Layer, ...]):
        self.own, self.layers = own, layers
        outward = all(ref.kind == "output" for layer in layers for ref in layer.tape.replaced())
        self.low_rank = _low_rank(own, layers[0]) if outward and len(layers) == 1 else None
        self.cls: Any = None if outward else generated_class(own, layers)
        self._forms: dict[bool, tuple[Callable[..., Any], set[str]]] = {}

    def __call__(self, module: nn.Module, output: Any, given: dict[str, Any], take: Callable[[Any], Any]) -> Any:
        """What the edits make of their rows of the output."""
        if module.training not in self._forms:
            self._forms[module.training] = self._form(module.training)
        run, used = self._forms[module.training]
        return run(module, take(output), *[take(value) if name in used else None for name, value in given.items()])

    def _form(self, training: bool) -> tuple[Callable[..., Any], set[str]]:
        """The edits as a function of the module, the output and the inputs; and the inputs that it looks at."""
        graph = woven_edit(self.own, self.layers, training)
        used = {str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder" and node.users}
        return function_of(graph, f"{self.own.base.__name__} + {self.layers[0].label}, by rows")[0], used


def _edit_of(name: str, rules: list[Applied], module: nn.Module, site: SiteState, own: OwnForward) -> _Edit:
    key = ("rows", name)
    found: Any = site.classes.get(key)
    if found is None:
        layers = tuple(_layers(rules, module, site, own))
        found = _edits.get((own.key, layers))
        if found is None:
            found = _edits[own.key, layers] = _Edit(own, layers)
        site.classes[key] = found
    return found


def _low_rank(own: OwnForward, layer: Layer) -> LowRankEdit | None:
    """Whether a rule's edit is one low-rank branch; asked once for all adapters that have it."""
    known = _low_ranks.setdefault(layer.tape, {})
    if own.key not in known:
        found = [low_rank_edit(woven_edit(own, [layer], mode), OUTPUT) for mode in (False, True)]
        known[own.key] = found[0] if found[0] == found[1] else None
    return known[own.key]


_edits: WeakValueDictionary[tuple, _Edit] = WeakValueDictionary()
_low_ranks: WeakKeyDictionary[Tape, dict[tuple, LowRankEdit | None]] = WeakKeyDictionary()


class _ByRows:
    """The base's forward for all rows, and each adapter's edits for its own."""

    def __init__(self, base: type[nn.Module], own: OwnForward, routing: Routing, edits: dict[str, _Edit]):
        self.base: Any = base
        self.own, self.routing, self.edits = own, routing, edits
        self.names = tuple(edits)
        self.covered = set(routing.rows.names) <= set(edits)  # every row has edits here

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        given, rows = _bound(self.own, args, kwargs), self.routing.rows
        passed = (*args, *kwargs.values())
        main = next((value for value in passed if isinstance(value, Tensor) and value.dim()), None)
        if main is None:
            raise SurgeryError(f"a {self.base.__name__} that is routed is called with nothing that has rows")
        if module.training and getattr(module, "running_mean", None) is not None:
            raise SurgeryError(
                f"a {self.base.__name__} that trains can't be routed",
                why="it looks at all rows of a batch together, for its running mean",
                fix="put it into evaluation mode",
            )
        size = self.routing.size_of(module, main)
        shared = not self.covered or any(edit.cls is None for edit in self.edits.values())
        output = self.base.forward(module, *args, **kwargs) if shared else None
        parts = []
        for name, edit in self.edits.items():
            take = partial(take_rows, rows=rows, names=name, size=size)
            if edit.cls is None:
                parts.append(edit(module, output, given, take))
            else:
                parts.append(edit.cls.forward(module, *take(list(args)), **take(kwargs)))
        if not self.covered:
            parts.append(take_rows(output, rows, self.names, size))
        return join_rows(parts, rows, self.names)


def _bound(own: OwnForward, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = own.signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


# Low-rank branches of many rows -------------------------------------------------------------------------------


class _LowRankRows:
    """y + (x Aᵢᵀ) Bᵢᵀ sᵢ for each row's adapter i, all rows at once.

    A bank holds A and B once a row, filled up to the largest rank, for two batched products; it is kept from call to
    call where nothing of it trains. Where it would be larger than two copies of the adapters, for many rows have the
    same one or ranks differ much, and with dropout, each adapter's rows go through plain products.
    """

    def __init__(
        self,
        base: type[nn.Module],
        own: OwnForward,
        routing: Routing,
        branches: dict[str, LowRankEdit],
        module: nn.Module,
    ):
        self.base: Any = base
        self.routing, self.input = routing, own.inputs()[0]
        self.names = tuple(branches)
        self.scales = [branch.scale for branch in branches.values()]
        self.drops = [branch.dropout for branch in branches.values()]
        held = [(tensors_of(module, name), branch) for name, branch in branches.items()]
        self.A = [tensors[branch.A] for tensors, branch in held]
        self.B = [tensors[branch.B] for tensors, branch in held]
        index = {name: i for i, name in enumerate(branches)}
        found = [(place, index[name]) for place, name in enumerate(routing.rows.names) if name in index]  # type: ignore[index]
        self.places = [place for place, _ in found]  # the rows that have a branch here
        self.whose = [who for _, who in found]
        ranks = [len(A) for A in self.A]
        self.banked = len(self.places) * max(ranks) <= 2 * sum(ranks)
        self.makes = not own.opaque  # a forward that is only called may keep what it returns
        # Tensors of inference mode do not count their changes. Aliases share the count, and lie side by side in memory:
        # the parameters, scattered, took a quarter of what routing one token costs, for being looked at.
        self.counted = [tensor.detach() for tensor in (*self.A, *self.B) if not tensor.is_inference()]
        self.bank: tuple[Tensor, Tensor] | None = None
        self.made = -1
        self.at: Tensor | None = None

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x: Tensor = args[0] if args else kwargs[self.input]
        self.routing.size_of(module, x)
        y: Tensor = self.base.forward(module, *args, **kwargs)
        if not self.banked or (module.training and any(self.drops)):
            return self._each(module, x, y)
        count = self.routing.rows.count
        A, B = self._bank()
        rows = x.reshape(count, -1, x.shape[-1])
        some = len(self.places) < count
        if some:
            rows = rows.index_select(0, self._at(x.device))
        if rows.dtype is not A.dtype and not is_autocast():
            rows = rows.to(A.dtype)
        down = torch.bmm(rows, A)
        if some:
            return self._added(y, [(self._at(y.device), torch.bmm(down, B))])
        if self._unseen(y) and down.dtype is y.dtype:
            y.view(count, -1, y.shape[-1]).baddbmm_(down, B.to(down.dtype))
            return y
        return y + torch.bmm(down, B).to(y.dtype).view(y.shape)

    def _each(self, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        rows = self.routing.rows
        given, ups = x.reshape(rows.count, -1, x.shape[-1]), []
        for name, A, B, scale, drop in zip(self.names, self.A, self.B, self.scales, self.drops, strict=True):
            index = rows.of(name, rows.count, x.device)
            branch = given.index_select(0, index).to(A.dtype)
            if module.training and drop:
                branch = F.dropout(branch, drop, True)
            ups.append((index, F.linear(F.linear(branch, A) * scale, B)))
        return self._added(y, ups)

    def _added(self, y: Tensor, ups: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The output with something added to some of its rows."""
        rows = y.reshape(self.routing.rows.count, -1, y.shape[-1])
        if self._unseen(y):
            for index, up in ups:
                rows.index_add_(0, index, up.to(y.dtype))
            return y
        index, up = (torch.cat(parts) for parts in zip(*ups, strict=True))
        return rows.index_add(0, index, up.to(y.dtype)).view(y.shape)

    def _unseen(self, y: Tensor) -> bool:
        """Whether the output that the forward has just made may be added to in place."""
        return self.makes and not torch.is_grad_enabled() and y.is_contiguous()

    def _at(self, device: torch.device) -> Tensor:
        if self.at is None or self.at.device != device:
            self.at = torch.tensor(self.places, device=device)
        return self.at

    def _bank(self) -> tuple[Tensor, Tensor]:
        """Aᵀ (rows, in, r), a view of A, and scaled Bᵀ (rows, r, out), ranks filled up with zeros."""
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*self.A, *self.B)):
            return self._stacked()
        made = sum(map(_version, self.counted))
        bank = self.bank
        if bank is None or self.made != made or bank[0].device != self.A[0].device:
            with torch.no_grad(), torch.inference_mode(False):
                bank = self.bank = self._stacked()
            self.made = made
        return bank

    def _stacked(self) -> tuple[Tensor, Tensor]:
        dtype = self.A[0].dtype
        rank = max(len(A) for A in self.A)
        As, Bs = [], []
        for A, B in zip(self.A, self.B, strict=True):
            spare = rank - len(A)
            As.append(F.pad(A, (0, 0, 0, spare)).to(dtype) if spare else A.to(dtype))
            Bs.append(F.pad(B, (0, spare)).to(dtype) if spare else B.to(dtype))
        scales = torch.tensor(self.scales, dtype=dtype, device=Bs[0].device).view(-1, 1, 1)
        A, B = torch.stack(As), torch.stack(Bs).mT * scales
        if self.whose == list(range(len(self.A))):
            return A.mT, B.contiguous()
        whose = torch.tensor(self.whose, device=A.device)
        return A.index_select(0, whose).mT, B.index_select(0, whose)


_version = attrgetter("_version")  # a number that changes with every change in place
