"""Merges into quantised weights beside PEFT: what it loses without a word, and what the façade does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import SurgeryWarning, apply_rules, merge, unmerge
from surgery import peft as ours
from surgery.packed.packed_weight import packed_weight_of
from surgery.rules import LoraRule
from tests.support.peers import peft
from tests.support.quantised import BY_NAME

pytest.importorskip("bitsandbytes")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.m: Any = BY_NAME["bitsandbytes Linear4bit nf4"].build(nn.Linear(128, 128, bias=False))

    def forward(self, x: Tensor) -> Any:
        return self.m(x)


def shrink(tensors: Any, size: float) -> None:
    """Make ΔW as small beside W as trained adapters usually are: 3 %."""
    with torch.no_grad():
        for name, parameter in tensors:
            if ".B" in name or "lora_B" in name:
                parameter.copy_(torch.randn_like(parameter) * size)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("quiet")
def test_peft_loses_a_change_in_a_four_bit_merge_and_does_not_unmerge_it() -> None:
    base: Any = Net()
    base.is_loaded_in_4bit = True  # as transformers says, and PEFT reads
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=["m"]))
    shrink(model.named_parameters(), 5e-3)
    layer: Any = model.base_model.model.m
    before = packed_weight_of(layer.base_layer).dequantise()  # type: ignore[union-attr]
    delta = layer.get_delta_weight("default").detach()
    assert 0.005 < delta.norm() / before.norm() < 0.1
    model.merge_adapter()
    merged = packed_weight_of(layer.base_layer).dequantise()  # type: ignore[union-attr]
    assert (merged - before - delta).norm() > 0.9 * delta.norm()  # nearly all of ΔW is rounded away
    model.unmerge_adapter()
    assert not torch.equal(packed_weight_of(layer.base_layer).dequantise(), before)  # type: ignore[union-attr]

    mine: Any = apply_rules(Net(), LoraRule("m", rank=4))
    shrink(mine.named_parameters(), 5e-3)
    x = torch.randn(3, 128)
    live, codes = mine(x), mine.m.weight.clone()
    merge(mine, quantised="dequantise")
    torch.testing.assert_close(mine(x), live, rtol=1e-4, atol=1e-5)
    unmerge(mine)
    assert torch.equal(mine.m.weight, codes) and torch.equal(mine(x), live)


def test_the_facade_merges_into_plain_linears_and_says_so() -> None:
    base: Any = Net()
    model = ours.get_peft_model(base, ours.LoraConfig(r=4, target_modules=["m"]))
    shrink(model.named_parameters(), 5e-4)
    x = torch.randn(3, 128)
    live, codes = model(x), base.m.weight.clone()
    with pytest.warns(SurgeryWarning, match="are plain Linears while") as caught:
        model.merge_adapter()
    assert caught[0].filename == __file__
    torch.testing.assert_close(model(x), live, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(base.m.weight, codes) and torch.equal(model(x), live)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)
        plain = model.merge_and_unload()
    assert plain is base and type(plain.m) is nn.Linear
    torch.testing.assert_close(plain(x), live, rtol=1e-4, atol=1e-5)


def test_the_facade_requantises_if_told() -> None:
    base: Any = Net()
    kind, codes = type(base.m), base.m.weight.clone()
    model = ours.get_peft_model(base, ours.LoraConfig(r=4, target_modules=["m"]))
    shrink(model.named_parameters(), 0.05)
    model.merge_adapter(quantised="requantise", limit=None)
    assert not torch.equal(base.m.weight, codes)
    model.unmerge_adapter()
    assert torch.equal(base.m.weight, codes)
    assert type(model.merge_and_unload(quantised="requantise", limit=None).m) is kind


def test_what_the_facade_merged_is_saved_as_a_plain_model(tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    torch.manual_seed(0)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=60))
    plain.save_pretrained(tmp_path / "base")
    load = transformers.LlamaForCausalLM.from_pretrained
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    asked = config.to_dict()
    ids = torch.randint(0, 60, (2, 7))
    for targets in ("all-linear", ["q_proj"]):
        base = load(tmp_path / "base", quantization_config=config, device_map="cpu").eval()
        model = ours.get_peft_model(base, ours.LoraConfig(r=4, target_modules=targets))
        shrink(model.named_parameters(), 0.05)
        live = model(ids).logits
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SurgeryWarning)
            merged = model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        again = load(tmp_path / "merged", device_map="cpu").eval()
        assert (getattr(again.config, "quantization_config", None) is None) == (targets == "all-linear")
        assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
        torch.testing.assert_close(again(ids).logits, live, rtol=1e-3, atol=1e-4)
        assert config.to_dict() == asked  # the caller's own object
