"""Edits that run on each adapter's rows separately: the edit alone, or the site's whole forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer, Tape
from surgery.patterns.module_class import class_of
from surgery.routing.routed_call import Routing, bind_arguments
from surgery.routing.rows import RowsError, join_rows, take_rows
from surgery.state.records import Applied, SiteState, site_state
from surgery.weaving.generated_class import generated_class
from surgery.weaving.lowering import LowRankEdit, low_rank_edit
from surgery.weaving.rewrite_recording import layer_of
from surgery.weaving.term_graph import OUTPUT
from surgery.weaving.variant_building import function_of
from surgery.weaving.weave import weave_edit

__all__ = ["EditsByRows", "RowEdit", "edit_of", "unweighted_layers"]


def unweighted_layers(
    applied_rules: Sequence[Applied], module: nn.Module, site: SiteState, own: OwnForward
) -> list[Layer]:
    """The layers of the rules with weight 1: `route` ignores the weights of `activate`."""
    return [layer_of(applied, module, site.path, own)._replace(weight=1.0) for applied in applied_rules]


class RowEdit:
    """One adapter's edits, shared by equivalent sites.

    The edits are a low-rank branch (`low_rank`), a function of the output, or a whole forward (`cls`).
    """

    def __init__(self, own: OwnForward, layers: tuple[Layer, ...]):
        self.own, self.layers = own, layers
        output_only = all(ref.kind == "output" for layer in layers for ref in layer.tape.replaced_refs())
        self.low_rank = _low_rank(own, layers[0]) if output_only and len(layers) == 1 else None
        self.cls: Any = None if output_only else generated_class(own, layers)
        self._functions: dict[bool, tuple[Callable[..., Any], set[str]]] = {}

    def __call__(self, module: nn.Module, output: Any, arguments: dict[str, Any], take: Callable[[Any], Any]) -> Any:
        """Compute the new output of the adapter's rows; `take` selects these rows of a value."""
        if module.training not in self._functions:
            self._functions[module.training] = self._function(module.training)
        run, used = self._functions[module.training]
        return run(module, take(output), *[take(value) if name in used else None for name, value in arguments.items()])

    def _function(self, training: bool) -> tuple[Callable[..., Any], set[str]]:
        """The edits as a function of the module, the output and the inputs, and the names of the inputs it reads."""
        graph = weave_edit(self.own, self.layers, training)
        used = {str(node.target).lstrip("*") for node in graph.nodes if node.op == "placeholder" and node.users}
        return function_of(graph, f"{self.own.base.__name__} + {self.layers[0].label}, by rows")[0], used


def edit_of(name: str, applied_rules: list[Applied], module: nn.Module, site: SiteState, own: OwnForward) -> RowEdit:
    """An adapter's edit at a site. The site caches the edit, and equivalent sites share one edit."""
    key = ("rows", name)
    edit: Any = site.classes.get(key)
    if edit is None:
        layers = tuple(unweighted_layers(applied_rules, module, site, own))
        edit = _edits.get((own.key, layers))
        if edit is None:
            edit = _edits[own.key, layers] = RowEdit(own, layers)
        site.classes[key] = edit
    return edit


def _low_rank(own: OwnForward, layer: Layer) -> LowRankEdit | None:
    """The low-rank branch that a rule's edit consists of, or None. Adapters with equal tapes share the cache."""
    by_forward = _low_ranks.setdefault(layer.tape, {})
    if own.key not in by_forward:
        evaluation, training = (low_rank_edit(weave_edit(own, [layer], mode), OUTPUT) for mode in (False, True))
        by_forward[own.key] = evaluation if evaluation == training else None
    return by_forward[own.key]


def _check_independent_rows(module: nn.Module, value: Tensor) -> None:
    """Raise `RowsError` if the rows are one sequence without a batch: an output depends on all of them."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and value.dim() == 2:
        raise RowsError(
            "the rows of a sequence can't have adapters of their own",
            where=_path(module),
            why=f"a {class_of(module).__name__} takes {tuple(value.shape)} for one sequence, without a batch",
            fix="call it with a batch of sequences, or exclude it from the adapters",
        )


def _path(module: nn.Module) -> str | None:
    site = site_state(module)
    return site.path if site is not None else None


_edits: WeakValueDictionary[tuple, RowEdit] = WeakValueDictionary()
_low_ranks: WeakKeyDictionary[Tape, dict[tuple, LowRankEdit | None]] = WeakKeyDictionary()


class EditsByRows:
    """A plan that runs the base's forward on all rows, and each adapter's edits on the rows of the adapter."""

    def __init__(self, base: type[nn.Module], own: OwnForward, routing: Routing, edits: dict[str, RowEdit]):
        self.base: Any = base
        self.own, self.routing, self.edits = own, routing, edits
        self.names = tuple(edits)
        self.covered = set(routing.rows.names) <= set(edits)  # every row has edits at this site

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        arguments, rows = bind_arguments(self.own, args, kwargs), self.routing.rows
        values = (*args, *kwargs.values())
        main = next((value for value in values if isinstance(value, Tensor) and value.dim()), None)
        if main is None:
            raise SurgeryError(f"a {self.base.__name__} that is routed is called with nothing that has rows")
        if module.training and getattr(module, "running_mean", None) is not None:
            raise SurgeryError(
                f"a {self.base.__name__} that trains can't be routed",
                why="it looks at all rows of a batch together, for its running mean",
                fix="put it into evaluation mode",
            )
        size = self.routing.size_of(module, main)
        if any(edit.cls is not None for edit in self.edits.values()):  # whose forward runs on some of the rows
            _check_independent_rows(module, main)
        base_needed = not self.covered or any(edit.cls is None for edit in self.edits.values())
        output = self.base.forward(module, *args, **kwargs) if base_needed else None
        parts = []
        for name, edit in self.edits.items():
            take = partial(take_rows, rows=rows, names=name, size=size)
            if edit.cls is None:
                parts.append(edit(module, output, arguments, take))
            else:
                parts.append(edit.cls.forward(module, *take(list(args)), **take(kwargs)))
        if not self.covered:
            parts.append(take_rows(output, rows, self.names, size))
        return join_rows(parts, rows, self.names, _path(module))
