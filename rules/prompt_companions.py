"""Rules for the modules around the one that virtual tokens are inserted into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import field
from typing import Any, cast

from torch import Tensor, nn

from surgery import Member, Rule, Site, SlotRule, Targets, rule
from surgery.rules._virtual_tokens import text_inputs, token_rows
from surgery.rules.slots.prompt import PromptMemorySlotRule
from surgery.state.records import site_state

THE_MODEL = ""  # the path of the model itself


@rule("prompt-memory")
class PromptMemoryRule(Rule):
    """A decoder's mask of its encoder's states, with columns for `length` virtual tokens. Companion of PromptRule.

    A mask that is as wide as the states are long stays unchanged.
    """

    targets: Targets = field(default=THE_MODEL, kw_only=False)
    length: int = 20
    scalable = False
    why_not_merged = "virtual tokens are not a change of a weight"

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return text_inputs.decoders(module, path)

    def rewrite(self, site: Site) -> None:
        states, mask = site.inputs["encoder_hidden_states"], site.inputs["encoder_attention_mask"]
        site.replace(
            mask, site.apply(token_rows.widen_memory_mask, states, mask, self.length, text_inputs.encoder_moves(site))
        )

    slot_kind = "prompt-memory"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        state = site_state(module)
        facts = (
            next((applied.facts for applied in state.applied if applied.rule is rules[0]), {})
            if state is not None
            else {}
        )
        return PromptMemorySlotRule(moves=facts.get("moves", True))

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> None:
        states, mask = sites[0].inputs["encoder_hidden_states"], sites[0].inputs["encoder_attention_mask"]
        length = max(cast(PromptMemoryRule, site.rule).length for site in sites)  # the encoder wants them equally long
        moves = text_inputs.encoder_moves(sites[0])
        sites[0].replace(mask, sites[0].apply(token_rows.widen_memory_mask, states, mask, length, moves))


@rule("prompt-hidden-ids")
class HiddenIdsRule(Rule):
    """A model receives its text's embeddings instead of ids, so its head sees no ids. Companion of PromptRule."""

    targets: Targets = field(default=THE_MODEL, kw_only=False)
    scalable = False
    routable = False
    why_not_merged = "it changes what the model is called with"

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return [(path, module)] if text_inputs.reads_padding(module) else []

    def rewrite(self, site: Site) -> None:
        ids, embeds = site.inputs["input_ids"], site.inputs["inputs_embeds"]
        result: Any = site.apply(embedded, site.this, ids, embeds)
        site.replace(ids, result[0])
        site.replace(embeds, result[1])


def embedded(module: Any, ids: Tensor | None, embeds: Tensor | None) -> tuple[None, Tensor | None]:
    """No ids, and the embeddings of a text."""
    return None, embeds if ids is None else module.get_input_embeddings()(ids)
