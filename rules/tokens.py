"""Training of single rows of an embedding: PEFT's trainable tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Combination, LiveSite, Rows, Rule, Share, Site, SlotRule, rule
from surgery.rules._shared import complex_weights, fields


@rule("tokens")
class TokensRule(Rule):
    """Train the embeddings of some tokens; all other rows stay the base's.

    >>> from torch import Tensor, nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import TokensRule
    >>> model = apply_rules(nn.Sequential(nn.Embedding(100, 8)), [TokensRule("0", tokens=[7, 42])])
    >>> model[0].adapters.default.rows.shape
    torch.Size([2, 8])

    Works on Embedding and, for a head, on Linear. `rows` is (tokens, features) and starts as the base's rows. It is
    float32 on modules in half precision. An embedding and a head that share their weight share `rows`, too, if one rule
    names both.

    Args:
        tokens: distinct row numbers.
        init: default "identity", the base's rows; "random": normal draws (PEFT's `init_weights=False`, for tests).

    Two adapters that have a row in common can't be live together.

    Raises:
        RuleError: a field is out of range.

    Source: PEFT's LoraConfig.trainable_token_indices and TrainableTokensConfig.
    """

    tokens: Sequence[int] = ()
    init: Literal["identity", "random"] = "identity"

    names: ClassVar[tuple[str, str]] = ("rows", "index")
    trains: ClassVar[bool] = True

    def validate(self) -> None:
        ids = self.tokens
        if not ids or not all(type(token) is int and token >= 0 for token in ids) or len(set(ids)) != len(ids):
            raise self.bad("tokens", "a list of distinct row numbers")
        fields.one_of(self, "init", "identity", "random")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.init == "identity"

    def differing_fields(self, other: Any) -> list[str]:
        """The order of the tokens is not a difference: `rows` lie in ascending order of the numbers."""
        same = sorted(self.tokens) == sorted(other.tokens)
        return [name for name in super().differing_fields(other) if name != "tokens" or not same]

    def check(self, module: nn.Module, path: str) -> str | None:
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            return "it is neither an Embedding nor a Linear"
        if why := complex_weights.why_not(self, module):
            return why
        last = max(self.tokens)
        fewer = f"it has {len(module.weight)} rows, none of number {last}: resize them first (ResizeVocabRule)"
        return fewer if last >= len(module.weight) else None

    def hides(self, other: Any) -> str | None:
        if not (isinstance(other, TokensRule) and self.trains and other.trains):
            return None
        shared = sorted(set(self.tokens) & set(other.tokens))
        some = f"{', '.join(map(str, shared[:3]))}{', …' if len(shared) > 3 else ''}"
        return f"both have rows for {some}: the later would hide the earlier" if shared else None

    def rewrite(self, site: Site) -> Tensor | None:
        ids = torch.tensor(sorted(self.tokens))
        weight: Tensor = site.module.weight  # type: ignore[assignment]
        start, (name, numbers) = weight.detach()[ids.to(weight.device)], self.names
        kept: Any = {"dtype": site.dtype if self.trains else start.dtype, "trainable": self.trains, "tied": weight}
        if self.init == "random":
            rows = site.param(name, start.shape, nn.init.normal_, **kept)
        else:
            # Values that are absent now are filled in by `initialise`.
            rows = site.param(name, start.shape if start.is_meta else start, **kept)
        index = site.buffer(numbers, ids)
        if not self.looks_up(site):
            site.replace(site.weight, site.weight.index_copy(0, index, rows.to(site.weight.dtype)))
            return None
        # Looking up a few rows is cheaper than copying the matrix: where a token is one of ours, take our row.
        at = torch.searchsorted(index, site.input).clamp(max=len(self.tokens) - 1)
        ours = (index[at] == site.input).unsqueeze(-1)
        return torch.where(ours, F.embedding(at, rows).to(site.output.dtype), site.output)

    def initialise(self, site: LiveSite) -> None:
        """Fills the rows where the plan had no values: the base is offloaded, or was on the meta device."""
        name, numbers = self.names
        if self.init != "random" and site.module.weight.is_meta:  # type: ignore[union-attr]
            weight = site.weight.detach()
            if not weight.is_meta:
                site.params[name].copy_(weight[site.params[numbers].to(weight.device)])

    def looks_up(self, site: Site) -> bool:
        return _looks_up(site)

    def merged(self, site: LiveSite) -> dict[str, Rows]:
        rows, index = (site.params[name] for name in self.names)
        return {"weight": Rows(index, rows.detach())}

    slot_kind = "tokens"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        return TokensSlotRule()

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        return dict(zip(("rows", "index"), (site.params[name] for name in self.names), strict=True))

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        """W + Σ w (T − W) for the rows that any of the adapters trains; other rows stay the base's."""
        if how.untouched(shares):
            return self, shares[0].params
        weight: Tensor = shares[0].site.weight.detach()
        name, numbers = self.names
        index = torch.cat([share.params[numbers] for share in shares]).unique()
        base = weight[index].to(torch.promote_types(weight.dtype, torch.float32))
        moves = []
        for share in shares:
            at = torch.searchsorted(index, share.params[numbers])
            moves.append(base.index_copy(0, at, share.params[name].detach().to(base.dtype)) - base)
        rows = base + how.sum(moves, [share.weight for share in shares])
        return self.replace(tokens=tuple(index.tolist())), {name: rows, numbers: index}


@rule("base-rows")
class BaseRowsRule(TokensRule):
    """Rows of an embedding or a head as they were when an adapter was made; they are not trained.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import BaseRowsRule
    >>> model = apply_rules(nn.Sequential(nn.Embedding(100, 8)), [BaseRowsRule("0", tokens=[98, 99])])
    >>> [(name, p.requires_grad) for name, p in model[0].adapters.default.named_parameters()]
    [('base_rows', False)]

    A PEFT file contains the base's embeddings if they are targets or were resized. Rows that differ from the model's
    become such a rule, and the adapter's other rules apply on top of it.

    Args:
        tokens: distinct row numbers.
        init: as in TokensRule.
        in_weight: insert the rows into the weight at each call, for rules that read it (DoRA), instead of looking them
            up; default False.

    Source: PEFT's save_embedding_layers.
    """

    in_weight: bool = False
    names = ("base_rows", "base_index")
    trains = False

    def looks_up(self, site: Site) -> bool:
        return not self.in_weight and _looks_up(site)

    def restores(self, name: str) -> bool:
        return name == "weight"


@rule("tokens-slot")
class TokensSlotRule(SlotRule):
    """Rows of an embedding or a head instead of the base's: TokensRule's form in a slot, for any number of tokens.

    >>> from torch import nn
    >>> from surgery.rules.tokens import TokensSlotRule
    >>> from surgery import apply_rules
    >>> model = apply_rules(nn.Sequential(nn.Embedding(9, 4)), [TokensSlotRule("0")])
    >>> {name: tuple(tensor.shape) for name, tensor in model[0].adapters.default.tensors().items()}
    {'rows': (2, 4), 'index': (2,)}

    `index` holds distinct row numbers. A plain Embedding compares them with the ids; on other modules the weight is
    edited.
    """

    slot_kind = "tokens"
    zeros_are_none = False

    def rewrite(self, site: Site) -> Tensor | None:
        weight: Tensor = site.module.weight  # type: ignore[assignment]
        rows = site.param("rows", weight.detach()[:2], dtype=site.dtype)
        index = site.buffer("index", torch.arange(2))
        if not _looks_up(site):
            site.replace(site.weight, site.weight.index_copy(0, index, rows.to(site.weight.dtype)))
            return None
        # A search among none, or the largest of none, is an error to some runtimes; a product and a sum are zero.
        ours = (site.input.unsqueeze(-1) == index).to(rows.dtype)
        looked_up = (ours @ rows).to(site.output.dtype)
        return torch.where(ours.sum(-1, keepdim=True) > 0, looked_up, site.output)

    def free(self, tensor: str) -> tuple[int, str] | None:
        return (0, "tokens")

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        return TokensRule(tokens=tuple(tensors["index"].tolist())), tensors


def _looks_up(site: Site) -> bool:
    module: Any = site.module
    return site.base_class.forward is nn.Embedding.forward and module.max_norm is None
