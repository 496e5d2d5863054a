"""State dicts of the base and of an adapter, and the rules of an adapter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError, near_misses
from surgery.forward.offloaded_weights import device_of_calls
from surgery.patterns.module_walk import RESERVED, base_modules
from surgery.patterns.wrappers import select_tensors
from surgery.rewritten_model.verb_root import check_all_present, rewritten, rewritten_if_any
from surgery.sharded_tensors import copy_into, is_flattened
from surgery.state.absent_values import base_device
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import base_alone, box_of, is_adapter_key, tensors_of
from surgery.state.merged_tensors import check_adapter_unmerged
from surgery.state.records import ModelState, Sites, sites
from surgery.state.restructuring import structure_keys
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal

__all__ = ["adapter_state_dict", "base_state_dict", "fill_tensors", "load_adapter_state_dict", "rules_of"]


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the base's tensors by their own keys, without adapters.

    >>> from torch import nn
    >>> from surgery import apply_rules, base_state_dict
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> list(base_state_dict(model))
    ['0.weight', '0.bias']

    Returns:
        The keys, order and tensors of `model.state_dict()` before any rule. While merged, the weights are the merged
        ones. The dict loads into the plain model with `strict=True`.
    """
    check_all_present(model)
    with base_alone():
        tensors = model.state_dict()
    return {key: tensor for key, tensor in tensors.items() if not is_adapter_key(model, key)}


def adapter_state_dict(
    model: nn.Module, adapter: str = "default", state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return an adapter's tensors by their names in the model, without the adapter's name.

    >>> from torch import nn
    >>> from surgery import adapter_state_dict, apply_rules
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)], adapter="topics")
    >>> {key: tuple(tensor.shape) for key, tensor in adapter_state_dict(model, "topics").items()}
    {'0.adapters.A': (2, 4), '0.adapters.B': (4, 2)}

    Args:
        model: the model.
        adapter: the adapter's name.
        state_dict: a state dict of the whole model to read from, gathered by FSDP or DeepSpeed; its keys may have
            wrappers' segments (`module.`, `_orig_mod.`). None: read the model.

    Returns:
        Detached tensors that share the model's (or the state dict's) memory.

    Raises:
        SurgeryError: an unknown adapter, or a state dict that lacks a tensor of the adapter.
    """
    root, state = rewritten(model)
    adapter_names(state, adapter)
    tensors, all_sites = {}, list(sites(root))
    selected = select_adapter_tensors(all_sites, adapter, state_dict)
    for path, module, _ in all_sites:
        for name, tensor in tensors_of(module, adapter, path, selected).items():
            tensors[".".join(filter(None, (path, RESERVED, name)))] = tensor.detach()
    return {**tensors, **_structure_tensors(root, state, adapter, state_dict)}


def _structure_tensors(
    root: nn.Module, state: ModelState, adapter: str, state_dict: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The values of what the adapter's structural rules made, by the names that files have."""
    records = [record for record in state.structure if record.adapter == adapter]
    if state_dict is None:
        return {key: tensor.values() for key, tensor in structure_keys(records)}
    paths = {id(module): path for path, module in base_modules(root)} if records else {}
    names = {
        key: ".".join(filter(None, (paths[id(tensor.owner)], tensor.name)))
        for key, tensor in structure_keys(records)
        if id(tensor.owner) in paths
    }
    whole = select_tensors(state_dict, names.values())
    return {key: tensor.values(whole.get(names.get(key, ""))) for key, tensor in structure_keys(records)}


def select_adapter_tensors(
    all_sites: Sites, adapter: str, state_dict: Mapping[str, Tensor] | None
) -> Mapping[str, Tensor] | None:
    """Returns the adapter's tensors in a state dict, by this model's names. None without a state dict."""
    if state_dict is None:
        flat = [path for path, module, _ in all_sites if any(map(is_flattened, tensors_of(module, adapter).values()))]
        if flat:
            raise SurgeryError(
                f"the tensors of {adapter!r} are not whole here",
                where=flat[0],
                why="FSDP made them parts of a sharded flat parameter",
                fix="gather them on all processes, get_model_state_dict(model, options=StateDictOptions("
                "full_state_dict=True)), and pass them: state_dict=…",
            )
        return None
    insides = [(".".join(filter(None, (path, RESERVED, adapter))), module) for path, module, _ in all_sites]
    names = [f"{inside}.{name}" for inside, module in insides for name in tensors_of(module, adapter)]
    return select_tensors(state_dict, names)


@verb
def load_adapter_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], adapter: str = "default") -> None:
    """Copy tensors, as `adapter_state_dict` returns them, into an adapter that is on the model.

    >>> from torch import nn
    >>> from surgery import adapter_state_dict, apply_rules, load_adapter_state_dict, rules_of
    >>> from surgery.rules import LoraRule
    >>> trained = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2, init="random")])
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), rules_of(trained))
    >>> load_adapter_state_dict(model, adapter_state_dict(trained))
    >>> bool((model[0].adapters.default.B == trained[0].adapters.default.B).all())
    True

    Dtypes and devices stay the model's. Changes of the base at the start (PiSSA) are not in these tensors: apply the
    same rules to the same base first.

    Args:
        model: the model.
        tensors: the tensors by the keys of `adapter_state_dict`.
        adapter: the adapter's name.

    Raises:
        SurgeryError: tensors that are missing, unknown or of another shape, all listed; or the adapter is merged, so
            the weights would keep the former tensors' change. The adapter is unchanged.
    """
    own = adapter_state_dict(model, adapter)
    check_adapter_unmerged(rewritten(model)[0], adapter)
    problems = [f"{key} is missing" for key in own if key not in tensors]
    problems += [f"{key} is unknown: {near_misses(key, own) or 'no such site'}" for key in tensors if key not in own]
    for key in own.keys() & tensors.keys():
        if own[key].shape != tensors[key].shape:
            problems.append(f"{key} has the shape {tuple(tensors[key].shape)}, not {tuple(own[key].shape)}")
        elif tensors[key].is_meta and not own[key].is_meta:
            problems.append(f"{key} is on the device meta, so it has no values")
    if problems:
        raise SurgeryError(
            f"the tensors do not fit the adapter {adapter!r}",
            why="; ".join(problems[:8]) + ("; …" if len(problems) > 8 else ""),
            fix="apply the rules that they were trained with: rules_of, rules_to_json",
        )
    with Journal() as journal:
        if any(own[key].is_meta and not tensor.is_meta for key, tensor in tensors.items()):
            if absent := [key for key, tensor in tensors.items() if tensor.is_meta]:
                what = f"{len(absent)} of {len(tensors)} tensors are on the device meta"
                raise SurgeryError(what, where=absent[0], why="they have no values", fix="load their values first")
            _give_memory(model, adapter, journal)
            own = adapter_state_dict(model, adapter)
        fill_tensors({key: tensor for key, tensor in own.items() if not tensors[key].is_meta}, tensors)


def _give_memory(model: nn.Module, adapter: str, journal: Journal) -> None:
    """Replace an adapter's tensors on the meta device by memory: where the base is, or on the CPU if it is on meta."""
    replaced: dict[int, nn.Parameter] = {}  # sites may share a parameter
    for module in rewritten(model)[1].places[adapter].modules:
        box = box_of(module, adapter)
        if box is None:
            continue
        journal.keep(box._parameters, box._buffers)
        device = device_of_calls(module) or base_device(module) or torch.device("cpu")
        for name, tensor in box.tensors().items():
            if isinstance(tensor, nn.Parameter) and tensor.is_meta:
                new = torch.empty_like(tensor, device=device)
                replaced.setdefault(id(tensor), nn.Parameter(new, requires_grad=tensor.requires_grad))
                box._parameters[name] = replaced[id(tensor)]
            elif tensor.is_meta:
                box._buffers[name] = torch.empty_like(tensor, device=device)


def fill_tensors(own: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copy values into tensors of a model by key; an outer journal undoes it."""
    with Journal() as journal:
        for key, tensor in own.items():
            journal.undo(copy_into, tensor, tensor.clone())
            copy_into(tensor, values[key])


def rules_of(model: nn.Module, adapter: str | None = None) -> list[Rule]:
    """Return the rules of an adapter, or of all adapters in the order in which they were applied.

    >>> from torch import nn
    >>> from surgery import apply_rules, rules_of
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> rules_of(model) == [LoraRule("0", rank=2)]
    True

    Args:
        model: the model. For a model without adapters the list is empty.
        adapter: the adapter's name. None: all adapters.

    Raises:
        SurgeryError: an unknown adapter.
    """
    if adapter is None and rewritten_if_any(model) is None:
        return []
    _, state = rewritten(model)
    return [rule for name in adapter_names(state, adapter) for rule in state.adapters[name]]
