"""Weights keep the model's names: what optimisation folds is told apart, and named again."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import onnx_ir as ir

__all__ = ["LAYOUT", "name_weights", "names_kept"]

LAYOUT = "surgery.layout"  # of an initialiser: "transposed" where it lies so
FOLDED = "pkg.onnxscript.optimizer.folded_from"
KIND = "pkg.torch.export.graph_signature.InputSpec.kind"
PERSISTENT = "pkg.torch.export.graph_signature.InputSpec.persistent"


@contextlib.contextmanager
def names_kept() -> Iterator[None]:
    """Optimisation makes one constant of equal ones, and new ones of constants; weights stay several, and themselves.

    A weight that is used once, turned, is kept turned: what multiplies by it needs no step for that. Normalisation is
    not multiplied into convolutions, and no bias left out for being zero: runtimes do the like as they open a file.
    """
    import onnx_ir.passes.common as passes
    from onnxscript import rewriter
    from onnxscript.optimizer import _constant_folding as folding
    from onnxscript.rewriter.rules.common import _fuse_batchnorm, _remove_optional_bias

    rules = rewriter._DEFAULT_REWRITE_RULES
    changing = [id(rule) for group in (_fuse_batchnorm, _remove_optional_bias) for rule in group.rules]
    merging, making = passes.DeduplicateInitializersPass, folding.FoldConstantsPass
    weights: set[str] = set()  # names of what is in the model's state_dict

    class Several(merging):  # type: ignore[misc, valid-type]
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

    class Themselves(making):  # type: ignore[misc, valid-type]
        def __init__(self, **how: Any):
            super().__init__(**{**how, "should_fold": lambda node: _may_fold(node, weights)})

        def call(self, model: ir.Model) -> Any:
            for graph in model.graphs():
                weights.update(name for name, value in graph.initializers.items() if _is_state(value))
            return super().call(model)

    passes.DeduplicateInitializersPass, folding.FoldConstantsPass = Several, Themselves  # type: ignore[misc]
    rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in rules if id(rule) not in changing)
    try:
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = rules
        passes.DeduplicateInitializersPass, folding.FoldConstantsPass = merging, making  # type: ignore[misc]


def _is_state(value: ir.Value) -> bool:
    metadata = value.metadata_props
    return metadata.get(KIND) == "PARAMETER" or (metadata.get(KIND) == "BUFFER" and metadata.get(PERSISTENT) == "True")


def _is_weight(value: ir.Value, weights: Collection[str]) -> bool:
    """Whether it is a weight, or one turned, which is all that is made of them here."""
    if value.name in weights:
        return True
    flat = value.shape is not None and len(value.shape) == 2  # and no list of sizes, which is no weight any more
    return flat and _source(value.metadata_props.get(FOLDED)) in weights


def _may_fold(node: ir.Node, weights: Collection[str]) -> bool | None:
    if not any(value is not None and _is_weight(value, weights) for value in node.inputs):
        return None
    value = node.inputs[0]
    once = value is not None and value.name in weights and len(value.uses()) == 1
    flat = value is not None and value.shape is not None and len(value.shape) == 2
    return None if node.op_type == "Transpose" and _turns(node) and once and flat else False


def _turns(node: ir.Node) -> bool:
    """Or leaves its input as it is, as where a weight is indexed by positions."""
    permutation = node.attributes.get("perm")
    return permutation is None or list(permutation.as_ints()) == [1, 0]


def name_weights(model: ir.Model, parameters: Mapping[str, Any]) -> None:
    """Weights that optimisation turned get their own names back; `surgery.layout` says how they lie."""
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
