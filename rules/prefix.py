"""Prefixes: trained keys and values before the text's, to which every query attends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from surgery import (
    Combination,
    LiveSite,
    Member,
    Rule,
    Share,
    Site,
    SiteError,
    SlotRule,
    Targets,
    rule,
    takes_functions,
)
from surgery.rules._attention.prefix import (
    existing_shapes,
    folded_tensors,
    keys_and_values,
    require_gradient,
    with_gated_prefix,
    with_prefix,
)
from surgery.rules._attention.rotary_keys import rotation_of
from surgery.rules._attention.rows import with_row_prefixes
from surgery.rules._attention.written_attention import may_write_attention, written_attention
from surgery.rules._attention.written_extension import extend
from surgery.rules._shared import combining
from surgery.rules._shared.fields import whole
from surgery.rules.slots.positions import ShiftedRule, require_module

EVERYWHERE = ("", "re:.*")  # the model itself, and all in it


@rule("prefix")
class PrefixRule(SlotRule):
    """softmax(q [Pk; k]ᵀ / √d + mask) [Pv; v]: `length` trained keys Pk and values Pv, which every query sees.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from surgery.rules import PrefixRule
    >>> from surgery import apply_rules
    >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaModel(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes))
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> _ = apply_rules(model, [PrefixRule(length=5)], example_inputs={"input_ids": ids})
    >>> model.layers[0].self_attn.adapters.default.key.shape
    torch.Size([2, 5, 4])

    Works on attention modules that take their attention function from a registry, as transformers' do (sdpa, eager),
    that call scaled_dot_product_attention, or that write out softmax(q kᵀ) v. Needs `example_inputs`: a call shows the
    keys' shape.

    The mask gets columns that every query sees; a causal attention without a mask gets its mask as a tensor. Where
    attention is written out, the prefix's scores are computed beside the text's, under one softmax. The prefix has no
    positions: positions stay the text's, and no rotation is applied to the prefix. Caches contain the text alone.

    Tensors: `key` and `value` (key heads, length, size); `gate` (heads) with `gate`; with `projection` instead of keys
    and values `embedding`, `inner`, `inner_bias`, `outer`, `outer_bias`. The rule can't be merged: a prefix is not a
    change of a weight.

    Args:
        targets: attention modules; default every self-attention, where keys come from the same input as queries.
            Cross-attentions must be named.
        length: number of keys; default 20. PEFT: num_virtual_tokens.
        projection: width of an MLP that computes keys and values; default None, no MLP. `folded_adapter` replaces it by
            its output. PEFT: prefix_projection, encoder_hidden_size.
        init: "random" (default; normal with deviation 0.02, an MLP as torch's layers) or "zero". `fit_prefix` starts a
            prefix as a text.
        gate: the prefix has a softmax of its own, and its result is added times tanh of one trained number per head,
            zero at the start (LLaMA-Adapter); default False. PEFT: AdaptionPromptConfig.
        shift: path of an nn.Embedding of positions, or of OPT's, to which positions are given `length` later, as with
            PEFT's prefixes; default None.

    Raises:
        RuleError: a field is out of range.
        SiteError: there is no example, or the module is not such an attention. In a call: the mask is not a tensor
            (flex
            attention).

    Sources: Li & Liang 2021, arXiv:2101.00190; Zhang et al. 2023, arXiv:2303.16199; PEFT's PrefixTuningConfig.
    """

    targets: Targets = field(default=EVERYWHERE, kw_only=False)
    length: int = 20
    projection: int | None = None
    init: Literal["random", "zero"] = "random"
    gate: bool = False
    shift: str | None = None
    scalable = False
    why_not_merged = "a prefix is keys and values beside the text's, not a change of a weight"

    def validate(self) -> None:
        whole(self, "length")
        whole(self, "projection", optional=True)
        if self.init not in ("random", "zero"):
            raise self.bad("init", "'random' or 'zero'")
        if type(self.gate) is not bool:
            raise self.bad("gate", "true or false")
        if self.shift is not None and (type(self.shift) is not str or not self.shift):
            raise self.bad("shift", "the path of an embedding")

    @property
    def identity(self) -> bool:  # type: ignore[override]
        return self.gate

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        if self.targets == EVERYWHERE and not takes_functions(module) and not may_write_attention(module):
            return []
        return [(path, module)]

    def companions(self) -> Iterable[Rule]:
        return [] if self.shift is None else [ShiftedRule(self.shift, by=self.length)]

    def rewrite(self, site: Site) -> Tensor | None:
        if site.unreached and self.targets == EVERYWHERE:
            return NotImplemented
        if self.shift is not None:
            site.fact("shift", lambda: require_module(site, self.shift or ""))
        if takes_functions(site.module):
            return self._around(site)
        attention = written_attention(site)
        if not attention.own and self.targets == EVERYWHERE and existing_shapes(site, self.length) is None:
            return NotImplemented
        shapes = [(attention.heads, self.length, size) for size in attention.sizes]
        key, value = keys_and_values(site, shapes, self.init, self.projection)
        return extend(site, attention, key, value, site.param("gate", (attention.queries,)) if self.gate else None)

    def _around(self, site: Site) -> Tensor | None:
        shapes, heads = existing_shapes(site, self.length), site.shape_of("gate")
        if shapes is None:
            example = self._seen(site)
            if example is None:
                return NotImplemented
            query, *pair = example
            shapes, heads = [(tensor.shape[1], self.length, tensor.shape[3]) for tensor in pair], (query.shape[1],)
        key, value = keys_and_values(site, shapes, self.init, self.projection)
        if self.gate:
            return site.around(with_gated_prefix, key, value, site.param("gate", heads or ()))
        return site.around(with_prefix, key, value)

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> None:
        members: list[Any] = []
        for site in sites:
            rule, gate = cast(PrefixRule, site.rule), site.shape_of("gate")
            key, value = keys_and_values(site, existing_shapes(site, rule.length) or [], rule.init, rule.projection)
            members.append((site.rows, key, value, None if gate is None else site.param("gate", gate)))
        sites[0].around(with_row_prefixes, *members)

    def folded(self, site: LiveSite) -> tuple[Rule, Mapping[str, Tensor]]:
        return (self, site.params) if self.projection is None else (self.replace(projection=None), folded_tensors(site))

    slot_kind = "prefix"
    why_no_slot = "some adapters have a gate, and others none"
    zeros_are_none = False  # a key of zeros takes its share of the softmax

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        gated = {cast(PrefixRule, rule).gate for rule in rules}
        return PrefixRule(length=2, init="zero", gate=gated.pop()) if len(gated) == 1 else None

    def free(self, tensor: str) -> tuple[int, str] | None:
        return (1, "length") if tensor in ("key", "value") else None

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        return self.replace(length=tensors["key"].shape[1]), tensors

    def slot_notes(self, model: nn.Module, module: nn.Module) -> Mapping[str, Any]:
        return rotation_of(model, module)

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        if cast(PrefixRule, slot).gate != self.gate:
            why = "behind a gate a prefix has a softmax of its own"
            fix = "export the model again with this adapter on it"
            raise SiteError("the prefix's slot differs in its gate", where=site.path, why=why, fix=fix)
        return self.folded(site)[1]

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        if self.projection is not None and not how.untouched(shares):
            raise how.refusal(shares, "its keys and values are made by an MLP", "folded_adapter takes the MLP out")
        return combining.average(self, shares, how)

    def _seen(self, site: Site) -> tuple[Tensor, Tensor, Tensor] | None:
        """Queries, keys and values of the example, (batch, heads, positions, size); None to skip a cross-attention."""
        example = site.needed_example("a call shows which shape an attention's keys have")
        with torch.enable_grad():
            args, kwargs, hidden = require_gradient(*example)
            calls = site.calls_inside(args, kwargs)
        if not calls:
            raise SiteError(f"{self.label} finds no attention in the example call", where=site.path)
        _, query, key, value = calls[0][1][:4]
        # Nothing but the hidden state may ask for gradients: the base is frozen where it has adapters already.
        own = key.requires_grad and torch.autograd.grad(key.sum(), hidden, allow_unused=True)[0] is not None
        return (query, key, value) if own or self.targets != EVERYWHERE else None
