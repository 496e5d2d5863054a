"""Makes and undoes the edits of structural rules on a model with adapters: their sites, flags and names move along."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from surgery.patterns.module_walk import base_modules
from surgery.rewritten_model import transformers_hooks
from surgery.rewritten_model.config_changes import carry_config_changes, note_configs
from surgery.rewritten_model.output_hooks import renew_output_hooks
from surgery.rewritten_model.resized_embeddings import grow_site
from surgery.state.record_undo import keep_model, keep_site
from surgery.state.records import ModelState, Places, base_parameters, site_state, sites
from surgery.state.restructuring import Restructuring, place_of, set_aside_modules
from surgery.state.site_links import module_at
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.undo_log import Journal, Trial
from surgery.weaving.site_class import install_live

__all__ = [
    "make_edits",
    "moved_along",
    "set_aside_sites",
    "structure_undone",
    "undo_edits",
]


def make_edits(root: nn.Module, state: ModelState | None, record: Restructuring, journal: Journal) -> None:
    """Make the noted edits of a structural rule."""

    def change() -> None:
        for edit in record.edits:
            journal.undo(edit.undo)
            edit.make()

    record.place, record.training = place_of(root), root.training
    moved_along(root, state, record, journal, change)
    note_configs(record)


def undo_edits(root: nn.Module, state: ModelState, record: Restructuring, journal: Journal) -> None:
    """Undo the edits of a structural rule. `check_undoable` was called."""

    def change() -> None:
        _undo_tables(record, journal)

    carry_config_changes(record, journal)
    _follow_place(root, record, journal)
    _follow_mode(root, record, journal)
    moved_along(root, state, record, journal, change)


def _undo_tables(record: Restructuring, journal: Journal) -> None:
    """Undo the edits of the tables. Tensors with other rows get the common rows of those that the model has now."""
    resized = [(old, _present(owner, name)) for owner, name, old, _ in record.resized]
    for owner, name, *_ in record.resized:  # other code may have put another tensor there
        journal.keep(owner._parameters if name in owner._parameters else owner._buffers)
    for edit in reversed(record.edits):
        journal.undo(edit.make)
        edit.undo()
    for old, present in resized:
        _carry_over(old, present, journal)


def _present(owner: nn.Module, name: str) -> torch.Tensor:
    tensor: Any = owner._parameters.get(name, owner._buffers.get(name))
    return tensor


def _carry_over(old: torch.Tensor, new: torch.Tensor, journal: Journal) -> None:
    """Copy the entries that both have into the tensor that comes back: the base may have been trained meanwhile."""
    if old.is_meta or new.is_meta:
        return
    common = tuple(slice(min(sizes)) for sizes in zip(old.shape, new.shape, strict=True))
    present, trained = old.detach()[common], new.detach()[common].to(old.device, old.dtype)
    if not torch.equal(present, trained):
        journal.undo(_set_data, old, old.data)
        old.data = old.detach().clone()
        old.detach()[common] = trained


@contextmanager
def structure_undone(records: Sequence[Restructuring]) -> Iterator[None]:
    """Inside the block, these structural rules, the model's last ones, are undone. Records of sites do not follow."""
    with Trial() as journal:
        for record in reversed(records):
            _undo_tables(record, journal)
        yield


def set_aside_sites(root: nn.Module, state: ModelState) -> list[nn.Module]:
    """The sites on modules that structural rules took out of the model."""
    if not state.structure:
        return []
    return [module for module in set_aside_modules(root, state.structure) if site_state(module) is not None]


def moved_along(
    root: nn.Module, state: ModelState | None, record: Restructuring, journal: Journal, change: Callable[[], None]
) -> None:
    """Change the structure, and adapt the records of adapters: paths, places, flags, and lists of names."""
    present = {id(module) for _, module in base_modules(root)}
    if state is None:
        change()
        return renew_output_hooks(root, present, journal)
    keep_model(journal, root, state)
    state.moved = bool(state.adapters)
    old_sites = {id(module) for _, module, _ in sites(root)}
    flags = {id(parameter): state.flags[name] for name, parameter in base_parameters(root) if name in state.flags}
    flags |= {id(parameter): flag for parameter, flag in record.flags}
    old_parameters = dict((id(parameter), parameter) for _, parameter in base_parameters(root))
    switched = [(module_at(root, path), rest) for path, *rest in state.switched]
    change()
    renew_output_hooks(root, present, journal)
    for _, _, old, new in record.exchanged:
        if id(old) in flags:
            flags.setdefault(id(new), flags[id(old)])
    for module in {id(owner): owner for owner, *_ in record.resized}.values():
        if site_state(module) is not None:
            grow_site(module, journal)
    for source, copied in record.copies:
        pairs = zip(source.parameters(), copied.parameters(), strict=False)
        flags |= {id(b): flags[id(a)] for a, b in pairs if id(a) in flags and id(b) not in flags}
    _move_sites(root, state, old_sites, journal)
    paths = {id(module): path for path, module in base_modules(root)}
    state.switched[:] = [(paths.get(id(module), ""), *rest) for module, rest in switched]  # type: ignore[misc]
    _move_flags(root, state, record, flags, old_parameters, journal)
    state.links = None
    state.unlinked.clear()
    for path, _ in state.ignored_on_save:
        if (saver := module_at(root, path)) is not None:
            journal.keep(saver.__dict__)
    transformers_hooks.ignore_on_save(root, state)


def _move_sites(root: nn.Module, state: ModelState, old: set[int], journal: Journal) -> None:
    """Give each site its present path, and each adapter its present sites."""
    present = {id(module): (path, module, site) for path, module, site in sites(root)}
    for key, (path, module, site) in present.items():
        if key not in old:
            keep_site(journal, module)
            site.path = path
            install_live(module, journal)  # other adapters may be live, or have other weights
        elif site.path != path:
            journal.attribute(site, "path")
            site.path = path
    for adapter, places in list(state.places.items()):
        modules = [module for module in places.modules if id(module) in present]
        known = {id(module) for module in modules}
        new = [module for key, (_, module, site) in present.items() if key not in known and site.of((adapter,))]
        if new:  # in the order of the model
            order = {key: index for index, key in enumerate(present)}
            new = sorted(modules + new, key=lambda module: order[id(module)])
        rules = [
            (module, [applied for _, applied in present[id(module)][2].of((adapter,))]) for module in new or modules
        ]
        state.places[adapter] = Places.of(adapter, rules)


def _move_flags(
    root: nn.Module,
    state: ModelState,
    record: Restructuring,
    flags: dict[int, bool],
    old: dict[int, nn.Parameter],
    journal: Journal,
) -> None:
    """Name the noted flags of the base by the present names, and freeze parameters that come to a frozen base."""
    present = list(base_parameters(root))
    ids = {id(parameter) for _, parameter in present}
    record.flags = [(parameter, flags[key]) for key, parameter in old.items() if key not in ids and key in flags]
    known = dict((id(parameter), flag) for parameter, flag in record.flags)
    flags = {**flags, **known}
    if not state.freezing:
        for _, parameter in present:
            if id(parameter) not in old and id(parameter) in flags:
                set_flag(parameter, flags[id(parameter)], journal)
        if state.flags:  # `remove` has yet to restore them
            state.flags = {name: flags[id(parameter)] for name, parameter in present if id(parameter) in flags}
        return
    state.flags = {name: flags.get(id(parameter), parameter.requires_grad) for name, parameter in present}
    trained = {id(tensor.whole) for made in state.structure for tensor in made.tensors if tensor.trainable}
    for _, parameter in present:
        if id(parameter) not in old:
            set_flag(parameter, id(parameter) in trained, journal)


def _follow_place(root: nn.Module, record: Restructuring, journal: Journal) -> None:
    """Move what comes back to the device and the dtype that the model went to in the meantime."""
    now = place_of(root)
    if now is None or record.place is None or now == record.place:
        return
    (device, dtype), (old_device, old_dtype) = now, record.place
    staying = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
    for tensor in record.tensors_of("before"):
        if id(tensor) in staying:
            continue
        cast = dtype if dtype != old_dtype and tensor.dtype == old_dtype else tensor.dtype
        target = device if device != old_device and tensor.device == old_device else tensor.device
        journal.undo(_set_data, tensor, tensor.data)
        tensor.data = tensor.data.to(target, cast)


def _follow_mode(root: nn.Module, record: Restructuring, journal: Journal) -> None:
    """Put what comes back into the mode that the model went to in the meantime, by `train()` or `eval()`."""
    if record.training is None or root.training == record.training:
        return
    for module in set_aside_modules(root, [record]):
        if module.training == record.training:
            journal.attribute(module, "training")
            module.training = root.training


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    tensor.data = data
