"""`folded_adapter`: an adapter's rules and tensors without the parts that only training needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from surgery.authoring.equal_rules import ByRule
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.errors import RuleError
from surgery.forward.offloaded_weights import value_at
from surgery.patterns.module_walk import RESERVED
from surgery.rewritten_model.state_dict import select_adapter_tensors
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import ModelState, Sites, sites

__all__ = ["fold_sites", "folded_adapter"]


def folded_adapter(
    model: nn.Module, adapter: str = "default", state_dict: Mapping[str, Tensor] | None = None
) -> tuple[list[Rule], dict[str, Tensor]]:
    """Return an adapter's rules and tensors in the simpler form that `Rule.folded` gives, without changing the model.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaModel
    >>> from surgery.rules import PrefixRule
    >>> from surgery import apply_rules, folded_adapter, load_adapter_state_dict, remove
    >>> sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2)
    >>> model = LlamaModel(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes))
    >>> example = {"input_ids": torch.tensor([[1, 2, 3]])}
    >>> _ = apply_rules(model, [PrefixRule(length=5, projection=8)], example_inputs=example)
    >>> rules, tensors = folded_adapter(model)
    >>> {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    {'layers.0.self_attn.adapters.key': (2, 5, 4), 'layers.0.self_attn.adapters.value': (2, 5, 4)}

    To use the result: `remove(model)`, `apply_rules(model, rules, …)`, `load_adapter_state_dict(model, tensors)`.

    Args:
        model: the model.
        adapter: the adapter's name.
        state_dict: the tensors to read, as for `adapter_state_dict`. None: the model's.

    Returns:
        The rules, and the tensors by their keys. Tensors that do not change share the model's memory.

    Raises:
        SurgeryError: an unknown adapter.
        RuleError: `Rule.folded` gives different rules for one rule at different sites.
    """
    root, state = rewritten(model)
    adapter_names(state, adapter)
    return fold_sites(state, list(sites(root)), adapter, state_dict)


def fold_sites(
    state: ModelState, all_sites: Sites, adapter: str, state_dict: Mapping[str, Tensor] | None
) -> tuple[list[Rule], dict[str, Tensor]]:
    """`folded_adapter` for a model whose sites are at hand."""
    plainer = ByRule[Rule]()
    tensors: dict[str, Tensor] = {}
    state_dict = select_adapter_tensors(all_sites, adapter, state_dict)
    at = state.rules_at((adapter,))
    for path, module, _ in all_sites:
        site_tensors = dict(tensors_of(module, adapter, path, state_dict))
        for applied in at.get(id(module), ()):
            live = LiveSite(module, path, adapter, site_tensors, lambda name, _, module=module: value_at(module, name))
            with HookCall(applied.rule, "folded", path):
                rule, folded_tensors = applied.rule.folded(live)
            if plainer.get(applied.rule, lambda rule=rule: rule) != rule:
                raise RuleError(f"{applied.rule.label}.folded gives different rules at different sites", where=path)
            site_tensors = dict(folded_tensors)
        for name, tensor in site_tensors.items():
            tensors[".".join(filter(None, (path, RESERVED, name)))] = tensor.detach()
    return [plainer.get(rule, lambda rule=rule: rule) for rule in state.adapters[adapter]], tensors
