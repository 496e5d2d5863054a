"""`surgery diff` compares what two adapters change of each weight, against plain torch arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import Rule, apply_rules, load_adapter, merge, remove, save_adapter
from surgery.rules import AdaLoraRule, IA3Rule, LohaRule, LoraRule, OftRule, TrainRule
from tests.support.command_line import Files, run

QUERY = "bert.encoder.layer.0.attention.self.query"
WORDS = "bert.embeddings.word_embeddings"


def saved(files: Files, folder: Path, rules: Rule | list[Rule], format: Any = "peft", seed: int = 0) -> Path:
    """An adapter with random tensors in a folder."""
    torch.manual_seed(seed)
    model = apply_rules(files.load(), rules)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    save_adapter(model, folder, format=format)
    return folder


def change(files: Files, folder: Path, path: str) -> torch.Tensor:
    """ΔW by merging into the real base."""
    model: Any = files.load()
    before = model.get_submodule(path).weight.detach().double()
    load_adapter(model, folder)
    merge(model)
    return model.get_submodule(path).weight.detach().double() - before


def rows(a: Path, b: Path) -> dict[str, dict[str, Any]]:
    return {row["weight"]: row for row in run("diff", a, b, "--json").data["changes"]}


RULES: dict[str, tuple[Rule | list[Rule], str]] = {
    "lora": (LoraRule(["query", "value"], rank=4, alpha=7), QUERY),
    "rslora beside a trained head": ([LoraRule("query", rank=3, rslora=True), TrainRule("classifier")], QUERY),
    "patterns": (LoraRule(["query", "value"], rank=2, rank_pattern={"query": 5}, alpha_pattern={"query": 3.0}), QUERY),
    "a bias": (LoraRule("query", rank=2, lora_bias=True), QUERY),
    "an embedding": (LoraRule("word_embeddings", rank=2), WORDS),
    "adalora": (AdaLoraRule("query", rank=4, total_step=9), QUERY),
    "loha": (LohaRule("query", rank=2), QUERY),
}


@pytest.mark.parametrize("format", ["peft", "surgery"])
@pytest.mark.parametrize("case", RULES)
def test_changes_are_those_of_a_merge(case: str, format: str, files: Files, tmp_path: Path) -> None:
    rules, path = RULES[case]
    a, b = saved(files, tmp_path / "a", rules, format), saved(files, tmp_path / "b", rules, format, seed=1)
    x, y = change(files, a, path), change(files, b, path)
    row = rows(a, b)[f"{path}.weight"]
    # The merge rounds the weight to float32, about 6e-8 of its own size in each entry.
    assert row["norm_a"] == pytest.approx(float(x.norm()), rel=1e-5)
    assert row["norm_b"] == pytest.approx(float(y.norm()), rel=1e-5)
    assert row["difference"] == pytest.approx(float((y - x).norm()), rel=1e-5)
    assert row["relative"] == pytest.approx(float((y - x).norm() / x.norm()), rel=1e-5)
    assert row["cosine"] == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-5)


@pytest.mark.parametrize("path", [QUERY, WORDS])
def test_other_factors_with_the_same_product_are_the_same_change(path: str, files: Files, tmp_path: Path) -> None:
    name = path.rpartition(".")[2]
    torch.manual_seed(0)
    first, second = (
        apply_rules(files.load(), LoraRule(name, rank=rank, alpha=alpha, init="random"))
        for rank, alpha in ((2, 2), (6, 3))
    )
    a, b = (model.get_submodule(path).adapters.default for model in (first, second))
    mix = torch.randn(2, 6)
    with torch.no_grad():
        b.A.copy_(torch.linalg.pinv(mix) @ a.A)
        b.B.copy_(a.B @ mix * 2)  # its scale is 1/2
    save_adapter(first, tmp_path / "a")
    save_adapter(second, tmp_path / "b", format="surgery")
    (row,) = rows(tmp_path / "a", tmp_path / "b").values()
    # The factors are in float32.
    assert row["status"] == "compared" and row["relative"] < 1e-6 and row["cosine"] == pytest.approx(1, abs=1e-9)
    done = run("diff", tmp_path / "a", tmp_path / "b")
    assert "2 other shape" in done.out and "1 of 1 are in both" in done.out and "cosine" in done.out


def test_weights_of_one_side_alone(files: Files, tmp_path: Path) -> None:
    a = saved(files, tmp_path / "a", LoraRule("query", rank=2))
    b = saved(files, tmp_path / "b", LoraRule("value", rank=2))
    statuses = {name.split(".")[-2]: (row["status"], row["cosine"]) for name, row in rows(a, b).items()}
    assert statuses == {"query": ("only in first", None), "value": ("only in second", None)}
    assert "0 of 2 are in both" in run("diff", a, b).out


@pytest.mark.parametrize(
    "rule",
    [
        LoraRule("query", rank=2, dora=True),
        OftRule("query", block_size=4),
        IA3Rule("query"),
        LoraRule("query", init="pissa"),
    ],
    ids=["dora", "oft", "ia3", "pissa"],
)
def test_rules_that_need_the_base_are_named(rule: Rule, files: Files, tmp_path: Path) -> None:
    a, b = saved(files, tmp_path / "a", rule), saved(files, tmp_path / "b", rule, seed=1)
    done = run("diff", a, b)
    assert done.code == 0 and "ΔW" not in done.out
    assert "the changes of weights by the first are not computed without its base: " in done.out


@pytest.mark.parametrize("shape", [[], [0, 3], [2, 3, 3, 3, 3, 3], [2]], ids=str)
def test_shapes_of_damaged_files_are_no_reason_to_fail(shape: list[int], files: Files) -> None:
    from surgery.commands.weight_changes import changes_of

    names = ("A", "B", "weight", "w1_a", "w1_b", "lora_embedding_A", "lora_embedding_B")
    sites = [{"path": path, "tensors": dict.fromkeys(names, shape)} for path in ("type.x", "type", "a..b", "")]
    assert changes_of(files.ours, sites) == ({}, "LoraRule matches nothing: targets ['query', 'value']")


def test_large_bases_take_no_memory(tmp_path: Path) -> None:
    """A stand-in of 2^20 × 2^20 numbers would take four terabytes."""
    from surgery.commands.weight_changes import changes_of

    model: Any = nn.Sequential(nn.Linear(1, 1, bias=False))
    model[0].weight = nn.Parameter(torch.zeros(()).expand(2**20, 2**20), requires_grad=False)
    apply_rules(model, LoraRule("0", rank=1, init="random"))
    save_adapter(model, tmp_path, format="surgery")
    remove(model)
    sites = [{"path": "0", "tensors": {"A": [1, 2**20], "B": [2**20, 1]}}]
    changes, why = changes_of(tmp_path, sites)
    assert why is None and changes["0.weight"].norm() > 0
