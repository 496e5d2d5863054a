"""Loads a folder of many adapters, with a choice of the live ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    LoadError,
    SurgeryError,
    activate,
    active,
    adapters,
    apply_rules,
    load_adapters,
    remove,
    save_adapter,
    using,
)
from surgery.rules import LoraRule, TrainRule
from surgery.testing import Snapshot

X = torch.arange(12.0).view(2, 6) / 12
NAMES = ("mail", "news", "sport")


def model_of() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, Tensor]:
    """Three adapters in `tmp_path`, each with its own head, and the outputs of each alone."""
    outputs = {}
    for rank, name in enumerate(NAMES, 1):
        model = apply_rules(model_of(), [LoraRule("0", rank=rank, init="random"), TrainRule("2")], adapter=name)
        with torch.no_grad():
            model.get_parameter(f"2.adapters.{name}.weight").mul_(rank + 1)
        save_adapter(model, tmp_path / name, name)
        outputs[name] = model(X).detach()
    return outputs


def test_heads_of_their_own(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    model = model_of()
    plain = Snapshot(model)
    with pytest.raises(LoadError, match="both replace weight"):
        load_adapters(model, tmp_path)
    assert not plain.differences(model)
    assert tuple(load_adapters(model, tmp_path, live="news")) == NAMES
    assert active(model) == ("news",)
    for name in NAMES:
        with using(model, name):
            assert torch.equal(model(X), expected[name])
    assert not plain.differences(remove(model))


@pytest.mark.parametrize("live", [[], ["mail"]], ids=["none", "one"])
def test_beside_those_from_before(live: list[str], tmp_path: Path, expected: dict[str, Tensor]) -> None:
    model = apply_rules(model_of(), LoraRule("0", rank=2, init="random"), adapter="old")
    load_adapters(model, tmp_path, live=live)
    assert active(model) == tuple(live)
    model = activate(remove(model, NAMES), "old", weights=0.5)
    load_adapters(model, tmp_path, live=["old", *live])
    assert active(model) == ("old", *live) and adapters(model)["old"].weight == 1.0


def test_whole_or_nothing(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    model = apply_rules(model_of(), [LoraRule("0", rank=2, init="random"), TrainRule("2")], adapter="old")
    activate(model, "old", weights=-0.5)
    before, output = Snapshot(model), model(X)

    def unchanged() -> None:
        assert not before.differences(model) and active(model) == ("old",) and torch.equal(model(X), output)
        assert adapters(model)["old"].weight == -0.5 and model[0].adapters.old.A.requires_grad

    with pytest.raises(SurgeryError, match=r"live='nws' is not an adapter(.|\n)*news"):
        load_adapters(model, tmp_path, live="nws")
    unchanged()
    with pytest.raises(SurgeryError, match="can't be live together"):
        load_adapters(model, tmp_path, live=["mail", "news"])
    unchanged()
    (tmp_path / "news/adapter_config.json").write_text("{")
    (tmp_path / "sport/adapter_config.json").write_text("{")
    with pytest.raises(LoadError) as caught:
        load_adapters(model, tmp_path, live="mail")
    assert len(caught.value.problems) == 2
    unchanged()


def test_what_holds_the_base_can_not_be_idle(tmp_path: Path, expected: dict[str, Tensor]) -> None:
    model = apply_rules(model_of(), LoraRule("0", rank=2, init="pissa"), adapter="first")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="can't be idle"):
        load_adapters(model, tmp_path, live="mail")
    assert not before.differences(model) and active(model) == ("first",)
