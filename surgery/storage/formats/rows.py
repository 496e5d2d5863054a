"""The formats that are known from the start, each as rows of data. Sources are named beside them."""

from __future__ import annotations

from surgery.storage.formats import architectures as _architectures
from surgery.storage.formats.table import AdapterFormat, KeyPrefix, TensorKey, register_format

__all__: list[str] = []

_LOHA = tuple(TensorKey(name, f".hada_{name}") for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR = tuple(TensorKey(name, f".lokr_{name}") for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
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
            TensorKey("A", ".lora_a", "transposed"),
            TensorKey("B", ".lora_b", "transposed"),
            TensorKey("magnitude", ".m"),
        ),
        files=("adapters.safetensors",),
        settings_file="adapter_config.json",
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
    KeyPrefix("lora_te1_", "text_encoder"),
    KeyPrefix("lora_te2_", "text_encoder_2"),
    KeyPrefix("lora_te3_", "text_encoder_3"),
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
        names=("flux", "sd3", "sdxl"),
        header=_KOHYA_HEADER,
    )
)
