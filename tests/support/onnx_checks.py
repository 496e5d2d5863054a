"""Helpers for tests of exported files: sessions of onnxruntime, adapters' tensors by hand, names in a graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from torch import Tensor, nn

from surgery import adapter_state_dict, apply_rules
from surgery.onnx.calls.example import ExampleCall, arrays_of, outputs_of
from surgery.rules import LoraRule
from surgery.state.records import sites
from tests.support.near import Wanted, off

TOLERANCE = 2e-5  # relative to an output's largest number; more if the model's own error is larger (`near.py`)


def session(path: Path, optimised: bool = True) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])


def adapted(model: nn.Module, targets: Any, *ranks: int, alpha: float = 5) -> nn.Module:
    """A model with adapters a, b, … of these ranks, with values far from the initial ones."""
    for name, rank in zip("abc", ranks, strict=False):
        rule = LoraRule(targets or [type(model)], rank=rank, alpha=alpha, init="random")
        apply_rules(model.eval(), [rule], adapter=name)
    return model


def by_hand(model: nn.Module, adapter: str) -> dict[str, np.ndarray]:
    """LoRA's tensors for the slots of a file, from what the rules say: B is multiplied by alpha / rank, or / √rank."""
    rules: dict[str, Any] = {
        path: applied.rule for path, _, site in sites(model) for applied in site.applied if applied.adapter == adapter
    }
    scales = {path: rule.alpha / rule.rank ** (0.5 if rule.rslora else 1) for path, rule in rules.items()}
    arrays = {}
    for name, tensor in adapter_state_dict(model, adapter).items():
        path, key = name.split(f"adapters.{adapter}.") if f"adapters.{adapter}." in name else name.split("adapters.")
        scale = scales[path.rstrip(".")] if key == "B" else 1.0
        arrays[f"{path}adapters.slot.{key}"] = (tensor * scale).numpy()
    return arrays


def expected(model: nn.Module, example: Any) -> Wanted[Tensor]:
    """The live model's outputs as a flat list."""
    example_call = ExampleCall.of(model, example)

    def call(model: nn.Module, wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
        return outputs_of(example_call.call(model, example_call.mapped(lambda _, tensor: wide(tensor)).copy()))

    return Wanted(model, call, lambda leaf: leaf)


def feeds(model: nn.Module, example: Any, inputs: Sequence[str]) -> dict[str, np.ndarray]:
    return arrays_of(ExampleCall.of(model, example), inputs)


def assert_near(actual: Sequence[Any], wanted: Sequence[Tensor], tolerance: float = TOLERANCE) -> None:
    assert len(actual) == len(wanted)
    for index, (array, other) in enumerate(zip(actual, wanted, strict=True)):
        assert array.shape == tuple(other.shape)
        assert (message := off(array, other, wanted, index, tolerance)) is None, message


def operations(path: Path) -> Counter[tuple[str, str]]:
    return Counter((node.domain, node.op_type) for node in onnx.load(str(path)).graph.node)


def read_initializers(path: Path) -> dict[str, np.ndarray]:
    """The initialisers of a file by name; transposed ones are transposed back."""
    import onnx_ir as ir

    graph = ir.load(str(path)).graph
    turned = {
        name for name, initializer in graph.initializers.items() if initializer.metadata_props.get("surgery.layout")
    }
    arrays = {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}
    return {name: array.T if name in turned else array for name, array in arrays.items()}


def assert_weights(model: nn.Module, path: Path, unused: Sequence[str] = ()) -> None:
    """Every parameter of the base is in the file under its name to the bit; of tied ones, one name is enough."""
    arrays = read_initializers(path)
    groups: dict[int, list[str]] = {}
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in own.items():
        if ".adapters." not in f".{name}":
            groups.setdefault(id(parameter), []).append(name)
    for names in groups.values():
        present = [name for name in names if name in arrays]
        assert present or names[0] in unused, f"{names} is not in the file"
        for name in present:
            assert np.array_equal(arrays[name], own[name].detach().numpy()), name


def assert_slots(path: Path, manifest: Mapping[str, Any], checked: bool = True) -> None:
    """Each slot is one input of the graph and has a default. `checked`: run onnx's checker, which does not know
    onnxruntime's own operations."""
    graph = onnx.load(str(path)).graph
    names = [value.name for value in graph.input]
    assert len(names) == len(set(names))
    assert set(names) == {*manifest["inputs"], *(slot["name"] for slot in manifest["slots"])}
    if checked:
        onnx.checker.check_model(str(path), full_check=True)
