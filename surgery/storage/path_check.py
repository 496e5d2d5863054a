"""Checks before saving that an adapter's rules still match its sites, if modules have moved."""

from __future__ import annotations

from torch import nn

from surgery.authoring.structure_rule import StructureRule
from surgery.errors import SurgeryError, abbreviate
from surgery.planning.matching import Tree
from surgery.state.records import ModelState, Sites
from surgery.storage.hotswap_plan import matched_sites

__all__ = ["check_targets"]


def check_targets(root: nn.Module, state: ModelState, all_sites: Sites, adapter: str) -> None:
    """Raises `SurgeryError` if the rules that would be saved no longer match the adapter's sites."""
    adapter_modules = {id(module) for module in state.places[adapter].modules}
    adapter_sites = [(path, module, site.path) for path, module, site in all_sites if id(module) in adapter_modules]
    if not state.moved and all(path == before for path, _, before in adapter_sites):
        return
    rules = [rule for rule in state.adapters[adapter] if not isinstance(rule, StructureRule)]
    matched = {id(match.module): match.path for _, match in matched_sites(Tree.of(root), rules, [])}
    names = [
        (path, path if path == before else f"{path}, which was {before}", module)
        for path, module, before in adapter_sites
    ]
    unmatched = [name for _, name, module in names if id(module) not in matched]
    if unmatched:
        raise SurgeryError(
            f"the adapter {adapter!r} can't be saved: modules of the model have moved",
            where=abbreviate(unmatched),
            why="its rules name these modules by path, and no longer match them",
            fix=_FIX,
        )
    more = [path for key, path in matched.items() if key not in adapter_modules] if state.moved else []
    if more:
        raise SurgeryError(
            f"the adapter {adapter!r} can't be saved: the structure of the model has changed",
            where=abbreviate(more),
            why="its rules match these modules, too, and it is not on them",
            fix=_FIX,
        )


_FIX = "put the modules back, or apply rules after the model has its structure; save_surgery writes all adapters"
