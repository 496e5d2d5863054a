"""Writes quantised weights as their codes: DequantizeLinear takes the place of a weight's initialiser."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from surgery.onnx.calls.shared_copy import packed_maps
from surgery.onnx.graph.weight_names import LAYOUT
from surgery.packed.affine_codes import AffineCodes
from surgery.patterns.module_walk import base_modules

__all__ = ["codes_of", "pack_weights"]


def codes_of(model: nn.Module) -> dict[str, AffineCodes | None]:
    """The codes of a model's quantised weights by their parameters' names; None where ONNX has no such layout."""
    paths = {id(module): path for path, module in base_modules(model)}
    return {f"{paths[id(packed.module)]}.weight".lstrip("."): packed.affine() for packed in packed_maps(model)}


def pack_weights(model: ir.Model, codes: Mapping[str, AffineCodes | None]) -> list[str]:
    """Replaces initialisers that have exactly these values. Returns the names of weights that stay dequantised."""
    graph, staying = model.graph, []
    for name, found in codes.items():
        value = graph.initializers.get(name)
        if value is None or value.const_value is None or found is None or not _same(value, found):
            staying.append(name)
            continue
        turned = value.metadata_props.get(LAYOUT) == "transposed"
        inputs = [_initializer(f"{name}.{part}", tensor) for part, tensor in _tensors(name, found, turned)]
        attributes: dict[str, int] = {"axis": int(turned)}
        if found.scales.shape[1] > 1:
            attributes = {"axis": int(not turned), "block_size": found.block}
        nodes = [ir.node("DequantizeLinear", inputs, attributes)]
        output = nodes[0].outputs[0]
        if inputs[1].dtype != value.dtype:  # the kernel's values are of the scales' dtype
            output.type, output.shape = ir.TensorType(inputs[1].dtype or ir.DataType.FLOAT16), value.shape
            nodes.append(ir.node("Cast", [output], {"to": value.dtype}))
            output = nodes[1].outputs[0]
        output.shape, output.type = value.shape, value.type
        value.replace_all_uses_with(output)
        graph.initializers.pop(name)
        output.name = name
        for given in inputs:
            assert given.name is not None
            graph.initializers[given.name] = given
        graph.insert_before(graph[0], nodes)
    return staying


def _same(value: ir.Value, codes: AffineCodes) -> bool:
    """Whether an initialiser has the bits of the codes' values; adapters may be merged into it."""
    assert value.const_value is not None
    expected = codes.values()
    if value.metadata_props.get(LAYOUT) == "transposed":
        expected = expected.t()
    if expected.dtype not in (torch.float32, torch.float16):
        return False
    return np.array_equal(value.const_value.numpy(), expected.cpu().numpy())


def _initializer(name: str, tensor: Any) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def _tensors(name: str, codes: AffineCodes, turned: bool) -> Iterator[tuple[str, Any]]:
    kinds = {(4, torch.int8): ir.DataType.INT4, (4, torch.uint8): ir.DataType.UINT4}
    kind = kinds.get((codes.bits, codes.codes.dtype))
    parts = {"codes": codes.codes, "scales": codes.scales, "zeros": codes.zeros}
    for part, tensor in parts.items():
        if tensor is None:
            continue
        tensor = tensor.detach().cpu()
        if part != "codes" and codes.scales.shape[1] == 1:
            tensor = tensor.flatten()
        elif turned:
            tensor = tensor.t()
        array = tensor.contiguous().numpy()
        if kind is not None and part != "scales":
            yield part, ir.tensor(array, dtype=kind, name=f"{name}.{part}")
        else:
            yield part, ir.tensor(array, name=f"{name}.{part}")
