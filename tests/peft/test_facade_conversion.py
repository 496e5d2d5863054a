"""`convert_to_lora`, `save_as_lora` and `replace_lora_weights_loftq` of the façade, beside PEFT's."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery.peft as facade
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.packed.packed_weight import packed_weight_of

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT reads it

IDS = torch.arange(8)[None]
TARGETS = ["q_proj", "down_proj"]


def llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval()  # type: ignore[arg-type]


def pair(method: str, **fields: Any) -> tuple[Any, Any]:
    """A model of PEFT and a façade with the same adapter of another method."""
    torch.manual_seed(1)
    theirs = peft.get_peft_model(llama(), getattr(peft, method)(target_modules=TARGETS, **fields))
    ours = facade.get_peft_model(llama(), getattr(facade, method)(target_modules=TARGETS, **fields))
    facade.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def product(tensors: dict[str, Tensor], key: str) -> Tensor:
    return tensors[key] @ tensors[key.replace("lora_B", "lora_A")]


@pytest.mark.parametrize("rank", [4, 0.8, 1.0])
@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig"])
def test_a_conversion_is_pefts(method: str, rank: float) -> None:
    theirs, ours = pair(method, r=4, init_weights=False)
    config, tensors = peft.convert_to_lora(theirs, rank)
    own_config, own_tensors = facade.convert_to_lora(ours, rank)
    if rank != 1.0:  # where the last singular values are rounding errors, ranks may differ
        assert own_tensors.keys() == tensors.keys()
        assert {k: t.shape for k, t in own_tensors.items()} == {k: t.shape for k, t in tensors.items()}
        assert own_config.rank_pattern == config.rank_pattern and own_config.alpha_pattern == config.alpha_pattern
        assert (own_config.r, own_config.lora_alpha) == (config.r, config.lora_alpha)
    assert own_config.target_modules == config.target_modules or rank == 1.0
    near = (
        1e-3 if rank == 1.0 else 1e-5
    )  # PEFT adds up squares in float32, and then leaves out what is below their rounding
    for key in (key for key in tensors if "lora_B" in key):
        expected, got = product(tensors, key), product(own_tensors, key)
        assert torch.allclose(got, expected, atol=near * float(expected.abs().max()))


def test_the_converted_adapter_in_peft_and_here(tmp_path: Path) -> None:
    _, ours = pair("LoHaConfig", r=2, init_weights=False)
    before = ours(IDS).logits
    facade.save_as_lora(tmp_path, ours, rank=16)
    assert torch.equal(ours(IDS).logits, before) and list(ours.peft_config) == ["default"]
    theirs = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    again = facade.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(theirs(IDS).logits, before, atol=1e-5)
    assert torch.allclose(again(IDS).logits, before, atol=1e-5)


def test_what_peft_does_not_convert_and_what_can_not_be() -> None:
    ours = facade.get_peft_model(
        llama(), facade.OFTConfig(target_modules=TARGETS, oft_block_size=4, init_weights=False)
    )
    assert ours.supports_lora_conversion()
    _, tensors = facade.convert_to_lora(ours, 0.999)
    assert len(tensors) == 8
    prefix = facade.get_peft_model(llama(), facade.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    assert not prefix.supports_lora_conversion()
    for model in (prefix, llama()):
        with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
            facade.convert_to_lora(model, 4)
    for rank, text in {
        0: "Passing a rank of 0",
        1.5: "between 0 and 1 but got 1.5",
        99: "larger than the weight shape",
    }.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            facade.convert_to_lora(ours, rank)
    with pytest.raises(ValueError, match="no adapter 'b'"):
        facade.convert_to_lora(ours, 4, "b")
    lora = facade.get_peft_model(llama(), facade.LoraConfig(target_modules=TARGETS, init_lora_weights=False))
    with pytest.warns(SurgeryWarning, match="already a LoRA adapter"):
        facade.convert_to_lora(lora, 4)


# LoftQ ----------------------------------------------------------------------------------------------------------


def quantised(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    bitsandbytes: Any = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    save_file(net.state_dict(), folder / "model.safetensors")
    values = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for index in (0, 2):
        linear: Any = net[index]
        new = bitsandbytes.nn.Linear4bit(linear.in_features, linear.out_features, quant_type="nf4")
        new.load_state_dict(linear.state_dict())
        net[index] = new.to("cpu")
    return net, values


def errors(model: Any, values: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """‖W − Q‖ and ‖W − (Q + s B A)‖ of each weight."""
    found = {}
    for index in ("0", "2"):
        site = model.get_base_model().get_submodule(index)
        packed: Any = packed_weight_of(site)
        box, weight, q = site.adapters.default, values[f"{index}.weight"], packed.dequantise().float()
        found[index] = float((weight - q).norm()), float((weight - q - 2.0 * (box.B @ box.A).detach()).norm())
    return found


CONFIG = {"r": 8, "lora_alpha": 16, "target_modules": ["0", "2"]}


def test_loftq_takes_the_error_of_quantising_in(tmp_path: Path) -> None:
    net, values = quantised(tmp_path)
    model = facade.get_peft_model(net, facade.LoraConfig(**CONFIG))
    facade.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
    for index, (alone, left) in errors(model, values).items():
        q = packed_weight_of(net[int(index)]).dequantise().float()  # type: ignore[union-attr]
        singular = torch.linalg.svdvals(values[f"{index}.weight"] - q)
        assert left < alone and left == pytest.approx(float(singular[8:].norm()), rel=1e-4)  # the best of its rank


def test_a_callback_of_loftq(tmp_path: Path) -> None:
    net, values = quantised(tmp_path)
    model = facade.get_peft_model(net, facade.LoraConfig(**CONFIG))
    before = copy.deepcopy(model.state_dict())
    seen: list[str] = []

    def keep(given: Any, name: str) -> bool:
        assert given is model
        seen.append(name)
        return name == "2"

    facade.replace_lora_weights_loftq(model, tmp_path, callback=keep)
    left = errors(model, values)
    assert seen == ["0", "2"] and left["0"][0] == left["0"][1] and left["2"][1] < left["2"][0]

    def fail(given: Any, name: str) -> bool:
        raise OSError("stop")

    after = copy.deepcopy(model.state_dict())
    with pytest.raises(OSError, match="stop"):
        facade.replace_lora_weights_loftq(model, tmp_path, callback=fail)
    assert all(torch.equal(tensor, after[key]) for key, tensor in model.state_dict().items() if "adapters" in key)
    assert before.keys() == after.keys()


def test_loftq_without_quantised_weights_or_files(tmp_path: Path) -> None:
    plain = facade.get_peft_model(nn.Sequential(nn.Linear(8, 8)), facade.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="No bnb LoRA module found on the model"):
        facade.replace_lora_weights_loftq(plain, tmp_path)
    net, _ = quantised(tmp_path)
    model = facade.get_peft_model(net, facade.LoraConfig(**CONFIG))
    with pytest.raises(ValueError, match="you must pass the model_path argument"):
        facade.replace_lora_weights_loftq(model)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(SurgeryError, match="LoftQ's values can't be computed"):
        facade.replace_lora_weights_loftq(model, tmp_path)
