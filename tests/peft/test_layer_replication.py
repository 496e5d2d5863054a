"""`layer_replication`: layers that are repeated with their weights below adapters of their own, beside PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import surgery
import surgery.peft as ours
from surgery import SurgeryError, rules_of, save_adapter
from surgery.rules import DropRule, LoraRule, RepeatRule
from surgery.testing import Snapshot
from tests.support.facade_models import same_adapters
from tests.support.peers import peft, transformers

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")  # in PEFT

CLOSE: dict[str, Any] = {"atol": 1e-6, "rtol": 1e-5}  # PEFT adds the change of LoRA to the output in another order
IDS = torch.tensor([[3, 4, 5, 6, 7]])
RANGES = [[0, 2], [1, 3]]
FIELDS: dict[str, Any] = {"r": 2, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
REPEATED = {**FIELDS, "layer_replication": RANGES}


def llama() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=16)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def pair(ranges: Any = RANGES) -> tuple[Any, Any]:
    """PEFT's model and ours, with the same tensors, which are not those of the start."""
    fields = {**REPEATED, "layer_replication": ranges, "init_lora_weights": False}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(**fields))
    mine = ours.get_peft_model(llama(), ours.LoraConfig(**fields))
    same_adapters(theirs, mine)
    return theirs, mine


def step(model: Any) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


@pytest.mark.parametrize("ranges", [RANGES, [[1, 3]]], ids=["deeper", "shallower"])
def test_it_computes_and_trains_as_pefts(ranges: Any) -> None:
    theirs, mine = pair(ranges)
    count = sum(end - start for start, end in ranges)
    assert len(mine.model.layers) == mine.config.num_hidden_layers == count
    assert [layer.self_attn.layer_idx for layer in mine.model.layers] == [*range(count)]
    assert sum(p.requires_grad for p in mine.parameters()) == sum(p.requires_grad for p in theirs.parameters())
    assert torch.allclose(logits(mine), logits(theirs), **CLOSE)
    settings = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(mine.generate(input_ids=IDS, **settings), theirs.generate(input_ids=IDS, **settings))
    before = logits(mine)
    step(mine)
    step(theirs)
    assert torch.allclose(logits(mine), logits(theirs), **CLOSE) and not torch.equal(logits(mine), before)


def test_copies_share_the_weights_of_the_base_and_have_adapters_of_their_own() -> None:
    base = llama()
    before, size = Snapshot(base), base.num_parameters()
    mine = ours.get_peft_model(base, ours.LoraConfig(**REPEATED))
    first, second = mine.model.layers[1].self_attn.q_proj, mine.model.layers[2].self_attn.q_proj
    assert first.weight is second.weight and first.adapters.default.A is not second.adapters.default.A
    assert mine.num_parameters() == size + 4 * 2 * (8 + 8)
    assert mine.unload() is base and not before.differences(base)


def test_files_go_both_ways(tmp_path: Path) -> None:
    theirs, mine = pair()
    mine.save_pretrained(tmp_path / "mine")
    theirs.save_pretrained(tmp_path / "theirs")
    for name in ("mine", "theirs"):
        assert json.loads((tmp_path / name / "adapter_config.json").read_text())["layer_replication"] == RANGES
        for library in (ours, peft):
            loaded = library.PeftModel.from_pretrained(llama(), tmp_path / name)
            assert torch.allclose(logits(loaded), logits(theirs), **CLOSE), (name, library)
    model = llama()
    surgery.load_adapter(model, tmp_path / "theirs")
    assert torch.equal(logits(model), logits(mine))
    rules = rules_of(model)
    assert rules[0] == RepeatRule("model.layers", order=[0, 1, 1, 2], shared=True) and len(rules) == 2


def test_a_second_adapter_is_on_the_layers_that_are_repeated_already(tmp_path: Path) -> None:
    _, mine = pair()
    expected = logits(mine)
    save_adapter(mine.get_base_model(), tmp_path / "first")
    mine.load_adapter(tmp_path / "first", "second")
    mine.add_adapter("third", ours.LoraConfig(**REPEATED))
    assert len(mine.model.layers) == 4
    mine.set_adapter("second")
    assert torch.equal(logits(mine), expected)
    surgery.hotswap(mine.get_base_model(), "second", tmp_path / "first")
    save_adapter(mine.get_base_model(), tmp_path / "second", "second")
    surgery.load_adapter(alone := llama(), tmp_path / "second")  # its file has the repetition, too
    assert torch.equal(logits(alone), expected)
    reports = surgery.load_adapters(model := llama(), tmp_path, live="second")
    assert len(reports) == 2 and torch.equal(logits(model), expected)
    before = Snapshot(mine.get_base_model())
    with pytest.raises(SurgeryError, match="tensors on a layer that would go"):
        mine.delete_adapter("default")
    assert not before.differences(mine.get_base_model())


def test_merged_it_is_a_deeper_plain_model(tmp_path: Path) -> None:
    _, mine = pair()
    expected = logits(mine)
    merged = mine.merge_and_unload()
    assert type(merged) is transformers.LlamaForCausalLM and len(merged.model.layers) == 4
    assert torch.allclose(logits(merged), expected, **CLOSE)
    merged.save_pretrained(tmp_path)
    assert torch.allclose(logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path)), expected, **CLOSE)


def test_pefts_format_is_taken_where_it_holds_the_repetition(tmp_path: Path) -> None:
    for number, (rules, held) in enumerate(
        [
            ([RepeatRule("model.layers", times=2, shared=True), LoraRule("q_proj", rank=2)], True),
            ([RepeatRule("layers", order=[0, 2], shared=True), LoraRule("q_proj", rank=2)], True),
            ([RepeatRule("model.layers", times=2), LoraRule("q_proj", rank=2)], False),
            ([DropRule("model.layers.1"), LoraRule("q_proj", rank=2)], False),
        ]
    ):
        model = surgery.apply_rules(llama(), rules)
        folder = save_adapter(model, tmp_path / str(number))
        assert (folder / "adapter_config.json").exists() is held, rules
        surgery.load_adapter(again := llama(), folder)
        assert torch.equal(logits(again), logits(model))


def test_what_is_wrong_is_told() -> None:
    base = llama()
    before = Snapshot(base)
    wrong = [
        ([[0, 9]], "there is no layer 3"),
        ([[1, 1]], "no layer is left"),
        ("all", "not a list of pairs"),
        ([[0, 1, 2]], "not a list of pairs"),
    ]
    for ranges, text in wrong:
        with pytest.raises(SurgeryError, match=text):
            ours.get_peft_model(base, ours.LoraConfig(**{**FIELDS, "layer_replication": ranges}))
        assert not before.differences(base)
    other = torch.nn.Sequential(torch.nn.Linear(4, 4))
    with pytest.raises(SurgeryError, match="where PEFT looks for them"):
        ours.get_peft_model(other, ours.LoraConfig(target_modules=["0"], layer_replication=[(0, 1)]))
