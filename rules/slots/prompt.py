"""The slots for prompts in exported files: any number of virtual tokens at run time, none without an adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from surgery import Rule, Site, SlotRule, rule
from surgery.rules._virtual_tokens import graph_insertion, text_inputs, token_rows


@rule("prompt-slot")
class PromptSlotRule(SlotRule):
    """[P; e(x)] with P of any length: PromptRule's slot, on the module that takes the text.

    `after`, a number, and `whole` are PromptRule's fields. `width` is the size of the embeddings. `moves`: whether a
    text has the same numbers with padding on its left, so that P stands after the padding. With a cache, the mask
    covers the text alone at each step, as in the live model. P is an input of the first step, and empty at later steps.
    """

    after: int = 0
    width: int = 1
    whole: bool = False
    moves: bool = True
    scalable = False
    why_not_merged = "virtual tokens are not a change of a weight"
    slot_kind = "prompt"
    zeros_are_none = False  # a virtual token of zeros has an effect

    def rewrite(self, site: Site) -> Any:
        role = site.fact("role", lambda: text_inputs.role(site))
        prompt = site.param("prompt", (2, self.width), nn.init.zeros_)
        if role == "layer":
            return site.with_hidden(site.apply(token_rows.insert_after, site.output, prompt, self.after))
        rest = text_inputs.starred(site) or ""
        result: Any = site.apply(
            graph_insertion.insert_in_graph, site.this, prompt, dict(site.inputs), rest, self.after, self.moves
        )
        new, place = result[0], result[1]
        for name in site.inputs:
            if name in token_rows.CHANGED or name == rest:
                site.replace(site.inputs[name], new[name])
        if role == "encoder" or self.whole:
            return None
        return site.apply(graph_insertion.remove_in_graph, site.output, place)

    def free(self, tensor: str) -> tuple[int, str] | None:
        return 0, "length"

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        prompt = {"rule": "prompt", "length": len(tensors["prompt"]), "after": self.after, "whole": self.whole}
        return Rule.from_dict(prompt), tensors


@rule("prompt-memory-slot")
class PromptMemorySlotRule(SlotRule):
    """Widens a decoder's mask of its encoder's states by a column for each virtual token, of any number."""

    moves: bool = True  # whether they stand behind padding on the left
    scalable = False
    why_not_merged = "virtual tokens are not a change of a weight"
    slot_kind = "prompt-memory"

    def rewrite(self, site: Site) -> None:
        states, mask = site.inputs["encoder_hidden_states"], site.inputs["encoder_attention_mask"]
        site.replace(mask, site.apply(token_rows.widen_memory_mask, states, mask, None, self.moves))


def slot_of(after: int | None, whole: bool, facts: Mapping[str, Any]) -> PromptSlotRule | None:
    """Returns the slot for prompts with these fields at a module, from the facts that planning found there."""
    seen = facts.get("seen", {"pooled": False, "left": True})
    # If positions depend on token ids, or a head looks for padding in them, calls without an adapter need the ids.
    if not seen["left"] or (whole and facts["padded"]):
        return None
    after = int(seen["pooled"]) if after is None else after
    return PromptSlotRule(after=after, width=facts["width"], whole=whole, moves=seen.get("moves", True))
