"""Keeps the model's names of weights through the optimiser's passes."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import onnx_ir as ir

__all__ = ["LAYOUT", "name_weights", "keep_weight_names"]

LAYOUT = "surgery.layout"  # metadata of an initialiser; "transposed" if its axes are swapped
FOLDED = "pkg.onnxscript.optimizer.folded_from"
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
PERSISTENT = "pkg.torch.export.graph_signature.InputSpec.persistent"


@contextlib.contextmanager
def keep_weight_names() -> Iterator[None]:
    """Patches the optimiser during the block: it does not join equal weights, and folds only their transposition.

    A weight that is used once and transposed is stored transposed, so the product needs no Transpose. Normalisation is
    not folded into convolutions, and zero biases stay: runtimes handle both when they open a file.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import rewriter
    from onnxscript.optimizer import _constant_folding as folding
    from onnxscript.rewriter.rules.common import _fuse_batchnorm, _remove_optional_bias

    rules = rewriter._DEFAULT_REWRITE_RULES
    disabled = [id(rule) for group in (_fuse_batchnorm, _remove_optional_bias) for rule in group.rules]
    original_deduplicate, original_fold = passes.DeduplicateInitializersPass, folding.FoldConstantsPass
    weights: set[str] = set()  # names in the model's state_dict

    class DeduplicateConstants(original_deduplicate):  # type: ignore[misc, valid-type]
        def call(self, model: ir.Model) -> Any:
            graphs = [
                (graph, {name: value for name, value in graph.initializers.items() if _is_weight(value, weights)})
                for graph in model.graphs()
            ]
            for graph, values in graphs:
                for name in values:
                    graph.initializers.pop(name)
            try:
                return super().call(model)
            finally:
                for graph, values in graphs:
                    graph.initializers.update(values)

    class FoldConstants(original_fold):  # type: ignore[misc, valid-type]
        def __init__(self, **how: Any):
            super().__init__(**{**how, "should_fold": lambda node: _may_fold(node, weights)})

        def call(self, model: ir.Model) -> Any:
            for graph in model.graphs():
                weights.update(name for name, value in graph.initializers.items() if _is_state(value))
            return super().call(model)

    passes.DeduplicateInitializersPass, folding.FoldConstantsPass = DeduplicateConstants, FoldConstants  # type: ignore[misc]
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if id(rule) not in disabled)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
        passes.DeduplicateInitializersPass, folding.FoldConstantsPass = original_deduplicate, original_fold  # type: ignore[misc]


def _is_state(value: ir.Value) -> bool:
    metadata = value.metadata_props
    return metadata.get(KIND) == "PARAMETER" or (metadata.get(KIND) == "BUFFER" and metadata.get(PERSISTENT) == "True")


def _is_weight(value: ir.Value, weights: Collection[str]) -> bool:
    """Whether the value is a weight or a transposed weight; the patched optimiser makes nothing else of weights."""
    if value.name in weights:
        return True
    flat = value.shape is not None and len(value.shape) == 2  # a folded list of sizes is not a weight
    return flat and _source(value.metadata_props.get(FOLDED)) in weights


def _may_fold(node: ir.Node, weights: Collection[str]) -> bool | None:
    if not any(value is not None and _is_weight(value, weights) for value in node.inputs):
        return None
    value = node.inputs[0]
    once = value is not None and value.name in weights and len(value.uses()) == 1
    flat = value is not None and value.shape is not None and len(value.shape) == 2
    return None if node.op_type == "Transpose" and _transposes(node) and once and flat else False


def _transposes(node: ir.Node) -> bool:
    """Whether a Transpose swaps the axes; it keeps them if a weight is indexed by positions."""
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]


def name_weights(model: ir.Model, parameters: Mapping[str, Any]) -> None:
    """Renames transposed weights to their parameters' names, and marks them with `surgery.layout`."""
    graph = model.graph
    for name, value in list(graph.initializers.items()):
        source = _source(value.metadata_props.get(FOLDED))
        if source is None or source not in parameters or source in graph.initializers or value.const_value is None:
            continue
        if tuple(value.const_value.shape) == tuple(parameters[source].shape[::-1]):
            graph.initializers.pop(name)
            value.name = source
            value.metadata_props[LAYOUT] = "transposed"
            graph.initializers[source] = value


def _source(text: str | None) -> str | None:
    try:
        data = ast.literal_eval(text) if text else None
    except (ValueError, SyntaxError):
        return None
    return data[0] if isinstance(data, list) and len(data) == 1 and isinstance(data[0], str) else None
