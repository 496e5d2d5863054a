"""Chooses and names the free axes of an export."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.calls.example import ExampleCall, is_cache, leaves_of
from surgery.onnx.calls.resized_calls import resize, sizes_of, with_total

__all__ = [
    "Axes", "Dynamic", "axes_of", "dynamic_shapes", "examples_for_tracing", "fixed_axis_notices",
    "with_longer_texts", "rename_dims",
]  # fmt: skip

Dynamic = bool | Mapping[str, Mapping[int, str]]
Axes = dict[str, dict[int, str]]  # input → axis → name


def axes_of(example: ExampleCall, dynamic: Dynamic) -> Axes:
    """Returns the free axes of a call's tensors with their names: batches, and positions of texts and caches.

    Image sizes are fixed. A mapping as `dynamic` is checked and used as it is.
    """
    tensors = {name: leaf for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)}
    if dynamic is False:
        return {}
    if dynamic is not True:
        return _check_mapping(dynamic, tensors)
    caches = {name for name, value in example.values.items() if is_cache(value)}
    axes: Axes = {}
    for name, tensor in tensors.items():
        if tensor.dim():
            root = name.partition(".")[0]
            axes[name] = _of_cache(name, tensor) if root in caches else _axes(root, tensor, bool(caches), tensors)
    return _separate_names(axes, tensors)


def _separate_names(axes: Axes, tensors: Mapping[str, Tensor]) -> Axes:
    """Gives sizes that may differ different names. Tracing joins the names of sizes that must be equal.

    Tensors of a text share the text's sizes, unless the example shows others. Runtimes reuse memory by these names.
    """
    first_use: dict[str, tuple[bool, int]] = {}
    named_axes: Axes = {}
    for name, free in axes.items():
        named_axes[name] = {}
        for axis, dim in free.items():
            key = (_is_text(name, tensors[name]), tensors[name].shape[axis])
            same = dim not in first_use or (key[0] and first_use[dim] == key)
            first_use.setdefault(dim, key)
            named_axes[name][axis] = dim if same else unique_dim_name(name, dim)
    return named_axes


def _is_text(name: str, tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(re.search("mask|embeds|encoder|past_key_values", name))


def unique_dim_name(name: str, dim: str) -> str:
    return re.sub(r"\W", "_", f"{name}_{dim}")


def _check_mapping(dynamic: Mapping[str, Mapping[int, str]], tensors: Mapping[str, Tensor]) -> Axes:
    sizes: dict[str, int] = {}
    for name, axes in dynamic.items():
        if name not in tensors:
            why = near_misses(name, tensors) or f"they are {', '.join(tensors)}"
            raise SurgeryError(f"dynamic names {name!r}, which is not an input", why=why)
        for axis, dim in axes.items():
            if type(axis) is not int or not 0 <= axis < tensors[name].dim() or not isinstance(dim, str) or not dim:
                raise SurgeryError(
                    f"dynamic[{name!r}] has {axis!r}: {dim!r}",
                    why=f"{name} has {tensors[name].dim()} dimensions",
                    fix='{"input_ids": {0: "batch", 1: "sequence"}}',
                )
            if sizes.setdefault(dim, size := tensors[name].shape[axis]) != size:
                why = f"axes with the same name must have the same size, and the example has {sizes[dim]} and {size}"
                raise SurgeryError(f"dynamic[{name!r}] has {axis!r}: {dim!r}", why=why)
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
        return {0: "batch", 1: positions if "mask" in name or name == "input_values" else unique_dim_name(name, "size")}
    return {0: "batch", 1: positions, 2: unique_dim_name(name, "size")}


def examples_for_tracing(example: ExampleCall, axes: Axes) -> list[ExampleCall]:
    """Returns the example with 5 in place of sizes of 1, which tracing takes for constants: all sizes, or only batches.

    Few models have another size of 5. Strides that are equal by chance fix sizes, too, so 2 would be worse.
    """
    sizes = sizes_of(example, axes)
    ones = [name for name, size in sizes.items() if size == 1]
    replaced = [ones, [name for name in ones if name.endswith("batch")], []]
    examples = [
        resize(example, axes, with_total({**sizes, **dict.fromkeys(free, 5)}, sizes)) for free in replaced if free
    ]
    return [*examples, example]


def with_longer_texts(example: ExampleCall, axes: Axes) -> ExampleCall:
    """Returns the call with texts that are longer by one.

    Tracing generalises from the example: a text whose length is a multiple of a chunk size needs no padding.
    """
    sizes = sizes_of(example, axes)
    more = {name: size if name.endswith(("batch", "_size")) else size + 1 for name, size in sizes.items()}
    return resize(example, axes, with_total(more, sizes))


def dynamic_shapes(example: ExampleCall, axes: Axes) -> dict[str, Any]:
    """Returns the axes as torch.export's `dynamic_shapes`, with AUTO: the model may make some constant."""
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
    """Nests the shapes as torch.export flattens a value. Caches become lists."""
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
    """Renames the symbols of an ONNX graph (input → axis → name). Returns the axes that are free."""
    import onnx_ir as ir

    names: dict[str, str] = {}
    free: dict[str, dict[int, str]] = {}
    for value in model.graph.inputs:
        for axis, name in axes.get(value.name, {}).items():
            dim = value.shape[axis] if value.shape is not None and axis < len(value.shape) else None
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and not _number(dim.value):
                free.setdefault(value.name, {})[axis] = name
                names.setdefault(dim.value, name)  # the first name wins; sums of names have no name of their own
    for value in _values(model):
        if value.shape is not None and any(isinstance(dim, ir.SymbolicDim) for dim in value.shape):
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])
    for value in model.graph.inputs:
        for axis in list(free.get(value.name, {})):
            free[value.name][axis] = str(value.shape[axis].value)
    return free


def fixed_axis_notices(
    example: ExampleCall, axes: Axes, free: Mapping[str, Mapping[int, str]], takes: Callable[[ExampleCall], bool]
) -> list[str]:
    """Returns a notice for each axis that should be free and is fixed, except unnamed sizes.

    `takes`: whether the live model accepts a call. It distinguishes what tracing fixed from what the model fixes.
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
    """Returns the call with a larger dimension: it alone; with all other text lengths; or, if it is a batch, with all
    batches larger by one or doubled, for models that need a fixed number of images for each text."""
    sizes = sizes_of(example, axes)
    alone = resize(example, axes, with_total({**sizes, dim: sizes[dim] + 1}, sizes))
    if not dim.endswith(("batch", "_size")):
        return [alone, with_longer_texts(example, axes)]
    batches = {name: size for name, size in sizes.items() if name.endswith("batch")}
    if dim not in batches or len(batches) < 2:
        return [alone]
    more = [{name: size + 1 for name, size in batches.items()}, {name: 2 * size for name, size in batches.items()}]
    return [alone, *(resize(example, axes, {**sizes, **changed}) for changed in more)]


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
