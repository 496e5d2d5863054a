"""Which dimensions of an export are free, and what they are called."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.calls.example import ExampleCall, is_cache, leaves_of
from surgery.onnx.calls.resized_calls import sized, sizes_of, summed

__all__ = [
    "Axes", "Dynamic", "axes_of", "dynamic_shapes", "examples_for_tracing", "fixed_dims",
    "of_other_lengths", "rename_dims",
]  # fmt: skip

Dynamic = bool | Mapping[str, Mapping[int, str]]
Axes = dict[str, dict[int, str]]  # input → axis → name


def axes_of(example: ExampleCall, dynamic: Dynamic) -> Axes:
    """What is free in each tensor of a call, with names: `batch` first; the positions of a text or a cache.

    Pictures keep their sizes. A mapping says it itself: input → axis → name.
    """
    tensors = {name: leaf for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)}
    if dynamic is False:
        return {}
    if dynamic is not True:
        return _said(dynamic, tensors)
    caches = {name for name, value in example.values.items() if is_cache(value)}
    axes: Axes = {}
    for name, tensor in tensors.items():
        if tensor.dim():
            root = name.partition(".")[0]
            axes[name] = _of_cache(name, tensor) if root in caches else _axes(root, tensor, bool(caches), tensors)
    return _apart(axes, tensors)


def _apart(axes: Axes, tensors: Mapping[str, Tensor]) -> Axes:
    """Sizes that need not be one have names of their own; where tracing finds that they are, one name is left.

    What belongs to a text has its sizes, unless the example shows others. Runtimes reuse memory by these names.
    """
    taken: dict[str, tuple[bool, int]] = {}
    named_axes: Axes = {}
    for name, free in axes.items():
        named_axes[name] = {}
        for axis, dim in free.items():
            key = (_is_text(name, tensors[name]), tensors[name].shape[axis])
            same = dim not in taken or (key[0] and taken[dim] == key)
            taken.setdefault(dim, key)
            named_axes[name][axis] = dim if same else own_dim(name, dim)
    return named_axes


def _is_text(name: str, tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(re.search("mask|embeds|encoder|past_key_values", name))


def own_dim(name: str, dim: str) -> str:
    return re.sub(r"\W", "_", f"{name}_{dim}")


def _said(dynamic: Mapping[str, Mapping[int, str]], tensors: Mapping[str, Tensor]) -> Axes:
    sizes: dict[str, int] = {}
    for name, axes in dynamic.items():
        if name not in tensors:
            why = near_misses(name, tensors) or f"they are {', '.join(tensors)}"
            raise SurgeryError(f"dynamic names {name!r}, which is no input", why=why)
        for axis, said in axes.items():
            if type(axis) is not int or not 0 <= axis < tensors[name].dim() or not isinstance(said, str) or not said:
                raise SurgeryError(
                    f"dynamic[{name!r}] has {axis!r}: {said!r}",
                    why=f"{name} has {tensors[name].dim()} dimensions",
                    fix='{"input_ids": {0: "batch", 1: "sequence"}}',
                )
            if sizes.setdefault(said, size := tensors[name].shape[axis]) != size:
                why = f"sizes of one name are one size, and the example has {sizes[said]} and {size}"
                raise SurgeryError(f"dynamic[{name!r}] has {axis!r}: {said!r}", why=why)
    return {name: dict(axes) for name, axes in dynamic.items()}


def _of_cache(name: str, tensor: Tensor) -> dict[int, str]:
    past = "sequence" if ".encoder." in name else "past"
    return {0: "batch", 2: past} if tensor.dim() == 4 else {0: "batch"}


def _axes(name: str, tensor: Tensor, cached: bool, tensors: Mapping[str, Tensor]) -> dict[int, str]:
    side = "decoder_" if name.startswith("decoder_") else ""
    text = not tensor.is_floating_point()
    if tensor.dim() == 1 and name in ("cache_position", "position_ids"):
        return {0: f"{side}sequence"}
    if tensor.dim() == 1 or (tensor.dim() > 3 and "mask" not in name):
        return {0: "batch"}
    positions = f"{side}sequence"
    if text and tensor.dim() == 2:
        ids = tensors.get(f"{side}input_ids", tensors.get("inputs_embeds"))
        longer = cached and "mask" in name and ids is not None and ids.shape[1] != tensor.shape[1]
        return {0: "batch", 1: "total" if longer else positions}
    if tensor.dim() == 4:  # a mask over queries and keys
        return {0: "batch", 2: positions, 3: "total" if cached else positions}
    if tensor.dim() == 2:
        return {0: "batch", 1: positions if "mask" in name or name == "input_values" else own_dim(name, "size")}
    return {0: "batch", 1: positions, 2: own_dim(name, "size")}


def examples_for_tracing(example: ExampleCall, axes: Axes) -> list[ExampleCall]:
    """The call with five where it has one, which would be taken for a constant: everywhere, or in the batch alone.

    Five and not two, since few models have another size of five: strides that are equal by chance fix sizes, too.
    """
    sizes = sizes_of(example, axes)
    ones = [name for name, size in sizes.items() if size == 1]
    asked = [ones, [name for name in ones if name.endswith("batch")], []]
    examples = [sized(example, axes, summed({**sizes, **dict.fromkeys(free, 5)}, sizes)) for free in asked if free]
    return [*examples, example]


def of_other_lengths(example: ExampleCall, axes: Axes) -> ExampleCall:
    """The call with texts one longer.

    Tracing takes for always so what is so for the example: of a text that fills its last chunk, that none is padded.
    """
    sizes = sizes_of(example, axes)
    more = {name: size if name.endswith(("batch", "_size")) else size + 1 for name, size in sizes.items()}
    return sized(example, axes, summed(more, sizes))


def dynamic_shapes(example: ExampleCall, axes: Axes) -> dict[str, Any]:
    """The same for torch.export. What the model itself asks to be constant becomes so there."""
    auto = torch.export.Dim.AUTO
    leaves = iter(leaves_of(example.values))
    by_name: dict[str, Any] = {}
    for name, value in example.values.items():
        if isinstance(value, (str, int, float, bool)):
            next(leaves)
            by_name[name] = None
            continue
        flat, spec = pytree.tree_flatten(value)
        shapes = [_shape(leaf, dict.fromkeys(axes.get(next(leaves)[0], {}), auto)) for leaf in flat]
        if isinstance(value, Tensor):
            by_name[name] = shapes[0]
        elif type(value) in (dict, list, tuple):
            by_name[name] = pytree.tree_unflatten(shapes, spec)
        else:
            by_name[name] = _nested(value, iter(shapes))
    return by_name


def _shape(leaf: Any, free: dict[int, Any]) -> Any:
    return free if isinstance(leaf, Tensor) else None


def _nested(value: Any, shapes: Any) -> Any:
    """Caches are lists to torch.export, of as many levels as their own classes' flattening makes."""
    if isinstance(value, Tensor) or value is None or type(value) not in pytree.SUPPORTED_NODES:
        return next(shapes)
    children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    nested = [_nested(child, shapes) for child in children]
    return (
        tuple(nested)
        if type(value) is tuple
        else dict(zip(value, nested, strict=True))
        if type(value) is dict
        else nested
    )


def rename_dims(model: Any, axes: Mapping[str, Mapping[int, str]]) -> dict[str, dict[int, str]]:
    """Give the symbols of an ONNX graph these names (input → axis → name); which of them came out free."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    free: dict[str, dict[int, str]] = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and not _number(dim.value):
                free.setdefault(value.name, {})[axis] = name
                names.setdefault(dim.value, name)  # no name for a sum of others
    for value in _values(model):
        if value.shape is not None and any(isinstance(dim, ir.SymbolicDim) for dim in value.shape):
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for value in model.graph.inputs:
        for axis in list(free.get(value.name, {})):
            free[value.name][axis] = str(value.shape[axis].value)
    return free


def fixed_dims(
    example: ExampleCall, axes: Axes, free: Mapping[str, Mapping[int, str]], takes: Callable[[ExampleCall], bool]
) -> list[str]:
    """What was asked to be free, and came out fixed. Sizes that have no name of their own are not told.

    `takes`: whether the live model can be called so, which tells what tracing fixed from what the model does.
    """
    notices = []
    for name, leaf in leaves_of(example.values):
        for axis, dim in axes.get(name, {}).items() if isinstance(leaf, Tensor) else ():
            if axis not in free.get(name, {}) and not dim.endswith("_size"):
                size = leaf.shape[axis]
                why = "; give an example with more" if size < 2 else ": the model allows no other"
                if size > 1 and any(map(takes, _with_more(example, axes, dim))):
                    why = ": tracing fixed it, though the model takes others"
                notices.append(f"{name} is fixed at {size} along axis {axis} ({dim}){why}")
    return notices


def _with_more(example: ExampleCall, axes: Axes, dim: str) -> list[ExampleCall]:
    """The call with one more along a dimension: along it alone, and along all that are not batches; of a batch, along
    all batches, too, and with all doubled, where it has to have so many images for so many texts."""
    sizes = sizes_of(example, axes)
    alone = sized(example, axes, summed({**sizes, dim: sizes[dim] + 1}, sizes))
    if not dim.endswith(("batch", "_size")):
        return [alone, of_other_lengths(example, axes)]
    batches = {name: size for name, size in sizes.items() if name.endswith("batch")}
    if dim not in batches or len(batches) < 2:
        return [alone]
    more = [{name: size + 1 for name, size in batches.items()}, {name: 2 * size for name, size in batches.items()}]
    return [alone, *(sized(example, axes, {**sizes, **changed}) for changed in more)]


def _values(model: Any) -> Any:
    seen: set[int] = set()
    for graph in model.graphs():
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            if id(value) not in seen:
                seen.add(id(value))
                yield value


def _number(text: Any) -> bool:
    return isinstance(text, int) or str(text).isdigit()


def _renamed(dim: Any, names: Mapping[str, str]) -> Any:
    text = getattr(dim, "value", dim)
    if text is None or isinstance(text, int):
        return text
    if _number(text):
        return int(text)
    return re.sub(r"[A-Za-z_]\w*", lambda match: names.get(match[0], match[0]), text)
