"""PEFT's activated LoRA (`alora_invocation_tokens`), through the façade and in PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery.peft as ours
from surgery import SurgeryError
from tests.support.conformance import of_transformers
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words
MODELS = ["LlamaForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"]
SIZES: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
}
IDS = torch.tensor([[1, 3, 4, 5, 6, 7], [3, 4, 9, 3, 4, 2], [1, 2, 5, 6, 7, 8], [0, 0, 8, 3, 4, 1]])
MASK = (IDS != 0).long()
TEXT = {"input_ids": IDS, "attention_mask": MASK}
GENERATE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def base(name: str) -> Any:
    torch.manual_seed(0)
    return of_transformers(name, num_hidden_layers=2, **SIZES.get(name, {})).eval()


def config(library: Any, invocation: list[int] | None, **fields: Any) -> Any:
    fields = {"r": 4, "lora_alpha": 32, "init_lora_weights": False, "target_modules": "all-linear", **fields}
    return library.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=invocation, **fields)


def pair(name: str, folder: Path, train: bool = False, **fields: Any) -> tuple[Any, Any]:
    """PEFT's model and the façade with the same tensors."""
    torch.manual_seed(1)
    if name == "OPTForCausalLM":  # PEFT's aLoRA fails on its fc1, which sees all tokens in one axis
        fields["target_modules"] = ["q_proj", "v_proj"]
    peft.get_peft_model(base(name), config(peft, [3, 4], **fields)).save_pretrained(folder)
    both = (library.PeftModel.from_pretrained(base(name), folder, is_trainable=train) for library in (peft, ours))
    theirs, mine = both
    return theirs.train(train), mine.train(train)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_generated_tokens(name: str, tmp_path: Path) -> None:
    theirs, mine = pair(name, tmp_path)
    with torch.no_grad():
        assert torch.allclose(mine(**TEXT).logits, theirs(**TEXT).logits, atol=1e-6)
        assert torch.allclose(mine(**TEXT, logits_to_keep=2).logits, theirs(**TEXT, logits_to_keep=2).logits, atol=1e-6)
    assert torch.equal(mine.generate(**TEXT, **GENERATE), theirs.generate(**TEXT, **GENERATE))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_training_steps(name: str, reentrant: bool | None, tmp_path: Path) -> None:
    losses = []
    for model in pair(name, tmp_path, train=True, lora_bias=True):
        if reentrant is not None:
            model.prepare_model_for_gradient_checkpointing(model)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
        losses.append([])
        for _ in range(4):
            loss = model(**TEXT, labels=IDS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(float(loss))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and losses[0][0] - losses[0][-1] > 1e-3


class Embedded(torch.nn.Module):
    """A model that is not called with token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear = torch.nn.Embedding(10, 8), torch.nn.Linear(8, 8)

    def forward(self, X: torch.Tensor) -> torch.Tensor:
        return self.linear(self.embed(X))


def test_offsets_that_the_caller_knows(tmp_path: Path) -> None:
    theirs, mine = pair(MODELS[0], tmp_path)
    embeds, offsets = base(MODELS[0]).get_input_embeddings()(IDS), {"alora_offsets": [2, None, 6, 9]}
    with torch.no_grad():
        for call in ({"input_ids": IDS}, {"inputs_embeds": embeds}):
            assert torch.allclose(mine(**call, **offsets).logits, theirs(**call, **offsets).logits, atol=1e-6)
            assert torch.allclose(mine.forward(**call, **offsets).logits, theirs(**call, **offsets).logits, atol=1e-6)
    assert torch.equal(mine.generate(**TEXT, **offsets, **GENERATE), theirs.generate(**TEXT, **offsets, **GENERATE))
    with pytest.raises(ValueError, match="3 numbers for 4 rows"):
        mine(IDS, alora_offsets=[1, 2, 3])
    ids, outputs = torch.tensor([[0, 1, 2, 3]]), []
    for library in (peft, ours):
        torch.manual_seed(0)
        model = Embedded()
        settings = library.LoraConfig(target_modules=["linear"], alora_invocation_tokens=[2], init_lora_weights=False)
        torch.manual_seed(1)
        outputs.append(library.get_peft_model(model, settings).eval()(X=ids, alora_offsets=[2]))
    assert torch.allclose(outputs[1], outputs[0], atol=1e-6)


def test_rows_of_several_adapters(tmp_path: Path) -> None:
    configs = {"a": [3, 4], "b": [8], "c": None}
    torch.manual_seed(1)
    theirs = peft.get_peft_model(base(MODELS[0]), config(peft, configs["a"]), "a")
    for name in ("b", "c"):
        theirs.add_adapter(name, config(peft, configs[name]))
    theirs.eval().save_pretrained(tmp_path)
    mine = ours.PeftModel.from_pretrained(base(MODELS[0]), tmp_path / "a", "a")
    for name in ("b", "c"):
        mine.load_adapter(tmp_path / name, name)
    rows = {"adapter_names": ["c", "a", "__base__", "b"]}
    with torch.no_grad():
        assert torch.allclose(mine(**TEXT, **rows).logits, theirs(**TEXT, **rows).logits, atol=1e-6)
    assert torch.equal(mine.generate(**TEXT, **rows, **GENERATE), theirs.generate(**TEXT, **rows, **GENERATE))


def test_a_new_adapter_is_pefts(tmp_path: Path) -> None:
    """With the same random numbers; saved here, and loaded by PEFT."""
    outputs = []
    for library in (peft, ours):
        model = base(MODELS[0])
        torch.manual_seed(2)
        outputs.append(library.get_peft_model(model, config(library, [3, 4])).eval())
    outputs[1].save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["alora_invocation_tokens"] == [3, 4]
    again = peft.PeftModel.from_pretrained(base(MODELS[0]), tmp_path).eval()
    with torch.no_grad():
        expected = outputs[1](**TEXT).logits
        assert torch.allclose(outputs[0](**TEXT).logits, expected, atol=1e-6)
        assert torch.allclose(again(**TEXT).logits, expected, atol=1e-6)
        with outputs[1].disable_adapter():
            assert torch.equal(outputs[1](**TEXT).logits, base(MODELS[0])(**TEXT).logits)


def test_what_peft_refuses_too() -> None:
    for library in (peft, ours):
        model = library.get_peft_model(base(MODELS[0]), config(library, [3, 4]))
        with pytest.raises((NotImplementedError, SurgeryError)):
            model.merge_and_unload()
        with pytest.raises(ValueError):
            library.get_peft_model(base(MODELS[0]), config(library, [3], use_dora=True))
        with pytest.raises(ValueError):
            library.get_peft_model(base(MODELS[0]), config(library, [3], target_modules=["embed_tokens"]))
    with pytest.warns(UserWarning, match="only supported for CAUSAL_LM"):
        ours.LoraConfig(alora_invocation_tokens=[1])
