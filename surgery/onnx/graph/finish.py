"""Finishes an exported graph: marks of the rules, defaults of slots, constants, no stack traces."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from typing import Any

import onnx_ir as ir
from torch import Tensor

from surgery.errors import SurgeryError

__all__ = ["add_defaults", "make_constants", "mark_rules", "require_inputs", "tidy"]

SCOPES = "pkg.torch.onnx.name_scopes"
TRACE = "pkg.torch.onnx.stack_trace"


def require_inputs(model: ir.Model, names: Iterable[str], after: str) -> None:
    """Raises `SurgeryError` if a pass removed a slot."""
    inputs = {value.name for value in model.graph.inputs}
    if missing := [name for name in names if name not in inputs]:
        raise SurgeryError(
            f"slots were lost by {after}",
            why=", ".join(name.removeprefix("surgery_slots.") for name in missing[:4]),
            fix="optimize=False, or report it",
        )


def mark_rules(model: ir.Model, sites: Mapping[str, Mapping[str, str]]) -> None:
    """Marks each node of a rule with the rule and the site (`surgery.rule`, `surgery.site`), which Netron shows.

    A rule's nodes are those that a site computes from the adapter's tensors. `sites`: path → tensor's name → rule.
    """
    owners: dict[str, tuple[str, tuple[str, ...]]] = {
        name: (path, (label,)) for path, labels in sites.items() for name, label in labels.items()
    }
    value_owners = {id(value): owners[value.name] for value in model.graph.inputs if value.name in owners}
    for node in model.graph:
        path = _module(node)
        slot_owners = [
            value_owners[id(value)] for value in node.inputs if value is not None and id(value) in value_owners
        ]
        labels = tuple(dict.fromkeys(label for owner, several in slot_owners if owner == path for label in several))
        if labels:
            node.metadata_props["surgery.rule"] = ", ".join(dict.fromkeys(", ".join(labels).split(", ")))
            node.metadata_props["surgery.site"] = path
            value_owners.update({id(value): (path, labels) for value in node.outputs})


def _module(node: ir.Node) -> str:
    """Returns the path of the module whose forward a node comes from."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(scopes[-2]) if len(scopes) > 1 else ""


def add_defaults(model: ir.Model, defaults: Mapping[str, Tensor], required: Iterable[str] = ()) -> None:
    """Gives slots default values, which makes the inputs optional."""
    required = set(required)
    for value in model.graph.inputs:
        tensor = defaults.get(value.name or "")
        if tensor is not None and value.name and value.name not in required:
            value.const_value = _tensor(tensor, value.name)
            model.graph.initializers[value.name] = value


def make_constants(model: ir.Model, tensors: Mapping[str, Tensor]) -> None:
    """Makes inputs initialisers. They were inputs only so that no pass would fold them."""
    for value in list(model.graph.inputs):
        if value.name and value.name in tensors:
            value.const_value = _tensor(tensors[value.name], value.name)
            model.graph.inputs.remove(value)
            model.graph.initializers[value.name] = value


def _tensor(tensor: Tensor, name: str) -> Any:
    from onnx_ir.tensor_adapters import TorchTensor

    return TorchTensor(tensor.detach().cpu().contiguous(), name=name)


def tidy(model: ir.Model) -> None:
    """Removes stack traces, which contain paths of the exporting machine."""
    for graph in model.graphs():
        for node in graph:
            node.metadata_props.pop(TRACE, None)
