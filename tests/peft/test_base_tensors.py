"""A state dict under PEFT's keys with tensors of the base: they go into the base, as in PEFT."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from surgery import LoadError, SurgeryError
from tests.support.peers import peft

METHODS = {
    "Lora": {"r": 4}, "OFT": {"oft_block_size": 2}, "BOFT": {"boft_block_size": 2}, "HRA": {"r": 2},
    "Miss": {"r": 2}, "FourierFT": {"n_frequency": 5}, "C3A": {"block_size": 2}, "Vera": {"r": 2},
    "RandLora": {"r": 2},
}  # fmt: skip


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.second(self.first(inputs).tanh())


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(10, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> None:
        return None


def made(package: Any, method: str, bias: str, base: nn.Module) -> Any:
    config = getattr(package, f"{method}Config")
    fields = {**METHODS[method], "target_modules": ["first"], "bias": bias}
    return package.get_peft_model(copy.deepcopy(base), config(**fields)).eval()


def trained(method: str, bias: str, base: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    """PEFT's state dict of a model with trained biases, and the model's output."""
    model = made(peft, method, bias, base)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 4)
    return peft.get_peft_model_state_dict(model), model(INPUTS)


INPUTS = torch.randn(3, 8)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("bias", ["all", "only"])
@pytest.mark.parametrize("method", METHODS)
def test_trained_biases_go_into_the_base(method: str, bias: str) -> None:
    torch.manual_seed(0)
    base = Base()
    bias = f"{getattr(peft.PeftType, method.upper()).value.lower()}_only" if bias == "only" else bias
    state, expected = trained(method, bias, base)
    mine = made(ours, method, "none", base)
    plain = {key for key in state if key.endswith("bias")}
    result = ours.set_peft_model_state_dict(mine, state)
    assert result.unexpected_keys == []
    torch.testing.assert_close(mine(INPUTS), expected)
    biases = [key.removeprefix("base_model.model.").replace(".base_layer", "") for key in sorted(plain)]
    assert biases == (["first.bias", "second.bias"] if bias == "all" else ["first.bias"])
    own = ours.get_base_model_state_dict(mine)
    for name, key in zip(biases, sorted(plain), strict=True):
        assert torch.equal(own[name], state[key])
    assert torch.equal(own["first.weight"], base.get_parameter("first.weight"))
    copies = made(ours, method, bias, base)  # an adapter with copies of its own leaves the base as it was
    assert ours.set_peft_model_state_dict(copies, state) == ([], [])
    torch.testing.assert_close(copies(INPUTS), expected)
    own = ours.get_base_model_state_dict(copies)
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in own.items())


def test_an_error_leaves_adapter_and_base_unchanged() -> None:
    torch.manual_seed(0)
    base = Base()
    state, _ = trained("Lora", "all", base)
    mine = made(ours, "Lora", "none", base)
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    with pytest.raises(SurgeryError, match="second.bias does not fit") as error:
        ours.set_peft_model_state_dict(mine, {**state, "base_model.model.second.bias": torch.zeros(3)})
    assert isinstance(error.value, RuntimeError) and not isinstance(error.value, LoadError)
    mine.merge_adapter()
    with pytest.raises(SurgeryError, match="the model is merged") as error:
        ours.set_peft_model_state_dict(mine, state)
    assert isinstance(error.value, RuntimeError)
    mine.unmerge_adapter()
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())
    mine.add_adapter("other", ours.LoraConfig(r=4, target_modules=["first"]))
    mine.merge_adapter(["other"])
    with pytest.raises(SurgeryError, match="while other are merged"):
        ours.set_peft_model_state_dict(mine, state)
    mine.unmerge_adapter()
    mine.delete_adapter("other")
    assert all(torch.equal(tensor, before[name]) for name, tensor in mine.state_dict().items())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_saved_embeddings_go_into_the_base() -> None:
    torch.manual_seed(0)
    base: Any = Words()
    config = {"r": 2, "target_modules": ["embed_tokens"]}
    theirs: Any = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config, init_lora_weights=False)).eval()
    with torch.no_grad():
        theirs.base_model.model.embed_tokens.base_layer.weight.mul_(2)
    mine: Any = ours.get_peft_model(copy.deepcopy(base), ours.LoraConfig(**config)).eval()
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=True)
    assert "base_model.model.embed_tokens.base_layer.weight" in state
    assert ours.set_peft_model_state_dict(mine, state) == ([], [])
    tokens = torch.arange(10)
    torch.testing.assert_close(mine.embed_tokens(tokens), theirs.embed_tokens(tokens))
