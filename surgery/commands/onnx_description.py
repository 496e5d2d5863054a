"""Describes ONNX files by their metadata; the graph and the weights are skipped."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.onnx import Manifest

__all__ = ["describe_adapter_of_slots", "describe_onnx"]


def describe_onnx(path: Path) -> dict[str, Any]:
    """An ONNX file; with the manifest that `export_onnx` writes, its slots, inputs, outputs and base, too."""
    from surgery.onnx.runtime.manifest import KEY, Manifest
    from surgery.onnx.runtime.metadata import metadata_of

    metadata = metadata_of(path)
    separate = [f"{path.name}.data"] if path.with_name(f"{path.name}.data").is_file() else []
    if KEY not in metadata:
        note = "it has no manifest: export_onnx did not write it"
        found = {"format": "ONNX", "metadata": {name: text[:200] for name, text in metadata.items()}, "notes": [note]}
        return {**found, "files": separate, "opens_with": ["onnxruntime"]}
    manifest = Manifest.from_json(metadata[KEY], f"the manifest of {path.name}")
    kinds = Counter(str(site["rule"]) for site in manifest.sites)
    return {
        "format": f"ONNX, adapters as {manifest.adapters}",
        "base": {"class": manifest.base["class"]} if isinstance(manifest.base.get("class"), str) else {},
        "opset": manifest.opset,
        "inputs": list(manifest.inputs),
        "outputs": list(manifest.outputs),
        "slots": {rule: f"{count} sites" for rule, count in kinds.items()},
        "rules": [rule for rule in manifest.rules if isinstance(rule, dict)],
        "sites": [
            {"path": str(site["site"]), "rank": None, "tensors": _slots(manifest, site)} for site in manifest.sites
        ],
        "constants": list(manifest.constants),
        "files": separate,
        "opens_with": ["surgery.onnx.OnnxRunner", "onnxruntime"],
    }


def describe_adapter_of_slots(path: Path) -> dict[str, Any]:
    """A file of `export_adapter`."""
    return {
        "format": "an adapter for the slots of an ONNX file",
        "notes": ["surgery.onnx.read_adapter lists its tensors, with onnxruntime"],
        "opens_with": ["surgery.onnx.OnnxRunner.load", "onnxruntime.AdapterFormat"],
    }


def _slots(manifest: Manifest, site: Any) -> dict[str, Any]:
    shapes = {slot.name: list(slot.shape) for slot in manifest.slots}
    return {str(name).rpartition(".")[2]: shapes.get(name, "") for name in site["slots"]}
