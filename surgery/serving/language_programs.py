"""Profiles of programs that run language models. Each fact stands in the named file of the program's version."""

from __future__ import annotations

from surgery.serving.mlx_models import MODEL_TYPES, SPLIT_ATTENTION
from surgery.serving.profile import TargetProfile, register_target
from surgery.serving.vllm_classes import ADAPTED, BOTH, EMBEDDINGS, NOT_ADAPTED

__all__: list[str] = []

_ATTENTION, _GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")

register_target(
    TargetProfile(
        "vllm",
        "vLLM",
        "0.32.0",
        format="peft",
        sources={
            "dora": "vllm/lora/peft_helper.py",
            "rslora": "vllm/lora/peft_helper.py",
            "lora_bias": "vllm/lora/peft_helper.py",
            "invocation": "vllm/lora/peft_helper.py",
            "trained": "vllm/lora/peft_helper.py",
            "scale": "vllm/lora/peft_helper.py",
            "ranks": "vllm/lora/peft_helper.py",
            "largest_rank": "vllm/config/lora.py",
            "default_rank": "vllm/config/lora.py",
            "convolutions": "vllm/lora/utils.py",
            "embeddings": "vllm/model_executor/models",
            "classes": "vllm/model_executor/models/registry.py",
            "tied": "vllm/lora/layers/logits_processor.py",
            "paths": "vllm/lora/model_manager.py",
        },
        largest_rank=512,
        default_rank=16,
        rank_choices=(1, 8, 16, 32, 64, 128, 256, 320, 512),
        rank_option="--max-lora-rank",
        rslora=True,
        trained=("score", "classifier"),
        tied=True,
        paths=r"(?!(.*\.)?(visual|vision|image|audio|speech)\w*\.)(?!(.*\.)?(multi_modal_projector|connector|merger)\.).*",
        paths_reason="it passes over LoRA on towers and connectors, unless --enable-tower-connector-lora is given",
        embedding_classes={
            **{name: ("embed_tokens", "lm_head") for name in sorted(BOTH)},
            **{name: ("embed_tokens",) for name in sorted(EMBEDDINGS)},
            "ExaoneForCausalLM": ("wte", "lm_head"),
        },
        classes=ADAPTED,
        other_classes=NOT_ADAPTED,
        command="vllm serve BASE --enable-lora --lora-modules NAME=FOLDER --max-lora-rank {rank}",
        notes=(
            "A class that is not in the list runs through vLLM's Transformers backend, if at all: not checked.",
            "Releases before 0.32 ignore rank_pattern and alpha_pattern.",
            "On a CPU, rows without an adapter get the last slot's: give --max-loras one slot more than adapters.",
        ),
    )
)

register_target(
    TargetProfile(
        "sglang",
        "SGLang",
        "0.5.23",
        format="peft",
        sources={
            "dora": "python/sglang/srt/lora/lora_manager.py",
            "ranks": "python/sglang/srt/lora/mem_pool.py",
            "scale": "python/sglang/srt/lora/lora.py",
            "rslora": "python/sglang/srt/lora/lora.py",
            "lora_bias": "python/sglang/srt/lora/lora.py",
            "invocation": "python/sglang/srt/lora/lora_config.py",
            "trained": "python/sglang/srt/lora/lora.py",
            "groups": "python/sglang/srt/lora/lora.py",
            "modules": "python/sglang/srt/lora/utils.py",
            "embeddings": "python/sglang/srt/lora/utils.py",
            "heads": "python/sglang/srt/lora/utils.py",
            "paths": "python/sglang/srt/layers/utils/common.py",
            "tied": "python/sglang/srt/lora/lora_manager.py",
        },
        ranks="one",
        scale="scale",
        embeddings=("embed_tokens",),
        heads=("lm_head",),
        modules=(
            *_ATTENTION,
            "qkv_proj",
            "o_proj",
            "out_proj",
            "in_proj",
            *_GATED,
            "gate_up_proj",
            "down_proj",
            "q_a_proj",
            "kv_a_proj_with_mqa",
            "q_b_proj",
            "kv_b_proj",
            "fc1_latent_proj",
            "fc2_latent_proj",
        ),  # fmt: skip
        groups=(_ATTENTION, _GATED, ("q_a_proj", "kv_a_proj_with_mqa")),
        tied=True,
        paths=r"(model\.)?(language_model\.)?(model\.)?layers\.\d+\..*",
        paths_reason="it finds a layer by layers.<number> of the language model",
        command="python -m sglang.launch_server --model-path BASE --enable-lora --lora-paths NAME=FOLDER",
        notes=("SGLang ignores use_rslora and alpha_pattern, so scales are multiplied into B.",),
    )
)

register_target(
    TargetProfile(
        "tensorrt-llm",
        "TensorRT-LLM",
        "main 037d4ba",
        format="peft",
        sources={
            "dora": "tensorrt_llm/lora_manager.py",
            "scale": "tensorrt_llm/lora_manager.py",
            "rslora": "tensorrt_llm/lora_manager.py",
            "ranks": "tensorrt_llm/lora_manager.py",
            "paths": "tensorrt_llm/lora_manager.py",
            "groups": "tensorrt_llm/lora_manager.py",
            "lora_bias": "tensorrt_llm/lora_manager.py",
            "invocation": "tensorrt_llm/lora_manager.py",
            "modules": "tensorrt_llm/lora_helper.py",
            "default_rank": "tensorrt_llm/lora_helper.py",
        },
        scale="alpha",
        rslora=True,
        default_rank=64,
        rank_option="LoraConfig(max_lora_rank=…)",
        modules=(*_ATTENTION, "o_proj", *_GATED, "down_proj", "gate_up_proj"),
        groups=(_ATTENTION,),
        paths=r".*\.\d+\.\w+\.\w+",
        paths_reason="it finds a module by <number>.<block>.<name>",
        command="LLM(BASE, lora_config=LoraConfig(lora_dir=[FOLDER], max_lora_rank={rank}))",
        notes=(
            "TensorRT-LLM passes over LoRA on lm_head and embed_tokens without a word, so it is refused here.",
            "DoRA is refused: its runtime wants the magnitude divided by a norm that only the base tells.",
        ),
    )
)

register_target(
    TargetProfile(
        "llama.cpp",
        "llama.cpp",
        "of llama-cpp-python 0.3.36",
        format="gguf",
        sources={
            "scale": "src/llama-adapter.cpp",
            "ranks": "src/llama-adapter.cpp",
            "invocation": "src/llama-adapter.cpp",
            "embeddings": "src/llama-adapter.cpp",
            "heads": "src/llama-adapter.cpp",
            "trained": "src/llama-adapter.cpp",
            "tied": "src/llama-adapter.cpp",
            "dora": "convert_lora_to_gguf.py",
            "lora_bias": "convert_lora_to_gguf.py",
        },
        scale="alpha",
        invocation=True,
        embeddings=("embed_tokens",),
        heads=("lm_head",),
        command="llama-server -m BASE.gguf --lora FOLDER/adapter.gguf",
        notes=("llama.cpp passes over changes of norms without a word, so they are refused here.",),
    )
)

register_target(
    TargetProfile(
        "mlx",
        "MLX-LM",
        "0.32.2",
        format="mlx",
        sources={
            "scale": "mlx_lm/tuner/utils.py",
            "ranks": "mlx_lm/tuner/utils.py",
            "dora": "mlx_lm/tuner/dora.py",
            "embeddings": "mlx_lm/tuner/lora.py",
            "heads": "mlx_lm/tuner/utils.py",
            "convolutions": "mlx_lm/tuner/utils.py",
            "trained": "mlx_lm/tuner/utils.py",
            "tied": "mlx_lm/tuner/lora.py",
            "model_types": "mlx_lm/models",
            "lacking": "mlx_lm/models",
        },
        dora=True,
        ranks="one",
        scale="scale",
        embeddings=("*",),
        heads=("*",),
        model_types=MODEL_TYPES,
        lacking={
            **dict.fromkeys(SPLIT_ATTENTION, ("kv_b_proj",)),
            "bitnet": ("*",),
            "nanochat": ("*",),
        },
        command="mlx_lm.generate --model BASE --adapter-path FOLDER",
    )
)

register_target(
    TargetProfile(
        "openvino",
        "OpenVINO GenAI",
        "2026.4.1",
        format="openvino",
        sources={
            "scale": "src/cpp/src/lora/adapter.cpp",
            "ranks": "src/cpp/src/lora/adapter.cpp",
            "convolutions": "src/cpp/src/lora/adapter.cpp",
            "heads": "src/cpp/src/lora/adapter.cpp",
            "dtypes": "src/cpp/src/lora/adapter.cpp",
            "dora": "src/cpp/src/lora/adapter.cpp",
        },
        scale="none",
        convolutions="pointwise",
        heads=("lm_head",),
        dtypes=("float32", "float16", "bfloat16"),
        command='AdapterConfig(Adapter("FOLDER/openvino_lora.safetensors"), alpha=1.0)',
        notes=("OpenVINO GenAI ignores the file's alpha; its own alpha, 1 by default, is the strength.",),
    )
)

register_target(
    TargetProfile(
        "onnxruntime-genai",
        "onnxruntime-genai",
        "0.18.0",
        format="onnxruntime-genai",
        sources={
            "scale": "src/python/py/models/builders/base.py",
            "dora": "src/python/py/models/builders/base.py",
            "lora_bias": "src/python/py/models/builders/base.py",
            "dtypes": "src/models/adapters.cpp",
        },
        scale="none",
        dtypes=("float32", "float16"),
        command='Adapters(model).load("FOLDER/adapter.onnx_adapter", "NAME")',
        notes=(
            "The model must be built by onnxruntime-genai's builder with adapter_path=, with LoRA on the same modules.",
            "The tensors' dtype must be that of the model's inputs.",
        ),
    )
)
