"""Compares models that are exported with slots with the live model, for the tests of slots."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery import Rule, adapters, apply_rules, deactivate, using
from surgery.onnx.checking.adapter_transfer import slot_arrays
from surgery.onnx.export import export_onnx
from surgery.onnx.runtime.manifest import Manifest
from tests.support.near import Wanted, off

Inputs = Mapping[str, Tensor]

# float32: sums in another order than torch's, and scales that are in a factor and not behind it: some ulps of the
# largest term. Of models that lose more by themselves, more is allowed (`near.py`).
TOLERANCE = 2e-5


class Exported:
    """A model's file with slots, and the model before any rule."""

    def __init__(self, model: nn.Module, inputs: Inputs, folder: Path, **settings: Any):
        self.model, self.inputs = model, inputs
        settings = {"adapters": "slots", **settings}
        self.report = export_onnx(model, folder / "model.onnx", dict(inputs), verify=False, **settings)
        self.manifest = self.report.manifest
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # at 2, onnxruntime warns of each slot, because it is not a constant
        self.session = onnxruntime.InferenceSession(str(self.report.path), options)

    def run(self, inputs: Inputs | None = None, tensors: Mapping[str, Tensor] | None = None) -> list[np.ndarray]:
        fed = {**(self.inputs if inputs is None else inputs), **(tensors or {})}
        names = {value.name for value in self.session.get_inputs()}
        names |= {value.name for value in self.session.get_overridable_initializers()}
        assert not set(tensors or {}) - names, set(tensors or {}) - names
        outputs = self.session.run(None, {n: t.detach().numpy() for n, t in fed.items() if n in names})
        return [np.asarray(output) for output in outputs]

    def tensors(self, adapter: str, model: nn.Module | None = None) -> dict[str, Tensor]:
        arrays = slot_arrays(self.model if model is None else model, adapter, Manifest.read(self.report.path))
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def nodes(self) -> dict[str, str]:
        """The rules in the marks of nodes, by site."""
        import onnx

        rules_of_site: dict[str, set[str]] = {}
        for node in onnx.load(str(self.report.path)).graph.node:
            metadata = {prop.key: prop.value for prop in node.metadata_props}
            if "surgery.rule" in metadata:
                rules_of_site.setdefault(metadata["surgery.site"], set()).add(metadata["surgery.rule"])
        return {site: "; ".join(sorted(rules)) for site, rules in rules_of_site.items()}


def outputs(model: nn.Module, inputs: Inputs) -> Wanted[np.ndarray]:
    def call(model: nn.Module, wide: Callable[[Tensor], Tensor]) -> list[Tensor]:
        result = model(**{name: wide(value) if isinstance(value, Tensor) else value for name, value in inputs.items()})
        return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]

    return Wanted(model, call, lambda leaf: leaf.numpy())


def shaken(model: nn.Module, size: float = 0.3) -> nn.Module:
    """Move every adapter's floating-point tensors at random, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in f".{name}":
                parameter.add_(torch.randn_like(parameter) * size)
    return model


def adapted(model: nn.Module, named: Mapping[str, Sequence[Rule] | Rule], example: Any = None) -> nn.Module:
    """The model in evaluation mode with these adapters, idle, their tensors moved."""
    for name, rules in named.items():
        apply_rules(model.eval(), rules, adapter=name, example_inputs=example)
        deactivate(model)
    return shaken(model)


def same(actual: Sequence[np.ndarray], wanted: Sequence[np.ndarray], tolerance: float = TOLERANCE) -> None:
    assert len(actual) == len(wanted)
    for index, (have, want) in enumerate(zip(actual, wanted, strict=True)):
        assert have.shape == want.shape, f"output {index}: {have.shape}, not {want.shape}"
        assert (message := off(have, want, wanted, index, tolerance)) is None, message


def check_slots(
    exported: Exported, base: nn.Module, others: Sequence[Inputs] = (), tolerance: float = TOLERANCE
) -> None:
    """Check that empty slots give the base, and each adapter's tensors the live model's outputs, at several sizes."""
    for inputs in (exported.inputs, *others):
        plain = outputs(base, inputs)
        same(exported.run(inputs), plain, tolerance)
        for name in adapters(exported.model):
            with using(exported.model, name):
                wanted = outputs(exported.model, inputs)
                moved = any(np.abs(a - b).max() > 1e-3 for a, b in zip(wanted, plain, strict=True))
                assert moved or inputs is not exported.inputs, f"{name} does nothing"
                same(exported.run(inputs, exported.tensors(name)), wanted, tolerance)


def plain(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval()
