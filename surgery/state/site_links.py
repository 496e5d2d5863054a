"""The edges between a model and its sites. They show cheaply whether a site is still in the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.patterns.wrappers import child_of, unwrap

__all__ = ["Links", "at_path", "link_sites", "module_at"]

Edge = tuple[nn.Module, str, nn.Module]  # a parent, a name, and the child of this name


@dataclass
class Links:
    """Every edge between the model and its sites, once. Checking them takes microseconds and no walk of the model.

    `sites`: the ids of the sites that the edges lead to.
    """

    edges: list[Edge] = field(default_factory=list)
    sites: set[int] = field(default_factory=set)

    def hold(self) -> bool:
        """Whether every child is still in its place."""
        for parent, name, child in self.edges:
            if parent._modules.get(name) is not child:
                return False
        return True

    def add(self, root: nn.Module, sites: Iterable[nn.Module]) -> list[nn.Module]:
        """Add the edges to more sites. Returns the sites that are not in the model."""
        above, seen, missing = _above(root), {id(child) for _, _, child in self.edges}, list[nn.Module]()
        for site in sites:
            if site is root or id(site) in self.sites:
                continue
            if id(site) not in above:
                missing.append(site)
                continue
            self.sites.add(id(site))
            module = site
            while module is not root and id(module) not in seen:
                seen.add(id(module))
                parent, name = above[id(module)]
                if not isinstance(parent, torch.jit.ScriptModule):  # its children do not have `get`, and do not change
                    self.edges.append((parent, name, module))
                module = parent
        return missing


def link_sites(root: nn.Module, sites: Iterable[nn.Module]) -> tuple[Links, list[nn.Module]]:
    """Returns the links of a model's sites, and the sites that are not in the model."""
    links = Links()
    return links, links.add(root, sites)


def at_path(root: nn.Module, path: str) -> tuple[str, nn.Module]:
    """Returns the module at a path without wrapper segments, or the last existing module on it, with its path."""
    module, done = root, list[str]()
    for name in path.split(".") if path else ():
        child = child_of(module, name)
        if child is None:
            break
        done.append(name)
        module = child
    return ".".join(done), unwrap(module)


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    """Returns the module at a path, or None."""
    reached, module = at_path(root, path)
    return module if reached == path else None


def _above(root: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """Returns the first parent of each module in a walk, with the child's name, by the child's id."""
    parents: dict[int, tuple[nn.Module, str]] = {}
    waiting = [root]
    while waiting:
        parent = waiting.pop()
        for name, child in parent._modules.items():
            if child is None or child is root or id(child) in parents or (name == RESERVED and is_adapters(child)):
                continue
            parents[id(child)] = parent, name
            waiting.append(child)
    return parents
