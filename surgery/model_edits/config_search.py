"""Finds the fields of a configuration that describe lists of layers, by building models from changed copies."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from surgery.model_edits.config_fields import (
    Place,
    counts,
    derived_values,
    layer_values,
    rename_stages,
    reordered,
    suggests_layers,
)
from surgery.model_edits.layer_config import LayerConfig, NoLayerConfig, blocks
from surgery.model_edits.layer_placement import place_kinds
from surgery.model_edits.model_differences import Difference, differences
from surgery.model_edits.plain_model import build_plain, call_problem, config_problem
from surgery.patterns.wrappers import submodule

__all__ = ["find_layer_config"]


def find_layer_config(
    module: nn.Module, containers: Sequence[str], order: Sequence[int]
) -> LayerConfig | NoLayerConfig:
    """Find the configuration with which the class of a model builds lists of layers of another length or order.

    A candidate is a number that equals the present number of layers, alone or in a list (the depths of stages). It is
    right if the model that is built from it has that many layers in these lists, and as many as before in all others.
    Lists of one value a layer are taken along in the new order, and lists of layers' indices with new indices.

    Args:
        module: the model or part that has the configuration.
        containers: the paths of the lists of layers in it, all of one length.
        order: for each new layer, the index of the old one.

    Returns:
        The configuration, or why there is none.
    """
    config: Any = module.config
    count = max(_length(module, container) for container in containers)
    before = build_plain(module, config)
    if before is None or any(_length(before, container) != count for container in containers):
        return NoLayerConfig(f"{type(config).__name__} does not build this {type(module).__name__}")
    search = _Search(module, before, tuple(containers), tuple(order), count)
    found = search.same_length() if len(order) == count else search.other_length()
    if isinstance(found, LayerConfig):
        found = place_kinds(found, search.attempt, order, count)
        found = _callable(_with_derived(found, search), search, count)
    if isinstance(found, LayerConfig):
        problem = config_problem(found.config, found.after)
        if problem is not None and config_problem(config, found.before) is None:
            return NoLayerConfig(f"{type(config).__name__} of {len(order)} layers: {problem}", final=True)
    return found


class _Search:
    """Tries changed copies of a configuration."""

    def __init__(
        self, module: nn.Module, before: nn.Module, containers: tuple[str, ...], order: tuple[int, ...], count: int
    ):
        self.module, self.before, self.containers, self.order = module, before, containers, order
        self.config: Any = module.config
        self.modes = list(self._modes(count))
        self.count = count

    def same_length(self) -> LayerConfig | NoLayerConfig:
        """The layers are exchanged: no number changes, but lists with a value a layer."""
        candidates = (self.attempt(self._changed(self.config, (), mode), (), mode) for mode in self.modes)
        found = _best([candidate for candidate in candidates if isinstance(candidate, LayerConfig)])
        return found or NoLayerConfig(f"{type(self.config).__name__} does not build layers in another order")

    def other_length(self) -> LayerConfig | NoLayerConfig:
        """The number of layers changes: find the fields that say it, one list after another."""
        fields: tuple[Place, ...] = ()
        open_lists, found = list(self.containers), None
        while open_lists:
            result = self._next_field(fields, open_lists)
            if isinstance(result, NoLayerConfig):
                return result
            found, fields, changed = result
            open_lists = [path for path in open_lists if path not in changed]
        assert found is not None
        return found

    def _next_field(
        self, fields: tuple[Place, ...], open_lists: Sequence[str]
    ) -> tuple[LayerConfig, tuple[Place, ...], set[str]] | NoLayerConfig:
        best: tuple[LayerConfig, tuple[Place, ...], set[str]] | None = None
        parallel: tuple[Place, set[str]] | None = None
        places: list[Place | None] = [place for place in counts(self.config, self.count) if place not in fields]
        for place in [*places, None]:
            chosen = (*fields, place) if place is not None else fields
            for mode in self.modes:
                if place is None and not mode:
                    continue
                result = self.attempt(self._changed(self.config, chosen, mode), chosen, mode, set(open_lists))
                if isinstance(result, set):
                    if open_lists[0] in result and place is not None:
                        parallel = parallel or (place, result)
                elif result is not None and (best is None or result.score < best[0].score):
                    left = [path for path in open_lists if _length(result.after, path) == self.count]
                    best = result, chosen, set(open_lists) - set(left)
            if best is not None and best[0].score == (0, 0, 0):
                break
        if best is not None:
            return best
        if parallel is not None:
            place, changed = parallel
            lists = tuple(path for path in dict.fromkeys((*self.containers, *sorted(changed))))
            why = f"{type(self.config).__name__}.{place} says the length of {', '.join(lists)}"
            return NoLayerConfig(why, lists, final=True)
        name = type(self.config).__name__
        for place in counts(self.config, self.count):
            changed = self._lists_of(place)
            if open_lists[0] in changed and not changed <= set(self.containers):
                lists = tuple(dict.fromkeys((*self.containers, *sorted(changed))))
                return NoLayerConfig(f"{name}.{place} says the length of {', '.join(lists)}", lists, final=True)
        return NoLayerConfig(f"{name} does not build {len(self.order)} layers in {open_lists[0]}")

    def _lists_of(self, place: Place) -> set[str]:
        """The lists that are longer if a number is larger by one: there are models that can't be built smaller."""
        changed = copy.deepcopy(self.config)
        place.write(changed, self.count + 1)
        after = build_plain(self.module, changed)
        return self._changed_lists(after) if after is not None else set()

    def attempt(
        self, config: Any, fields: Sequence[Place], lists: Sequence[Place] = (), wanted: Collection[str] | None = None
    ) -> LayerConfig | set[str] | None:
        """Build a changed configuration. Returns the paths of lists, if others than the wanted change their length."""
        after = build_plain(self.module, config)
        if after is None:
            return None
        changed = self._changed_lists(after)
        right = all(_length(after, path) == len(self.order) for path in changed)
        if not right or not changed <= set(self.containers) or wanted is not None and not changed & set(wanted):
            return changed
        done = [path for path in self.containers if _length(after, path) == len(self.order)]
        names = tuple(str(place) for place in (*fields, *lists))
        return LayerConfig(config, names, self.before, after, tuple(done), self._score(after, done, self.order))

    def _modes(self, count: int) -> Iterator[tuple[Place, ...]]:
        """Selections of the fields that may have one value a layer, the most likely first."""
        certain, likely, others = list[Place](), list[Place](), list[Place]()
        for place in layer_values(self.config, count):
            effect = self._effect(place, count)
            if effect is not False:
                (certain if effect else likely if suggests_layers(place) else others).append(place)
        modes = [(*certain, *likely), (*certain, *likely, *others), tuple(certain), ()]
        if len(self.order) == count:
            modes = [(*certain, *likely), ()]
        yield from dict.fromkeys(modes)

    def _effect(self, place: Place, count: int) -> bool | None:
        """Whether a field's values belong to the layers: exchanging them exchanges layers, and no tensors elsewhere.

        None: exchanging them changes nothing that can be compared.
        """
        values = place.read(self.config)
        turned = [*range(1, count), 0]
        if reordered(values, turned) == reordered(values, range(count)):
            return None
        changed = copy.deepcopy(self.config)
        place.write(changed, reordered(values, turned))
        after = build_plain(self.module, changed)
        if after is None:
            return None
        outside = differences(self.before, after, self.containers)
        if self._changed_lists(after) or any(difference.tensors or difference.modules for difference in outside):
            return False
        unmoved = self._score(after, self.containers, range(count))
        if unmoved == (0, 0, 0):
            return None
        moved = self._score(after, self.containers, turned)
        # A layer may have tensors of its position (the first without a norm), which differ wherever layers move.
        return moved < unmoved or moved < self._score(self.before, self.containers, turned)

    def _changed(self, config: Any, fields: Sequence[Place], lists: Sequence[Place]) -> Any:
        changed = copy.deepcopy(config)
        for place in fields:
            place.write(changed, len(self.order))
        for place in lists:
            place.write(changed, reordered(place.read(config), self.order))
        # An item of a list, such as Swin's depths[1], says the number of layers in a stage, and not that of the stages.
        if len(self.order) != self.count and all(place.index is None for place in fields):
            rename_stages(changed, self.count, self.order)
        return changed

    def _changed_lists(self, after: nn.Module) -> set[str]:
        """The lists that have another length in a model, without those inside a list that is longer or shorter."""
        lists = [path for path, module in self.before.named_modules() if isinstance(module, _LISTS)]
        changed = [path for path in lists if _length(self.before, path) != _length(after, path)]
        above = {*changed, *self.containers}
        return {path for path in changed if not any(path.startswith(f"{other}.") for other in above)}

    def _score(self, after: nn.Module, containers: Sequence[str], order: Sequence[int]) -> tuple[int, int, int]:
        outside = sum(blocks(difference) for difference in differences(self.before, after, self.containers))
        layers = attributes = 0
        for container in containers:
            old, new = (list(model.get_submodule(container).children()) for model in (self.before, after))
            for position, index in enumerate(order):
                found = differences(old[index], new[position])
                layers += any(difference.has_tensors for difference in found)
                attributes += sum(_counted(difference, position - index) for difference in found)
        return outside, layers, attributes


_LISTS = (nn.ModuleList, nn.Sequential)


def _counted(difference: Difference, moved: int) -> int:
    """The attributes that differ, without indices of layers, numbers that depend on the depth, and collections."""
    values = difference.attributes.values()
    return sum(not (isinstance(was, (float, list, tuple, dict)) or _is_index(was, now, moved)) for was, now in values)


def _is_index(was: Any, now: Any, moved: int) -> bool:
    return type(was) is type(now) is int and now - was == moved


def _best(candidates: Sequence[LayerConfig]) -> LayerConfig | None:
    return min(candidates, key=lambda candidate: candidate.score, default=None)


def _with_derived(found: LayerConfig, search: _Search) -> LayerConfig:
    """The configuration with the values that its class derives from the changed fields when a file is read."""
    derived = derived_values(search.config, found.config)
    if not derived:
        return found
    changed = copy.deepcopy(found.config)
    for place, value in derived:
        place.write(changed, value)
    other = search.attempt(changed, ())
    if not isinstance(other, LayerConfig):
        return found
    return replace(other, fields=(*found.fields, *(str(place) for place, _ in derived)))


def _callable(found: LayerConfig, search: _Search, count: int) -> LayerConfig | NoLayerConfig:
    """The configuration, or one with a further number of layers, whose model can be called."""
    problem = call_problem(found.before, found.after)
    if problem is None:
        return found
    for place in counts(found.config, count):
        if place.index is not None or not suggests_layers(place) or len(search.order) == count:
            continue
        changed = copy.deepcopy(found.config)
        place.write(changed, len(search.order))
        other = search.attempt(changed, ())
        if isinstance(other, LayerConfig) and other.score <= found.score:
            if call_problem(other.before, other.after) is None:
                return replace(other, fields=(*found.fields, str(place)))
    kind = type(search.module).__name__
    return NoLayerConfig(f"a {kind} that is built so fails when it is called: {problem}", final=True)


def _length(model: nn.Module, container: str) -> int:
    try:
        return len(submodule(model, container)._modules)
    except AttributeError:
        return -1
