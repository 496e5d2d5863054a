"""PEFT's checkpoints as adapters of an exported file, without the model and without torch."""

from __future__ import annotations

from pathlib import Path

from surgery.errors import SurgeryError, near_misses
from surgery.onnx.conversion.base_embeddings import base
from surgery.onnx.conversion.checkpoint import read_checkpoint
from surgery.onnx.conversion.conversion_state import Conversion
from surgery.onnx.conversion.lora import lora
from surgery.onnx.conversion.other_methods import ia3, prefix, prompt, tokens, trained
from surgery.onnx.runtime.adapter_check import listed
from surgery.onnx.runtime.adapter_file import write_adapter
from surgery.onnx.runtime.manifest import Manifest

__all__ = ["convert_peft"]

_METHODS = {"LORA": lora, "IA3": ia3, "PREFIX_TUNING": prefix, "PROMPT_TUNING": prompt, "P_TUNING": prompt}


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
    except SurgeryError as error:
        raise listed(f"{name} can't be converted", [error]) from None
    conversion = Conversion(manifest, checkpoint, Path(onnx_path))
    kind = checkpoint.config["peft_type"]
    if kind not in _METHODS:
        why = near_misses(kind[:60], _METHODS) or f"{', '.join(_METHODS)} are"
        fix = "load_adapter and export_adapter, with the model"
        conversion.problems.append(SurgeryError(f"PEFT's {kind[:60]!r} can't be converted", why=why, fix=fix))
    else:
        with conversion.noting("the configuration"):
            _METHODS[kind](conversion)
        tokens(conversion)
        trained(conversion)
        base(conversion)
        conversion.complete()
        problems = conversion.problems + [_placeless(manifest, key) for key in conversion.left]
        problems += manifest.check(conversion.arrays) if not problems else []
        conversion.problems = problems
    if conversion.problems:
        raise listed(f"{name} can't be converted", sorted(conversion.problems, key=lambda problem: problem.where or ""))
    return write_adapter(out_path, conversion.arrays, manifest)


def _placeless(manifest: Manifest, key: str) -> SurgeryError:
    why = near_misses(key.rpartition(".")[0], [site for site, _ in manifest.groups])
    return SurgeryError("the file has no slot for a tensor of the checkpoint", where=key, why=why)
