"""Prefixes that start as the keys and values of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import RuleError, adapter_state_dict, rules_of
from surgery.rules._attention.prefix import listeners

KEY = "adapters.key"


def fit_prefix(model: nn.Module, example_inputs: Any, adapter: str = "default") -> None:
    """Set an adapter's prefixes to the keys and values of a text's first positions.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from surgery.rules import PrefixRule, fit_prefix
    >>> from surgery import apply_rules
    >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaModel(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes)).eval()
    >>> text, more = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    >>> whole = model(torch.cat([text, more], 1)).last_hidden_state
    >>> _ = apply_rules(model, [PrefixRule(length=3)], example_inputs={"input_ids": text})
    >>> fit_prefix(model, {"input_ids": text})
    >>> after = model(more, position_ids=torch.tensor([[3, 4]])).last_hidden_state
    >>> torch.testing.assert_close(after, whole[:, 3:])

    Keys are copied as they enter the attention; in a rotary model they are rotated at the text's positions. So a causal
    model with the prefix continues, from the position after it, as it does after the text. The call is made in
    evaluation mode, with all adapters but without this adapter's prefixes. If it reaches a site several times, the
    first time counts.

    Args:
        model: a model with PrefixRules.
        example_inputs: one call of the model, as in `apply_rules`, with one text that is at least as long as the
            prefix.
        adapter: the adapter's name; default "default".

    Raises:
        RuleError: the adapter has no prefixes, or prefixes with a projection (fold them first); or the call has several
            texts, a string instead of token ids, padding, too short a text, or does not reach every site. The prefixes
            then keep their values.

    Source: Li & Liang 2021, arXiv:2101.00190, section 7.4: activations of real words start a prefix well.
    """
    boxes = _prefixes(model, adapter)
    if (text := _written_text(example_inputs)) is not None:
        raise RuleError(
            f"fit_prefix got the text {text[:40]!r}",
            why="the model is called with token ids, and the text is not tokenized",
            fix='tokenize it: fit_prefix(model, tokenizer(text, return_tensors="pt"))',
        )
    mask = example_inputs.get("attention_mask") if isinstance(example_inputs, Mapping) else None
    if mask is not None and not bool(mask.all()):
        raise RuleError("the text is padded", why="padded positions would be in the prefix", fix="leave padding out")
    texts: dict[str, tuple[Tensor, Tensor]] = {}
    modes = [(module, module.training) for module in model.modules()]
    for path, tensors in boxes.items():
        listeners[id(tensors["key"])] = lambda key, value, path=path: texts.setdefault(path, (key, value))
    try:
        model.eval()
        with torch.no_grad():
            _call(model, example_inputs)
    finally:
        for tensors in boxes.values():
            listeners.pop(id(tensors["key"]), None)
        for module, mode in modes:
            module.training = mode
    for path, tensors in boxes.items():
        _check(path, tensors["key"], texts.get(path))
    with torch.no_grad():
        for path, tensors in boxes.items():
            for name, tensor in zip(("key", "value"), texts[path], strict=True):
                tensors[name].copy_(tensor[0, :, : tensors[name].shape[-2]])


def _prefixes(model: nn.Module, adapter: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of the prefixes, by the path of their site."""
    rules = [rule for rule in rules_of(model, adapter) if rule.name == "prefix"]
    if not rules:
        raise RuleError(f"the adapter {adapter!r} has no PrefixRule")
    if any(getattr(rule, "projection", None) for rule in rules):
        raise RuleError(
            "a prefix with a projection can't be fitted",
            why="its keys and values are made by an MLP",
            fix="fit a PrefixRule without one, or take the MLP out: folded_adapter(model)",
        )
    owners = [key.removesuffix(KEY) for key in adapter_state_dict(model, adapter) if key.endswith(KEY)]
    parameters: dict[str, dict[str, Tensor]] = {
        path: dict(model.get_submodule(f"{path}adapters.{adapter}").named_parameters()) for path in owners
    }
    return {path.rstrip("."): tensors for path, tensors in parameters.items() if "value" in tensors}


def _written_text(inputs: Any) -> str | None:
    """Returns the first string in the arguments of a call, or None."""
    if isinstance(inputs, str):
        return inputs
    parts = inputs.values() if isinstance(inputs, Mapping) else inputs if isinstance(inputs, (tuple, list)) else ()
    return next((text for part in parts if (text := _written_text(part)) is not None), None)


def _check(path: str, key: Tensor, text: tuple[Tensor, Tensor] | None) -> None:
    if text is None:
        raise RuleError("the text does not reach the prefix", where=path, fix="give inputs that use the module")
    rows, _, positions, _ = text[0].shape
    if rows != 1:
        raise RuleError(f"{rows} texts, where one is wanted", where=path, fix="give one text, in a batch of one")
    if positions < key.shape[-2]:
        why = f"it has {positions} keys here, and the prefix {key.shape[-2]}"
        raise RuleError("the text is too short", where=path, why=why, fix="give a longer text, or a smaller length")


def _call(model: nn.Module, inputs: Any) -> None:
    if isinstance(inputs, Mapping):
        model(**inputs)
    else:
        model(*inputs if isinstance(inputs, (tuple, list)) else (inputs,))
