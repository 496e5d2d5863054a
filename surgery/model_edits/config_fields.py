"""Places in a configuration whose values follow the layers: their number, lists with one value a layer, indices."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = [
    "Place",
    "counts",
    "derived_values",
    "fields_of",
    "index_lists",
    "layer_values",
    "rename_stages",
    "reordered",
    "suggests_layers",
]


@dataclass(frozen=True)
class Place:
    """A place in a configuration.

    Attributes:
        path: the names of the sub-configurations that lead to it.
        name: the field.
        index: the index in the field's value, if it is a list and the place is one of its items.
    """

    path: tuple[str, ...]
    name: str
    index: int | None = None

    def read(self, config: Any) -> Any:
        """The value in a configuration."""
        value = vars(self._part(config))[self.name]
        return value if self.index is None else value[self.index]

    def write(self, config: Any, value: Any) -> None:
        """Set the value in a configuration."""
        fields = vars(self._part(config))
        if self.index is not None:
            items = fields[self.name]
            value = type(items)([value if i == self.index else item for i, item in enumerate(items)])
        fields[self.name] = value

    def _part(self, config: Any) -> Any:
        for part in self.path:
            config = getattr(config, part)
        return config

    def __str__(self) -> str:
        return ".".join((*self.path, self.name)) + ("" if self.index is None else f"[{self.index}]")


def fields_of(config: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[Place, Any]]:
    """Every public field of a configuration and of those inside it, with its value."""
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from fields_of(value, (*path, name))
        elif not name.startswith("_"):
            yield Place(path, name), value


def counts(config: Any, count: int) -> list[Place]:
    """The places whose value is the number of layers; those with a usual name come first."""
    places: list[Place] = []
    for place, value in fields_of(config):
        if type(value) is int and value == count:
            places.append(place)
        elif isinstance(value, (list, tuple)):
            items = (i for i, item in enumerate(value) if type(item) is int and item == count)
            places += [Place(place.path, place.name, i) for i in items]
    return sorted(places, key=lambda place: not suggests_layers(place))


def layer_values(config: Any, count: int) -> list[Place]:
    """The fields that may have one value a layer: lists of that length, and texts with one letter a layer."""
    places = []
    for place, value in fields_of(config):
        text = isinstance(value, str) and "pattern" in place.name
        listed = isinstance(value, (list, tuple)) and not _is_runs(value)
        if (text or listed) and len(value) == count or _is_runs(value) and len(_expanded(value)) == count:
            places.append(place)
    return [place for place in places if place.name != "architectures"]


def derived_values(before: Any, after: Any) -> list[tuple[Place, Any]]:
    """The fields of a changed configuration that its class derives from other fields, with their new values.

    A class may derive a field when it is made, as Zamba2's `hybrid_layer_ids`. Its value in a changed copy is the old
    one. `before`: the configuration without the change.
    """
    try:
        old, new = (dict(fields_of(_made_again(config))) for config in (before, after))
    except Exception:  # whatever the class raises for values that do not fit, which is told elsewhere
        return []
    stable = {place for place, value in fields_of(before) if place in old and old[place] == value}
    return [(p, new[p]) for p, value in fields_of(after) if p in stable and p in new and new[p] != value]


def _made_again(config: Any) -> Any:
    """A configuration that its class makes from the declared fields alone."""
    declared = getattr(type(config), "__dataclass_fields__", None)
    data = copy.deepcopy(config.to_dict())
    return type(config).from_dict({name: data[name] for name in data if declared is None or name in declared})


def index_lists(config: Any, count: int) -> list[Place]:
    """The fields that may list indices of layers."""
    return [
        place
        for place, value in fields_of(config)
        if isinstance(value, (list, tuple))
        and all(type(item) is int and 0 <= item < count for item in value)
        and len(set(value)) == len(value)
    ]


def reordered(values: Sequence[Any], order: Sequence[int]) -> Any:
    """A list, tuple or text with the values of the old layers in the new order.

    Runs are lists of [values, how often], as in GPT-Neo's attention_types.
    """
    if _is_runs(values):
        return [[[_expanded(values)[index] for index in order], 1]]
    taken = [values[index] for index in order]
    return "".join(taken) if isinstance(values, str) else type(values)(taken)  # type: ignore[call-arg]


def rename_stages(config: Any, count: int, order: Sequence[int]) -> None:
    """Adapt the names of the stages of a backbone, and which of them it returns, to another number of layers.

    transformers' backbones name the stem, if there is one, and each layer or stage. An output after the last layer
    stays the last; others stay with their layer.
    """
    for part in _parts(config):
        fields = vars(part)
        names, returned = fields.get("stage_names"), fields.get("_out_indices")
        before = int(bool(names) and names[0] == "stem") if isinstance(names, (list, tuple)) else -1
        if before < 0 or len(names) - before != count or not isinstance(returned, (list, tuple)):
            continue
        last = count + before - 1
        stages = [*names[:before], *(f"stage{number + 1}" for number in range(len(order)))]
        moved = [
            len(stages) - 1 if index == last else order.index(index - before) + before if index >= before else index
            for index in returned
            if index == last or index < before or index - before in order
        ]
        fields |= {"stage_names": stages, "_out_indices": moved, "_out_features": [stages[index] for index in moved]}


def _parts(config: Any) -> Iterator[Any]:
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _parts(value)


def suggests_layers(place: Place) -> bool:
    """Whether a field's name says that it is about layers."""
    return any(word in place.name for word in ("layer", "depth", "block", "pattern", "types"))


def _is_runs(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and bool(value)
        and all(isinstance(item, (list, tuple)) and len(item) == 2 for item in value)
        and all(isinstance(values, (list, tuple)) and type(times) is int for values, times in value)
    )


def _expanded(runs: Sequence[Any]) -> list[Any]:
    return [value for values, times in runs for _ in range(times) for value in values]
