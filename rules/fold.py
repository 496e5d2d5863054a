"""Prompts without the encoders that trained them."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from surgery import SurgeryError, apply_rules, folded_adapter, load_adapter_state_dict, remove, rules_of
from surgery.rules.prompt import PromptRule

M = TypeVar("M", bound=nn.Module)


def fold_prompts(model: M, adapter: str = "default", *, example_inputs: Any = None) -> M:
    """Replace a PromptRule's prompt and encoder by the encoder's output, as PEFT does when it saves.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from surgery.rules import PromptRule, fold_prompts
    >>> from surgery import apply_rules, rules_of
    >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes))
    >>> _ = fold_prompts(apply_rules(model, [PromptRule(length=5, encoder="mlp")]))
    >>> rules_of(model)[0].encoder, list(model.model.adapters.default.tensors())
    (None, ['prompt'])

    The model computes the same and saves `prompt` alone. The adapter is removed and applied again; its other rules keep
    their tensors.

    Args:
        model: a model with one adapter.
        adapter: the adapter's name; default "default".
        example_inputs: one call of the model, for rules that need it; default None.

    Returns:
        The same model.

    Raises:
        SurgeryError: the model has other adapters, or no prompt of the adapter has an encoder.
    """
    rules = rules_of(model, adapter)
    if rules_of(model) != rules:
        raise SurgeryError("prompts are folded in the model's only adapter", fix="fold before applying others")
    if not any(isinstance(rule, PromptRule) and rule.encoder for rule in rules):
        raise SurgeryError(f"no prompt of {adapter!r} has an encoder", fix="there is nothing to fold")
    plain, tensors = folded_adapter(model, adapter)
    remove(model, adapter)
    apply_rules(model, plain, adapter=adapter, example_inputs=example_inputs)
    load_adapter_state_dict(model, tensors, adapter)
    return model
