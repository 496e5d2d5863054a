"""A base in GGUF for llama.cpp: by `merge_to`, or by llama.cpp's own converter where LLAMA_CPP names its source."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import merge_to

__all__ = ["write_gguf"]


def write_gguf(model: nn.Module, folder: Path, file: Path) -> Path:
    """Write the model, whose folder of transformers is `folder`, into one file."""
    if source := os.environ.get("LLAMA_CPP"):
        converter = Path(source) / "convert_hf_to_gguf.py"
        command = [sys.executable, str(converter), str(folder), "--outfile", str(file), "--outtype", "f32"]
        subprocess.run(command, check=True, capture_output=True)
        return file
    words: dict[str, Any] = {"format": "gguf"}
    with torch.no_grad():
        merge_to(model, file.with_suffix(""), **words)
    (written,) = file.with_suffix("").glob("*.gguf")
    return written
