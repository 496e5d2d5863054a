"""Every format to every other and back: the change stays, or the error has a reason and a remedy.

ALL_FORMATS=1 takes all formats as sources; otherwise three.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from surgery import SurgeryError, SurgeryWarning, adapter_formats, convert_adapter
from surgery.adapter_files.tensor_files import open_tensors

FORMATS = sorted(adapter_formats())
SOURCES = FORMATS if os.environ.get("ALL_FORMATS") else ["gguf", "kohya", "mlx"]
LLAMA = {
    "model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 16, "head_dim": 4,
}  # fmt: skip
FLUX = {"_class_name": "FluxTransformer2DModel"}
SIZES: dict[str, dict[str, tuple[int, int]]] = {  # base → path → (out, in)
    "llama": {
        f"model.layers.{layer}.{name}": size
        for layer in range(2)
        for name, size in {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.down_proj": (16, 24)}.items()
    },
    "flux": {
        f"{block}.0.{name}": (16, 16)
        for block, names in {
            "transformer_blocks": ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
            "single_transformer_blocks": ("attn.to_q", "attn.to_k", "attn.to_v"),
        }.items()
        for name in names
    }
    | {"single_transformer_blocks.0.proj_mlp": (64, 16)},
}
# The formats that hold an adapter of each base: the others are of programs that do not run such models.
ACCEPTED = {
    "llama": set("peft mlx gguf torchtune openvino onnxruntime-genai lycoris".split()),
    "flux": set("peft mlx openvino diffusers diffusers-old kohya lycoris comfyui bfl".split()),
}
BASES: dict[str, tuple[dict[str, Any], str | None]] = {"llama": (LLAMA, None), "flux": (FLUX, "transformer")}


def peft_folder(folder: Path, base: str) -> Path:
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    for path, (rows, columns) in SIZES[base].items():
        for name, size in (("A", (2, columns)), ("B", (rows, 2))):
            tensors[f"base_model.model.{path}.lora_{name}.weight"] = torch.randn(size, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted(SIZES[base])
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def changes(folder: Path) -> dict[str, Tensor]:
    """Scale · B A of a folder of PEFT, by path."""
    config = json.loads((folder / "adapter_config.json").read_text())
    file = open_tensors(folder / "adapter_model.safetensors")
    result: dict[str, Tensor] = {}
    for key in file.shapes:
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            A, B = file.read(key), file.read(key.replace("lora_A", "lora_B"))
            ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
            assert ranks.get(path, config["r"]) == len(A)
            result[path] = alphas.get(path, config["lora_alpha"]) / len(A) * B @ A
    return result


def base_folder(folder: Path, base: str) -> Path:
    """The folder of a model, of which a conversion reads the configuration and the names of modules."""
    folder.mkdir()
    save_file({f"{path}.weight": torch.zeros(1) for path in SIZES[base]}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(BASES[base][0]))
    return folder


def convert(source: Path, target: Path, name: str, base: str) -> Path:
    component = BASES[base][1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        convert_adapter(source, target, format=name, base=source.parent / "base", component=component)
    return target


def refused(call: Callable[..., object], *arguments: Any) -> str | None:
    """What an error says, which has a reason and a remedy; None without an error."""
    try:
        call(*arguments)
    except SurgeryError as error:
        problems = [error, *getattr(error, "problems", ())]
        assert any(problem.why for problem in problems), f"no reason: {error}"
        assert any(problem.fix for problem in problems), f"no remedy: {error}"
        return str(error)
    return None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_pair(tmp_path: Path, base: str, source: str) -> None:
    first = peft_folder(tmp_path / "peft", base)
    base_folder(tmp_path / "base", base)
    expected, start = changes(first), tmp_path / "start"
    if refused(convert, first, start, source, base) is not None:
        assert source not in ACCEPTED[base]
        return
    accepted: set[str] = set()
    for target in FORMATS:
        middle, back = tmp_path / target, tmp_path / f"{target}-back"
        if refused(convert, start, middle, target, base) is not None:
            continue
        accepted.add(target)
        assert refused(convert, middle, back, "peft", base) is None, (source, target)
        found = changes(back)
        assert found.keys() == expected.keys()
        for path, change in expected.items():
            assert torch.allclose(found[path], change, atol=1e-5), (source, target, path)
    assert accepted == ACCEPTED[base], source
