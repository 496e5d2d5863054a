"""Checks an exported file: onnxruntime can run its graph, and it has all slots and the model's weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from surgery.errors import ParityError, SurgeryError
from surgery.lifecycle.activation import active
from surgery.lifecycle.remove import remove
from surgery.merging.merge import ensure_unmerged
from surgery.onnx.calls.example import ExampleCall, array_of
from surgery.onnx.calls.shared_copy import leave_live, sharing_copy
from surgery.onnx.graph.prepare import PREPARE, ExportSettings
from surgery.onnx.graph.weight_names import LAYOUT
from surgery.onnx.runtime.manifest import Manifest
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import model_state, require_state

__all__ = ["check_file", "check_weights", "open_for_check", "run_session"]

POOLING = 22  # from this opset on, onnx drops pooling windows that begin in the padding, as torch and onnxruntime do


def check_file(path: str | Path, manifest: Manifest, session: Any) -> list[str]:
    """Runs onnx's checker, and checks that all inputs, outputs and slots exist. Returns notices.

    Raises `ParityError` if the file is wrong.
    """
    import onnx

    notices = list[str]()
    domains = {opset.domain for opset in onnx.load(str(path), load_external_data=False).opset_import}
    if "com.microsoft" not in domains:  # onnx's checker does not know onnxruntime's own operations
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:
            notices.append(_shape_notice(path, manifest, error))
    inputs = {node.name for node in session.get_inputs()}
    all_inputs = {node.name for node in session.get_overridable_initializers()} | inputs
    for what, expected, existing in (
        ("slots", [slot.name for slot in manifest.slots], all_inputs),
        ("inputs", manifest.inputs, inputs),
        ("outputs", manifest.outputs, {node.name for node in session.get_outputs()}),
    ):
        if missing := [name for name in expected if name not in existing]:
            why = f"{', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}"
            raise ParityError(f"the file lacks {what} that its manifest names", where=str(path), why=why)
    return notices


def _shape_notice(path: str | Path, manifest: Manifest, error: Exception) -> str:
    """Returns a notice if onnx.checker refuses only the shapes: onnxruntime's run shows whether they are right.

    Raises `ParityError` for any other objection.
    """
    import onnx

    try:
        if not isinstance(error, onnx.shape_inference.InferenceError):
            raise error
        onnx.checker.check_model(str(path))
    except Exception as other:
        raise ParityError("onnx.checker refuses the file", where=str(path), why=_short(other)) from other
    pooled = manifest.opset < POOLING and "Pool" in str(error)
    newer = f"; with opset={POOLING} it accepts them (ceil_mode)" if pooled else ""
    return f"onnx.checker infers other shapes than onnxruntime computes: {_short(error)}{newer}"


def check_weights(path: str | Path, manifest: Manifest, model: nn.Module, example: ExampleCall, names: Any) -> int:
    """Checks that tensors with the names of model tensors have their bits. Returns the number of these tensors."""
    import onnx_ir as ir

    if manifest.adapters == "merged":
        source = PREPARE["merged"](model, example, names, ExportSettings()).model
    elif model_state(model) is None:
        source = sharing_copy(model, dequantise="all")
    else:
        source = sharing_copy(model, dequantise="all")  # adapters such as PiSSA change weights at their start
        if manifest.adapters == "slots":
            remove(ensure_unmerged(source), check=False)
        else:
            leave_live(source, adapter_names(require_state(source), names) if names is not None else active(source))
    initializers: Mapping[str, Any] = ir.load(str(path)).graph.initializers
    require_data(path, initializers)
    slots = {slot.name for slot in manifest.slots}
    count, wrong = 0, list[str]()
    for name, tensor in _tensors(source):
        value = initializers.get(name)
        if value is None or value.const_value is None or name in slots:
            continue
        expected, stored = array_of(tensor), value.const_value.numpy()
        expected = expected.T if value.metadata_props.get(LAYOUT) == "transposed" else expected
        count += 1
        if expected.shape != stored.shape or not (
            np.array_equal(expected, stored) or expected.tobytes() == stored.tobytes()
        ):
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ParityError(
            "the file has other weights than the model",
            where=", ".join(wrong[:4]) + more,
            why="the weights changed after the export, or belong to another model",
            fix="export the model again",
        )
    return count


def require_data(path: str | Path, initializers: Mapping[str, Any]) -> None:
    """Raises `SurgeryError` if a file of external weights is missing."""
    for value in initializers.values():
        data_path = getattr(value.const_value, "path", None)
        if data_path is not None and not Path(data_path).is_file():
            fix = f"put {Path(data_path).name} beside it, under the name that it was written with"
            raise SurgeryError(
                "the file's weights are missing", where=str(path), why=f"there is no {data_path}", fix=fix
            )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def open_for_check(path: str | Path, optimised: bool, providers: Sequence[str] | None = None) -> Any:
    """Opens a session of onnxruntime with or without its optimiser."""
    import onnxruntime

    from surgery.onnx.runtime.sessions import create_session

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # at 2, onnxruntime warns of each slot, because it is not a constant
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    try:
        return create_session(Path(path), options, providers)
    except Exception as error:
        raise _no_kernels(error) or ParityError(
            "onnxruntime can't open the file", where=str(path), why=_short(error)
        ) from error


def run_session(session: Any, feeds: Mapping[str, Any], where: str) -> list[Any]:
    """Returns all outputs. Raises errors of onnxruntime as `ParityError`."""
    try:
        if any(array.dtype.name == "bfloat16" for array in feeds.values()):
            from surgery.onnx.runtime.dtypes import array_of_value, value_of

            values = {name: value_of(array) for name, array in feeds.items()}
            names = [node.name for node in session.get_outputs()]
            return [array_of_value(value) for value in session.run_with_ort_values(names, values)]
        return session.run(None, dict(feeds))
    except Exception as error:
        raise _no_kernels(error) or ParityError(
            "onnxruntime can't run the file",
            where=where,
            why=_short(error),
            fix="if it runs only at the example's sizes, the export fixed a free size: name all free sizes in "
            "dynamic=, or fix all with dynamic=False",
        ) from error


def _no_kernels(error: Exception) -> SurgeryError | None:
    if "NOT_IMPLEMENTED" not in str(error) and "bfloat16" not in str(error):
        return None
    return SurgeryError(
        "onnxruntime can't run this file here, so it was not compared",
        why=_short(error),
        fix="verify=False writes it for another machine or provider; the CPU has few kernels for bfloat16 and float64: "
        "float32 and float16 run everywhere",
    )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:400]
