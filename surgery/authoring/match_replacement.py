"""`MatchReplacement`: whole matches replaced, and every reason against it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

from surgery.authoring.forward_values import ForwardValues
from surgery.authoring.match_effects import (
    ReplacedMatch,
    active_passages,
    dropout_probability,
    region_objection,
    write_objection,
)
from surgery.authoring.site_facts import UNCALLED
from surgery.errors import SiteError
from surgery.forward.parameter_view import find_tensor
from surgery.forward.values import Value, ref_of
from surgery.structures.structure import Occurrence
from surgery.tracing.inlining import call_objection

__all__ = ["MatchReplacement"]


class MatchReplacement(ForwardValues):
    """The base class of `Site` for rules that replace whole matches.

    Attributes:
        claimed: The operations that earlier rules of the adapter replace at the site: node name → the rule's label.
        claims: The operations that this rule replaces.
        replaced: The matches that this rule replaces.
        warnings: Texts of `warn`.
    """

    claimed: Mapping[str, str]
    claims: dict[str, str]
    replaced: list[ReplacedMatch]
    warnings: list[str]

    @property
    def training(self) -> Tensor:
        raise NotImplementedError

    def objection(self, match: Occurrence, called: bool = True) -> str | None:
        """Returns why a match of `find` can't be replaced as a whole, or None.

        The reasons: an earlier rule of the adapter replaces a part of it; it writes in place to a value that is used
        outside; something else writes in place to what it reads, between its operations; the forward runs it under an
        autocast of its own; or a module has rules or hooks, and the site would no longer call it.

        Args:
            match: The match.
            called: Whether the rewrite has already made its calls of modules. False: the last reason is left out.
        """
        nodes, shared = self._nodes_of(match.nodes), set(self._nodes_of(match.shared))
        taken = next((node for node in nodes if node not in shared and node.name in self.claimed), None)
        if taken is not None:
            return f"{self.claimed[taken.name]} replaces {taken}"
        if (why := write_objection(nodes, shared) or region_objection(nodes)) is not None or not called:
            return why
        for path in self._uncalled(self._gone(match)):
            if (why := call_objection(self.module.get_submodule(path))) is not None:
                return f"the replacement does not call {path}, and {why}"
        return None

    def lost_passage(self, match: Occurrence) -> str | None:
        """Returns why a match can't be replaced in the present mode, or None.

        The reason: a dropout that is active in this mode, or a `detach`, lies between its operations, and the rewrite
        has not read `match.passed`.
        """
        root = self.node_of(match.root)
        for passage in self._passages:
            if passage.root is root and not passage.was_read:
                for kind, node in active_passages(passage.nodes, self.module, bool(self.training)):
                    return f"the replacement leaves out {node}, a {kind} inside of the match"
        return None

    def dropout_in(self, match: Occurrence) -> float:
        """Returns the probability of the dropout between the operations of a match; 0 if none is active in this mode.

        Raises:
            SiteError: There are several.
        """
        passed = self._nodes_of(match.passed)
        active = [node for kind, node in active_passages(passed, self.module, bool(self.training)) if kind == "dropout"]
        if len(active) > 1:
            raise SiteError(f"a match of {self.label} has {len(active)} dropouts: {active}", where=self.path)
        return dropout_probability(active[0], self.module) if active else 0.0

    def replace_match(self, match: Occurrence, new: Sequence[Any]) -> None:
        """Replace the results of a match of `find`.

        Args:
            match: The match.
            new: The new values, one for each of `match.roots`.

        Raises:
            SiteError: There are more or fewer new values than results; or there is an `objection`.
        """
        if len(new) != len(match.roots):
            raise SiteError(
                f"{self.label} replaces {len(match.roots)} results by {len(new)} values",
                where=self.path,
                fix="pass one value for each result of the match",
            )
        if (why := self.objection(match)) is not None:
            raise SiteError(f"{self.label} can't replace a match", where=self.path, why=why)
        gone = self._gone(match)
        nodes, shared = (tuple([node.name for node in self._nodes_of(part)]) for part in (match.nodes, match.shared))
        self.replaced.append(ReplacedMatch(nodes, shared))
        self.claims |= {node.name: self.label for node in gone}
        uncalled = {*self.facts.get(UNCALLED, ()), *self._uncalled(gone)}
        if uncalled:
            self.facts[UNCALLED] = tuple(sorted(uncalled))
        for root, value in zip(match.roots, new, strict=True):
            self.replace(root, value)

    def facts_of(self, value: Tensor) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
        """Returns the shape and dtype of a value from `find` in the example; None if they are unknown."""
        ref = ref_of(cast(Value, value))
        tensor = find_tensor(self.module, str(ref.key)) if ref.kind == "state" else None
        if tensor is not None:
            return tuple(tensor.shape), tensor.dtype
        node = self.node_of(value)
        return node.meta.get("shape"), node.meta.get("dtype")

    def warn(self, text: str) -> None:
        """Warn with a text: while planning, or in the first call of a kind, once for all sites of the adapter."""
        warning = f"{self.label} at {self.path or 'the model itself'} {text}"
        if warning not in self.warnings:
            self.warnings.append(warning)

    def replace(self, old: Tensor, new: Any, *, only: Sequence[Tensor] = ()) -> None:
        raise NotImplementedError

    def _nodes_of(self, values: Collection[Any]) -> list[fx.Node]:
        return [self.node_of(value) for value in values]

    def _gone(self, match: Occurrence) -> list[fx.Node]:
        """Returns the operations that nothing needs once the match is replaced."""
        shared = set(self._nodes_of(match.shared))
        return [node for node in self._nodes_of(match.nodes) if node not in shared]

    def _uncalled(self, gone: Collection[fx.Node]) -> list[str]:
        """Returns the modules whose only calls are among these nodes, and that the rewrite does not call."""
        calls = {str(node.target) for node in gone if node.op == "call_module"}
        others = {str(node.target) for node in self.graph.nodes if node.op == "call_module" and node not in gone}
        again = {str(step.target) for step in self.tape.steps if step.kind == "module"}
        return sorted(calls - others - again)
