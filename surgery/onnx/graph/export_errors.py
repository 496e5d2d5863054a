"""Explains a failed export: the exporter's step, the operation, and where the model calls it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import fx

from surgery.errors import SurgeryError

__all__ = ["export_failure"]

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_MISSING = re.compile(r"No ONNX function found for <OpOverload\(op='([^']+)', overload='([^']+)'\)>")
_ADVICE = (
    "For more information",
    "For extended logs",
    "If you suspect",
    "For more debugging",
    "For C++",
    "The error above",
)
_STEPS = {
    "TorchExportError": "tracing by torch.export",
    "ConversionError": "writing the traced graph as ONNX",
    "DispatchError": "writing the traced graph as ONNX",
    "GraphConstructionError": "writing the traced graph as ONNX",
}


def export_failure(model: Any, error: BaseException) -> SurgeryError:
    """Converts an exporter's error to the error that `export_onnx` raises."""
    chain = list(_chain(error))
    step = next(
        (_STEPS[type(cause).__name__] for cause in chain if type(cause).__name__ in _STEPS),
        _STEPS["TorchExportError"],
    )
    what = f"this {type(model).__name__} can't be exported: {step} failed"
    node = next(filter(None, map(_node_of, chain)), None)
    for cause in chain:
        if (match := _MISSING.search(str(cause))) is not None:
            name = _operation(node) or match[1].partition(".")[2].replace(".", "::")
            via = "" if _short(match[1]) == name else f" (the exporter decomposes it to {match[1]})"
            why = f"the exporter has no ONNX operation for {name}{via}"
            return SurgeryError(what, where=_site_of(chain) or _module_and_line(node), why=why, fix=_alternatives(name))
    last = chain[-1] if type(chain[0]).__name__ in _STEPS else chain[0]
    fix = "torch.export.export(model, …) on the plain model gives more details; dynamic=False fixes all sizes"
    if "DataDependent" in type(last).__name__:
        fix = "compute without a branch or a Python number that depends on values, such as torch.where"
    where = _site_of(chain) or _module_and_line(node) or _call_line(last)
    return SurgeryError(what, where=where, why=f"{type(last).__name__}: {_first_lines(last)}", fix=fix)


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__


def _node_of(error: BaseException) -> fx.Node | None:
    """Returns the node that the exporter was translating."""
    trace, frame = error.__traceback__, None
    while trace is not None:
        node = trace.tb_frame.f_locals.get("node")
        if isinstance(node, fx.Node) and node.op == "call_function":
            frame = node
        trace = trace.tb_next
    return frame


def _operation(node: fx.Node | None) -> str | None:
    """Returns the operation that a node comes from, before decomposition."""
    if node is None:
        return None
    source = node.meta.get("from_node") or []
    while source:
        first = source[-1]
        if getattr(first, "from_node", None):
            source = first.from_node
            continue
        return _short(str(getattr(first, "target", "") or node.target))
    return _short(str(node.target))


def _short(name: str) -> str:
    """Returns `cumprod` for `aten.cumprod.default`."""
    parts = name.removeprefix("torch.ops.").split(".")
    return parts[1] if len(parts) > 1 else name


def _module_and_line(node: fx.Node | None) -> str | None:
    """Returns the module that calls a node's operation, and the line."""
    if node is None:
        return None
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    line = next((text for text in reversed(str(node.meta.get("stack_trace") or "").splitlines()) if "File" in text), "")
    match = re.search(r'File "([^"]+)", line (\d+)', line)
    location = f"{match[1].rpartition('/')[2]}:{match[2]}" if match else ""
    return ", ".join(filter(None, (path or "the model itself", location)))


def _call_line(error: BaseException) -> str | None:
    """Returns the last line that torch's error text names."""
    places = re.findall(r'File "([^"]+)", line (\d+), in', str(error))
    return f"{places[-1][0].rpartition('/')[2]}:{places[-1][1]}" if places else None


def _site_of(chain: list[BaseException]) -> str | None:
    for cause in reversed(chain):
        for note in getattr(cause, "__notes__", []):
            if note.startswith("at the site"):
                return note.removeprefix("at the site ")[:200]
    return None


def _alternatives(name: str) -> str:
    return f"compute {name} with other operations in that module, or export the model without that part"


def _first_lines(error: BaseException) -> str:
    lines = [line.strip() for line in _COLOUR.sub("", str(error)).splitlines() if line.strip()]
    reasons = [line for line in lines if not line.startswith(_ADVICE) and "step " not in line]
    return " ".join(reasons[:3])[:400] or "no reason given"
