"""Groups the sites of adapters into units: sites that share tensors of the files are merged together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.arithmetic.exact_fold import Record
from surgery.checkpoints.base_skeleton import Skeleton
from surgery.checkpoints.checkpoint_files import CheckpointFiles
from surgery.checkpoints.name_map import NameGroup
from surgery.checkpoints.unit_merge import MergeSite, TensorStore, merge_into
from surgery.errors import NotInFilesError
from surgery.forward.parameter_view import tensor_at
from surgery.patterns.module_walk import base_modules
from surgery.state.parameter_owners import Owners

__all__ = ["MergeUnit", "absent_error", "merge_unit", "merge_units", "read_tensor", "site_tensors"]


@dataclass(eq=False)
class MergeUnit:
    """Sites in the order of the model, and the groups of tensors that their rules may change."""

    sites: list[MergeSite]
    groups: list[NameGroup]

    @property
    def disk(self) -> tuple[str, ...]:
        """The names in the files of all tensors that may change."""
        return tuple(name for group in self.groups for name in group.disk)


def merge_units(sites: Sequence[MergeSite], skeleton: Skeleton) -> list[MergeUnit]:
    """Returns the units of sites, in the order of their first sites."""
    groups_of = [_groups(site, skeleton) for site in sites]
    earlier, first = list(range(len(sites))), dict[int, int]()  # a site of the same unit; the first site of a group

    def first_of_unit(index: int) -> int:
        while earlier[index] != index:
            earlier[index] = index = earlier[earlier[index]]
        return index

    for index, groups in enumerate(groups_of):
        for key in groups:
            low, high = sorted((first_of_unit(index), first_of_unit(first.setdefault(key, index))))
            earlier[high] = low
    units: dict[int, MergeUnit] = {}
    for index, site in enumerate(sites):
        unit = units.setdefault(first_of_unit(index), MergeUnit([], []))
        unit.sites.append(site)
        unit.groups += [group for key, group in groups_of[index].items() if first[key] == index]
    return list(units.values())


def _groups(site: MergeSite, skeleton: Skeleton) -> dict[int, NameGroup]:
    """The groups of the tensors that a site's rules may change, by their ids."""
    names = [each for name in site_tensors(site) for each in (name, *skeleton.twins.get(name, ()))]
    groups = [group for name in names if (group := skeleton.names.of_memory.get(name)) is not None]
    return {id(group): group for group in groups}


def site_tensors(site: MergeSite) -> Iterator[str]:
    """The names in the model of a site's own tensors and of those below it."""
    for path, module in base_modules(site.module):
        for name in (*module._parameters, *module._buffers):
            yield site.name(f"{path}.{name}" if path else name)


def read_tensor(name: str, skeleton: Skeleton, files: CheckpointFiles, wide: torch.dtype | None) -> Tensor:
    """Reads a tensor by its name in the model. `wide`: a dtype that the result must at least have."""
    group = skeleton.names.of_memory.get(name)
    while group is not None and group.source is not None:
        group, name = group.source, group.source.memory[0]
    if group is None:
        raise absent_error(name)
    tensors = group.to_memory({disk: files.read(disk) for disk in group.disk})
    tensor = tensors[name]
    if wide is not None and tensor.is_floating_point():
        tensor = tensor.to(torch.promote_types(tensor.dtype, wide))
    return tensor


def absent_error(name: str) -> NotInFilesError:
    """The error for a tensor of a site that the base's files do not hold."""
    why, fix = "the files of the base do not hold this tensor", "load the model, and merge_to(model, folder)"
    return NotInFilesError("a rule can't be merged into files", where=name, why=why, fix=fix)


def merge_unit(
    unit: MergeUnit,
    skeleton: Skeleton,
    files: CheckpointFiles,
    owners: Owners,
    *,
    untie: bool,
    record: bool,
    wide: torch.dtype | None,
) -> tuple[dict[str, Tensor], list[tuple[str, Record]]]:
    """Merges a unit. Returns the new tensors by their names in the files, and the records by names in the model."""
    started = {site.name(name): tensor_at(site.module, name) for site in unit.sites for name, _ in site.started}

    def read(name: str) -> Tensor:
        if name not in started:
            return read_tensor(name, skeleton, files, wide)
        tensor = started[name].detach().clone()  # the adapter changed it when it was loaded (PiSSA)
        return tensor if wide is None else tensor.to(torch.promote_types(tensor.dtype, wide))

    store = TensorStore(read)
    for site in unit.sites:
        for name, made in site.started:
            store.changed[site.name(name)] = None
            store.folds.append((site.name(name), made))
    for site in unit.sites:
        merge_into(store, site, owners, untie, record)
    return to_disk(store, skeleton), store.folds


def to_disk(store: TensorStore, skeleton: Skeleton) -> dict[str, Tensor]:
    """The changed tensors of a store by their names in the files."""
    new: dict[str, Tensor] = {}
    if absent := [name for name in store.changed if name not in skeleton.names.of_memory]:
        raise absent_error(absent[0])
    changed = {id(group): group for name in store.changed if (group := skeleton.names.of_memory[name])}
    for group in changed.values():
        new |= group.to_disk({name: store[name] for name in group.memory})
    for name in store.changed:
        for twin in skeleton.twins.get(name, ()):
            new |= skeleton.names.of_memory[twin].to_disk({twin: store[name]})
    return new
