"""Writes the source text of a forward: the statements of a graph, and a signature."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx

__all__ = ["graph_statements", "signature_source"]


def graph_statements(graph: fx.Graph) -> tuple[list[str], dict[str, Any]]:
    """Returns the statements of a graph's code, each with its rule as a comment, and the names that they use."""
    code = graph.python_code("self")
    lines = code.src.rstrip().split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("def forward(")) + 1
    origins = {node.name: node.meta.get("surgery", "") for node in graph.nodes}
    body = []
    for line in lines[start:]:
        text = line.removeprefix("    ")
        origin = origins.get(text.partition(" = ")[0].partition(":")[0].strip(), "")
        body.append(f"{text}  # {origin}" if origin else text)
    return [line for line in body if line.strip()], dict(code.globals)


def signature_source(signature: inspect.Signature) -> tuple[str, dict[str, Any]]:
    """Returns the source of a method's signature, and the default values that it uses by name."""
    defaults = {}
    parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)]
    for parameter in signature.parameters.values():
        kind = parameter.kind
        if kind is parameter.POSITIONAL_ONLY:
            kind = parameter.POSITIONAL_OR_KEYWORD
        default = parameter.default
        if default is not parameter.empty and not isinstance(default, (int, float, str, bool, type(None))):
            defaults[f"_surgery_default_{parameter.name}"] = default
            default = _SourceName(f"_surgery_default_{parameter.name}")
        parameters.append(inspect.Parameter(parameter.name, kind, default=default))
    if all(p.kind is not inspect.Parameter.POSITIONAL_ONLY for p in parameters[1:]):
        parameters[0] = parameters[0].replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return str(inspect.Signature(parameters))[1:-1], defaults


class _SourceName:
    """A default value whose repr is a name in the generated source."""

    def __init__(self, name: str):
        self.name = name

    def __repr__(self) -> str:
        return self.name
