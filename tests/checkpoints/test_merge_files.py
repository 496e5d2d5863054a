"""`merge_files` writes the bits that `merge_to` writes for the loaded model, for many models and rules."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    LoadError,
    MergeError,
    PlanError,
    Rule,
    SurgeryError,
    SurgeryWarning,
    apply_rules,
    load_adapter,
    merge,
    merge_files,
    merge_to,
    save_adapter,
    unmerge_files,
)
from surgery.rules import (
    DropRule,
    ExpertLoraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    OftRule,
    PrefixRule,
    TrainRule,
)
from tests.support import tiny
from tests.support.checkpoints import assert_same, contents, meta, stack, tensors_of, write_sharded
from tests.support.families import FAMILIES

transformers: Any = pytest.importorskip("transformers")

ALL = bool(os.environ.get("ALL_FAMILIES"))
SOME = ("t5", "mixtral", "zamba")


def llama(dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    settings: dict[str, Any] = dict(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    settings |= {"num_attention_heads": 2, "tie_word_embeddings": False, **fields}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings)).to(dtype).eval()


def written(model: Any, rules: Rule | list[Rule], folder: Path, size: str = "4KB", **options: Any) -> Any:
    """Writes a base and an adapter, whose tensors are random, and the checkpoint of `merge_to`."""
    model.save_pretrained(folder / "base", max_shard_size=size)
    model = type(model).from_pretrained(folder / "base").eval()
    apply_rules(model, rules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save_adapter(model, folder / "adapter")
    merge_to(model, folder / "reference", **options)
    return model


def check(folder: Path, **options: Any) -> Any:
    """Merges into files, compares with the reference, and takes the merge out again."""
    base = folder / "base"
    report = merge_files(base, folder / "adapter", folder / "merged", keep_record=True, **options)
    assert_same(tensors_of(folder / "merged"), tensors_of(folder / "reference"))
    merge_files(base, folder / "adapter", folder / "without record", **options)
    merged = contents(folder / "merged", ["merge_record/"])
    assert contents(folder / "without record") == merged
    assert {file.name for file in base.iterdir()} <= {file.name for file in (folder / "merged").iterdir()}
    restored = unmerge_files(folder / "merged", folder / "restored")
    assert contents(folder / "restored") == contents(base)
    assert restored.shards == report.base and report.base.keys() == {file.name for file in base.glob("*.safetensors")}
    return report


@pytest.mark.filterwarnings("ignore:.*bypassed on one branch:surgery.errors.SurgeryWarning")  # DeBERTa reads weights
@pytest.mark.parametrize("name", list(FAMILIES) if ALL else SOME)
def test_a_family_has_the_bits_of_merge_to(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = FAMILIES[name].make().eval()
    untie = name == "zamba"
    try:
        written(model, LoraRule("all-linear", rank=2, init="random"), tmp_path, "15KB", untie=untie)
    except SurgeryError as error:
        pytest.skip(str(error))
    assert check(tmp_path, untie=untie).sites > 0


def many_kinds() -> list[Rule]:
    return [
        LoraRule(["v_proj", "up_proj"], rank=2, dora=True),
        LohaRule("o_proj", rank=2),
        LokrRule("gate_proj", rank=2),
        OftRule("q_proj", block_size=4),
        LoraRule("embed_tokens", rank=2),
        LoraRule("down_proj", rank=2),
        TrainRule("lm_head"),
        IA3Rule("k_proj"),
    ]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_rules_of_many_kinds_together(dtype: torch.dtype, tmp_path: Path) -> None:
    """One model with a rule of each kind, each at another module."""
    written(llama(dtype), many_kinds(), tmp_path)
    check(tmp_path, workers=2)


def test_several_rules_at_one_module(tmp_path: Path) -> None:
    written(
        llama(torch.bfloat16), [LoraRule("q_proj", rank=2), IA3Rule("q_proj"), LohaRule("q_proj", rank=2)], tmp_path
    )
    check(tmp_path)


def test_experts_that_are_fused_in_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = FAMILIES["mixtral"].make().eval()
    written(model, [ExpertLoraRule("experts", rank=2), LoraRule("q_proj", rank=2)], tmp_path)
    names = [key for key in tensors_of(tmp_path / "base") if "experts.0." in key]
    assert names and not any("gate_up" in key for key in names)  # separate in the files
    check(tmp_path)


@pytest.mark.parametrize("name", ("embed_tokens", "lm_head"))
def test_a_tied_head_gets_a_weight_of_its_own(name: str, tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=True)
    written(model, LoraRule(name, rank=2), tmp_path, untie=True)
    assert "lm_head.weight" not in tensors_of(tmp_path / "base")
    with pytest.raises(PlanError, match="would change another module(.|\n)*merge_files\\(…, untie=True"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "none")
    assert not (tmp_path / "none").exists() and not list(tmp_path.glob(".*"))
    check(tmp_path, untie=True)
    plain = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert plain.lm_head.weight is not plain.model.embed_tokens.weight and not plain.config.tie_word_embeddings


def test_another_dtype_rounds_once(tmp_path: Path) -> None:
    model = written(llama(torch.bfloat16), LoraRule("all-linear", rank=2), tmp_path)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    merge_files(base, adapter, tmp_path / "wide", dtype=torch.float32)
    wide = type(model).from_pretrained(base, dtype=torch.float32)
    load_adapter(wide, adapter)
    merge_to(wide, tmp_path / "expected")
    assert_same(tensors_of(tmp_path / "wide"), tensors_of(tmp_path / "expected"))
    assert json.loads((tmp_path / "wide/config.json").read_text())["dtype"] == "float32"
    loaded = type(model).from_pretrained(tmp_path / "wide")
    assert loaded.dtype == torch.float32

    again = type(model).from_pretrained(tmp_path / "wide")
    with pytest.warns(SurgeryWarning, match="another base"):
        merge_files(tmp_path / "wide", adapter, tmp_path / "narrow", dtype=torch.bfloat16, same_base=False)
        load_adapter(again, adapter, same_base=False)
    merge(again)
    expected = {
        name: tensor.to(torch.bfloat16) for name, tensor in again.state_dict().items() if "adapters" not in name
    }
    assert_same(tensors_of(tmp_path / "narrow"), expected)
    with pytest.raises(SurgeryError, match="keep_record=True needs the dtype of the base"):
        merge_files(base, adapter, tmp_path / "no", dtype=torch.float32, keep_record=True)


def test_pickled_weights_become_safetensors(tmp_path: Path) -> None:
    model = written(llama(), LoraRule("all-linear", rank=2), tmp_path)
    base = tmp_path / "base"
    state = tensors_of(base)
    for file in base.glob("model*"):
        file.unlink()
    half = len(state) // 2
    parts = [dict(list(state.items())[:half]), dict(list(state.items())[half:])]
    names = [f"pytorch_model-{number:05}-of-00002.bin" for number in (1, 2)]
    for name, part in zip(names, parts, strict=True):
        torch.save(part, base / name)
    mapping = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": mapping}))
    report = merge_files(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.shards == ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert_same(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "reference"))
    assert type(model).from_pretrained(tmp_path / "merged") is not None
    with pytest.raises(SurgeryError, match="needs safetensors files"):
        merge_files(base, tmp_path / "adapter", tmp_path / "no", keep_record=True)


def test_a_base_without_its_head_and_with_old_names(tmp_path: Path) -> None:
    """The files of BertModel with the names of 2019, for an adapter of a classifier."""
    torch.manual_seed(0)
    model, _ = tiny.bert()
    written(model, LoraRule("query", rank=2), tmp_path)
    base, old = tmp_path / "base", dict[str, torch.Tensor]()
    for key, tensor in tensors_of(base).items():
        if not key.startswith("classifier"):
            key = key.removeprefix("bert.").replace("LayerNorm.weight", "LayerNorm.gamma")
            old[key.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    from safetensors.torch import save_file

    for file in base.glob("model*"):
        file.unlink()
    save_file(old, base / "model.safetensors", {"format": "pt"})
    merge_files(base, tmp_path / "adapter", tmp_path / "merged")
    merged = tensors_of(tmp_path / "merged")
    assert merged.keys() == old.keys()
    plain = type(model).from_pretrained(tmp_path / "merged").state_dict()  # type: ignore[attr-defined]
    reference = tensors_of(tmp_path / "reference")
    assert_same({k: plain[k] for k in reference if "classifier" not in k},
                {k: t for k, t in reference.items() if "classifier" not in k})  # fmt: skip


def test_several_adapters_with_weights(tmp_path: Path) -> None:
    model = written(llama(), LoraRule("all-linear", rank=2), tmp_path)
    apply_rules(model, LoraRule("q_proj", rank=1, init="random"), adapter="second")
    save_adapter(model, tmp_path / "second", "second")
    from surgery import activate

    activate(model, ["default", "second"], weights=[0.5, -2.0])
    merge_to(model, tmp_path / "both")
    sources = [tmp_path / "adapter", tmp_path / "second"]
    merge_files(tmp_path / "base", sources, tmp_path / "merged", weights=[0.5, -2.0])
    assert_same(tensors_of(tmp_path / "merged"), tensors_of(tmp_path / "both"))


def test_a_model_that_transformers_does_not_have(tmp_path: Path) -> None:
    model = stack()
    write_sharded(model, tmp_path / "base")
    apply_rules(model, LoraRule("all-linear", rank=2, init="random"))
    save_adapter(model, tmp_path / "adapter")
    merge(model)
    with pytest.raises(SurgeryError, match="model=model"):
        merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", model=meta())
    expected = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert_same(tensors_of(tmp_path / "merged"), expected)


def test_other_files_are_copied_but_not_weights_in_other_formats(tmp_path: Path) -> None:
    written(llama(), LoraRule("q_proj", rank=2), tmp_path)
    base = tmp_path / "base"
    for name in ("tokenizer.json", "modeling_own.py", "tf_model.h5", "parts/vocab.txt", "onnx/model.onnx", ".git/x"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = merge_files(base, tmp_path / "adapter", tmp_path / "merged")
    assert report.left_out == ("onnx/", "tf_model.h5")
    files = contents(tmp_path / "merged")
    assert {"tokenizer.json", "modeling_own.py", "parts/vocab.txt", "config.json"} <= files.keys()
    assert not {"tf_model.h5", "onnx/model.onnx", ".git/x"} & files.keys()


def test_refusals_come_before_anything_is_written(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base", max_shard_size="4KB")
    base, out = tmp_path / "base", tmp_path / "out"

    def refused(rules: Rule | list[Rule], error: type[SurgeryError], text: str, **options: Any) -> None:
        adapted = type(model).from_pretrained(base)
        apply_rules(adapted, rules, example_inputs=dict(input_ids=torch.ones(1, 3, dtype=torch.long)))
        save_adapter(adapted, tmp_path / "adapter")
        with pytest.raises(error, match=text):
            merge_files(base, tmp_path / "adapter", out, **options)
        assert not out.exists() and not list(tmp_path.glob(".*"))

    refused([LoraRule("q_proj"), PrefixRule("self_attn", length=2)], (PlanError, LoadError), ".")  # type: ignore[arg-type]
    refused(DropRule("model.layers.0"), MergeError, "structure")
    refused(LoraRule("q_proj"), SurgeryError, "workers=0", workers=0)
    refused(LoraRule("q_proj"), SurgeryError, "is not a dtype of weights", dtype=torch.int8)
    settings = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(MergeError, match="the base is quantised"):
        merge_files(base, tmp_path / "adapter", out)
    (base / "config.json").write_text(json.dumps(settings))
    out.mkdir()
    (out / "x").write_text("x")
    with pytest.raises(SurgeryError, match="exists already"):
        merge_files(base, tmp_path / "adapter", out)


def test_another_base_is_an_error(tmp_path: Path) -> None:
    model = written(llama(), LoraRule("q_proj", rank=2), tmp_path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    torch.manual_seed(5)
    nn.init.normal_(other := llama().lm_head.weight)
    changed = llama()
    changed.lm_head.weight = nn.Parameter(other.detach())
    changed.save_pretrained(tmp_path / "other")
    with pytest.raises(LoadError, match="another base(.|\n)*merge_files\\(…, same_base=False"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Twice(nn.Module):
    """A model with one module under two names, and a head that shares the embedding's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.first = nn.Embedding(10, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight, self.second = self.embedding.weight, self.first


def test_a_tensor_that_the_files_hold_under_two_names(tmp_path: Path) -> None:
    """Both names get the merged values, and both get the base's again."""
    torch.manual_seed(0)
    model = Twice()
    write_sharded(model, tmp_path / "base", 2)
    apply_rules(model, LoraRule("first", rank=2, init="random"))
    save_adapter(model, tmp_path / "adapter")
    merge(model)
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", keep_record=True, model=meta(Twice))
    expected = {k: v for k, v in model.state_dict().items() if ".adapters." not in k}
    assert_same(tensors_of(tmp_path / "merged"), expected)
    unmerge_files(tmp_path / "merged", tmp_path / "restored", model=meta(Twice))
    assert contents(tmp_path / "restored") == contents(tmp_path / "base")

    state = {name: tensor.clone() for name, tensor in Twice().state_dict().items()}
    state["second.weight"] += 1
    stored = nn.Module()
    stored.state_dict = lambda *_, **__: state  # type: ignore[method-assign]
    write_sharded(stored, tmp_path / "other")
    with pytest.raises(SurgeryError, match="contradict each other(.|\n)*second.weight"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "no", model=meta(Twice))


def test_a_base_with_infinity_and_nan(tmp_path: Path) -> None:
    """The numbers by which an adapter knows its base are JSON, which has neither."""
    model = stack()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0], parameter.view(-1)[-1] = float("inf"), float("nan")
    write_sharded(model, tmp_path / "base")
    apply_rules(model, LoraRule("0", rank=2, init="random"))
    save_adapter(model, tmp_path / "adapter")
    merge_files(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", model=meta())
    merge(model)
    merged = tensors_of(tmp_path / "merged")
    torch.testing.assert_close(merged["0.weight"], model.state_dict()["0.weight"], rtol=0, atol=0, equal_nan=True)
    write_sharded(stack(), tmp_path / "other")
    with pytest.raises(LoadError, match="another base"):
        merge_files(tmp_path / "other", tmp_path / "adapter", tmp_path / "no", model=meta())
