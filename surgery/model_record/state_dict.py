"""A rewritten model's tensors by name: the base's, an adapter's; and the rules that made an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from surgery.arithmetic.sharded_tensors import is_flattened, put
from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError, near_misses
from surgery.model_record.verb_root import check_all_present, records_in, rewritten
from surgery.patterns.module_walk import RESERVED
from surgery.patterns.wrappers import select_tensors
from surgery.state.adapter_tensors import base_alone, is_adapter_key, tensors_of
from surgery.state.records import adapter_names, sites
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal

__all__ = ["adapter_state_dict", "base_state_dict", "load_adapter_state_dict", "rules_of"]


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The base's own tensors under their own keys, adapters left out.

    >>> from torch import nn
    >>> from surgery import apply_rules, base_state_dict
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> list(base_state_dict(model))
    ['0.weight', '0.bias']

    The keys, their order and the tensors are those of `model.state_dict()` before any rule; while an adapter is
    merged, they are the merged weights. Loads into the plain model with `strict=True`.
    """
    check_all_present(model)
    with base_alone():
        found = model.state_dict()
    return {key: tensor for key, tensor in found.items() if not is_adapter_key(model, key)}


def adapter_state_dict(
    model: nn.Module, adapter: str = "default", state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """An adapter's tensors, under the names they have in the model, without the adapter's own name.

    >>> from torch import nn
    >>> from surgery import adapter_state_dict, apply_rules
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)], adapter="topics")
    >>> {key: tuple(tensor.shape) for key, tensor in adapter_state_dict(model, "topics").items()}
    {'0.adapters.A': (2, 4), '0.adapters.B': (4, 2)}

    The tensors are detached and share the model's memory. `state_dict`: the model's, to take them from where it was
    gathered elsewhere (FSDP, DeepSpeed); its keys may have the segments of wrappers (`module.`, `_orig_mod.`).
    `SurgeryError` for an unknown adapter, and for a state dict that lacks a tensor of the adapter.
    """
    root, state = rewritten(model)
    adapter_names(state, adapter)
    found, state_dict = {}, given_tensors(root, adapter, state_dict)
    for path, module, _ in sites(root):
        for name, tensor in tensors_of(module, adapter, path, state_dict).items():
            found[".".join(filter(None, (path, RESERVED, name)))] = tensor.detach()
    return found


def given_tensors(
    model: nn.Module, adapter: str, state_dict: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """The adapter's tensors in a state dict that was given, under the names of this model; None where none was."""
    if state_dict is None:
        flat = [
            path for path, module, _ in sites(model) if any(map(is_flattened, tensors_of(module, adapter).values()))
        ]
        if flat:
            raise SurgeryError(
                f"the tensors of {adapter!r} are not whole here",
                where=flat[0],
                why="FSDP has made them parts of a flat parameter that is sharded",
                fix="gather them on all processes, get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)), and give them: state_dict=…",
            )
        return None
    insides = [(".".join(filter(None, (path, RESERVED, adapter))), module) for path, module, _ in sites(model)]
    names = [f"{inside}.{name}" for inside, module in insides for name in tensors_of(module, adapter)]
    return select_tensors(state_dict, names)


@verb
def load_adapter_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Copy tensors, as `adapter_state_dict` gives them, into an adapter that its rules have made on a model.

    >>> from torch import nn
    >>> from surgery import adapter_state_dict, apply_rules, load_adapter_state_dict, rules_of
    >>> from surgery.rules import LoraRule
    >>> trained = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2, init="random")])
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), rules_of(trained))
    >>> load_adapter_state_dict(model, adapter_state_dict(trained))
    >>> bool((model[0].adapters.default.B == trained[0].adapters.default.B).all())
    True

    dtypes and devices stay the model's. All or nothing: raises `SurgeryError` that lists every tensor that is missing,
    unknown or of another shape. What an initialisation changed in the base (PiSSA) is not in these tensors, so such a
    model is to be made from the same base with the same rules.
    """
    own = adapter_state_dict(model, adapter)
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is unknown: {near_misses(key, own) or 'no such site'}" for key in tensors if key not in own]
    for key in own.keys() & tensors.keys():
        if own[key].shape != tensors[key].shape:
            problems.append(f"{key} is {tuple(tensors[key].shape)}, and {tuple(own[key].shape)} here")
    if problems:
        raise SurgeryError(
            f"the tensors do not fit the adapter {adapter!r}",
            why="; ".join(problems[:8]) + ("; …" if len(problems) > 8 else ""),
            fix="apply the rules that they were trained with: rules_of, rules_to_json",
        )
    with Journal() as journal:
        for key, tensor in own.items():
            journal.undo(put, tensor, tensor.clone())
            put(tensor, tensors[key])


def rules_of(model: nn.Module, adapter: str | None = None) -> list[Rule]:
    """The rules that made an adapter (or all of them, in the order they were applied).

    >>> from torch import nn
    >>> from surgery import apply_rules, rules_of
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> rules_of(model) == [LoraRule("0", rank=2)]
    True

    An untouched model has none. `SurgeryError` for an unknown adapter.
    """
    if adapter is None and not records_in(model) and not any(True for _ in sites(model)):
        return []
    _, state = rewritten(model)
    return [rule for name in adapter_names(state, adapter) for rule in state.adapters[name]]
