"""Traces a linear layer with low-rank branches as one operation, and writes it as matrix products at the end.

Traced directly, a branch is about ten operations on symbolic sizes and two more inputs, which torch.export and
onnxscript visit several times: with a branch on each linear layer, an export took 1.7 times as long as the base's. So
the operation refers to its factors by name, and the inputs are added after the exporter's passes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from surgery.forward import graph_functions
from surgery.weaving import low_rank_kernel

__all__ = ["Factor", "by_name", "translations", "write_branches"]

DOMAIN, BRANCH = "surgery", "LowRank"


@dataclass(frozen=True)
class Factor:
    """A placeholder for a factor in its module. Operations on it raise TypeError."""

    name: str
    dtype: torch.dtype


@torch.library.custom_op("surgery::low_rank_linear", mutates_args=())
def low_rank_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: str, dtype: torch.dtype, scales: Sequence[float]
) -> Tensor:
    """Outside an export, computes only the layer."""
    return F.linear(x, weight, bias)


@low_rank_linear.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: str, dtype: torch.dtype, scales: Sequence[float]
) -> Tensor:
    torch._check(x.shape[-1] == weight.shape[1])  # otherwise the size would be free in the file
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@contextlib.contextmanager
def by_name(lifted: Sequence[Any]) -> Iterator[None]:
    """Replaces these tensors by `Factor`s during the block; linear layers with branches accept them."""

    def layer(x: Tensor, weight: Tensor, bias: Tensor | None, factors: list[Any], scales: list[float]) -> Tensor:
        pairs: list[tuple[Any, Any, float]] = list(zip(factors[::2], factors[1::2], scales, strict=True))
        named = [pair for pair in pairs if isinstance(pair[0], Factor)]
        if named:
            names = "\n".join([lifted_factor.name for pair in named for lifted_factor in pair[:2]])
            y = low_rank_linear(x, weight, bias, names, named[0][0].dtype, [scale for *_, scale in named])
        else:
            y = F.linear(x, weight, bias)
        for A, B, scale in pairs:
            if not isinstance(A, Factor):  # a constant of the file
                y = graph_functions.same_dtype(y + F.linear(F.linear(x.to(A.dtype), A), B) * scale, y)
        return y

    for tensor in lifted:
        tensor.box.__dict__[tensor.key] = Factor(tensor.name, tensor.tensor.dtype)
    try:
        with low_rank_kernel.use_layer_operation(layer):
            yield
    finally:
        for tensor in lifted:
            del tensor.box.__dict__[tensor.key]


def translations() -> dict[Any, Any]:
    """Returns the translation for `torch.onnx.export`: the layer, and one node for its branches."""
    from onnxscript.function_libs.torch_lib.ops.nn import aten_linear

    def translate(x: Any, weight: Any, bias: Any, factors: str, dtype: int, scales: Sequence[float]) -> Any:
        return _branches()(x, aten_linear(x, weight, bias), factors=factors, dtype=dtype, scales=list(scales))

    return {torch.ops.surgery.low_rank_linear.default: translate}


@cache
def _branches() -> Any:
    from onnx.defs import OpSchema
    from onnxscript.values import Op, Opset

    kinds = OpSchema.AttrType
    schema = OpSchema(
        BRANCH,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter(name, "T") for name in ("x", "y")],
        outputs=[OpSchema.FormalParameter("out", "T")],
        type_constraints=[("T", [f"tensor({kind})" for kind in ("float", "double", "float16", "bfloat16")], "")],
        attributes=[
            OpSchema.Attribute("factors", kinds.STRING, required=True),
            OpSchema.Attribute("dtype", kinds.INT, required=True),
            OpSchema.Attribute("scales", kinds.FLOATS, required=True),
        ],
    )
    return Op(Opset(DOMAIN, 1), BRANCH, schema)


def write_branches(model: ir.Model, inputs: Mapping[str, ir.Value]) -> None:
    """Replaces branch nodes by y + (x Aᵀ) Bᵀ scale. `inputs`: graph inputs by the factors' names."""
    for graph in model.graphs():
        for node in list(graph):
            if (node.domain, node.op_type) == (DOMAIN, BRANCH):
                _write_branch(graph, node, inputs)
    model.opset_imports.pop(DOMAIN, None)


def _write_branch(graph: Any, node: ir.Node, inputs: Mapping[str, ir.Value]) -> None:
    x, y = node.inputs
    out, marks = node.outputs[0], dict(node.metadata_props)
    assert x is not None and y is not None
    out_dtype, dtype = out.dtype, ir.DataType(node.attributes["dtype"].as_int())
    nodes: list[ir.Node] = []

    def add_node(kind: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        name = f"{node.name}.{len(nodes)}"
        nodes.append(new := ir.node(kind, inputs, attributes, name=name, metadata_props=dict(marks)))
        new.outputs[0].name, new.outputs[0].dtype = f"{out.name}.{len(nodes)}", dtype
        return new.outputs[0]

    def cast(value: ir.Value) -> ir.Value:
        return value if out_dtype == dtype else add_node("Cast", value, to=dtype)

    rows, total = cast(x), cast(y)
    names = node.attributes["factors"].as_string().split("\n")
    for A, B, scale in zip(names[::2], names[1::2], node.attributes["scales"].as_floats(), strict=True):
        branch = add_node("MatMul", rows, add_node("Transpose", inputs[A], perm=[1, 0]))
        branch = add_node("MatMul", branch, add_node("Transpose", inputs[B], perm=[1, 0]))
        if scale != 1.0:
            branch = add_node("Mul", branch, add_node("Constant", value=ir.tensor([scale], dtype)))
        total = add_node("Add", total, branch)
    last = total if out_dtype == dtype else add_node("Cast", total, to=out_dtype)
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [out], [last])
