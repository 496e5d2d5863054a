"""Exports a model with an example call as an ONNX graph, with some of the model's tensors as inputs of the graph."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.onnx.calls.example import ExampleCall, cache_name, leaves_of
from surgery.onnx.graph.export_errors import export_failure
from surgery.onnx.graph.exporters import exporter_for, fuse, no_idle_masks, patched_attention, quiet
from surgery.onnx.graph.finish import require_inputs
from surgery.onnx.graph.lifted_tensors import SLOTS, Lifted, add_named_inputs, forward_with, split_factors
from surgery.onnx.graph.low_rank_op import by_name
from surgery.onnx.graph.recurrent import recurrent_layers
from surgery.onnx.graph.weight_names import keep_weight_names

__all__ = ["Program", "program_of"]


@dataclass
class Program:
    """The graph, and its inputs for the example's tensors. The remaining inputs are lifted tensors."""

    model: Any  # onnx_ir.Model
    inputs: dict[str, str]  # the example's tensor → the graph's input


def program_of(
    model: nn.Module,
    example: ExampleCall,
    lifted: Sequence[Lifted],
    shapes: Mapping[str, Any],
    how: Any,
) -> Program:
    """Exports the model, a copy that may be changed. `how`: its `ExportSettings`. Raises `SurgeryError` on failure."""
    names = [name for name, leaf in leaves_of(example.values) if isinstance(leaf, Tensor)]
    named, slot_arguments = split_factors(model, example, lifted)
    inputs = dict(example.copy())
    dynamic = dict(shapes)
    if slot_arguments:
        inputs[SLOTS] = {tensor.name: tensor.tensor for tensor in slot_arguments}
        auto = torch.export.Dim.AUTO
        dynamic[SLOTS] = {tensor.name: {} if tensor.free is None else {tensor.free: auto} for tensor in slot_arguments}
    with (
        forward_with(model, example, slot_arguments) as exported,
        quiet(),
        no_idle_masks(),
        keep_weight_names(),
        by_name(named),
        recurrent_layers(),
        torch.no_grad(),
    ):
        try:
            export = exporter_for(exported, inputs)
            with patched_attention(how, exported):
                onnx_program = export(exported, inputs, dynamic, how)
            slots = [f"{SLOTS}.{tensor.name}" for tensor in lifted]
            add_named_inputs(onnx_program, named, slots)
            require_inputs(onnx_program, slots, "the exporter's passes")
            if how.optimize_for == "ort":
                fuse(onnx_program)
                require_inputs(onnx_program, slots, "onnxruntime's fusions")
        except SurgeryError:
            raise
        except Exception as error:
            raise export_failure(model, error) from error
    graph = onnx_program.graph
    example_inputs = [value for value in graph.inputs if not value.name.startswith(f"{SLOTS}.")]
    for value in graph.inputs:
        value.name = value.name.removeprefix(f"{SLOTS}.")
    if len(example_inputs) != len(names) or len(graph.inputs) - len(example_inputs) != len(lifted):
        missing = {tensor.name for tensor in lifted} - {value.name for value in graph.inputs}
        raise SurgeryError(
            "the exported graph has other inputs than the call",
            why=f"it has {len(graph.inputs)} for {len(names) + len(lifted)}; missing: {', '.join(sorted(missing)[:3])}",
        )
    for value, name in zip(example_inputs, names, strict=True):
        value.name = name
    _name_outputs(graph)
    return Program(onnx_program, {name: value.name for name, value in zip(names, example_inputs, strict=True)})


def _name_outputs(graph: Any) -> None:
    """Names cache outputs `present…`; cache inputs are `past_key_values…`."""
    for value in graph.outputs:
        name = re.sub(r"^output\.", "", value.name or "")
        value.name = cache_name(re.sub(r"^past_key_values\.", "present.", name))
