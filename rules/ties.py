"""Shared weights: two parameters become one, or one becomes two."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from surgery import ModelEdits, StructureRule, rule


@rule("tie")
class TieRule(StructureRule):
    """Make parameters one: a head that shares the embedding's weight.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import TieRule
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    >>> _ = apply_rules(model, [TieRule("1", to="0.weight")])
    >>> model[1].weight is model[0].weight
    True
    >>> remove(model)[1].weight is model[0].weight
    False

    The targets are the modules whose parameter goes. In a model of transformers that says which module is its head,
    the rule needs no fields. It changes `config.tie_word_embeddings` and the ties that the model declares, so
    `tie_weights` keeps the tie. The parameter that goes comes back with its values when the rule is removed.

    Args:
        to: the path of the parameter that takes the place; default None: the weight of the input embedding.
        parameter: the name of the targets' parameter; default "weight".

    Raises:
        SiteError: the parameters differ in shape or dtype, or are one already.

    Source: Press and Wolf 2017, arXiv:1608.05859.
    """

    to: str | None = None
    parameter: str = "weight"

    finds_targets = True

    def validate(self) -> None:
        if self.to is not None and (type(self.to) is not str or not self.to):
            raise self.bad("to", "the path of a parameter, such as 'embed.weight'")
        if type(self.parameter) is not str or not self.parameter.isidentifier():
            raise self.bad("parameter", "the name of a parameter")

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        edits.tie([path for path, _ in matched], self.parameter, self.to)


@rule("untie")
class UntieRule(StructureRule):
    """Give a module parameters of its own in the place of shared ones: a head beside the embedding.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import UntieRule
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    >>> model[1].weight = model[0].weight
    >>> apply_rules(model, [UntieRule("1", trainable=True)])[1].weight is model[0].weight
    False
    >>> [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    ['1.weight']
    >>> remove(model)[1].weight is model[0].weight
    True

    The new parameters start with the shared values. They belong to the adapter: its files have them, and load on a base
    that is tied. In a model of transformers that says which module is its head, the rule needs no targets. It changes
    `config.tie_word_embeddings` and the ties that the model declares, so `tie_weights` does not tie again. The flag
    stays where other ties of the model depend on it (T5's encoder and decoder).

    Args:
        parameter: the name of the targets' parameter; default None: all that they share with other modules.
        trainable: whether the new parameters train while the base is frozen; default False.

    Raises:
        SiteError: a target does not share a parameter.
    """

    parameter: str | None = None
    trainable: bool = False

    finds_targets = True

    def validate(self) -> None:
        if self.parameter is not None and (type(self.parameter) is not str or not self.parameter.isidentifier()):
            raise self.bad("parameter", "the name of a parameter")
        if type(self.trainable) is not bool:
            raise self.bad("trainable", "true or false")

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        edits.untie([path for path, _ in matched], self.parameter, trainable=self.trainable)
