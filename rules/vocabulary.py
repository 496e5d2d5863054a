"""Another number of tokens: embeddings, heads and the configuration grow or shrink."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from surgery import ModelEdits, Rule, StructureRule, rule


@rule("resize-vocab")
class ResizeVocabRule(StructureRule):
    """Change the number of tokens that a model knows, as if it had been built so.

    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import ResizeVocabRule
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    >>> apply_rules(model, [ResizeVocabRule(["0", "1"], tokens=12)])
    Sequential(
      (0): Embedding(12, 4)
      (1): Linear(in_features=4, out_features=12, bias=True)
    )
    >>> remove(model)[0]
    Embedding(10, 4)

    Models of transformers need no targets: the rule finds all that depends on the size of the vocabulary, tied or not,
    and changes the configuration. In other models the targets are the embedding and an untied head.

    The rows of the base stay, and its modules stay the same objects. New rows do not train by themselves: name them in
    a TokensRule of the same call. Files of the adapter have only the new rows, and load on a base that was not resized.
    If the base was trained meanwhile, `remove` keeps the trained values of its rows.

    Args:
        tokens: the new number of rows; default None: the present one, for `pad_to_multiple_of`.
        pad_to_multiple_of: the number is rounded up to a multiple of this; default None.
        init: what new rows start as: "mean" (default) of all rows, "zeros", "normal" (draws with the configuration's
            deviation) or "copy". Or a tensor (new rows, features), or a mapping from modules' paths to tensors: such a
            rule can't be written as data, but the adapter's files hold the rows.
        sources: for "copy": for each new row the number of a row, or several, whose mean it starts as. Rows without a
            source start as the mean; default None.

    Raises:
        RuleError: a field is out of range.
        SiteError: the configuration uses a token that would go; the embedding is not known; the rows do not fit.

    Source: transformers' `resize_token_embeddings`.
    """

    tokens: int | None = None
    pad_to_multiple_of: int | None = None
    init: Literal["mean", "zeros", "normal", "copy"] | Tensor | Mapping[str, Tensor] = "mean"
    sources: Sequence[int | Sequence[int]] | None = None

    finds_targets = True

    def validate(self) -> None:
        for name in ("tokens", "pad_to_multiple_of"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise self.bad(name, "a whole number from 1")
        if self.tokens is None and self.pad_to_multiple_of is None:
            raise self.bad("tokens", "given: the number of tokens")
        init: Any = self.init
        tensors = list(init.values()) if isinstance(init, Mapping) else [init]
        if not isinstance(init, str) and not (tensors and all(isinstance(item, Tensor) for item in tensors)):
            raise self.bad("init", _STARTS)
        if isinstance(init, str) and init not in ("mean", "zeros", "normal", "copy"):
            raise self.bad("init", _STARTS)
        if (init == "copy" if isinstance(init, str) else False) is not (self.sources is not None):
            raise self.bad("sources", "given with init='copy', and with no other start")
        if self.sources is not None and not all(map(_is_source, self.sources)):
            raise self.bad("sources", "a list of row numbers, or of lists of row numbers")

    def in_files(self) -> Rule:
        return self if isinstance(self.init, str) else self.replace(init="mean")

    def restructure(self, edits: ModelEdits, matched: Sequence[tuple[str, nn.Module]]) -> None:
        paths = [path for path, _ in matched]
        edits.resize_vocabulary(
            paths, self.tokens, multiple=self.pad_to_multiple_of, start=self.init, sources=self.sources or ()
        )


_STARTS = "'mean', 'zeros', 'normal', 'copy', a tensor, or a mapping from paths to tensors"


def _is_source(source: Any) -> bool:
    rows = source if isinstance(source, tuple) else (source,)
    return bool(rows) and all(type(row) is int and row >= 0 for row in rows)
