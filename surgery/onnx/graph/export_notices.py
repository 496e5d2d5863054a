"""Notices of an export: what the model does in Python that its file does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from surgery.errors import abbreviate
from surgery.lifecycle.activation import active
from surgery.onnx.calls.shared_copy import packed_maps
from surgery.onnx.graph.generate_differences import GENERATION, changed_logits
from surgery.patterns.module_walk import base_modules
from surgery.rewritten_model.verb_root import records_in
from surgery.routing.thread_state import thread_routing

__all__ = ["notices_of"]


def notices_of(given: nn.Module, model: nn.Module, manifest: Mapping[str, Any]) -> list[str]:
    """All notices. `given`: the argument of `export_onnx`; `model`: the model in it that is exported."""
    about_weights = [*_rounding_notices(model), *_nested_tensor_notices(model)]
    return [*about_weights, *_route_notices(given), *_generate_notices(model, manifest)]


def _rounding_notices(model: nn.Module) -> list[str]:
    """Modules that quantise their inputs: the file has their dequantised weights, and leaves inputs as they are."""
    paths = {id(module): path for path, module in base_modules(model)}
    rounding = [packed for packed in packed_maps(model) if packed.activations is not None]
    if not rounding:
        return []
    where = abbreviate([paths[id(packed.module)] or "(the model itself)" for packed in rounding])
    return [
        f"{where} quantise their inputs ({rounding[0].activations}): the file has their dequantised "
        "weights, and its inputs are not rounded. It is compared with the model in this form"
    ]


def _route_notices(model: nn.Module) -> list[str]:
    """Notices about an open route block: a file has one set of adapters for all rows."""
    routed = [
        routing.model
        for routing in thread_routing.routings
        if any(routing.model is part for part in records_in(model).values())
    ]
    if not routed:
        return []
    names = ", ".join(name for part in routed for name in active(part)) or "none"
    return [f"a block of route is open, and a file routes nothing: it is of the model outside of the block ({names})"]


def _generate_notices(model: nn.Module, manifest: Mapping[str, Any]) -> list[str]:
    """Notices about what transformers' generate does that the file, or its runner, does not."""
    if "logits" not in manifest["outputs"] or "input_ids" not in manifest["inputs"]:
        return []
    differences = manifest.get(GENERATION, {})
    notices = [f"{differences['differs']}: OnnxRunner.generate refuses this file"] if "differs" in differences else []
    if settings := changed_logits(model):
        notices.append(
            f"the model's generation config has {', '.join(settings)}, which generate applies and the file does not"
        )
    return notices


def _nested_tensor_notices(model: nn.Module) -> list[str]:
    quick = [path for path, module in model.named_modules() if getattr(module, "enable_nested_tensor", False) is True]
    zeros = "torch's own kernel for evaluation writes zeros at padded positions, and the file what training computes"
    return [f"{path or 'the model'}: {zeros}" for path in quick]
