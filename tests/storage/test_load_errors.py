"""Each problem of a LoadError says where it is, why it is one, and what to do; and what it says to do works."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from surgery import LoadError, SurgeryError, SurgeryWarning, apply_rules, hotswap, load_adapter, save_adapter
from surgery.rules import LoraRule


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def adapted(seed: int = 0) -> nn.Module:
    return apply_rules(model(seed), LoraRule("0", rank=2, init="random"))


@pytest.fixture(params=["peft", "surgery"])
def folder(request: Any, tmp_path: Path) -> Path:
    return save_adapter(adapted(), tmp_path / "saved", format=request.param)


def tensors_in(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def refused(folder: Path, base: nn.Module | None = None, **options: Any) -> SurgeryError:
    """The only problem of loading a folder."""
    with pytest.raises(LoadError) as caught:
        load_adapter(model() if base is None else base, folder, **options)
    (problem,) = caught.value.problems
    assert problem.where and problem.why and problem.fix, str(problem)
    return problem


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(tensors_in(folder))
    edit(tensors)
    save_file(tensors, tensors_in(folder), {"format": "pt"})


def test_another_base_names_same_base(folder: Path) -> None:
    problem = refused(folder, model(1))
    assert problem.what == "it was made on another base" and problem.where == str(folder)
    assert problem.why and problem.why.startswith("2 of 2 weights differ (")
    assert problem.fix and "load_adapter(…, same_base=False)" in problem.fix
    with pytest.warns(SurgeryWarning, match="it was made on another base: 2 of 2 weights differ"):
        load_adapter(model(1), folder, same_base=False)
    with pytest.raises(LoadError, match=r"hotswap\(…, same_base=False\)"):
        hotswap(adapted(1), "default", folder)


def test_numbers_that_are_not_finite_name_finite(folder: Path) -> None:
    change(folder, lambda tensors: next(iter(tensors.values())).fill_(torch.inf))
    problem = refused(folder)
    assert problem.fix and "load_adapter(…, finite=False)" in problem.fix
    load_adapter(model(), folder, finite=False)


def test_what_does_not_fit_names_strict(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update(more=torch.zeros(1)))
    problem = refused(folder)
    assert "one tensor is not of this adapter: more" in problem.what
    assert problem.fix and "load_adapter(…, strict=False)" in problem.fix
    with pytest.warns(SurgeryWarning, match="not of this adapter"):
        load_adapter(model(), folder, strict=False)


def test_damage_is_told_in_words(folder: Path) -> None:
    path = tensors_in(folder)
    whole = path.read_bytes()
    for content, why in (
        (whole[:-4], "this tensor ends at byte 64 of the data, and the file has 60: it was cut off"),
        (whole.replace(b'"F32"', b'"F16"', 1), "this tensor has 32 bytes, which are not those of F16 numbers of shape"),
        (whole.replace(b'"data_offsets"', b'"data_offset_"', 1), "does not give this tensor a dtype, a shape"),
        (whole[:40], "a file of 40"),
        (whole[:8] + b"x" + whole[9:], "Expecting value"),
    ):
        path.write_bytes(content)
        problem = refused(folder)
        assert problem.why and why in problem.why and "{" not in problem.why
        assert problem.fix and problem.fix.startswith("copy or download the file again")


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"peft_type": "LORA", "target_modules": ["0"], "r": 2, "odd": 1}', '{"peft_type": 3}']
)
def test_settings_that_can_not_be_read_have_a_fix(tmp_path: Path, text: str) -> None:
    folder = save_adapter(adapted(), tmp_path, format="peft")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(LoadError) as caught:
        load_adapter(model(), folder)
    assert all(problem.where and problem.fix for problem in caught.value.problems), str(caught.value)


def test_a_folder_without_an_adapter_has_a_fix(tmp_path: Path) -> None:
    assert "save_adapter" in str(refused(tmp_path).fix)
