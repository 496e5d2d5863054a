"""What an exported file holds: a graph that onnxruntime can run, all its slots, and the model's own weights."""

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

__all__ = ["check_file", "check_weights", "opened", "ran"]

POOLING = 22  # the opset from which onnx leaves out a window that begins in the padding, as torch and onnxruntime do


def check_file(path: str | Path, manifest: Manifest, session: Any) -> list[str]:
    """The graph by onnx's own checker, and whether all inputs, outputs and slots are there; `ParityError`. Gives what
    there is to tell."""
    import onnx

    notices = list[str]()
    domains = {opset.domain for opset in onnx.load(str(path), load_external_data=False).opset_import}
    if "com.microsoft" not in domains:  # onnxruntime's own operations it does not know
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except Exception as error:
            notices.append(_shapes_refused(path, manifest, error))
    inputs = {node.name for node in session.get_inputs()}
    fed = {node.name for node in session.get_overridable_initializers()} | inputs
    for what, wanted, there in (
        ("slots", [slot.name for slot in manifest.slots], fed),
        ("inputs", manifest.inputs, inputs),
        ("outputs", manifest.outputs, {node.name for node in session.get_outputs()}),
    ):
        if lost := [name for name in wanted if name not in there]:
            why = f"{', '.join(lost[:3])}{', …' if len(lost) > 3 else ''}"
            raise ParityError(f"the file lacks {what} that its manifest names", where=str(path), why=why)
    return notices


def _shapes_refused(path: str | Path, manifest: Manifest, refused: Exception) -> str:
    """A notice where onnx.checker takes the graph and refuses its shapes alone: whether those are right is seen when
    onnxruntime runs it. `ParityError` for any other objection."""
    import onnx

    try:
        if not isinstance(refused, onnx.shape_inference.InferenceError):
            raise refused
        onnx.checker.check_model(str(path))
    except Exception as error:
        raise ParityError("onnx.checker refuses the file", where=str(path), why=_short(error)) from error
    pooled = manifest.opset < POOLING and "Pool" in str(refused)
    newer = f"; with opset={POOLING} it takes them (ceil_mode)" if pooled else ""
    return f"onnx.checker infers other shapes than onnxruntime computes: {_short(refused)}{newer}"


def check_weights(path: str | Path, manifest: Manifest, model: nn.Module, example: ExampleCall, names: Any) -> int:
    """Every tensor of the file that has the name of one of the model's has its bits; how many those are."""
    import onnx_ir as ir

    if manifest.adapters == "merged":
        source = PREPARE["merged"](model, example, names, ExportSettings()).model
    elif model_state(model) is None:
        source = sharing_copy(model)
    else:
        source = sharing_copy(model)  # some adapters change weights at their start
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
        own, stored = array_of(tensor), value.const_value.numpy()
        own = own.T if value.metadata_props.get(LAYOUT) == "transposed" else own
        count += 1
        if own.shape != stored.shape or not (np.array_equal(own, stored) or own.tobytes() == stored.tobytes()):
            wrong.append(name)
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ParityError(
            "the file has other weights than the model",
            where=", ".join(wrong[:4]) + more,
            why="either changed after the export, or they are of another model",
            fix="export the model again",
        )
    return count


def require_data(path: str | Path, initializers: Mapping[str, Any]) -> None:
    """`SurgeryError` where weights that stand in a file of their own aren't beside the graph."""
    for value in initializers.values():
        place = getattr(value.const_value, "path", None)
        if place is not None and not Path(place).is_file():
            fix = f"put {Path(place).name} beside it: they belong together, under the names they were written with"
            raise SurgeryError("the file's weights are missing", where=str(path), why=f"there is no {place}", fix=fix)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def opened(path: str | Path, optimised: bool, providers: Sequence[str] | None = None) -> Any:
    """A session of onnxruntime, with its optimiser or without."""
    import onnxruntime

    from surgery.onnx.runtime.sessions import session

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of each slot that it is no constant
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    try:
        return session(Path(path), options, providers)
    except Exception as error:
        raise _no_kernels(error) or ParityError(
            "onnxruntime can't open the file", where=str(path), why=_short(error)
        ) from error


def ran(session: Any, feeds: Mapping[str, Any], where: str) -> list[Any]:
    """All outputs; onnxruntime's errors as `ParityError`."""
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
            fix="where it runs at the example's sizes alone, one that should be free is fixed: name them all in "
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
