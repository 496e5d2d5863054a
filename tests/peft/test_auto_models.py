"""Classes that load the base with its adapter, and calls and keys as PEFT has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery.peft as ours
from surgery import SurgeryError
from surgery.rules import task_of
from tests.support import tiny
from tests.support.peers import peft

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT asks for it


@pytest.fixture
def base(tmp_path: Path) -> Any:
    """A decoder that is loaded from a folder, whose name its configuration has."""
    model: Any = tiny.llama(layers=1)[0]
    model.save_pretrained(tmp_path / "base")
    return type(model).from_pretrained(tmp_path / "base").eval()


def saved(base: Any, folder: Path, **fields: Any) -> Path:
    config = ours.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, **fields)
    ours.get_peft_model(base, config).save_pretrained(folder)
    return folder


def change_mapping(folder: Path, mapping: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_mapping": mapping}))


def test_a_configuration_without_a_task_names_the_bases_class(base: Any, tmp_path: Path) -> None:
    folder, ids = saved(base, tmp_path / "adapter"), torch.arange(4)[None]
    expected = base(ids).logits
    for library in (ours, peft):
        read: Any = library.AutoPeftModel.from_pretrained(folder)
        torch.testing.assert_close(read(ids).logits, expected)
    assert isinstance(ours.AutoPeftModel.from_pretrained(folder), type(base))
    causal = ours.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert issubclass(type(causal), ours.PeftModelForCausalLM)


@pytest.mark.parametrize("library", ["os", "transformers_of_others", "torch.nn"])
def test_a_class_of_a_library_that_is_not_trusted_is_refused(base: Any, tmp_path: Path, library: str) -> None:
    folder = saved(base, tmp_path / "adapter")
    change_mapping(folder, {"parent_library": library, "base_model_class": "system"})
    for package in (ours, peft):
        for kind in ("AutoPeftModel", "AutoPeftModelForCausalLM"):
            with pytest.raises(ValueError, match=f"wants to import '{library}' which is not in the import allowlist"):
                getattr(package, kind).from_pretrained(folder)


def test_a_library_may_be_allowed(base: Any, tmp_path: Path) -> None:
    folder, kind = saved(base, tmp_path / "adapter"), type(base)
    with pytest.raises(ValueError, match="not in the import allowlist"):
        ours.AutoPeftModel.from_pretrained(folder, import_allowlist=[])
    assert isinstance(ours.AutoPeftModel.from_pretrained(folder, import_allowlist=[kind.__module__]), kind)


def test_a_class_for_another_task_is_refused(base: Any, tmp_path: Path) -> None:
    folder = saved(base, tmp_path / "adapter", task_type="CAUSAL_LM")
    for library in (ours, peft):
        with pytest.raises(ValueError, match="Expected target PEFT class: PeftModelForCausalLM"):
            library.AutoPeftModelForSequenceClassification.from_pretrained(folder)
        with pytest.raises(ValueError, match="with a task type, please use a specific class"):
            library.AutoPeftModel.from_pretrained(folder)
    change_mapping(saved(base_again(base), tmp_path / "bare"), None)
    with pytest.raises(ValueError, match="Cannot infer the auto class"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "bare")


def base_again(base: Any) -> Any:
    return type(base).from_pretrained(base.config._name_or_path).eval()


@pytest.mark.filterwarnings("ignore")  # transformers tells about new rows
def test_embeddings_grow_to_the_tokenizer_beside_the_adapter(base: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    rows = len(base.get_input_embeddings().weight)
    words = {f"w{number}": number for number in range(rows + 3)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="w0")
    base.resize_token_embeddings(rows + 3)
    folder = saved(base, tmp_path / "adapter", task_type="CAUSAL_LM")
    tokenizer.save_pretrained(folder)
    for library in (ours, peft):
        read: Any = library.AutoPeftModelForCausalLM.from_pretrained(folder)
        assert len(read.get_input_embeddings().weight) == rows + 3


# Keys ---------------------------------------------------------------------------------------------------------------


def test_keys_of_a_model_without_a_facade_have_no_prefix() -> None:
    states = []
    for library in (peft, ours):
        model = nn.Sequential(nn.Linear(8, 8))
        library.inject_adapter_in_model(library.LoraConfig(r=2, target_modules=["0"]), model)
        state = library.get_peft_model_state_dict(model)
        tripled = {key: torch.full_like(tensor, 3) for key, tensor in state.items()}
        result = library.set_peft_model_state_dict(model, {**tripled, "1.lora_A.weight": torch.ones(2, 8)})
        assert not [key for key in result.missing_keys if "lora" in key], library
        assert list(result.unexpected_keys) and all("1.lora_A" in key for key in result.unexpected_keys)
        again = library.get_peft_model_state_dict(model)
        assert all(torch.equal(again[key], tripled[key]) for key in state), library
        states.append(list(state))
    assert states[0] == states[1] == ["0.lora_A.weight", "0.lora_B.weight"]


def test_both_spellings_of_the_keys_are_taken() -> None:
    faced = ours.get_peft_model(nn.Sequential(nn.Linear(8, 8)), ours.LoraConfig(r=2, target_modules=["0"]))
    state = ours.get_peft_model_state_dict(faced)
    model = ours.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(8, 8)))
    assert ours.set_peft_model_state_dict(model, state) == ([], [])
    inner = ours.get_peft_model_state_dict(faced.get_base_model())
    assert list(inner) == [key.removeprefix("base_model.model.") for key in state]


def test_tensors_that_transformers_put_on_a_model_are_read_by_peft(base: Any) -> None:
    base.add_adapter(ours.LoraConfig(r=2, target_modules=["q_proj"]))
    state = ours.get_peft_model_state_dict(base)
    expected = peft.get_peft_model_state_dict(base, adapter_name="default")
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    config = ours.LoraConfig(r=2, target_modules=["q_proj"])
    model = ours.inject_adapter_in_model(config, base_again(base), state_dict=state)
    assert list(ours.get_peft_model_state_dict(model)) == list(state)


# Tasks --------------------------------------------------------------------------------------------------------------


def test_calls_take_the_tasks_of_their_rows(base: Any) -> None:
    config = ours.MultitaskPromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=3, prompt_tuning_init="RANDOM"
    )
    model: Any = ours.get_peft_model(base, config).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if ".adapters." in name:
                tensor.copy_(torch.randn_like(tensor))
    ids, tasks = torch.arange(8).reshape(2, 4), torch.tensor([2, 0])
    mask = torch.ones_like(ids)
    with task_of(tasks):
        expected = base(ids, mask).logits
        written = base.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(model(ids, mask, task_ids=tasks).logits, expected)
    assert torch.equal(model.forward(ids, mask, task_ids=tasks).logits, expected)
    found = model.generate(input_ids=ids, attention_mask=mask, task_ids=tasks, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, written)
    assert not torch.equal(model(ids, mask, task_ids=tasks.flip(0)).logits, expected)
    for call, more in ((model, {}), (model.forward, {}), (model.generate, {"max_new_tokens": 2})):
        with pytest.raises(ValueError, match="names no task") as error:
            call(input_ids=ids, attention_mask=mask, **more)
        assert isinstance(error.value, SurgeryError)
    with model.disable_adapter():
        assert model(ids, mask, task_ids=tasks).logits.shape == (2, 4, base.config.vocab_size)


# Configurations ------------------------------------------------------------------------------------------------------


def test_a_prompt_that_started_from_a_text_is_read_again(base: Any, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="a").save_pretrained(tmp_path / "words")
    config = ours.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init="TEXT", prompt_tuning_init_text="b",
        tokenizer_name_or_path=str(tmp_path / "words"), tokenizer_kwargs={"padding_side": "left"},
    )  # fmt: skip
    adapted: Any = ours.get_peft_model(base, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    for library in (ours, peft):
        again = library.PeftConfig.from_pretrained(tmp_path / "adapter")
        start = getattr(again.prompt_tuning_init, "value", again.prompt_tuning_init)
        assert (start, again.tokenizer_kwargs) == ("TEXT", {"padding_side": "left"})
    read: Any = ours.PeftModel.from_pretrained(base_again(base), tmp_path / "adapter")
    ids = torch.arange(4)[None]
    assert torch.equal(read(ids).logits, adapted(ids).logits)
