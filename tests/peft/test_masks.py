"""SHiRA's masks by a function of one's own (`ShiraConfig.mask_fn`), beside PEFT."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from surgery import SurgeryError
from surgery.testing import Snapshot
from tests.support.peers import peft

X = torch.linspace(-1, 1, 24).view(3, 8)

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def largest(module: Any, r: int, random_seed: int | None = None) -> Tensor:
    """The largest weights, or with a seed the smallest."""
    count, size = r * sum(module.weight.shape), module.weight.abs().flatten()
    mask = torch.zeros_like(size)
    mask[(size if random_seed is None else -size).topk(count).indices] = 1
    return mask.view(module.weight.shape)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).eval()


def adapted(library: Any, function: Any, **fields: Any) -> Any:
    fields = {"r": 2, "mask_type": "custom", "target_modules": ["0", "2"], "init_weights": False, **fields}
    config = library.ShiraConfig(**fields)
    config.mask_fn = function
    return library.get_peft_model(net(), config).eval()


@pytest.mark.parametrize("fields", [{}, {"mask_type": "random", "random_seed": 3}], ids=["custom", "seed"])
def test_a_mask_is_pefts(fields: dict[str, Any], tmp_path: Path) -> None:
    theirs, mine = adapted(peft, largest, **fields), adapted(ours, largest, **fields)
    expected, own = peft.get_peft_model_state_dict(theirs), ours.get_peft_model_state_dict(mine)
    assert expected.keys() == own.keys()
    places = [key for key in expected if key.endswith("indices")]
    assert len(places) == 2 and all(torch.equal(own[key], expected[key]) for key in places)
    ours.set_peft_model_state_dict(mine, expected)
    torch.testing.assert_close(mine(X), theirs(X))
    mine.save_pretrained(tmp_path)
    for library in (peft, ours):
        torch.testing.assert_close(library.PeftModel.from_pretrained(net(), tmp_path).eval()(X), mine(X))


def test_pefts_own_configuration_brings_its_function() -> None:
    config = peft.ShiraConfig(r=2, mask_type="custom", target_modules=["0", "2"])
    config.mask_fn = largest
    own = ours.get_peft_model_state_dict(ours.get_peft_model(net(), config))
    expected = ours.get_peft_model_state_dict(adapted(ours, largest))
    assert all(torch.equal(own[key], expected[key]) for key in expected if key.endswith("indices"))


def test_a_configuration_keeps_its_function() -> None:
    config = ours.ShiraConfig(mask_type="custom")
    assert config.mask_fn is None and ours.ShiraConfig().mask_fn is not None
    config.mask_fn = largest
    assert copy.deepcopy(config).mask_fn is pickle.loads(pickle.dumps(config)).mask_fn is config.mask_fn is largest
    assert "own_mask_fn" not in config.to_dict() and "mask_fn" not in config.to_dict()


def test_errors_leave_the_model_as_it_was() -> None:
    model = net()
    before = Snapshot(model)
    masks: list[tuple[Any, str]] = [
        (lambda module, r: torch.ones_like(module.weight), "it gives 96 ones, and needs 40 ones"),
        (lambda module, r: torch.ones(3), "another shape"),
        (lambda module, r: None, "a NoneType of another shape"),
        (None, "config.mask_fn = "),
    ]
    for function, match in masks:
        config = ours.ShiraConfig(r=2, mask_type="custom", target_modules=["0"])
        config.mask_fn = function
        with pytest.raises(SurgeryError, match=match) as error:
            ours.get_peft_model(model, config)
        assert isinstance(error.value, ValueError) and before.differences(model) == []
