"""Another head: a classifier with other labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery import ModelEdits, StructureRule, rule


@rule("head")
class HeadRule(StructureRule):
    """Exchange the head of a model for a new one with other labels. It trains with the adapter.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import HeadRule
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    >>> apply_rules(model, [HeadRule("1", labels=5)])[1]
    Linear(in_features=8, out_features=5, bias=True)
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight', '1.bias']
    >>> remove(model)[1]
    Linear(in_features=8, out_features=2, bias=True)

    Models of transformers need no targets: the rule finds the layers whose size follows from the configuration's number
    of labels. The configuration gets the number and the names of the labels, and `model.num_labels` changes. So the
    model is one that was built with these labels, with its loss. In other models the targets name the last Linear.
    Attributes such as `num_classes` of the modules around it change, too.

    The new head starts as the model's class starts it, in the dtype of the old one. Its tensors are in the adapter's
    files, which load on a base with the old head.

    Args:
        labels: the number of labels, or their names.
        trainable: whether the new head trains while the base is frozen; default True.

    Raises:
        RuleError: a field is out of range.
        SiteError: there is no head, or a target is not a Linear.
    """

    labels: int | Sequence[str] = 0
    trainable: bool = True

    finds_targets = True

    def validate(self) -> None:
        labels: Any = self.labels
        if type(labels) is int:
            valid = labels > 0
        else:
            valid = isinstance(labels, tuple) and bool(labels) and all(isinstance(name, str) for name in labels)
            valid = valid and len(set(labels)) == len(labels)
        if not valid:
            raise self.bad("labels", "a number of labels, or a list of different names")
        if type(self.trainable) is not bool:
            raise self.bad("trainable", "true or false")

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        edits.exchange_head([path for path, _ in matched], self.labels, trainable=self.trainable)
