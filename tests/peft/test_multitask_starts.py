"""Multitask prompts of the façade that start from the file of another one, beside PEFT's."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import surgery.peft as ours
from surgery import SurgeryError
from surgery.testing import Snapshot
from tests.support.facade_models import llama
from tests.support.peers import peft

STARTS = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")
COMMON: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 4, "num_ranks": 2}

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def trained(folder: Path, safe: bool = True) -> Path:
    """The file of a multitask prompt with three tasks."""
    torch.manual_seed(0)
    model = peft.get_peft_model(llama()[0], peft.MultitaskPromptTuningConfig(**COMMON, num_tasks=3))
    model.save_pretrained(folder, safe_serialization=safe)
    return folder / ("adapter_model.safetensors" if safe else "adapter_model.bin")


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("start", STARTS)
def test_a_start_from_a_file_is_pefts(start: str, safe: bool, tmp_path: Path) -> None:
    base, example = llama()
    fields: dict[str, Any] = {"prompt_tuning_init": start, "prompt_tuning_init_task": 2}
    fields |= {"prompt_tuning_init_state_dict_path": str(trained(tmp_path, safe))}
    fields |= {"num_tasks": 2 if start == "ONLY_SOURCE_SHARED" else 1}
    theirs, mine = (
        library.get_peft_model(copy.deepcopy(base), library.MultitaskPromptTuningConfig(**COMMON, **fields))
        for library in (peft, ours)
    )
    expected, own = (library.get_peft_model_state_dict(model) for library, model in ((peft, theirs), (ours, mine)))
    same = [key for key in expected if torch.equal(own[key], expected[key])]
    assert same == (["prompt_embeddings"] if start == "ONLY_SOURCE_SHARED" else list(expected))
    assert expected.keys() == own.keys() and all(own[key].shape == expected[key].shape for key in own)
    assert all(parameter.requires_grad for name, parameter in mine.named_parameters() if ".adapters." in name)
    ours.set_peft_model_state_dict(mine, expected)
    tasks = torch.zeros(2, dtype=torch.long)
    with torch.no_grad():
        actual, wanted = (model.eval()(**example, task_ids=tasks).logits for model in (mine, theirs))
    torch.testing.assert_close(actual, wanted[:, -actual.shape[1] :], rtol=1e-5, atol=1e-6)
    mine.save_pretrained(tmp_path / "mine")
    (tmp_path / "adapter_model.safetensors").unlink(missing_ok=True)  # a saved adapter does not need it
    read = ours.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "mine")
    saved = ours.get_peft_model_state_dict(read)
    assert saved.keys() == expected.keys() and all(torch.equal(saved[key], expected[key]) for key in saved)


def test_errors_leave_the_model_as_it_was(tmp_path: Path) -> None:
    base, _ = llama()
    before, file = Snapshot(base), trained(tmp_path)
    save_file({"prompt_embeddings": torch.zeros(4, 32)}, other := tmp_path / "other.safetensors")
    average, exact = {"prompt_tuning_init": STARTS[0]}, {"prompt_tuning_init": STARTS[1]}
    place, name = {"prompt_tuning_init_state_dict_path": str(file)}, "prompt_tuning_init_state_dict_path"
    cases: list[tuple[dict[str, Any], str]] = [
        (average, f"{name} needs to be specified with AVERAGE_SOURCE_TASKS"),
        (average | {name: str(tmp_path / "absent.bin")}, "absent.bin"),
        (average | {name: str(other)}, "has no prefix_task_cols, prefix_task_rows"),
        (average | place | {"num_tasks": 2}, "prefix_task_cols does not fit"),
        (exact | place | {"num_virtual_tokens": 5}, "does not fit"),
        (exact | place | {"prompt_tuning_init_task": 3}, "prompt_tuning_init_task=3 is not a task"),
    ]
    for fields, match in cases:
        with pytest.raises(SurgeryError, match=match) as error:
            ours.get_peft_model(base, ours.MultitaskPromptTuningConfig(**{**COMMON, **fields}))
        assert isinstance(error.value, ValueError) and before.differences(base) == []
