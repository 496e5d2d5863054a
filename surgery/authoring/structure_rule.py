"""`StructureRule`: the base class of rules that change a model's modules and not what a module computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from surgery.authoring.rule import Rule
from surgery.model_edits.model_edits import ModelEdits

__all__ = ["StructureRule"]


@dataclass(frozen=True)
class StructureRule(Rule):
    """A rule that changes the structure of the model: its layers, its vocabulary, tied weights.

    It changes the model through `edits`, which notes the inverse of each change, so `remove` undoes it to the bit. Of
    the rules in one call, structural rules come first, and the other rules see the new structure.

    >>> from torch import nn
    >>> from surgery import StructureRule, apply_rules, remove, rule
    >>> @rule("doc-exact-gelu")
    ... class ExactGeluRule(StructureRule):
    ...     def restructure(self, edits, matched):
    ...         for path, _ in matched:
    ...             edits.set_module(path, nn.GELU())
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> apply_rules(model, [ExactGeluRule("1")])[1]
    GELU(approximate='none')
    >>> remove(model)[1]
    ReLU()
    """

    finds_targets: ClassVar[bool] = False  # without targets, `restructure` gets no modules and finds them itself
    routable: ClassVar[bool] = False
    scalable: ClassVar[bool] = False
    why_not_merged = "it changes the model's structure, and not weights: commit(model) makes it final"
    why_not_combined = "structures can't be added"

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        """Change the model.

        Args:
            edits: makes the changes: `edits.set_module(path, module)`, `edits.set_parameter(…)` and others.
            matched: the matched modules with their paths, in the model's order.

        Raises:
            SurgeryError: the model can't be changed so. All changes are undone.
        """
        raise NotImplementedError(f"{type(self).__name__} has no restructure")

    def in_files(self) -> Rule:
        """Return the rule as files have it: without tensors in fields, because files have their values. Default: it."""
        return self

    def rewrite(self, site: Any) -> None:
        """A structural rule does not edit forwards."""
        return None
