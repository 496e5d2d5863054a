"""Converts PEFT checkpoints into adapters of an exported file, without the model and without torch."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.conversion import ia3, lora, virtual_tokens  # noqa: F401  # they register converters
from surgery.onnx.conversion.base_embeddings import drop_base_embeddings
from surgery.onnx.conversion.checkpoint import read_checkpoint
from surgery.onnx.conversion.conversion_state import Conversion
from surgery.onnx.conversion.converters import converter_for
from surgery.onnx.conversion.trained_modules import convert_token_rows, convert_trained_parameters
from surgery.onnx.runtime.adapter_check import listed
from surgery.onnx.runtime.adapter_file import write_adapter
from surgery.onnx.runtime.manifest import Manifest

__all__ = ["convert_peft"]


def convert_peft(folder: str | Path, onnx_path: str | Path, out_path: str | Path) -> Path:
    """Convert a PEFT folder into an `.onnx_adapter` file, without torch.

    The folder has `adapter_config.json` and `adapter_model.safetensors`.

    Supports LoRA with rank_pattern, alpha_pattern, rsLoRA, lora_bias, and DoRA (its gains are computed from the weights
    in the file, which needs the onnx package), IA³, prefixes, prompt tuning and p-tuning. With any of them it supports
    modules_to_save, trained biases and trainable_token_indices, if the file has slots for them. Scales are folded into
    B. Half-precision checkpoints are computed in float32.

    Args:
        folder: the PEFT folder.
        onnx_path: a file of `export_onnx(…, adapters="slots")`.
        out_path: the file to write.

    Returns:
        `out_path`.

    Raises:
        LoadError: lists everything that the file has no place for; nothing is written.
    """
    manifest = Manifest.read(onnx_path)
    name = Path(folder).name
    try:
        checkpoint = read_checkpoint(folder, [site for site, _ in manifest.groups])
        convert = converter_for(checkpoint.config["peft_type"])
    except SurgeryError as error:
        raise listed(f"{name} can't be converted", [error]) from None
    conversion = Conversion(manifest, checkpoint, Path(onnx_path))
    with conversion.collecting_errors("the configuration"):
        convert(conversion)
    convert_token_rows(conversion)
    convert_trained_parameters(conversion)
    drop_base_embeddings(conversion)
    conversion.complete()
    conversion.problems += [_no_slot_error(manifest, key) for key in conversion.remaining_tensors]
    if not conversion.problems:
        conversion.problems += manifest.check(conversion.arrays)
    if conversion.problems:
        raise listed(f"{name} can't be converted", sorted(conversion.problems, key=lambda problem: problem.where or ""))
    return write_adapter(out_path, conversion.arrays, manifest)


def _no_slot_error(manifest: Manifest, key: str) -> SurgeryError:
    why = near_misses(key.rpartition(".")[0], [site for site, _ in manifest.groups])
    return SurgeryError("the file has no slot for a tensor of the checkpoint", where=key, why=why)
