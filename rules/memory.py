"""What an encoder-decoder needs where its encoder's states hold virtual tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import field

from torch import nn

from rules import _texts, _virtual
from surgery import Rule, Site, Targets, rule

THE_MODEL = ""  # the path of the model itself


@rule("prompt-memory")
class PromptMemoryRule(Rule):
    """A decoder's mask of its encoder's states, with columns for `length` virtual tokens. Comes with a PromptRule.

    The mask is left alone where it is as wide as the states are long.
    """

    targets: Targets = field(default=THE_MODEL, kw_only=False)
    length: int = 20
    scalable = False
    why_not_merged = "virtual tokens are no change of a weight"

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return _texts.decoders(module, path)

    def rewrite(self, site: Site) -> None:
        states, mask = site.inputs["encoder_hidden_states"], site.inputs["encoder_attention_mask"]
        site.replace(mask, site.apply(_virtual.widened, states, mask, self.length))
