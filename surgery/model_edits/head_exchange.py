"""Exchanges the head of a model for one with another number of labels, as if the model had been built so."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.model_differences import Difference, differences, plain_attributes
from surgery.model_edits.plain_model import build_plain, configured
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["exchange_head"]

# Attributes of modules without a configuration that say the number of labels.
_COUNT = re.compile(r"(num|n|number_of)_?(labels|classes)")


def exchange_head(edits: EditLog, paths: Sequence[str], labels: int | Sequence[str], *, trainable: bool) -> None:
    """Exchange the last linear layers of a model, and adapt the configuration to them.

    Args:
        edits: the edits of the rule.
        paths: the paths of the layers; empty: those whose size follows from the configuration's number of labels.
        labels: the number of labels, or their names.
        trainable: whether the new layers train with the adapter.
    """
    count = labels if isinstance(labels, int) else len(labels)
    part = next((p for p in [configured(edits.model, path) for path in paths or [""]] if p is not None), None)
    built = _Built.of(submodule(edits.model, part), count) if part is not None else None
    prefix = f"{part}." if part else ""
    heads = {f"{prefix}{path}": module for path, module in built.heads.items()} if built is not None else {}
    if not paths and not heads:
        kind = class_of(edits.model).__name__
        raise SiteError(
            f"this {kind} does not have a head whose size is a number of labels",
            why="a model built from its configuration with another num_labels has the same tensors"
            if part is not None
            else "it does not have a configuration of transformers",
            fix="name the last Linear of the head: HeadRule('fc', labels=…)",
        )
    for path in paths or heads:
        new = heads.get(path)
        _exchange(edits, path, new if new is not None else _linear(edits, path, count), trainable)
    if built is not None and (not paths or set(paths) & heads.keys()):
        owner = submodule(edits.model, part or "")
        for difference in built.attributes:
            target = submodule(owner, difference.path)
            for name, (was, becomes) in difference.attributes.items():
                if plain_attributes(target).get(name) == was and difference.path not in built.heads:
                    edits.set_attribute(target, name, copy.copy(becomes))
        edits.set_config(owner.config, _config(owner.config, labels), part or "")


class _Built:
    """What follows from the number of labels in a configuration.

    Attributes:
        heads: path → the module in a model that is built with the new number, on the meta device.
        attributes: the attributes of other modules that differ.
    """

    def __init__(self, heads: Mapping[str, nn.Module], attributes: Sequence[Difference]):
        self.heads, self.attributes = heads, attributes

    @staticmethod
    def of(module: nn.Module, count: int) -> _Built | None:
        config: Any = module.config
        before = build_plain(module, config)
        present = getattr(config, "num_labels", None)
        if before is None or type(present) is not int:
            return None
        after = build_plain(module, _config(config, count))
        # With the same number nothing would differ, so the places are found by another number.
        other = build_plain(module, _config(config, count + 1)) if count == present else after
        if after is None or other is None:
            return None
        found = differences(before, other)
        paths = [difference.path for difference in found if difference.has_tensors]
        heads = {path: after.get_submodule(path) for path in paths if not _is_inside(path, paths)}
        return _Built(heads, differences(before, after))


def _is_inside(path: str, others: Sequence[str]) -> bool:
    return any(path.startswith(f"{other}.") for other in others if other) or (path != "" and "" in others)


def _config(config: Any, labels: int | Sequence[str]) -> Any:
    """A copy of a configuration with other labels."""
    new = copy.deepcopy(config)
    if isinstance(labels, int):
        if labels != getattr(config, "num_labels", None):
            new.num_labels = labels
    else:
        new.id2label = dict(enumerate(labels))
        new.label2id = {name: index for index, name in enumerate(labels)}
    # transformers notes the kind of the loss at the first call with labels, from their number.
    if getattr(new, "problem_type", None) in ("regression", "single_label_classification"):
        if (new.num_labels == 1) is not (new.problem_type == "regression"):
            new.problem_type = None
    return new


def _linear(edits: EditLog, path: str, count: int) -> nn.Module:
    """A Linear like the one at a path, with another number of outputs, on the meta device."""
    old = submodule(edits.model, path)
    if not isinstance(old, nn.Linear):
        raise SiteError(
            f"a {class_of(old).__name__} is not a head",
            where=path or "(the model itself)",
            why="its number of labels can't be changed",
            fix="name the Linear that computes the logits; ReplaceRule puts any module into its place",
        )
    if not path:
        raise SiteError("the model itself is the head", fix="put it into a Sequential")
    for above in (".".join(path.split(".")[:depth]) for depth in range(path.count(".") + 1)):
        owner = submodule(edits.model, above)
        for name, value in plain_attributes(owner).items():
            if value == old.out_features and type(value) is int and _COUNT.fullmatch(name.lstrip("_")):
                edits.set_attribute(owner, name, count)
    return nn.Linear(old.in_features, count, bias=old.bias is not None, device="meta")


def _exchange(edits: EditLog, path: str, built: nn.Module, trainable: bool) -> None:
    """Put a head with new values into the place of a present one, in its dtype and on its device."""
    old = submodule(edits.model, path)
    like = next((tensor for tensor in (*old.parameters(), *edits.model.parameters()) if _is_floating(tensor)), None)
    new = copy.deepcopy(built).train(old.training)
    if any(True for _ in new.buffers()):
        raise SiteError(
            "the head can't be exchanged",
            where=path,
            why=f"a {type(new).__name__} has buffers, whose values the class alone knows",
            fix="name the Linear that computes the logits",
        )
    device = like.device if like is not None else torch.device("cpu")
    if not device.type == "meta":
        new.to_empty(device="cpu")
        with torch.no_grad():
            _initialise(edits.model, path, new)
    new.to(device=device, dtype=like.dtype if like is not None else None)
    edits.set_module(path, new)
    edits.steps.append((path, class_of(old).__name__, _summary(old, new)))
    for below, module in base_modules(new):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameter.requires_grad_(trainable)
                edits.store(".".join(filter(None, (path, below))), name, trainable=trainable)


def _is_floating(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def _initialise(model: nn.Module, path: str, new: nn.Module) -> None:
    """Give a new head initial values: as the model's class does, else as torch does."""
    part = configured(model, path)
    own: Any = getattr(submodule(model, part), "_init_weights", None) if part is not None else None
    for _, module in base_modules(new):
        if not any(parameter is not None for parameter in module._parameters.values()):
            continue
        if callable(getattr(module, "reset_parameters", None)):
            module.reset_parameters()  # type: ignore[operator]
        if own is not None:
            for parameter in module.parameters(recurse=False):
                if hasattr(parameter, "_is_hf_initialized"):  # then transformers would not draw again
                    delattr(parameter, "_is_hf_initialized")
            own(module)


def _summary(old: nn.Module, new: nn.Module) -> str:
    before, after = getattr(old, "out_features", None), getattr(new, "out_features", None)
    if before is not None and after is not None:
        return f"{before} → {after} labels"
    return f"a new {class_of(new).__name__}"
