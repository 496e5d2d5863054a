"""How a record's sites hang in their model: by which parents and names. Tells cheaply when one is no longer there."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from surgery.patterns.module_walk import RESERVED, is_adapters
from surgery.patterns.wrappers import child_of, unwrap

__all__ = ["Links", "at_path", "linked", "there"]

Edge = tuple[nn.Module, str, nn.Module]  # a parent, a name, and the child of this name


@dataclass
class Links:
    """Each edge between the model and its sites, once: to look at all costs some microseconds, and walks nothing.

    `sites`: the ids of the sites that the edges lead to.
    """

    edges: list[Edge] = field(default_factory=list)
    sites: set[int] = field(default_factory=set)

    def hold(self) -> bool:
        """Whether every child is still where it was."""
        for parent, name, child in self.edges:
            if parent._modules.get(name) is not child:
                return False
        return True

    def add(self, root: nn.Module, sites: Iterable[nn.Module]) -> list[nn.Module]:
        """Find the way to more sites; returns those that are not in the model."""
        above, seen, lost = _above(root), {id(child) for _, _, child in self.edges}, list[nn.Module]()
        for site in sites:
            if site is root or id(site) in self.sites:
                continue
            if id(site) not in above:
                lost.append(site)
                continue
            self.sites.add(id(site))
            module = site
            while module is not root and id(module) not in seen:
                seen.add(id(module))
                parent, name = above[id(module)]
                if not isinstance(parent, torch.jit.ScriptModule):  # its children have no `get`, and don't change
                    self.edges.append((parent, name, module))
                module = parent
        return lost


def linked(root: nn.Module, sites: Iterable[nn.Module]) -> tuple[Links, list[nn.Module]]:
    """The links of a model's sites, and the sites that are not in the model."""
    links = Links()
    return links, links.add(root, sites)


def at_path(root: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The module at a path (wrappers' segments left out), or the last one on it where it ends; with its path."""
    module, done = root, list[str]()
    for name in path.split(".") if path else ():
        child = child_of(module, name)
        if child is None:
            break
        done.append(name)
        module = child
    return ".".join(done), unwrap(module)


def there(root: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, if there still is one."""
    found, module = at_path(root, path)
    return module if found == path else None


def _above(root: nn.Module) -> dict[int, tuple[nn.Module, str]]:
    """The parent of each module, and its name there: the first that a walk comes by."""
    found: dict[int, tuple[nn.Module, str]] = {}
    waiting = [root]
    while waiting:
        parent = waiting.pop()
        for name, child in parent._modules.items():
            if child is None or child is root or id(child) in found or (name == RESERVED and is_adapters(child)):
                continue
            found[id(child)] = parent, name
            waiting.append(child)
    return found
