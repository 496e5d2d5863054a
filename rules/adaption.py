"""Adaption prompts: an attention's own maps turn virtual tokens into keys and values, behind a gate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from surgery import LiveSite, Member, Rule, Site, SiteError, SlotRule, rule, takes_functions
from surgery.rules._shared import fields
from surgery.rules._shared.hidden_states import features_of


@rule("adaption-prompt")
class AdaptionRule(SlotRule):
    """Wo (attention(q, k, v) + g · softmax(q (P Wkᵀ)ᵀ / √d) P Wvᵀ): `length` trained tokens P behind a trained gate g.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from surgery.rules import AdaptionRule
    >>> from surgery import apply_rules
    >>> sizes = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaModel(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes))
    >>> ids = torch.tensor([[1, 2, 3]])
    >>> before = model(ids).last_hidden_state
    >>> _ = apply_rules(model, [AdaptionRule("self_attn", length=5, layers=[2, 3])])
    >>> model.layers[3].self_attn.adapters.default.prompt.shape, torch.equal(model(ids).last_hidden_state, before)
    (torch.Size([5, 16]), True)

    LLaMA-Adapter as PEFT implements it. Works on attention modules of transformers with `k_proj` and `v_proj`, or with
    one `c_attn`. At each call these maps make keys and values of P, with the changes that other rules make to the maps.
    The keys have no positions. Every query attends to them under a softmax of their own. (A PrefixRule with `gate`
    trains the keys and values themselves, and has one gate per head.)

    Tensors: `prompt` (length, features), normal with deviation 1, and `gate` (1), zero. The rule can't be merged:
    virtual tokens are not a change of a weight.

    Args:
        length: number of virtual tokens; default 10. PEFT: adapter_len.
        mapped: whether the prompt's output passes through the attention's output map; default True, as PEFT does on
            Llama and Mistral. False adds it to the attention's result, as PEFT does on GPT-2.

    Raises:
        RuleError: a field is out of range.
        SiteError: the module does not have these maps, or `mapped` is True and it does not take its attention function
            from a registry.

    Source: Zhang et al. 2023, arXiv:2303.16199; PEFT's AdaptionPromptConfig.
    """

    length: int = 10
    mapped: bool = True
    identity = True
    why_not_merged = "virtual tokens are not a change of a weight"

    def validate(self) -> None:
        fields.whole(self, "length")
        if type(self.mapped) is not bool:
            raise self.bad("mapped", "true or false")

    def rewrite(self, site: Site) -> Tensor | None:
        width = self._width(site)
        prompt = site.param("prompt", (self.length, width), nn.init.normal_)
        gate = site.param("gate", (1,))
        if self.mapped:
            return site.around(with_prompt, prompt, gate)
        return site.with_hidden(site.apply(add_prompt, site.this, site.hidden, site.input, prompt, gate))

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> None:
        if not all(cast(AdaptionRule, site.rule).mapped for site in sites):
            why = "mapped=False is made of what the attention returns"
            raise SiteError("these prompts can't be routed in one batch", where=sites[0].path, why=why)
        members = []
        for site in sites:
            rule = cast(AdaptionRule, site.rule)
            members.append(
                (site.rows, site.param("prompt", (rule.length, rule._width(site))), site.param("gate", (1,)))
            )
        sites[0].around(with_row_prompts, *members)

    slot_kind = "adaption-prompt"
    why_no_slot = "the adapters differ in whether the output map takes what the prompt gives"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        mapped = {cast(AdaptionRule, rule).mapped for rule in rules}
        return AdaptionRule(length=2, mapped=mapped.pop()) if len(mapped) == 1 else None

    def free(self, tensor: str) -> tuple[int, str] | None:
        return (0, "length") if tensor == "prompt" else None

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        return self.replace(length=len(tensors["prompt"])), tensors

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        if cast(AdaptionRule, slot).mapped != self.mapped:
            fix = "export the model again with this adapter on it"
            raise SiteError("the slot adds its prompt elsewhere", where=site.path, fix=fix)
        return site.params

    def _width(self, site: Site) -> int:
        """The number of input features of the module's maps."""
        why = None
        fused, key = (site.module._modules.get(name) for name in ("c_attn", "k_proj"))
        if fused is None and (key is None or "v_proj" not in site.module._modules):
            why = "it has no maps k_proj and v_proj, nor one c_attn"
        elif self.mapped and not takes_functions(site.module):
            why = "it takes no attention function from a registry"
        elif not self.mapped and fused is None:
            why = "without positions, only the query of a c_attn is known: mapped=True"
        elif getattr(site.module, "is_cross_attention", False):
            why = "it looks at another text"
        width = features_of(key or fused, None, "input") if why is None else why  # type: ignore[arg-type]
        if isinstance(width, str):
            label = f"{self.label} can't go on this {site.base_class.__name__}"
            raise SiteError(label, where=site.path, why=width, fix="target self-attentions")
        return width


def with_prompt(prompt: Tensor, gate: Tensor) -> Callable[..., Any]:
    """Wraps an attention function: adds what the queries find in the prompt."""

    def attend(
        attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        output, *rest = attention(module, query, key, value, *args, **kwargs)
        sizes = query.shape[-1], value.shape[-1]
        return (
            output + attend_prompt(query, *prompt_keys_values(module, prompt, *sizes), gate).to(output.dtype),
            *rest,
        )

    return attend


def with_row_prompts(*members: Any) -> Callable[..., Any]:
    """As `beside`, for the rows of several adapters."""

    def attend(
        attention: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        output, *rest = attention(module, query, key, value, *args, **kwargs)
        for rows, prompt, gate in members:
            index = rows.of(len(query), query.device)
            more = attend_prompt(
                query[index], *prompt_keys_values(module, prompt, query.shape[-1], value.shape[-1]), gate
            )
            output = output.index_add(0, index, more.to(output.dtype))
        return (output, *rest)

    return attend


def add_prompt(module: Any, hidden: Tensor, x: Tensor, prompt: Tensor, gate: Tensor) -> Tensor:
    """The result of an attention with one `c_attn`, plus what its queries find in the prompt."""
    query = module.c_attn(x).chunk(3, -1)[0]
    query = query.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    more = attend_prompt(query, *prompt_keys_values(module, prompt, module.head_dim, module.head_dim), gate)
    return hidden + more.flatten(2).to(hidden.dtype)


def prompt_keys_values(module: Any, prompt: Tensor, key_size: int, value_size: int) -> tuple[Tensor, Tensor]:
    """The prompt's keys and values, (1, heads, length, size), by the module's own maps."""
    maps = module._modules
    first = maps.get("k_proj") or maps["c_attn"]
    weight = next(iter(first.parameters()))
    tokens = (prompt.to(weight.dtype) if weight.is_floating_point() else prompt).unsqueeze(0)
    if "k_proj" in maps:
        key, value = module.k_proj(tokens), module.v_proj(tokens)
    else:
        key, value = module.c_attn(tokens).chunk(3, -1)[1:]
    pairs = ((key, key_size), (value, value_size))
    key, value = (tensor.unflatten(-1, (-1, size)).transpose(1, 2) for tensor, size in pairs)
    return key, value


def attend_prompt(query: Tensor, key: Tensor, value: Tensor, gate: Tensor) -> Tensor:
    """gate · softmax(q kᵀ / √d) v, (batch, positions, heads, size); the softmax in float32."""
    shared = query.shape[1] // key.shape[1]
    key, value = (tensor.to(query.dtype).repeat_interleave(shared, 1) for tensor in (key, value))
    scores = query @ key.mT / math.sqrt(query.shape[-1])
    weights = gate.to(query.dtype) * scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2)
