"""Adapters on models whose weights accelerate keeps on the CPU or on disk, beside the same model without offloading."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils import OffloadedWeightsLoader
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from surgery import (
    MergeError,
    PlanError,
    SurgeryError,
    activate,
    adapter_state_dict,
    adapters,
    apply_rules,
    as_lora,
    combine,
    commit,
    coverage,
    graph_of,
    load_adapter,
    merge,
    merge_to,
    remove,
    route,
    save_adapter,
    synced,
    unmerge,
)
from surgery.merging import offloaded_merge
from surgery.rules import (
    BottleneckRule,
    DropRule,
    HeadRule,
    IA3Rule,
    LoraRule,
    OftRule,
    PrefixRule,
    PromptRule,
    ReorderRule,
    RepeatRule,
    ResizeVocabRule,
    TieRule,
    TokensRule,
    TrainRule,
)
from surgery.rules.rewrites import QuantiseRule, fuse_rms_norm
from surgery.state.fingerprint import fingerprint

CPU = torch.device("cpu")
X = torch.arange(10).view(2, 5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.up, self.down = nn.Embedding(11, 12), nn.Linear(12, 10), nn.Linear(10, 10)
        self.norm = nn.LayerNorm(10)

    def forward(self, ids: Tensor) -> Tensor:
        return self.norm(self.down(torch.tanh(self.up(self.embed(ids)))))


def on_disk(model: Any, folder: Path) -> Any:
    return disk_offload(model, folder, execution_device=CPU)


def dispatched(model: Any, folder: Path) -> Any:
    places: Any = {"embed": "cpu", "up": "disk", "down": "disk", "norm": "cpu"}
    return dispatch_model(model, places, main_device=CPU, offload_dir=folder, force_hooks=True)


WAYS: dict[str, Callable[[Any, Path], Any]] = {
    "cpu": lambda model, _: cpu_offload(model, execution_device=CPU),
    "disk": on_disk,
    "device_map": dispatched,
    "with_hook": lambda model, _: cpu_offload_with_hook(model, execution_device=CPU)[0],
}
RULES: dict[str, Any] = {
    "lora": LoraRule(["embed", "up", "down"], rank=2),
    "dora": LoraRule(["up", "down"], rank=2, dora=True),
    "pissa": LoraRule("up", rank=2, init="pissa"),
    "ia3": IA3Rule("up"),
    "train": [LoraRule("up", rank=2), TrainRule("norm")],
    "oft": OftRule("up", block_size=4),
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[[Any, Path], Any]:
    return WAYS[request.param]


def adapt(model: Any, rules: Any) -> Any:
    torch.manual_seed(1)
    return apply_rules(model, rules, example_inputs=X)


def train(model: Any) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(X) - torch.arange(10.0)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("ignore:Some parameters are on the meta device")
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_every_verb_gives_what_it_gives_without_offloading(
    way: Callable[[Any, Path], Any], rules: Any, tmp_path: Path
) -> None:
    plain, model = Net(), way(Net(), tmp_path / "weights")
    away, before = model.up.weight.is_meta, plain(X)
    hook = model.up.__dict__.get("_hf_hook")
    adapt(plain, rules)
    adapt(model, rules)
    assert torch.equal(model(X), plain(X)) and model.up.weight.is_meta == away
    assert not any(tensor.is_meta for tensor in adapter_state_dict(model).values())
    assert train(model) == train(plain) and torch.equal(model(X), plain(X))
    folder = save_adapter(model, tmp_path / "adapter")
    assert fingerprint(model) == fingerprint(plain)  # by which a load tells another base
    merge(model)
    merge(plain)
    assert type(model.up) is nn.Linear and torch.equal(model(X), plain(X)) and model.up.weight.is_meta == away
    unmerge(model)
    unmerge(plain)
    assert torch.equal(model(X), plain(X))
    remove(model)
    assert torch.equal(model(X), before) and model.up.__dict__.get("_hf_hook") is hook
    load_adapter(model, folder)
    assert torch.equal(model(X), plain(X))
    remove(model)
    remove_hook_from_submodules(model)
    assert torch.equal(model(X), before) and not model.up.weight.is_meta


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloading_after_the_adapter(where: str, tmp_path: Path) -> None:
    plain, model = adapt(Net(), RULES["lora"]), WAYS[where](adapt(Net(), RULES["lora"]), tmp_path)
    assert model.up.weight.is_meta and not model.up.adapters.default.A.is_meta
    assert train(model) == train(plain) and torch.equal(model(X), plain(X))
    merge(model)
    merge(plain)
    assert torch.equal(model(X), plain(X))
    remove_hook_from_submodules(model)  # the merged weights come back into the model
    assert torch.equal(model.up.weight, plain.up.weight)
    unmerge(model)
    unmerge(plain)
    assert torch.equal(model(X), plain(X)) and torch.equal(model.up.weight, Net().up.weight)


def test_a_merge_that_fails_leaves_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = adapt(on_disk(Net(), tmp_path), LoraRule(["up", "down"], rank=2, init="random"))
    before, files = model(X), {file: file.read_bytes() for file in tmp_path.iterdir()}
    keep, calls = offloaded_merge.keep_value, []

    def fail_once(module: nn.Module, name: str, value: Tensor) -> None:
        calls.append(name)
        if len(calls) == 2:
            raise OSError("no space left on device")
        keep(module, name, value)

    monkeypatch.setattr(offloaded_merge, "keep_value", fail_once)
    with pytest.raises(OSError, match="no space"):
        merge(model)
    assert len(calls) > 2 and torch.equal(model(X), before)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files
    calls.clear()
    calls += ["", ""]
    merge(model)
    merged = model(X)
    calls.clear()
    with pytest.raises(OSError, match="no space"):
        unmerge(model)
    assert torch.equal(model(X), merged)
    unmerge(model)
    assert torch.equal(model(X), before) and {file: file.read_bytes() for file in tmp_path.iterdir()} == files


def test_a_weight_that_changed_while_merged(tmp_path: Path) -> None:
    model = adapt(on_disk(Net(), tmp_path), LoraRule("up", rank=2, init="random"))
    merge(model)
    file = tmp_path / "up.weight.dat"
    file.write_bytes(bytes(reversed(file.read_bytes())))
    with pytest.raises(MergeError, match="changed since"):
        unmerge(model)
    merged = model(X)
    assert torch.equal(model(X), merged)


def test_files_of_the_checkpoint_are_not_written(tmp_path: Path) -> None:
    """A device map with "disk" reads safetensors from the checkpoint itself."""
    net, checkpoint, folder = Net(), tmp_path / "model.safetensors", tmp_path / "offload"
    save_file(net.state_dict(), checkpoint)
    folder.mkdir()
    (folder / "index.json").write_text("{}")
    bits = checkpoint.read_bytes()
    index = {name: {"safetensors_file": str(checkpoint), "weight_name": name} for name in net.state_dict()}
    places: Any = {"embed": "cpu", "up": "disk", "down": "disk", "norm": "cpu"}
    arguments: dict[str, Any] = {"main_device": "cpu", "offload_index": index}
    model: Any = dispatch_model(net, places, offload_dir=folder, force_hooks=True, **arguments)
    plain, rule = Net(), LoraRule(["up", "down"], rank=2, init="random")
    adapt(model, rule)
    adapt(plain, rule)
    merge(model)
    merge(plain)
    assert torch.equal(model(X), plain(X)) and checkpoint.read_bytes() == bits
    assert {file.name for file in folder.iterdir()} == {"index.json", "up.weight.dat", "down.weight.dat"}
    unmerge(model)
    remove(model)
    assert torch.equal(model(X), Net()(X)) and checkpoint.read_bytes() == bits


def test_tied_weights_on_the_cpu() -> None:
    def tied() -> Any:
        net = Net()
        net.down = nn.Linear(10, 10)
        net.down.weight = nn.Parameter(torch.randn(10, 10))
        net.last = nn.Linear(10, 10)
        net.last.weight = net.down.weight
        return net

    model = adapt(cpu_offload(tied(), execution_device=CPU), LoraRule("down", rank=2, init="random"))
    before, eye = model(X), torch.eye(10)
    last = model.last(eye)
    with pytest.raises(MergeError, match="would change another module"):
        merge(model)
    assert torch.equal(model(X), before)
    merge(model, untie=True)
    assert torch.equal(model.last(eye), last) and torch.allclose(model(X), before, atol=1e-5)
    unmerge(model)
    assert torch.equal(model(X), before) and torch.equal(model.last(eye), last)


def test_blocks_that_are_loaded_as_a_whole() -> None:
    model = cpu_offload(nn.Sequential(Net()), execution_device=CPU, preload_module_classes=["Net"])
    with pytest.raises(PlanError, match="loads the weights of whole blocks"):
        apply_rules(model, LoraRule("up", rank=2))
    adapted: Any = cpu_offload(
        nn.Sequential(adapt(Net(), RULES["ia3"])), execution_device=CPU, preload_module_classes=["Net"]
    )
    assert torch.equal(adapted(X), Net()(X))


def test_a_store_that_is_not_known(tmp_path: Path) -> None:
    model = adapt(on_disk(Net(), tmp_path), LoraRule("up", rank=2, init="random"))

    class Other:
        def __init__(self, loader: OffloadedWeightsLoader):
            self.loader = loader

        def __getitem__(self, key: str) -> Tensor:
            return self.loader[key]

    model.up._hf_hook.weights_map.dataset = Other(model.up._hf_hook.weights_map.dataset)
    before = model(X)
    with pytest.raises(SurgeryError, match="can't be written"):
        merge(model)
    assert torch.equal(model(X), before)


def test_conversion_to_lora(tmp_path: Path) -> None:
    model, plain = adapt(on_disk(Net(), tmp_path), RULES["oft"]), adapt(Net(), RULES["oft"])
    train(model)
    train(plain)
    as_lora(model)
    as_lora(plain)
    assert torch.equal(model(X), plain(X)) and model.up.weight.is_meta


def llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)).eval()  # type: ignore[arg-type]


IDS = {"input_ids": torch.arange(8)[None]}


@pytest.mark.parametrize("rule", [
    PrefixRule(length=3), PromptRule(length=3), BottleneckRule("mlp", size=4), DropRule("layers.0"),
    TokensRule("embed_tokens", tokens=[1, 2]),
], ids=lambda rule: rule.label)  # fmt: skip
def test_rules_whose_site_has_no_weights_of_its_own(rule: Any, tmp_path: Path) -> None:
    plain, model = llama(), on_disk(llama(), tmp_path)
    for each in (plain, model):
        torch.manual_seed(1)
        apply_rules(each, rule, example_inputs=IDS)
    assert torch.equal(model(**IDS).logits, plain(**IDS).logits)
    assert not any(tensor.is_meta for tensor in adapter_state_dict(model).values())
    assert torch.equal(remove(model)(**IDS).logits, llama()(**IDS).logits)


def test_verbs_on_several_adapters(tmp_path: Path) -> None:
    plain, model = llama(), on_disk(llama(), tmp_path)
    outputs: list[list[Tensor]] = []
    for each in (plain, model):
        torch.manual_seed(1)
        for name in ("a", "b"):
            apply_rules(each, LoraRule(["q_proj", "v_proj"], rank=2, init="random"), adapter=name)
        combine(each, {"a": 1.0, "b": 0.5}, "c")
        results = [activate(each, name)(**IDS).logits for name in ("a", "b", "c")]
        with route(each, ["a", "b"]):
            results.append(each(input_ids=IDS["input_ids"].repeat(2, 1)).logits)
        commit(each, "c")
        outputs.append([*results, remove(each)(**IDS).logits])
    assert all(torch.equal(one, other) for one, other in zip(*outputs, strict=True))
    assert model.model.layers[0].self_attn.q_proj.weight.is_meta


@pytest.mark.parametrize("way", ["cpu", "disk"])
def test_synced_gives_the_merged_values(way: str, tmp_path: Path) -> None:
    plain, model = adapt(Net(), RULES["train"]), adapt(WAYS[way](Net(), tmp_path), RULES["train"])
    train(plain)
    train(model)
    with synced(plain) as expected, synced(model) as tensors:
        for (key, value), (name, tensor) in zip(expected, tensors, strict=True):
            assert name == key and torch.equal(tensor, value)
    assert model.up.weight.is_meta


def test_synced_refuses_a_tied_weight_on_the_cpu() -> None:
    net: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    net[1].weight = net[0].weight
    model = apply_rules(cpu_offload(net, execution_device=CPU), LoraRule("0", rank=2, init="random"))
    with pytest.raises(MergeError, match="would change another module"), synced(model):
        pass
    with synced(model, untie=True) as tensors:
        values = dict(tensors)
    assert not torch.equal(values["0.weight"], values["1.weight"])


def test_combined_copies_of_tensors(tmp_path: Path) -> None:
    plain, model = Net(), on_disk(Net(), tmp_path)
    for each in (plain, model):
        for name, target in (("a", "norm"), ("b", "up")):
            adapt_as(each, TrainRule(target), name)
        combine(each, {"a": 1.0, "b": 0.5}, "c", method="ties", density=0.5)
    assert all(torch.equal(adapter_state_dict(model, "c")[key], t) for key, t in adapter_state_dict(plain, "c").items())


def adapt_as(model: Any, rule: Any, name: str) -> None:
    apply_rules(model, rule, adapter=name)
    train(model)


def test_rows_of_the_base_in_a_file(tmp_path: Path) -> None:
    """PEFT writes the base's embeddings where they are targets. Those of another base come with the adapter."""
    other = apply_rules(llama(), LoraRule("embed_tokens", rank=2, init="random"))
    with torch.no_grad():
        other.model.embed_tokens.weight[3] += 1
    folder = save_adapter(other, tmp_path / "adapter")
    model = on_disk(llama(), tmp_path / "weights")
    report = load_adapter(model, folder)
    assert any("differs from this base's in 1 of 40 rows" in text for text in report.assumed)
    assert torch.equal(model(**IDS).logits, other(**IDS).logits)
    again = save_adapter(model, tmp_path / "again")
    assert (again / "adapter_model.safetensors").read_bytes() == (folder / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("rule", [
    RepeatRule("layers", order=[0, 0, 1]), HeadRule("lm_head", labels=7), TieRule(), QuantiseRule("q_proj"),
    ResizeVocabRule(tokens=48), fuse_rms_norm(),
], ids=lambda rule: rule.name)  # fmt: skip
def test_rules_that_go_on_before_offloading(rule: Any, tmp_path: Path) -> None:
    model = on_disk(llama(), tmp_path)
    before = model(**IDS).logits
    with pytest.raises(SurgeryError, match="accelerate") as error:
        apply_rules(model, rule, example_inputs=IDS)
    assert "before the model is offloaded" in str(error.value)
    assert torch.equal(model(**IDS).logits, before) and not adapters(model)


def test_layers_change_their_order(tmp_path: Path) -> None:
    plain, model = llama(), on_disk(llama(), tmp_path)
    rules = [ReorderRule("layers", order=[1, 0]), LoraRule("q_proj", rank=2, init="random")]
    for each in (plain, model):
        torch.manual_seed(1)
        apply_rules(each, rules)
        merge(each)
    assert torch.equal(model(**IDS).logits, plain(**IDS).logits)
    assert torch.equal(remove(unmerge(model))(**IDS).logits, llama()(**IDS).logits)


def test_what_the_offloaded_model_can_not_do(tmp_path: Path) -> None:
    model = apply_rules(on_disk(llama(), tmp_path / "weights"), LoraRule("q_proj", rank=2, init="random"))
    with pytest.raises(SurgeryError, match="save_pretrained can't write this model"):
        merge_to(model, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    for run in (graph_of, coverage):
        with pytest.raises(SurgeryError, match="before the model is offloaded"):
            run(model, IDS)
