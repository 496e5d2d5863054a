"""Profiles of programs that make images. Each fact stands in the named file of the program's version."""

from __future__ import annotations

from surgery.serving.profile import TargetProfile, register_target

__all__: list[str] = []

register_target(
    TargetProfile(
        "diffusers",
        "diffusers",
        "0.42.1",
        format="diffusers",
        sources={
            "dora": "src/diffusers/utils/peft_utils.py",
            "lora_bias": "src/diffusers/utils/peft_utils.py",
            "ranks": "src/diffusers/utils/peft_utils.py",
            "scale": "src/diffusers/loaders/lora_base.py",
            "convolutions": "peft/tuners/lora/layer.py",
            "embeddings": "peft/tuners/lora/layer.py",
        },
        dora=True,
        lora_bias=True,
        convolutions="all",
        command='pipeline.load_lora_weights("FOLDER")',
        notes=("diffusers computes by PEFT, which must be installed.",),
    )
)

register_target(
    TargetProfile(
        "comfyui",
        "ComfyUI",
        "0.38.1",
        format="comfyui",
        sources={
            "methods": "comfy/weight_adapter/__init__.py",
            "dora": "comfy/weight_adapter/base.py",
            "ranks": "comfy/weight_adapter/lora.py",
            "scale": "comfy/weight_adapter/lora.py",
            "convolutions": "comfy/weight_adapter/lora.py",
            "classes": "comfy/lora.py",
        },
        methods=("lora", "loha", "lokr", "difference"),
        convolutions="all",
        command="FOLDER/comfyui_lora.safetensors goes into models/loras",
        notes=("ComfyUI divides DoRA's magnitude by the norm of the base's weight, so DoRA becomes a LoRA.",),
    )
)
