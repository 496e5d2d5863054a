"""Sites that stand at other paths than when rules were applied: whether the rules still mean them."""

from __future__ import annotations

from torch import nn

from surgery.errors import SurgeryError, abbreviate
from surgery.planning.matching import Tree
from surgery.state.records import ModelState, Sites
from surgery.storage.hotswap_plan import placed

__all__ = ["check_meant"]


def check_meant(root: nn.Module, state: ModelState, all_sites: Sites, adapter: str) -> None:
    """`SurgeryError` where an adapter's rules, as they are written into files, no longer lead to its sites."""
    mine = {id(module) for module in state.places[adapter].modules}
    here = [(path, module, site.path) for path, module, site in all_sites if id(module) in mine]
    if all(path == before for path, _, before in here):
        return
    problems: list[SurgeryError] = []
    meant = {id(match.module) for _, match in placed(Tree.of(root), list(state.adapters[adapter]), problems)}
    strayed = [f"{path}, which was {before}" for path, module, before in here if id(module) not in meant]
    if strayed:
        raise SurgeryError(
            f"the adapter {adapter!r} can't be saved: modules of the model have moved",
            where=abbreviate(strayed),
            why="its rules say by path where they go, and no longer lead there",
            fix="put the modules back, or apply rules after the model has its structure",
        )
