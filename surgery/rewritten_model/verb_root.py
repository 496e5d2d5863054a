"""Finds the rewritten model in a verb's argument and checks that all its sites are still in it. Verbs begin here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import nn

from surgery.authoring.rule_arguments import model_problem
from surgery.errors import SurgeryError, abbreviate
from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.patterns.wrappers import unwrap
from surgery.rewritten_model.moved_sites import follow
from surgery.state.records import (
    ModelState,
    SiteState,
    is_only_record,
    merged_adapters,
    model_state,
    require_state,
    site_state,
    sites,
)
from surgery.state.site_links import at_path, link_sites

__all__ = [
    "check_all_present",
    "check_parts_idle",
    "records_in",
    "rewritten",
    "rewritten_if_any",
    "root_of",
    "with_lost",
]


def rewritten(model: nn.Module, *, lost: bool = False) -> tuple[nn.Module, ModelState]:
    """Returns the rewritten model, which may be inside the argument (a host module or a wrapper), and its record.

    Raises `SurgeryError` if there is not exactly one, or if a site is no longer in the model (unless `lost`).
    """
    root = root_of(model)
    state = require_state(root)
    if not lost:
        check_present(root, state)
    return root, state


def rewritten_if_any(model: nn.Module) -> tuple[nn.Module, ModelState] | None:
    """As `rewritten`, for functions that only read. None if no rules were applied to any part of the model."""
    check_module(model)
    root = unwrap(model)
    if not records_in(root) and not any(True for _ in sites(root)):
        return None
    return rewritten(model)


def root_of(model: nn.Module) -> nn.Module:
    """Returns the only module with a model record: the argument, the module that it wraps, or a module inside it."""
    root = unwrap(model)
    check_module(model)
    if model_state(root) is not None:
        return root
    below = records_in(root)
    if len(below) == 1:
        return next(iter(below.values()))
    if below:
        raise SurgeryError(
            f"{len(below)} parts of this {type(root).__name__} were rewritten separately",
            where=abbreviate(list(below)),
            why="each has a record and adapters of its own",
            fix=f"pass one of them: model.{next(iter(below))}",
        )
    inner_sites = [(path, site.path) for path, _, site in sites(root)]
    if inner_sites:
        path_here, recorded = inner_sites[0]
        path_in_model = recorded.removesuffix(path_here).rstrip(".") if recorded.endswith(path_here) else ""
        raise SurgeryError(
            "this is a part of a rewritten model",
            where=abbreviate([path or "(the module itself)" for path, _ in inner_sites]),
            why="the record of its rules is on the model that apply_rules was called with"
            + (f", in which this is {path_in_model!r}" if path_in_model else ""),
            fix="pass that model",
        )
    raise SurgeryError(
        "no rules were applied to this module",
        why="it has no adapters",
        fix="apply rules first, or pass the module that apply_rules was called with",
    )


def check_module(model: object) -> None:
    """Raise `SurgeryError` if the argument of a verb is not a module."""
    problem = model_problem(unwrap(model))
    if problem is not None:
        raise problem


def records_in(model: nn.Module, *, below: bool = False, nested: bool = False) -> dict[str, nn.Module]:
    """Returns the modules with a record by path. Records inside another rewritten module count only if `nested`.

    `below`: skip the record of the model itself.
    """
    check_module(model)
    roots: dict[str, nn.Module] = {}
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if model_state(module) is not None and not (below and module is model):
            roots[path] = module
            if not nested:
                continue
        for name, child in reversed(module._modules.items()):
            if child is not None and not (name == RESERVED and is_adapters(child)):
                waiting.append((f"{path}.{name}" if path else name, child))
    return roots


def check_present(root: nn.Module, state: ModelState) -> None:
    """Raise `SurgeryError` if a site is no longer in the model and its record can't move to a replacement."""
    links, new_sites = state.links, state.unlinked
    if links is not None and links.hold() and (not new_sites or not links.add(root, new_sites)):
        new_sites.clear()
        return
    for _ in range(2):  # check again after moving records
        state.links, missing = link_sites(root, state.sites())
        new_sites.clear()
        if not missing:
            return
        state.links = None
        unreplaced = follow(root, state, missing)
        if unreplaced:
            raise _lost_sites_error(root, unreplaced)


def check_parts_idle(root: nn.Module) -> None:
    """Raise `SurgeryError` if a part that was rewritten separately has live adapters: verbs on the whole skip those.

    The model is walked only if this process has another rewritten model.
    """
    if is_only_record():
        return
    parts = records_in(root, below=True, nested=True)
    live = {path: names for path, part in parts.items() if (names := _live_adapters(part))}
    if not live:
        return
    path, names = next(iter(live.items()))
    undo = "unmerge and deactivate" if merged_adapters(parts[path]) else "deactivate"
    raise SurgeryError(
        "part of this model has live adapters of its own",
        where=abbreviate(list(live), "parts"),
        why=f"it was rewritten separately, and {', '.join(names)} would stay live",
        fix=f"{undo} model.{path} first; activate(model.{path}) makes them live again afterwards",
    )


def _live_adapters(part: nn.Module) -> list[str]:
    state = model_state(part)
    return [name for name, status in state.standing.items() if status.live] if state is not None else []


def with_lost(
    root: nn.Module, state: ModelState, adapters: Iterable[str] | None = None
) -> Iterator[tuple[str, nn.Module, SiteState]]:
    """Yields `sites`, then the sites (of these adapters) that are no longer in the model, with their former paths."""
    recorded = state.sites() if adapters is None else [m for name in adapters for m in state.places[name].modules]
    remaining = {id(module): module for module in recorded}
    for path, module, site in sites(root):
        remaining.pop(id(module), None)
        yield path, module, site
    for module in remaining.values():
        if (site := site_state(module)) is not None:
            yield site.path, module, site


def check_all_present(model: nn.Module) -> None:
    """Call `check_present` for each record in a model."""
    for root in records_in(model, nested=True).values():
        if (state := model_state(root)) is not None:
            check_present(root, state)


def _lost_sites_error(root: nn.Module, modules: list[nn.Module]) -> SurgeryError:
    """Returns the error for lost sites. It names each recorded module and the module at its path now."""
    texts = []
    for module in modules:
        site = site_state(module)
        path = site.path if site is not None else "(unknown)"
        rules = (
            ", ".join(f"{applied.rule.label} [{applied.adapter}]" for applied in site.applied)
            if site is not None
            else "rules"
        )
        reached, present = at_path(root, path)
        if reached != path:
            change = f"{reached or 'the model'} has no {path.removeprefix(reached).lstrip('.')} now"
        elif present is module:
            change = "it is reached by another way now"
        else:
            change = f"another {_describe_module(present)} is there now"
        texts.append(
            f"{path or '(the model itself)'} was a {_describe_module(module)} rewritten by {rules}, and {change}"
        )
    many = f"{len(modules)} modules that have adapters are" if len(modules) > 1 else "a module that has adapters is"
    more = f"; and {len(texts) - 2} more" if len(texts) > 2 else ""
    return SurgeryError(
        f"{many} no longer in the model",
        where=abbreviate([site.path for module in modules if (site := site_state(module)) is not None]),
        why="; ".join(texts[:2]) + more,
        fix="replace modules before rules are applied; restore the former modules, or remove the rules from the rest "
        "(remove(model, check=False)) and apply them again",
    )


def _describe_module(module: nn.Module) -> str:
    sizes = module.extra_repr()
    return f"{type(module).__name__}({sizes})" if len(sizes) < 80 else type(module).__name__
