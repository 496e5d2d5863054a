"""The façade's configurations beside PEFT's: which fields are refused, what is warned of, for whose they pass."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import surgery.peft as ours
from surgery import SurgeryError, SurgeryWarning
from tests.support import ROOT
from tests.support.peers import peft

NEEDED: dict[str, dict[str, Any]] = {"AdaLoraConfig": {"total_step": 10}}
KINDS = sorted(kind.__name__ for kind in ours.PeftConfig.kinds.values())
TEXT = {"prompt_tuning_init": "TEXT"}


def made(library: Any, name: str, fields: dict[str, Any]) -> Any:
    return getattr(library, name)(**{**NEEDED.get(name, {}), **fields})


def result(library: Any, name: str, fields: dict[str, Any]) -> tuple[Any, str, list[str]]:
    """The builtin error that a configuration is refused with, its first line, and the warnings."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            made(library, name, fields)
            kind, text = None, ""
        except Exception as error:
            kind, text = (
                next(k for k in (ValueError, TypeError, KeyError) if isinstance(error, k)),
                str(error).replace("PeftType.", ""),
            )
    return kind, text.splitlines()[0][:60] if text else "", sorted(str(each.message)[:50] for each in record)


LAYERED = [name for name in KINDS if {"layers_to_transform", "target_modules"} <= {
    field.name for field in dataclasses.fields(getattr(ours, name))}]  # fmt: skip
OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"target_parameters": "a"}),
    ("LoraConfig", {"lora_bias": True, "use_dora": True}),
    *(("LoraConfig", {"lora_bias": True, "init_lora_weights": start})
      for start in (True, False, "gaussian", "pissa", "olora", "orthogonal")),
    ("LoraConfig", {"use_dora": True, "megatron_config": {"a": 1}}),
    ("LoraConfig", {"init_lora_weights": "loftq"}),
    ("LoraConfig", {"loftq_config": {"loftq_bits": 4}}),
    ("LoraConfig", {"alora_invocation_tokens": [1]}),
    ("LoraConfig", {"init_lora_weights": "eva"}), ("LoraConfig", {"init_lora_weights": "corda"}),
    ("LoraConfig", {"kasa_config": 3}), ("LoraConfig", {"eva_config": "a"}), ("LoraConfig", {"use_bdlora": [1]}),
    ("LoraConfig", {"no_such_field": 1}),
    ("AdaLoraConfig", {"total_step": None}), ("AdaLoraConfig", {"total_step": 0}), ("AdaLoraConfig", {"r": 3}),
    ("AdaLoraConfig", {"use_dora": True}), ("AdaLoraConfig", {"orth_reg_weight": -1.0}),
    ("AdaLoraConfig", {"tinit": 6, "tfinal": 4}), ("AdaLoraConfig", {"tinit": 5, "tfinal": 4}),
    ("AdaLoraConfig", {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}),
    ("IA3Config", {"target_modules": ["k"], "feedforward_modules": ["q"]}),
    ("IA3Config", {"target_modules": ["k", "q"], "feedforward_modules": ["q"]}),
    ("IA3Config", {"target_modules": "k", "feedforward_modules": "q"}),
    ("OFTConfig", {"r": 2}), ("OFTConfig", {"oft_block_size": 0}), ("OFTConfig", {"r": 2, "oft_block_size": 0}),
    ("BOFTConfig", {"boft_block_num": 2}), ("BOFTConfig", {"boft_block_size": 0}),
    ("RoadConfig", {"variant": "road_3"}), ("RoadConfig", {"group_size": 3}), ("RoadConfig", {"group_size": 0}),
    ("PromptTuningConfig", TEXT), ("PromptTuningConfig", {**TEXT, "tokenizer_name_or_path": "a"}),
    ("PromptTuningConfig", {"tokenizer_kwargs": {"a": 1}}),
    ("MultitaskPromptTuningConfig", TEXT),
]  # fmt: skip


@pytest.mark.parametrize("name", LAYERED)
@pytest.mark.parametrize("targets", ["a", ["a"], None])
@pytest.mark.parametrize("layers", [{"layers_to_transform": [0]}, {"layers_pattern": "b"}, {}])
def test_layers_beside_targets(name: str, targets: Any, layers: dict[str, Any]) -> None:
    fields = {"target_modules": targets, **layers}
    assert result(ours, name, fields) == result(peft, name, fields)


@pytest.mark.parametrize(("name", "fields"), OTHERS, ids=lambda value: str(value))
def test_fields_are_refused_as_in_peft(name: str, fields: dict[str, Any]) -> None:
    mine, theirs = result(ours, name, fields), result(peft, name, fields)
    if theirs[0] is TypeError and "no_such_field" in fields:  # Python's own words, with the name of the class
        assert mine[0] is TypeError
    elif "lora_bias" in fields or "r" in fields or "boft_block_num" in fields:  # which name values, further on
        assert mine[0] is theirs[0] and mine[1][:40] == theirs[1][:40] and mine[2] == theirs[2]
    else:
        assert mine == theirs


@pytest.mark.parametrize("name", KINDS)
def test_task_types_are_checked(name: str) -> None:
    assert result(ours, name, {"task_type": "SEQ_CSL"}) == result(peft, name, {"task_type": "SEQ_CSL"})
    assert result(ours, name, {"task_type": "SEQ_CLS"}) == result(peft, name, {"task_type": "SEQ_CLS"})


@pytest.mark.parametrize("name", KINDS)
def test_a_configuration_passes_for_pefts(name: str, tmp_path: Path) -> None:
    config = made(ours, name, {})
    assert isinstance(config, getattr(peft, name)) and isinstance(config, peft.PeftConfig)
    assert isinstance(config, getattr(ours, name)) and type(config) is getattr(ours, name)
    assert not isinstance(config, peft.XLoraConfig)
    for copied in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(copied) is type(config) and copied == config and copied is not config
    again = config.__class__(**NEEDED.get(name, {}))
    assert again == config and isinstance(again, getattr(ours, name)) and copy.copy(again) == config
    assert dataclasses.replace(config, inference_mode=True).inference_mode
    assert repr(config).startswith(f"{name}(")
    config.save_pretrained(tmp_path)
    read = ours.PeftConfig.from_pretrained(tmp_path)
    assert read == config and type(read) is type(config)


def test_without_peft_a_configuration_is_its_own() -> None:
    code = """
import sys
from surgery.peft import LoraConfig
config = LoraConfig(r=2)
assert "peft" not in sys.modules and config.__class__ is LoraConfig
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_configurations_by_their_type(tmp_path: Path) -> None:
    for library in (ours, peft):
        config = library.PeftConfig.from_peft_type(peft_type="LORA", r=3)
        assert type(config) is library.LoraConfig and config.r == 3
        with pytest.raises(KeyError, match="LORRA"):
            library.PeftConfig.from_peft_type(peft_type="LORRA")
        with pytest.raises(TypeError, match="missing required keys"):
            library.LoraConfig.from_peft_type(of_tomorrow=1)
        with pytest.warns(UserWarning, match="Unexpected keyword arguments \\['of_tomorrow'\\] for class LoraConfig"):
            library.PeftConfig.from_peft_type(peft_type="LORA", of_tomorrow=None)
        config.save_pretrained(tmp_path)
        data = library.LoraConfig.from_json_file(tmp_path / "adapter_config.json")
        assert data["r"] == 3 and isinstance(data, dict)
        (tmp_path / "adapter_config.json").write_text(json.dumps({**data, "runtime_config": {}}))
        with pytest.warns(UserWarning, match="contains a `runtime_config` key"):
            assert library.PeftConfig.from_pretrained(tmp_path).r == 3
        with pytest.raises(ValueError, match="Can't find 'adapter_config.json'"):
            library.PeftConfig.from_pretrained(tmp_path / "none" if library is peft else tmp_path.parent)
        with pytest.raises(AssertionError, match="should be a directory"):
            config.save_pretrained(tmp_path / "adapter_config.json")


def test_errors_are_of_both_families() -> None:
    with pytest.raises(SurgeryError) as caught:
        ours.OFTConfig(r=2)
    copied = pickle.loads(pickle.dumps(caught.value))
    assert isinstance(copied, ValueError) and type(copied) is type(caught.value) and str(copied) == str(caught.value)
    with pytest.warns(SurgeryWarning, match="Note that `r` is not used"):
        ours.AdaLoraConfig(r=3, total_step=10)
