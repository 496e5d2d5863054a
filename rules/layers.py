"""Layers dropped, repeated and exchanged: `DropRule`, `RepeatRule`, `ReorderRule`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery import ModelEdits, SiteError, StructureRule, rule


@rule("drop")
class DropRule(StructureRule):
    """Take layers out of a model, as if it had been built without them.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import DropRule
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 4))
    >>> len(apply_rules(model, [DropRule("2")])), len(remove(model))
    (3, 4)

    The targets are layers: children of a ModuleList or a Sequential. The layers after a dropped one move up, with their
    indices (`layer_idx`), and the configuration says the new number of layers and their types. So caches, generation
    and `hidden_states` work as in a model that was built so. Adapters on the other layers stay; adapters on a dropped
    layer come back with it.

    Raises:
        SiteError: a target is not in a list of layers; no layer would be left; or a layer has tensors that depend on
            its position (the first layer of T5, with the biases of all layers).

    Source: LayerDrop (Fan et al. 2019, arXiv:1909.11556); ShortGPT (Men et al. 2024, arXiv:2403.03853).
    """

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        dropped: dict[str, set[str]] = {}
        for path, _ in matched:
            container, _, name = path.rpartition(".")
            dropped.setdefault(container, set()).add(name)
        orders: dict[tuple[int, ...], list[str]] = {}
        for container, names in dropped.items():
            keys = edits.layers(container)
            order = tuple(index for index, key in enumerate(keys) if key not in names)
            orders.setdefault(order, []).append(container)
        for order, containers in orders.items():
            edits.reorder(containers, order)


@rule("repeat")
class RepeatRule(StructureRule):
    """Build a deeper model by repeating layers.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import RepeatRule
    >>> model = nn.ModuleDict({"layers": nn.Sequential(nn.Linear(4, 4), nn.ReLU()), "head": nn.Linear(4, 2)})
    >>> len(apply_rules(model, [RepeatRule("layers", order=[0, 1, 0, 1])])["layers"])
    4

    The target is a list of layers (ModuleList or Sequential), such as "model.layers". A layer that occurs again is a
    copy with weights of its own. Indices and the configuration change as for DropRule. Adapters that are on a repeated
    layer are on its copy, too. Layers that `order` leaves out are dropped.

    Args:
        order: indices of present layers, in the new order; default None.
        times: how often the whole list is repeated, instead of `order`; default None.
        shared: copies share the weights of the original layer (the modules are new, so that caches tell them apart);
            default False.

    Raises:
        RuleError: neither or both of `order` and `times`.
        SiteError: the target is not a list of layers, or an index is beyond its layers.

    Source: depth up-scaling (SOLAR 10.7B, Kim et al. 2023, arXiv:2312.15166); mergekit's passthrough merge.
    """

    order: Sequence[int] | None = None
    times: int | None = None
    shared: bool = False

    def validate(self) -> None:
        if (self.order is None) == (self.times is None):
            raise self.bad("order", "given with times, or both are left out: name one of the two")
        if self.times is not None and (type(self.times) is not int or self.times < 1):
            raise self.bad("times", "a number of repetitions, from 1")
        if self.order is not None and not _are_indices(self.order):
            raise self.bad("order", "a list of indices of layers, from 0")
        if type(self.shared) is not bool:
            raise self.bad("shared", "true or false")

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        orders: dict[tuple[int, ...], list[str]] = {}
        for path, _ in matched:
            present = range(len(edits.layers(path)))
            order = self.order if self.order is not None else [*present] * (self.times or 1)
            orders.setdefault(tuple(order), []).append(path)
        for order, paths in orders.items():
            edits.reorder(paths, order, share_weights=self.shared)


@rule("reorder")
class ReorderRule(StructureRule):
    """Put the layers of a list into another order.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import ReorderRule
    >>> model = nn.ModuleDict({"layers": nn.Sequential(nn.Tanh(), nn.ReLU())})
    >>> apply_rules(model, [ReorderRule("layers", order=[1, 0])])["layers"]
    Sequential(
      (0): ReLU()
      (1): Tanh()
    )

    Args:
        order: the index of each present layer once, in the new order.

    Raises:
        RuleError: an index is missing or occurs twice.
        SiteError: the target is not a list of layers, or has another number of layers.
    """

    order: Sequence[int] = ()

    def validate(self) -> None:
        if not self.order or not _are_indices(self.order) or sorted(self.order) != list(range(len(self.order))):
            raise self.bad("order", "each index from 0 once")

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        for path, _ in matched:
            missing = sorted(set(range(len(edits.layers(path)))) - set(self.order))
            if missing:
                why = f"it lacks {', '.join(map(str, missing))}"
                raise SiteError("the order leaves layers out", where=path, why=why, fix="DropRule takes layers out")
        edits.reorder([path for path, _ in matched], self.order)


def _are_indices(order: object) -> bool:
    return isinstance(order, (list, tuple)) and bool(order) and all(type(i) is int and i >= 0 for i in order)
