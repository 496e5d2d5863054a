"""`RewriteMatch`: one match, as a replacement and a condition see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx

from surgery import Occurrence, Site

__all__ = ["MatchSite", "RewriteMatch", "disjoint"]


class RewriteMatch(Mapping[str, Any]):
    """One match of a pattern at a site: a mapping from the pattern's names to what they stand for.

    Attributes:
        site: The site.
        found: The match as `site.find` returns it.
    """

    def __init__(self, site: Site, found: Occurrence, names: tuple[str, ...], number: int = 0):
        self.site, self.found, self.number = site, found, number
        self._names = names

    def __getitem__(self, name: str) -> Any:
        if name not in self._names:
            raise KeyError(name)
        return self.found.bindings.get(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @property
    def path(self) -> str:
        """The path of the site."""
        return self.site.path

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """The nodes of the match, in the graph's order."""
        return tuple(self.site.node_of(value) for value in self.found.nodes)

    @property
    def modules(self) -> set[str]:
        """The paths, from the site, of the modules whose forwards have the operations, as far as they are inlined."""
        nodes = [node for node in self.nodes if node.op != "get_attr"]
        return {node.meta.get("inlined", _caller(node)) for node in nodes}

    @property
    def results(self) -> set[fx.Node]:
        """The nodes that the replacement's results take the place of."""
        roots = getattr(self.found, "roots", None) or (self.found.root,)
        return {self.site.node_of(root) for root in roots}

    @property
    def inner(self) -> set[fx.Node]:
        """The nodes that nothing outside the match uses, without the results."""
        shared = {self.site.node_of(value) for value in self.found.shared}
        return {*self.nodes} - self.results - shared

    @property
    def dropout(self) -> float:
        """The probability of a dropout between the operations; 0 if none is active in the present mode.

        A replacement that reads it says that it drops as the forward did. If it does not, the match is left as it is
        in training.
        """
        return self.site.dropout_in(self.found)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of a tensor in the example; None for another value, or if it is unknown."""
        return self._example(name)[0]

    def dtype(self, name: str) -> Any:
        """Returns the dtype of a tensor in the example; None for another value, or if it is unknown."""
        return self._example(name)[1]

    @property
    def result_dtype(self) -> Any:
        """The dtype of the pattern's result in the example."""
        return self.site.node_of(self.found.root).meta.get("dtype")

    def is_constant(self, name: str) -> bool:
        """Whether a name stands for a plain value, such as a number in the code. An absent name is None: constant."""
        return not hasattr(type(self[name]), "__torch_function__")

    def _example(self, name: str) -> tuple[tuple[int, ...] | None, Any]:
        value = self[name]
        if self.is_constant(name):
            return None, None
        return self.site.facts_of(value)


def disjoint(matches: list[RewriteMatch]) -> list[RewriteMatch]:
    """Returns matches that can all be rewritten: where the result of one is an operation inside another, the larger."""
    chosen: list[RewriteMatch] = []
    for match in sorted(matches, key=lambda match: -len(match.nodes)):
        if not any(_overlap(match, other) for other in chosen):
            chosen.append(match)
    kept = set(map(id, chosen))  # two matches are compared by identity: their values can't be
    return [match for match in matches if id(match) in kept]


def _overlap(match: RewriteMatch, other: RewriteMatch) -> bool:
    return match.results & other.inner != set() or other.results & match.inner != set()


def _caller(node: fx.Node) -> str:
    return str(node.target).rpartition(".")[0] if node.op == "call_module" else ""


class MatchSite:
    """A site for the replacement of one match: tensors of further matches get further names.

    Everything else is that of the site.
    """

    def __init__(self, site: Site, number: int):
        self._site, self._number = site, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._site, name)

    def param(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        return self._site.param(self._numbered(name), *args, **kwargs)

    def buffer(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        return self._site.buffer(self._numbered(name), *args, **kwargs)

    def submodule(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self._site.submodule(self._numbered(name), *args, **kwargs)

    def _numbered(self, name: str) -> str:
        return f"{name}_{self._number}" if self._number else name
