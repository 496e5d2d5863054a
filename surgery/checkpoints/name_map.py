"""Maps names of tensors in files to names in the model, and back, as transformers does when it loads and saves.

Most names are the same, but for a prefix. Older files have other names, and some models fuse tensors of the files when
they are loaded (the experts of a mixture).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint_files import CheckpointFiles
from surgery.errors import SurgeryError

__all__ = ["NameGroup", "NameMap", "name_map"]


@dataclass(eq=False)
class NameGroup:
    """Tensors of the files that become tensors of the model together: one and one, or several that are fused.

    `source`: for a tensor that is not in the files, the group from which it starts (a head that was tied).
    """

    disk: tuple[str, ...]
    memory: tuple[str, ...]
    conversion: Conversion | None = None
    source: NameGroup | None = None

    def to_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.conversion is None:
            return {self.memory[0]: tensors[self.disk[0]]}
        return self.conversion.to_memory(tensors)

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.conversion is None:
            return {self.disk[0]: tensors[self.memory[0]]}
        return self.conversion.to_disk(tensors)


@dataclass(eq=False)
class Conversion:
    """A converter of transformers with the tensors that it takes.

    `sources`: each tensor's pattern of the converter and its name before the converter, in the order of the files.
    """

    model: Any
    converter: Any
    first: str
    sources: dict[str, tuple[str, str]] = field(default_factory=dict)

    def to_memory(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(self.converter)
        for disk, (pattern, _) in self.sources.items():
            converter.add_tensor(self.first, disk, pattern, tensors[disk])
        converted = converter.convert(self.first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter, first = self.converter.reverse_transform(), None
        for memory, tensor in tensors.items():
            renamed, pattern = converter.rename_source_key(memory)
            if pattern is None:
                raise SurgeryError(f"{memory} can't be converted back to the names in the files")
            first = first or renamed
            converter.add_tensor(first, memory, pattern, tensor)
        converted = converter.convert(first, model=self.model, config=self.model.config)
        disk_names = {inner: disk for disk, (_, inner) in self.sources.items()}
        prefix = f"{self.model.base_model_prefix}."
        back: dict[str, Tensor] = {}
        for name, value in converted.items():
            names = [each for each in (name, name.removeprefix(prefix), prefix + name) if each in disk_names]
            if not names:
                raise SurgeryError(f"{name} is converted back to a name that is not in the files")
            back[disk_names[names[0]]] = value[0] if isinstance(value, list) else value
        return back


@dataclass(eq=False)
class NameMap:
    """The groups of a checkpoint by name in the model. `unexpected`: names in files that the model does not have."""

    groups: list[NameGroup]
    unexpected: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.of_memory = {name: group for group in self.groups for name in group.memory}

    def add(self, group: NameGroup) -> None:
        self.groups.append(group)
        self.of_memory |= dict.fromkeys(group.memory, group)


def name_map(model: nn.Module, files: CheckpointFiles) -> NameMap:
    """Returns the map between a checkpoint and a model.

    Raises:
        SurgeryError: a tensor of the files has another shape than the model's.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    stored = {key: place.shape for key, place in files.tensors.items()}
    named = _Names(model, wanted)
    groups: dict[str, NameGroup] = {}
    unexpected: list[str] = []
    for disk in named.ordered(stored):
        memory, converter, pattern, inner = named.place(disk)
        if memory not in wanted:
            unexpected.append(disk)
        elif converter is None:
            groups[memory] = NameGroup((disk,), (memory,))
        else:
            group = groups.setdefault(memory, NameGroup((), (memory,), Conversion(model, converter, memory)))
            assert group.conversion is not None
            group.conversion.sources[disk] = pattern, inner
            group.disk = (*group.disk, disk)
    for group in groups.values():
        if group.conversion is not None:
            _complete(group, files)
    problems = [
        f"{name} is {stored[group.disk[0]]} in the files and {wanted[name]} in the model"
        for group in groups.values()
        for name in group.memory
        if group.conversion is None and stored[group.disk[0]] != wanted[name]
    ]
    if problems:
        fix = "mend config.json, or name the model that the weights were saved from"
        raise SurgeryError(f"the weights don't fit {type(model).__name__}", why="; ".join(problems[:5]), fix=fix)
    return NameMap(list(groups.values()), tuple(unexpected))


def _complete(group: NameGroup, files: CheckpointFiles) -> None:
    """Finds the names that a converter makes, by running it on the meta device."""
    places = files.tensors
    tensors = {key: torch.empty(places[key].shape, dtype=places[key].dtype, device="meta") for key in group.disk}
    group.memory = tuple(group.to_memory(tensors))


class _Names:
    """Names of one model as transformers changes them; the same names for a model of another library."""

    def __init__(self, model: Any, wanted: Mapping[str, tuple[int, ...]]):
        self.wanted, self.prefix = wanted, getattr(model, "base_model_prefix", None)
        self.renamings: list[Any] = []
        self.converters: list[Any] = []
        if hasattr(model, "config") and hasattr(type(model), "from_pretrained"):
            from transformers.conversion_mapping import get_model_conversion_mapping
            from transformers.core_model_loading import WeightConverter, WeightRenaming

            mapping = get_model_conversion_mapping(model) or []
            self.renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
            self.converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        self.by_pattern = {pattern: each for each in self.converters for pattern in each.source_patterns}

    def ordered(self, names: Iterable[str]) -> list[str]:
        """The order in which converters take tensors: numbers in names count as numbers."""
        if not self.converters:
            return list(names)
        from transformers.core_model_loading import dot_natural_key

        return sorted(names, key=dot_natural_key)

    def place(self, disk: str) -> tuple[str, Any, str, str]:
        """The name in the model, the converter, its pattern, and the name before the converter."""
        inner = disk
        for renaming in self.renamings:
            inner, _ = renaming.rename_source_key(inner)
        memory, pattern = inner, None
        for converter in self.converters:
            memory, pattern = converter.rename_source_key(memory)
            if pattern is not None:
                break
        memory = self._prefixed(memory)
        if memory not in self.wanted and disk in self.wanted:
            memory, pattern = self._prefixed(disk), None
        return memory, self.by_pattern[pattern] if pattern is not None else None, pattern or "", inner

    def _prefixed(self, name: str) -> str:
        if not self.prefix:
            return name
        shorter = re.sub(f"^{re.escape(self.prefix)}.", "", name, count=1)
        if name.startswith(self.prefix) and shorter in self.wanted:
            return shorter
        longer = f"{self.prefix}.{name}"
        return longer if longer in self.wanted else name
