"""Prompts: trained virtual tokens before a text's own tokens. Prompt tuning and p-tuning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from surgery import Combination, LiveSite, Member, Rule, Share, Site, SiteError, SlotRule, Targets, rule
from surgery.rules._shared import combining
from surgery.rules._shared import fields as _fields
from surgery.rules._virtual_tokens import encoder as _encoder
from surgery.rules._virtual_tokens import insertion, text_inputs, token_rows, tokens_per_row
from surgery.rules.prompt_companions import THE_MODEL, HiddenIdsRule, PromptMemoryRule
from surgery.rules.slots import prompt as prompt_slots
from surgery.state.records import site_state


@rule("prompt")
class PromptRule(Rule):
    """[P; e(x)]: `length` trained virtual tokens P before the embeddings of a text.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from surgery.rules import PromptRule
    >>> from surgery import apply_rules
    >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes))
    >>> _ = apply_rules(model, [PromptRule(length=5)])
    >>> model.model.adapters.default.prompt.shape, model(torch.tensor([[1, 2, 3]])).logits.shape
    (torch.Size([5, 16]), torch.Size([1, 3, 30]))

    Works on the innermost module that takes `input_ids` or `inputs_embeds` with an `attention_mask`: in the targets, or
    without targets in the model; in an encoder-decoder, in the encoder. Masks, positions and token types become longer.
    The module's output is as long as the text, so labels, heads and `generate` work unchanged. Padding on the left
    stays first, so a row of a batch has the same numbers as the row alone. A cache contains the virtual tokens once. On
    any other named module, virtual tokens are inserted into the output, which stays longer (VPT-shallow on a vision
    model's embeddings).

    Tensors: `prompt` (length, features), and the encoder's. The rule can't be merged: virtual tokens are not a change
    of a weight.

    Args:
        targets: modules to search; default the model itself.
        length: number of virtual tokens; default 20. PEFT: num_virtual_tokens.
        init: "random" (default; normal with deviation 1), "vocab" (rows of the embedding) or "text" (the rows of
            `text_ids`, repeated or cut). PEFT: prompt_tuning_init.
        text_ids: token ids for init="text"; default (). PEFT: prompt_tuning_init_text.
        after: how many of the text's tokens stay before the virtual tokens; default None: 1 where the module pools its
            first token, otherwise 0.
        encoder: "mlp" or "lstm": P is the output of this network (p-tuning), until `fold_prompts`; default None.
            PEFT: encoder_reparameterization_type.
        encoder_size: hidden features of the encoder; default None: the embeddings' width. PEFT: encoder_hidden_size.
        encoder_layers: layers of an LSTM; default 2. PEFT: encoder_num_layers.
        encoder_dropout: dropout of an LSTM; default 0. PEFT: encoder_dropout.
        whole: the code around the module sees the virtual tokens, too, as PEFT's classifiers do; default False. Outputs
            keep their positions. A head that looks for padding in token ids gets no ids and takes the last position.

    Raises:
        RuleError: a field is out of range.
        SiteError: a call can't take more tokens correctly, such as one whose mask was prepared outside.

    Sources: Lester et al. 2021, arXiv:2104.08691; Liu et al. 2021, arXiv:2103.10385; Jia et al. 2022, arXiv:2203.12119;
    PEFT's PromptTuningConfig and PromptEncoderConfig.
    """

    targets: Targets = field(default=THE_MODEL, kw_only=False)
    length: int = 20
    init: Literal["random", "vocab", "text"] = "random"
    text_ids: Sequence[int] = ()
    after: int | None = None
    encoder: Literal["mlp", "lstm"] | None = None
    encoder_size: int | None = None
    encoder_layers: int = 2
    encoder_dropout: float = 0.0
    whole: bool = False
    scalable = False
    why_not_merged = "virtual tokens are not a change of a weight"
    slot_kind = "prompt"
    why_no_slot = "the adapters differ in `after` or `whole`, or positions or a head need the text's token ids"

    def validate(self) -> None:
        _fields.whole(self, "length", "encoder_layers")
        _fields.whole(self, "encoder_size", optional=True)
        _fields.whole(self, "after", least=0, optional=True)
        _fields.one_of(self, "init", "random", "vocab", "text")
        _fields.one_of(self, "encoder", None, "mlp", "lstm")
        _fields.chance(self, "encoder_dropout")
        if type(self.whole) is not bool:
            raise self.bad("whole", "true or false")
        if not all(type(token) is int and token >= 0 for token in self.text_ids):
            raise self.bad("text_ids", "a list of token ids")
        if (self.init == "text") != bool(self.text_ids):
            raise self.bad("text_ids", "right: init='text' needs token ids, and nothing else takes them")

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        hosts = list(text_inputs.hosts(module, path))
        return hosts if hosts or self.targets == (THE_MODEL,) else [(path, module)]

    def companions(self) -> Iterable[Rule]:
        return [PromptMemoryRule(length=self.length), *([HiddenIdsRule()] if self.whole else ())]

    def rewrite(self, site: Site) -> Tensor | None:
        role = site.fact("role", lambda: text_inputs.role(site))
        if any(isinstance(other, PromptRule) and other.after != self.after for other in site.rules):
            raise SiteError("two prompts at one module need the same `after`", where=site.path)
        if role == "layer":
            return site.with_hidden(
                site.apply(token_rows.insert_after, site.output, self.virtual(site), self.after or 0)
            )
        site.fact("seen", lambda: text_inputs.probe_text_model(site))
        after = text_inputs.after_of(site, self.after)
        rest = text_inputs.starred(site) or ""
        arguments = site.this, self.virtual(site), dict(site.inputs), rest, site.mark
        result: Any = site.apply(insertion.insert_tokens, *arguments, after, text_inputs.traits(site))
        _replace_inputs(site, result[0], rest)
        if role == "encoder":
            return None  # what its decoder looks at, virtual tokens included
        return site.apply(insertion.remove_tokens, site.output, result[1], site.mark, None if self.whole else after)

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> Tensor | None:
        site, rules = sites[0], [cast(PromptRule, member.rule) for member in sites]
        placements = {
            (text_inputs.after_of(member, rule.after), rule.whole) for member, rule in zip(sites, rules, strict=True)
        }
        if len(placements) > 1:
            why = "they differ in `after` or `whole`"
            raise SiteError("these prompts can't be routed in one batch", where=site.path, why=why)
        (after, whole) = placements.pop()
        members = [(member.rows, rule.virtual(member)) for member, rule in zip(sites, rules, strict=True)]
        if site.facts["role"] == "layer":
            return site.with_hidden(site.apply(tokens_per_row.insert_after_per_row, site.output, after, *members))
        seen, rest = site.facts["seen"], text_inputs.starred(site) or ""
        counted = seen.get("counted", False) and not whole
        arguments = site.this, dict(site.inputs), rest, after, text_inputs.traits(site), counted
        result: Any = site.apply(tokens_per_row.insert_tokens_per_row, *arguments, *members)
        _replace_inputs(site, result[0], rest)
        if site.facts["role"] == "encoder":
            return None
        return site.apply(insertion.remove_tokens, site.output, result[1], result[2], None if whole else after)

    def folded(self, site: LiveSite) -> tuple[Rule, Mapping[str, Tensor]]:
        if self.encoder is None:
            return self, site.params
        network = {name: tensor for name, tensor in site.params.items() if name.startswith(("mlp_", "lstm_"))}
        with torch.no_grad():
            prompt = _encoder.encode(site.params["prompt"], network, 0.0, False)
        kept = {name: tensor for name, tensor in site.params.items() if name not in network}
        return self.replace(encoder=None), {**kept, "prompt": prompt}

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        state = site_state(module)
        facts = (
            next((applied.facts for applied in state.applied if applied.rule is rules[0]), None)
            if state is not None
            else None
        )
        fields = {(rule.after, rule.whole) for rule in cast("Sequence[PromptRule]", rules)}
        if facts is None or len(fields) > 1:
            return None
        return prompt_slots.slot_of(*fields.pop(), facts)

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        prompt_slot = cast(prompt_slots.PromptSlotRule, slot)
        if self.whole != prompt_slot.whole or self.after not in (None, prompt_slot.after):
            fix = "export the model again with this adapter on it"
            raise SiteError("the slot's virtual tokens stand elsewhere in the text", where=site.path, fix=fix)
        return {"prompt": self.folded(site)[1]["prompt"]}

    def virtual(self, site: Site) -> Tensor:
        """The virtual tokens as a value of the graph, (length, features)."""
        site.fact("padded", lambda: any(map(text_inputs.reads_padding, site.owners)))
        width = site.fact("width", lambda: text_inputs.width(site, self.init == "random", self.after))
        prompt = site.param("prompt", (self.length, width), text_inputs.start(site, self.init, self.text_ids))
        if self.encoder is None:
            return prompt
        shapes = _encoder.specs(self.encoder, width, self.encoder_size or width, self.encoder_layers)
        tensors = {name: site.param(name, shape, _encoder.uniform(bound)) for name, shape, bound in shapes}
        return site.apply(_encoder.encode, prompt, tensors, self.encoder_dropout, site.training)

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        if self.encoder is not None and not how.untouched(shares):
            raise how.refusal(shares, "its virtual tokens are made by an encoder", "fold_prompts takes the encoder out")
        return combining.average(self, shares, how, "text_ids", "encoder_size", "encoder_layers", "encoder_dropout")


def _replace_inputs(site: Site, new: Any, rest: str) -> None:
    for name in site.inputs:
        if name in token_rows.CHANGED or name == rest:
            site.replace(site.inputs[name], new[name])
