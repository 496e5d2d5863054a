"""Whole models that an earlier release of the same minor version pickled can be opened and worked on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import surgery
from surgery import activate, adapters, remove, unmerge
from tests.reports.pickles import FOLDER

MINOR = surgery.__version__.rpartition(".")[0]
FILES = sorted(FOLDER.glob(f"{MINOR}.*.pt"))


def test_this_minor_version_has_a_pickle() -> None:
    assert FILES, "run `python -m tests.reports.pickles`"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
@pytest.mark.parametrize("name", ["live", "merged"])
def test_a_pickle_of_the_same_minor_version_computes_and_is_taken_apart(file: Path, name: str) -> None:
    content = torch.load(file, weights_only=False)
    case, x = content["cases"][name], content["input"]
    model = case["model"]
    torch.testing.assert_close(model(x), case["output"])  # the processor that wrote it may round otherwise
    if name == "live":
        assert adapters(model).keys() == {"idle", "live"}
        activate(model, "idle")
        assert not torch.equal(model(x), case["output"])
    else:
        unmerge(model)
    remove(model)
    state = model.state_dict()
    assert state.keys() == case["base"].keys()
    assert all(torch.equal(tensor, case["base"][key]) for key, tensor in state.items())
    assert type(model[0]) is torch.nn.Linear
