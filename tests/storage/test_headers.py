"""Headers of safetensors files: read without torch, and never beyond the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from surgery import SurgeryError
from surgery.adapter_files.tensor_files import open_tensors
from surgery.adapter_files.tensor_headers import read_header


def test_a_header_says_what_the_tensors_are(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.empty(0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    header = read_header(tmp_path / "x.safetensors")
    assert header.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        found = header.tensors[name]
        assert found.shape == tuple(tensor.shape) and found.nbytes == tensor.numel() * tensor.element_size()
        assert found.numbers == tensor.numel()


def write(file: Path, header: Any, data: int = 8) -> Path:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(data))
    return file


def test_dtypes_that_torch_lacks_are_listed_and_not_opened(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {"a": {"dtype": "F4", "shape": [16], "data_offsets": [0, 8]}})
    assert read_header(file).tensors["a"].dtype == "F4"
    with pytest.raises(SurgeryError, match="is damaged"):
        open_tensors(file)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 9]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": 3, "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 8]},
        [],
    ],
)
def test_entries_that_do_not_fit_the_file_are_errors(entry: Any, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="is damaged"):
        read_header(write(tmp_path / "x.safetensors", {"a": entry}))
