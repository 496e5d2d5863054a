"""Ranks that were traced at one size and are free all the same: of tensors that are factors of a product alone."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

__all__ = ["free_ranks"]


def free_ranks(model: ir.Model, axes: Mapping[str, int | None]) -> bool:
    """Make these axes of a graph's inputs free; False, the graph as it was, where an input is more than a factor.

    A factor is turned and multiplied: A in x Aᵀ, B in (x Aᵀ) Bᵀ. What comes in between has the rank, and nothing else.
    """
    inputs = {value.name: value for value in model.graph.inputs}
    between: list[ir.Value] = []
    for name in axes:
        turned = [node.outputs[0] for node in _users(inputs[name])]
        if not turned or any(not _is(node, "Transpose") for node in _users(inputs[name])):
            return False
        products = [node for value in turned for node in _users(value)]
        if any(not _is(node, "MatMul") for node in products):
            return False
        between += [*turned, *(node.outputs[0] for node in products)]
    for name, axis in axes.items():
        value = inputs[name]
        if value.shape is None or axis is None:
            return False
        dims = [ir.SymbolicDim(f"{name}.rank") if at == axis else dim for at, dim in enumerate(value.shape)]
        value.shape = ir.Shape(dims)
    for value in between:
        if not value.is_graph_output():
            value.shape = None
    return True


def _users(value: ir.Value) -> list[ir.Node]:
    return [use.node for use in value.uses()]


def _is(node: ir.Node, kind: str) -> bool:
    return node.op_type == kind and node.domain in ("", "ai.onnx")
