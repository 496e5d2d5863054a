"""The formats that are known from the start, each as rows of data. Sources are named beside them."""

from __future__ import annotations

from surgery.storage.formats import architectures as _architectures
from surgery.storage.formats import gguf_names as _gguf_names
from surgery.storage.formats.mlx_names import MLX_NAMES
from surgery.storage.formats.table import AdapterFormat, KeyPrefix, TensorKey, register_format

__all__: list[str] = []

_REGISTERED = _gguf_names

_LOHA = tuple(TensorKey(f"hada_{name}", f".hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR_PARTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
_LOKR = tuple(TensorKey(f"lokr_{name}", f".lokr_{name}") for name in _LOKR_PARTS)
_UP_DOWN = (TensorKey("A", ".lora_down.weight"), TensorKey("B", ".lora_up.weight"), TensorKey("alpha", ".alpha"))

# peft: utils/save_and_load.py
_PEFT = (
    TensorKey("A", ".lora_A.weight"),
    TensorKey("B", ".lora_B.weight"),
    TensorKey("A", ".lora_embedding_A", embedding=True),
    TensorKey("B", ".lora_embedding_B", embedding=True),
    TensorKey("B_bias", ".lora_B.bias"),
    TensorKey("magnitude", ".lora_magnitude_vector"),
    TensorKey("alpha", ".alpha"),
    *_LOHA,
    *_LOKR,
)

register_format(
    AdapterFormat(
        "peft",
        "PEFT",
        _PEFT,
        files=("adapter_model.safetensors", "adapter_model.bin"),
        settings_file="adapter_config.json",
        prefixes=(KeyPrefix("base_model.model."),),
        scale="peft",
    )
)

# diffusers: loaders/lora_base.py; the configuration stands in the header
_COMPONENTS = "transformer unet text_encoder text_encoder_2 text_encoder_3 transformer_2 prior controlnet"
_PIPELINE = tuple(KeyPrefix(f"{name}.", name) for name in _COMPONENTS.split())
register_format(
    AdapterFormat(
        "diffusers",
        "diffusers",
        _PEFT[:7],
        files=("pytorch_lora_weights.safetensors", "pytorch_lora_weights.bin"),
        prefixes=_PIPELINE,
        names=("clip",),
        scale="diffusers",
        header={"format": "pt"},
    )
)

# mlx-lm: tuner/utils.py, tuner/lora.py, tuner/dora.py
register_format(
    AdapterFormat(
        "mlx",
        "MLX-LM",
        (
            TensorKey("A", ".lora_a", "transposed", embedding=None),
            TensorKey("B", ".lora_b", "transposed", embedding=None),
            TensorKey("magnitude", ".m"),
        ),
        files=("adapters.safetensors",),
        settings_file="adapter_config.json",
        names=MLX_NAMES,
        scale="one_scale",
        settings={
            "fine_tune_type": "$kind",
            "num_layers": "$layers",
            "lora_parameters": {"rank": "$rank", "scale": "$scale", "dropout": "$dropout", "keys": "$paths"},
        },
        header={"format": "mlx"},
    )
)

# sd-scripts: networks/lora.py, networks/lora_flux.py, networks/lora_sd3.py
_KOHYA = (
    KeyPrefix("lora_unet_", "unet"),
    KeyPrefix("lora_te_", "text_encoder"),
    KeyPrefix("lora_te1_", "text_encoder", beside="text_encoder_2"),
    KeyPrefix("lora_te2_", "text_encoder_2"),
    KeyPrefix("lora_te3_", "text_encoder_3"),
    KeyPrefix("lora_transformer_", "transformer", names="as-here"),  # OneTrainer, read by ComfyUI
)
_KOHYA_KEYS = (*_UP_DOWN, TensorKey("mid", ".lora_mid.weight"), TensorKey("magnitude", ".dora_scale", "column"))
_KOHYA_HEADER = {
    "ss_network_module": "networks.lora", "ss_network_dim": "$rank", "ss_network_alpha": "$alpha",
}  # fmt: skip
register_format(
    AdapterFormat(
        "kohya",
        "Kohya (sd-scripts, A1111)",
        _KOHYA_KEYS,
        files=("lora.safetensors",),
        prefixes=_KOHYA,
        separator="_",
        words=_architectures.WORDS,
        names=("flux", "sd3", "sdxl", "clip"),
        header=_KOHYA_HEADER,
    )
)

# lycoris-lora: modules/*.py, wrapper.py; through sd-scripts the prefixes are Kohya's
register_format(
    AdapterFormat(
        "lycoris",
        "LyCORIS",
        (
            *_KOHYA_KEYS,
            *_LOHA,
            *_LOKR,
            TensorKey("oft_blocks", ".oft_blocks"),
            TensorKey("rescale", ".rescale"),
            *(TensorKey(name, f".{name}.weight") for name in ("a1", "a2", "b1", "b2", "bm")),
            TensorKey("diff", ".diff"),
            TensorKey("diff_b", ".diff_b"),
            TensorKey("w_norm", ".w_norm"),
            TensorKey("b_norm", ".b_norm"),
        ),
        files=("lycoris.safetensors",),
        prefixes=(KeyPrefix("lycoris_"), *_KOHYA),
        separator="_",
        words=_architectures.WORDS,
        names=("flux", "sd3", "sdxl", "clip"),
        contains=("kohya",),
    )
)

# x-flux; diffusers: loaders/lora_conversion_utils.py
register_format(
    AdapterFormat(
        "xlabs",
        "XLabs Flux",
        (TensorKey("A", ".down.weight"), TensorKey("B", ".up.weight")),
        files=("xlabs_lora.safetensors",),
        prefixes=(KeyPrefix("", "transformer", names="flux-xlabs"),),
        names=("flux-xlabs",),
        names_required=True,
        scale="none",
    )
)

# Black Forest Labs' control LoRAs; diffusers: loaders/lora_conversion_utils.py
register_format(
    AdapterFormat(
        "bfl",
        "Black Forest Labs Flux",
        (*_PEFT[:2], TensorKey("B_bias", ".lora_B.bias"), TensorKey("value", ".scale")),
        files=("flux_lora.safetensors",),
        prefixes=(KeyPrefix("", "transformer", names="flux"),),
        names=("flux",),
        names_required=True,
        scale="none",
    )
)

# ComfyUI: comfy/lora.py, comfy/weight_adapter, comfy_extras/nodes_lora_extract.py
register_format(
    AdapterFormat(
        "comfyui",
        "ComfyUI",
        (
            *_KOHYA_KEYS,
            *_PEFT[:2],
            TensorKey("diff", ".diff"),
            TensorKey("diff_b", ".diff_b"),
            *_LOHA,
            *_LOKR,
        ),
        files=("comfyui_lora.safetensors",),
        prefixes=(
            KeyPrefix("diffusion_model.", "transformer"),
            KeyPrefix("lora_unet_", "unet", separator="_"),
            KeyPrefix("text_encoders.clip_l.transformer.", "text_encoder"),
            KeyPrefix("text_encoders.clip_g.transformer.", "text_encoder_2"),
        ),
        words=_architectures.WORDS,
        names=("flux", "sd3", "sdxl", "clip"),
        contains=("kohya", "lycoris"),
    )
)

# torchtune: models/convert_weights.py, modules/peft/lora.py
register_format(
    AdapterFormat(
        "torchtune",
        "torchtune",
        (
            TensorKey("A", ".lora_a.weight"),
            TensorKey("B", ".lora_b.weight"),
            TensorKey("magnitude", ".magnitude"),
        ),
        files=("adapter_0.safetensors", "adapter_0.pt"),
        settings_file="adapter_config.json",
        names=("torchtune",),
        names_required=True,
        scale="settings_alpha",
    )
)

# diffusers until 0.17
register_format(
    AdapterFormat(
        "diffusers-old",
        "diffusers until 0.17",
        (TensorKey("A", ".down.weight"), TensorKey("B", ".up.weight")),
        files=("pytorch_lora_weights.safetensors",),
        prefixes=_PIPELINE,
        names=("diffusers-old",),
        names_required=True,
        scale="none",
    )
)

# llama.cpp: convert_lora_to_gguf.py, src/llama-adapter.cpp
register_format(
    AdapterFormat(
        "gguf",
        "llama.cpp (GGUF)",
        (TensorKey("A", ".weight.lora_a"), TensorKey("B", ".weight.lora_b")),
        files=("adapter.gguf",),
        names=("gguf-llama", "gguf", "gguf-seed-oss", "gguf-around", "gguf-after", "gguf-apertus"),
        names_required=True,
        scale="one_alpha",
        header={"general.architecture": "$architecture"},
        container="gguf",
    )
)

# openvino.genai: src/cpp/src/lora/adapter.cpp; it ignores an alpha in the file, and does not divide by the rank
register_format(
    AdapterFormat(
        "openvino",
        "OpenVINO GenAI",
        _PEFT[:2],
        files=("openvino_lora.safetensors",),
        prefixes=(KeyPrefix("base_model.model."),),
        scale="none",
        contains=("peft",),
    )
)

# onnxruntime-genai: src/python/py/models/builders/base.py; the scale is multiplied into B
register_format(
    AdapterFormat(
        "onnxruntime-genai",
        "onnxruntime-genai",
        (
            TensorKey("A", ".lora_A.MatMul.weight", "transposed"),
            TensorKey("B", ".lora_B.MatMul.weight", "transposed"),
        ),
        files=("adapter.onnx_adapter",),
        names=("onnxruntime-genai",),
        names_required=True,
        scale="none",
        container="onnx_adapter",
    )
)
