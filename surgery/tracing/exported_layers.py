"""Recreates the layers of a torch.export graph as modules, so that rules have modules to target."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from surgery.errors import SurgeryError

__all__ = ["with_layers"]


def with_layers(exported: fx.GraphModule) -> fx.GraphModule:
    """Recreate torch's layers in a graph of `torch.export` as modules, in place.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, with_layers
    >>> from surgery.rules import LoraRule
    >>> x = torch.randn(2, 4)
    >>> model = torch.export.export(nn.Sequential(nn.Linear(4, 8), nn.ReLU()), (x,)).module()
    >>> before = model(x)
    >>> _ = apply_rules(with_layers(model), [LoraRule("0", rank=2)])
    >>> type(model.get_submodule("0")).__name__, torch.equal(model(x), before)
    ('Linear', True)

    An exported graph calls `aten.linear(x, weight, bias)`, and the former layer only contains the parameters. This
    function recreates Linear, Embedding, Conv1d/2d/3d and LayerNorm at the paths that the export recorded. The graph
    then calls them. Parameters, their names and the bits of the output stay.

    Args:
        exported: The graph: `torch.export.export(model, inputs).module()`.

    Returns:
        The same object.

    Raises:
        SurgeryError: The graph does not come from `torch.export`.

    Note:
        A layer stays as it is if its weight is computed, or if its calls have different settings.
    """
    nodes = exported.graph.nodes if isinstance(exported, fx.GraphModule) else ()
    if not any(isinstance(node.target, torch._ops.OpOverload) and "nn_module_stack" in node.meta for node in nodes):
        raise SurgeryError(
            f"this {type(exported).__name__} is not a graph of torch.export",
            why="its operations do not record their layers",
            fix="pass torch.export.export(model, inputs).module()",
        )
    calls: dict[str, list[tuple[fx.Node, Any]]] = {}
    for node in exported.graph.nodes:
        path, recipe = _layer(exported, node)
        if recipe is not None:
            calls.setdefault(path, []).append((node, recipe))
    for path, layer_calls in calls.items():
        recipes = [recipe for _, recipe in layer_calls]
        if any(recipe != recipes[0] for recipe in recipes):
            continue
        kind, settings = recipes[0]
        parent, _, name = path.rpartition(".")
        setattr(exported.get_submodule(parent), name, _make_layer(kind, settings, exported.get_submodule(path)))
        for node, _ in layer_calls:
            with exported.graph.inserting_before(node):
                call = exported.graph.call_module(path, (node.args[kind is nn.Embedding],))
            call.meta = dict(node.meta)
            node.replace_all_uses_with(call)
            exported.graph.erase_node(node)
    for node in reversed(list(exported.graph.nodes)):
        if node.op == "get_attr" and not node.users:
            exported.graph.erase_node(node)
    exported.recompile()
    return exported


def _layer(exported: fx.GraphModule, node: fx.Node) -> tuple[str, Any]:
    """Returns the path of a layer and its (class, settings) if a node is the whole call of the layer; else "", None."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if node.op != "call_function" or not stack or node.target not in _RECIPES:
        return "", None
    path, kind = stack[-1][0], str(stack[-1][1]).rpartition(".")[2]
    names, settings_of = _RECIPES[node.target]
    holder: Any = exported
    for part in path.split("."):
        holder = getattr(holder, part, None)
    # A module with children, buffers or a class of its own is already a layer, or computes its weight.
    if type(holder) is not nn.Module or kind not in names or holder._modules or holder._buffers:
        return "", None
    tensors = node.args[0:1] if kind == "Embedding" else node.args[2:4] if kind == "LayerNorm" else node.args[1:3]
    operands = [_tensor(exported, argument) for argument in tensors]
    weight, bias = holder._parameters.get("weight"), holder._parameters.get("bias")
    own = zip([*operands, None, None], (weight, bias), strict=False)
    if any(operand is not parameter for operand, parameter in own) or weight is None:
        return "", None
    return path, (names[kind], settings_of(weight, [*node.args], bias is not None))


def _tensor(exported: fx.GraphModule, argument: Any) -> Tensor | None:
    if not isinstance(argument, fx.Node):
        return None
    if argument.op != "get_attr":
        return torch.empty(0)  # a computed tensor, which is not a parameter
    path, _, name = str(argument.target).rpartition(".")
    return exported.get_submodule(path)._parameters.get(name, torch.empty(0))


def _make_layer(kind: type[nn.Module], settings: Mapping[str, Any], holder: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        layer = kind(**settings, device="meta")
    for name in layer._parameters:
        layer._parameters[name] = holder._parameters.get(name)
    layer.__dict__["training"] = holder.training
    return layer


def _linear(weight: Tensor, args: list[Any], bias: bool) -> dict[str, Any]:
    return {"in_features": weight.shape[1], "out_features": weight.shape[0], "bias": bias}


def _embedding(weight: Tensor, args: list[Any], bias: bool) -> dict[str, Any]:
    padding, scaled, sparse = [*args[2:], *(-1, False, False)[len(args) - 2 :]]
    sizes = {"num_embeddings": weight.shape[0], "embedding_dim": weight.shape[1]}
    return {**sizes, "sparse": sparse, "scale_grad_by_freq": scaled, "padding_idx": None if padding == -1 else padding}


def _convolution(weight: Tensor, args: list[Any], bias: bool) -> dict[str, Any]:
    rank = weight.dim() - 2
    stride, padding, dilation, groups = [*args[3:], *([1], [0], [1], 1)[len(args) - 3 :]]
    sizes = {"stride": stride, "padding": padding, "dilation": dilation}
    sizes = {key: size if isinstance(size, str) else tuple(size) * (rank // len(size)) for key, size in sizes.items()}
    channels = {"in_channels": weight.shape[1] * groups, "out_channels": weight.shape[0], "groups": groups}
    return {**channels, **sizes, "kernel_size": tuple(weight.shape[2:]), "bias": bias}


def _layer_norm(weight: Tensor, args: list[Any], bias: bool) -> dict[str, Any]:
    return {"normalized_shape": tuple(args[1]), "eps": args[4] if len(args) > 4 else 1e-5, "bias": bias}


_Settings = Callable[[Tensor, list[Any], bool], dict[str, Any]]
_RECIPES: dict[Any, tuple[dict[str, type[nn.Module]], _Settings]] = {
    torch.ops.aten.linear.default: ({"Linear": nn.Linear, "NonDynamicallyQuantizableLinear": nn.Linear}, _linear),
    torch.ops.aten.embedding.default: ({"Embedding": nn.Embedding}, _embedding),
    torch.ops.aten.layer_norm.default: ({"LayerNorm": nn.LayerNorm}, _layer_norm),
    torch.ops.aten.conv1d.default: ({"Conv1d": nn.Conv1d}, _convolution),
    torch.ops.aten.conv2d.default: ({"Conv2d": nn.Conv2d}, _convolution),
    torch.ops.aten.conv3d.default: ({"Conv3d": nn.Conv3d}, _convolution),
}
