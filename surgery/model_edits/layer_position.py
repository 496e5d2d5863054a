"""Gives modules what a plain model has at their new position: indices, scales, modules that only some layers have."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from surgery.errors import SiteError
from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.layer_config import LayerConfig, blocks
from surgery.model_edits.layer_numbers import renumber_layer
from surgery.model_edits.model_differences import (
    Difference,
    TensorDifference,
    differences,
    plain_attributes,
    same_class,
)
from surgery.patterns.wrappers import submodule

__all__ = ["adapt_layer", "adapt_outside"]


def adapt_layer(
    edits: EditLog,
    layer: nn.Module,
    plain: tuple[nn.Module, nn.Module],
    places: tuple[int, int],
    where: str,
    kind: str,
    copied: bool,
) -> None:
    """Change in a layer what differs between the plain layers of its old and its new index.

    A module or tensor that the plain model does not have at the new index is left out. A layer of another kind than
    the plain model's stays as it is, but for its index, and the edits note it as unplain.

    Args:
        edits: the edits of the rule.
        layer: the layer of the model.
        plain: the plain layers at the old and at the new index.
        places: the old and the new index.
        where: the path of the layer.
        kind: the class of the model and its number of layers, for messages.
        copied: whether the layer is a copy.
    """
    found = differences(*plain)
    for difference in found:
        _check_shapes(difference, where, kind)
    reason = _other_kind(found, plain)
    if reason is not None:
        edits.unplain.append(f"{where} has {reason[0]}, and a {kind} has {reason[1]} there")
        renumber_layer(edits, layer, *places)
        for difference in found:
            _set_attributes(edits, layer, difference, where, places)
        return
    for difference in found:
        _check_missing(difference, where, kind)
    for difference in found:
        _leave_out(edits, layer, difference, where, kind, copied)
        _set_attributes(edits, layer, difference, where)


def adapt_outside(
    edits: EditLog, module: nn.Module, found: LayerConfig, containers: Sequence[str], part: str, kind: str
) -> None:
    """Set the attributes outside of the lists of layers that depend on their number."""
    for difference in differences(found.before, found.after, containers):
        if blocks(difference):
            counts = [(len(model.get_submodule(containers[0])._modules)) for model in (found.before, found.after)]
            raise SiteError(
                "the number of layers can't change" if counts[0] != counts[1] else "the layers can't be exchanged",
                where=".".join(filter(None, (part, difference.path))),
                why=f"a {kind} has other tensors there: {_said(difference, *counts)}",
                fix="its values can't be made from the present ones: keep all layers, or use a model without it",
            )
        _set_attributes(edits, module, difference, part, silent=True)


def _other_kind(found: Sequence[Difference], plain: tuple[nn.Module, nn.Module]) -> tuple[str, str] | None:
    """What a layer has that makes it another kind of layer than the plain model's, and what that one has."""
    for difference in found:
        if difference.kinds is not None:
            return f"a {difference.kinds[0]}", f"a {difference.kinds[1]}"
    parents: dict[str, list[Difference]] = {}
    for difference in found:
        if difference.modules is not None and (difference.missing or difference.extra):
            parents.setdefault(difference.path.rpartition(".")[0], []).append(difference)
    for siblings in parents.values():
        names = [
            ", ".join(item.path for item in siblings if item.extra),
            ", ".join(item.path for item in siblings if item.missing),
        ]
        if all(names):
            return names[0], names[1]
    return None


def _check_shapes(difference: Difference, where: str, kind: str) -> None:
    """Raise `SiteError` if tensors have other shapes in the plain model."""
    shapes = [tensor for tensor in difference.tensors if tensor.first is not None and tensor.second is not None]
    if shapes:
        _refuse(difference, where, kind, "; ".join(map(str, shapes[:3])))


def _check_missing(difference: Difference, where: str, kind: str) -> None:
    """Raise `SiteError` if the plain model has tensors at the new index that the layer does not have."""
    if not difference.missing:
        return
    absent = "; ".join(map(str, difference.tensors[:3]))
    second = (difference.modules or (None, None))[1]
    _refuse(difference, where, kind, absent or f"the layer does not have this {type(second).__name__}")


def _refuse(difference: Difference, where: str, kind: str, text: str) -> None:
    raise SiteError(
        "the layers can't be put into this order",
        where=".".join(filter(None, (where, difference.path))),
        why=f"a {kind} has other tensors there: {text}",
        fix="leave the layers in place whose tensors depend on their position, such as the first",
    )


def _leave_out(edits: EditLog, layer: nn.Module, difference: Difference, where: str, kind: str, copied: bool) -> None:
    """Take out what the plain model does not have there, and take modules without tensors from it."""
    place = ".".join(filter(None, (where, difference.path)))
    if difference.modules is not None:
        first, second = difference.modules
        parent_path, _, name = difference.path.rpartition(".")
        parent = submodule(layer, parent_path)
        own = parent._modules.get(name)
        if not difference.path or (own is None) != (first is None):
            return
        if own is not None and first is not None and not same_class(own, first):
            return  # the user's own module
        children = {key: child for key, child in parent._modules.items() if key != name}
        if second is not None:
            children[name] = copy.deepcopy(second)
        edits.set_children(parent, {key: children[key] for key in (*parent._modules, name) if key in children})
    for tensor in difference.tensors:
        _leave_tensor_out(edits, submodule(layer, difference.path), tensor)
    if difference.extra and not copied:
        edits.warnings.append(f"{place} is left out: a {kind} does not have it there")


def _leave_tensor_out(edits: EditLog, module: nn.Module, tensor: TensorDifference) -> None:
    if tensor.name in module._parameters:
        edits.set_parameter(module, tensor.name, None)
    elif tensor.name in module._buffers:
        edits.set_buffer(module, tensor.name, None)


def _set_attributes(
    edits: EditLog,
    owner: nn.Module,
    difference: Difference,
    where: str,
    places: tuple[int, int] | None = None,
    silent: bool = False,
) -> None:
    """Set the attributes that differ between the two plain models, unless the model's own value is another one.

    `places`: set only attributes that are the old index, to the new one.
    """
    if not difference.attributes:
        return
    target = submodule(owner, difference.path)
    own = plain_attributes(target)
    for name, (was, becomes) in difference.attributes.items():
        if name not in own or own[name] != was or type(own[name]) is not type(was):
            continue
        if places is not None and not (type(was) is type(becomes) is int and (was, becomes) == places):
            continue
        edits.set_attribute(target, name, copy.copy(becomes))
        if not silent and not isinstance(becomes, int):
            place = ".".join(filter(None, (where, difference.path, name)))
            edits.warnings.append(
                f"{place} becomes {becomes!r} (before: {was!r}), as in a model built with these layers"
            )


def _said(difference: Difference, before: int, after: int) -> str:
    """The tensors that differ, and which dimension follows the number of layers."""
    if difference.modules is not None:
        first, second = difference.modules
        return f"a {type(second).__name__}" if first is None else f"no {type(first).__name__}"
    texts = []
    for tensor in difference.tensors[:3]:
        text = str(tensor)
        if tensor.first is not None and tensor.second is not None and len(tensor.first) == len(tensor.second):
            sizes = enumerate(zip(tensor.first, tensor.second, strict=True))
            axes = [(axis, was, now) for axis, (was, now) in sizes if was != now]
            if len(axes) == 1 and before != after and (axes[0][1] - axes[0][2]) % (before - after) == 0:
                text += f" (dimension {axes[0][0]} follows the number of layers, {before} and {after})"
        texts.append(text)
    return "; ".join(texts)
