"""Checks before saving that an adapter's rules still match its sites, if modules have moved."""

from __future__ import annotations

from torch import nn

from surgery.errors import SurgeryError, abbreviate
from surgery.planning.matching import Tree
from surgery.state.records import ModelState, Sites
from surgery.storage.hotswap_plan import matched_sites

__all__ = ["check_targets"]


def check_targets(root: nn.Module, state: ModelState, all_sites: Sites, adapter: str) -> None:
    """Raises `SurgeryError` if the rules that would be saved no longer match the adapter's sites."""
    adapter_modules = {id(module) for module in state.places[adapter].modules}
    adapter_sites = [(path, module, site.path) for path, module, site in all_sites if id(module) in adapter_modules]
    if all(path == before for path, _, before in adapter_sites):
        return
    problems: list[SurgeryError] = []
    matched = {id(match.module) for _, match in matched_sites(Tree.of(root), list(state.adapters[adapter]), problems)}
    unmatched = [f"{path}, which was {before}" for path, module, before in adapter_sites if id(module) not in matched]
    if unmatched:
        raise SurgeryError(
            f"the adapter {adapter!r} can't be saved: modules of the model have moved",
            where=abbreviate(unmatched),
            why="its rules name these modules by path, and no longer match them",
            fix="put the modules back, or apply rules after the model has its structure",
        )
