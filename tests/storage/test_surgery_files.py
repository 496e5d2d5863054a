"""`save_surgery` and `load_surgery`: all adapters of a model in their order, structural rules included."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import (
    LoadError,
    Rule,
    SurgeryError,
    SurgeryWarning,
    activate,
    active,
    adapter_state_dict,
    adapters,
    apply_rules,
    copy_adapter,
    deactivate,
    load_adapter,
    load_surgery,
    merge_to,
    remove,
    rule,
    save_adapter,
    save_surgery,
)
from surgery.rules import DropRule, LoraRule, ReorderRule, RepeatRule, ReplaceRule, TrainRule
from surgery.testing import Snapshot

IDS = torch.randint(0, 50, (2, 6), generator=torch.Generator().manual_seed(1))
SIZES: dict[str, Any] = dict(vocab_size=50, hidden_size=32, num_attention_heads=4, intermediate_size=64)


class Gate(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.gate = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.gate(x)) * x


@rule("test-double")
class DoubleRule(Rule):
    """A rule without tensors."""

    def rewrite(self, site: Any) -> Any:
        return site.output * 2


def llama(layers: int = 4, seed: int = 0, **settings: Any) -> Any:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **SIZES, **settings)).eval()


def lora(*targets: str, **fields: Any) -> LoraRule:
    return LoraRule(list(targets) or "q_proj", rank=2, init="random", **fields)


def again(model: Any, folder: Path, **options: Any) -> Any:
    """Save the surgery of a model and do it to its base, which comes back to the bit afterwards."""
    wanted = model(IDS).logits
    before = Snapshot(model)
    save_surgery(model, folder)
    assert before.differences(model) == []
    base = llama(seed=0)
    plain = Snapshot(base)
    assert load_surgery(base, folder, **options) is base
    assert torch.equal(base(IDS).logits, wanted) and active(base) == active(model)
    assert {name: a.sites for name, a in adapters(base).items()} == {n: a.sites for n, a in adapters(model).items()}
    for name in adapters(model):
        saved, read = adapter_state_dict(model, name), adapter_state_dict(base, name)
        assert saved.keys() == read.keys() and all(torch.equal(saved[key], read[key]) for key in saved)
    assert plain.differences(remove(base)) == []
    return load_surgery(base, folder, **options)


def test_rules_alone_are_some_hundred_bytes(tmp_path: Path) -> None:
    model = apply_rules(llama(), DropRule("model.layers.1"))
    again(model, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["surgery.json"]
    assert (tmp_path / "surgery.json").stat().st_size < 2000


def test_adapters_before_between_and_after_structures(tmp_path: Path) -> None:
    """Tensors have the names of the end, and those of layers that were taken out are there, too."""
    model = apply_rules(llama(), lora(layers=[0, 1, 3]), adapter="first")
    apply_rules(model, DropRule("model.layers.1"), adapter="cut")
    apply_rules(model, [lora("v_proj", layers=[1]), RepeatRule("model.layers", order=[0, 1, 1, 2])], adapter="deep")
    apply_rules(model, lora("o_proj", dropout=0.1), adapter="last")
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05 * torch.randn_like(parameter)
    other = again(model, tmp_path)
    for loaded in (model, other):
        remove(loaded, ["last", "deep", "cut"])
    assert len(other.model.layers) == 4
    assert torch.equal(other(IDS).logits, model(IDS).logits)  # the tensors on layer 1 came back


def test_idle_adapters_weights_and_heads_of_their_own(tmp_path: Path) -> None:
    model = apply_rules(llama(), ReorderRule("model.layers", order=[1, 0, 2, 3]), adapter="order")
    for name in ("news", "mail"):
        deactivate(model) if active(model) != ("order",) else None
        apply_rules(model, [lora(), TrainRule("lm_head")], adapter=name)
    apply_rules(model, lora("v_proj"), adapter="part")
    activate(model, ["order", "mail", "part"], weights={"part": 0.5})
    other = again(model, tmp_path)
    assert adapters(other)["part"].weight == 0.5 and not adapters(other)["news"].live


def test_a_module_in_the_place_of_another_needs_trust(tmp_path: Path) -> None:
    name = f"{__name__}.Gate"
    model = apply_rules(llama(), [ReplaceRule("mlp", by=name, kwargs={"size": 32}), DoubleRule("o_proj")])
    with pytest.raises(SurgeryError, match="save_surgery"):
        merge_to(model, tmp_path / "merged")
    save_surgery(model, tmp_path)
    with pytest.raises(LoadError, match=r"a ReplaceRule is not taken from a file") as error:
        load_surgery(llama(), tmp_path)
    assert "load_surgery(…, trust=True)" in str(error.value)
    again(model, tmp_path, trust=True)


def test_a_start_that_changes_the_base(tmp_path: Path) -> None:
    model = apply_rules(llama(), [DropRule("model.layers.0"), LoraRule("q_proj", rank=2, init="pissa")])
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.05
    again(model, tmp_path)


def test_all_that_is_wrong_is_said_and_nothing_changes(tmp_path: Path) -> None:
    model = apply_rules(llama(), [DropRule("model.layers.1"), lora()], adapter="a")
    folder = save_surgery(model, tmp_path / "good")

    def refused(match: str, base: Any = None, place: Path = folder, **options: Any) -> None:
        base = llama() if base is None else base
        before = Snapshot(base)
        with pytest.raises((LoadError, SurgeryError), match=match):
            load_surgery(base, place, **options)
        assert before.differences(base) == []

    refused("it was made on another base", llama(seed=1))
    with pytest.warns(SurgeryWarning, match="another base"):
        load_surgery(llama(seed=1), folder, same_base=False)
    refused("5 layers here and had 4|another base", llama(5))
    refused("the model has adapters already", apply_rules(llama(), lora()))
    refused("there is no surgery in this folder", place=tmp_path / "none")
    save_adapter(model, tmp_path / "adapter", "a")
    refused(r"load_adapter\(model, folder\) loads it", place=tmp_path / "adapter")
    with pytest.raises(LoadError, match="load_surgery"):
        load_adapter(llama(), folder)

    def changed(change: Any, tensors: Any = None) -> Path:
        place = tmp_path / "changed"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder, place)
        data = json.loads((place / "surgery.json").read_text())
        change(data)
        (place / "surgery.json").write_text(json.dumps(data))
        if tensors is not None:
            read = safetensors.torch.load_file(place / "surgery.safetensors")
            tensors(read)
            safetensors.torch.save_file(read, place / "surgery.safetensors")
        return place

    key = "0.model.layers.0.self_attn.q_proj.adapters.A"
    refused("later release", place=changed(lambda d: d.update(version=99)))
    refused("list no adapters", place=changed(lambda d: d.update(adapters=3)))
    refused("is not an adapter", place=changed(lambda d: d["adapters"][0].update(weight="x")))
    refused("match 3 modules, and were on 2", place=changed(lambda d: d["adapters"][0].update(sites=2)))
    refused("is not the name of a rule", place=changed(lambda d: d["adapters"][0]["rules"][0].update(rule="nonsense")))
    refused(f"{key} is missing", place=changed(lambda d: None, lambda t: t.pop(key)))
    refused("more is unexpected", place=changed(lambda d: None, lambda t: t.update(more=torch.ones(1))))
    refused("holds NaN", place=changed(lambda d: None, lambda t: t[key].fill_(torch.nan)))
    refused("does not give", place=changed(lambda d: None, lambda t: t.update({key: torch.ones(3, 3)})))
    (changed(lambda d: None) / "surgery.safetensors").unlink()
    refused("no surgery.safetensors beside", place=tmp_path / "changed")
    (tmp_path / "changed" / "surgery.json").write_text("{")
    refused("not JSON", place=tmp_path / "changed")


def test_a_save_that_was_interrupted(tmp_path: Path) -> None:
    """Between two renames, the settings are in the tensors' file."""
    model = apply_rules(llama(), lora())
    save_surgery(model, tmp_path)
    (tmp_path / "surgery.json").unlink()
    assert torch.equal(load_surgery(llama(), tmp_path)(IDS).logits, model(IDS).logits)
    save_surgery(apply_rules(llama(), DropRule("model.layers.0")), tmp_path)  # without tensors
    assert [file.name for file in tmp_path.iterdir()] == ["surgery.json"]


def test_what_can_not_be_written(tmp_path: Path) -> None:
    model = apply_rules(llama(), ReplaceRule("mlp", by=Gate(32)))
    with pytest.raises(SurgeryError, match="can't be written"):
        save_surgery(model, tmp_path)
    copied = apply_rules(llama(), lora(layers=[2, 3]), adapter="a")
    apply_rules(copied, DropRule("model.layers.0"), adapter="cut")
    copy_adapter(copied, "a", "b")
    with pytest.raises(SurgeryError, match="the adapter 'b' can't be saved: modules of the model have moved"):
        save_surgery(copied, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SurgeryError, match="no rules were applied"):
        save_surgery(llama(), tmp_path)
