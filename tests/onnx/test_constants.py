"""Every rule of the library in an exported file, as constants and merged, against the live model in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import Rule, StructureRule, SurgeryError, apply_rules, rules
from surgery.rules._shared.solving import cayley, orthonormal_columns, upper_inverse
from tests.support import tiny
from tests.support.sampling import LAYERS, onnx_cases
from tests.support.slots import TOLERANCE, Exported, outputs, same, shaken

# On one Linear or Conv1d each, by its name in the model.
MERGEABLE: dict[str, Rule] = {
    "ada": rules.AdaLoraRule("ada", rank=3, total_step=10),
    "bias": rules.BiasRule("bias"),
    "boft": rules.BoftRule("boft", n_butterfly_factor=2, init="random"),
    "boft_conv": rules.BoftRule("boft_conv", init="random"),
    "c3a": rules.C3aRule("c3a", block_size=4),
    "fourier": rules.FourierRule("fourier", n_frequency=20),
    "hra": rules.HraRule("hra", rank=4, init="random"),
    "hra_gs": rules.HraRule("hra_gs", rank=3, apply_GS=True),
    "ia3": rules.IA3Rule("ia3"),
    "loha": rules.LohaRule("loha", rank=2, init="random"),
    "lokr_conv": rules.LokrRule("lokr_conv", rank=2, init="random"),
    "lora": rules.LoraRule("lora", rank=2, dora=True),
    "miss": rules.MissRule("miss", rank=5),
    "miss_bat": rules.MissRule("miss_bat", rank=4, variant="bat"),
    "oft": rules.OftRule("oft", block_size=4, init="random"),
    "oft_conv": rules.OftRule("oft_conv", block_size=4, use_cayley_neumann=False, init="random"),
    "rand": rules.RandLoraRule("rand", rank=3),
    "road": rules.RoadRule("road", group_size=4, init="random"),
    "shira": rules.ShiraRule("shira", rank=2, init="random", random_seed=1),
    "tokens": rules.TokensRule("tokens", tokens=[2, 5]),
    "copied": rules.TrainRule("copied"),
    "vera": rules.VeraRule("vera", rank=7),
}
OTHERS: dict[str, Rule] = {
    "bottleneck": rules.BottleneckRule("bottleneck", size=3),
    "capture": rules.CaptureRule("capture"),
    "insert": rules.InsertRule("insert", by="torch.nn.Linear", kwargs={"in_features": 8, "out_features": 8}),
    "norm_replaced": rules.ReplaceRule(
        "norm_replaced", by="torch.nn.Linear", kwargs={"in_features": 16, "out_features": 8}
    ),
    "reft": rules.ReftRule("reft", rank=2, positions="f1+l2"),
    "steer": rules.SteerRule("steer", direction=[0.5] * 8),
}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(4, 8, 16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("btd,eod->bteo", x, self.up)


class Each(nn.Module):
    """One module per rule, all with the same input; also a LayerNorm and a stack of experts."""

    def __init__(self, names: list[str]):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Conv1d(16, 8, 3) if name.endswith("_conv") else nn.Linear(16, 8))
        self.norm, self.experts = nn.LayerNorm(16), Experts()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        outputs = {}
        for name, module in self.named_children():
            outputs[name] = module(x.transpose(1, 2) if name.endswith("_conv") else x)
        return outputs


def each(*named: dict[str, Rule]) -> nn.Module:
    by_name = {name: rule for group in named for name, rule in group.items()}
    further = [rules.NormRule("norm"), rules.ExpertLoraRule("experts", rank=2, init="random")]
    model = Each(list(by_name)).eval()
    apply_rules(model, [*by_name.values(), *further])
    return shaken(model, 0.1)


def test_all_rules_are_tried_here_or_with_a_model() -> None:
    tried = {type(rule) for rule in (*MERGEABLE.values(), *OTHERS.values())}
    tried |= {rules.NormRule, rules.ExpertLoraRule, rules.BaseRowsRule}  # the last is a TokensRule
    tried |= {rules.StatisticsRule}  # it changes what training moves, and no graph
    tried |= {rules.RewriteRule}  # tests/rules/test_rewrite_models.py
    tried |= {rules.PrefixRule, rules.PromptRule, rules.AdaptionRule, rules.MultitaskPromptRule}  # below
    offered = {
        kind for name in rules.__all__ if isinstance(kind := getattr(rules, name), type) and issubclass(kind, Rule)
    }
    structural = {kind for kind in offered if issubclass(kind, StructureRule)}  # test_structure_export.py
    assert tried == offered - structural


@pytest.mark.parametrize("mode", ["constant", "merged"])
def test_rules_on_one_module_each(mode: str, tmp_path: Path) -> None:
    model = each(MERGEABLE, OTHERS) if mode == "constant" else each(MERGEABLE)
    exported = Exported(model, {"x": torch.randn(3, 5, 16)}, tmp_path, adapters=mode)
    for inputs in (exported.inputs, {"x": torch.randn(4, 9, 16)}):
        # Merging rounds each weight once more, by some ulps of its largest term.
        same(exported.run(inputs), outputs(model, inputs), TOLERANCE if mode == "constant" else 5e-5)
    if mode == "constant":
        names = {value.name for value in exported.session.get_inputs()}
        assert names == {"x"} and not exported.session.get_overridable_initializers()


def test_what_can_not_be_merged_says_so(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="BottleneckRule can't be merged"):
        Exported(each(MERGEABLE, OTHERS), {"x": torch.randn(3, 5, 16)}, tmp_path, adapters="merged")


MODELS: dict[str, tuple[Any, list[Rule]]] = {
    "decoder": (
        tiny.gpt2,
        [
            rules.MultitaskPromptRule(length=3, tasks=2, task=1),
            rules.AdaptionRule("attn", length=3, mapped=False),
        ],
    ),
    "encoder": (
        tiny.bert,
        [rules.PromptRule(length=2, whole=True, encoder="mlp"), rules.PrefixRule(length=3, projection=4)],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_rules_of_texts(name: str, tmp_path: Path) -> None:
    make, several = MODELS[name]
    model, inputs = make(LAYERS)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    inputs = {key: torch.cat([value, value, value[:1]]) for key, value in inputs.items()}
    apply_rules(model, several, example_inputs=inputs)
    exported = Exported(shaken(model), inputs, tmp_path, adapters="constant")
    longer = {key: torch.cat([value[:4], torch.ones_like(value[:4, :2])], 1) for key, value in inputs.items()}
    for call_inputs in (inputs, longer):
        same(exported.run(call_inputs), outputs(model, call_inputs))


PROMPTS: dict[str, tuple[Any, Rule]] = {
    "decoder": (tiny.llama, rules.PromptRule(length=3)),
    "decoder that counts columns": (tiny.gpt2, rules.PromptRule(length=3, encoder="mlp")),
    "encoder": (tiny.bert, rules.PromptRule(length=2)),
    "encoder after its first token": (tiny.bert, rules.PromptRule(length=2, after=1)),
    "encoder-decoder": (tiny.t5, rules.PromptRule(length=2)),
    "layers": (tiny.llama, rules.AdaptionRule("self_attn", length=3)),
    "keys": (tiny.llama, rules.PrefixRule(length=3)),
    "task": (tiny.bert, rules.MultitaskPromptRule(length=2, tasks=2, task=1)),
}


@pytest.mark.parametrize("name", onnx_cases(PROMPTS, "encoder", "encoder-decoder", "decoder", "keys", "layers", "task"))
def test_the_batch_of_a_constant_prompt_is_free(name: str, tmp_path: Path) -> None:
    """Rows of any number, padded or not, of any length: the virtual tokens are one for all rows, and repeated there."""
    make, rule = PROMPTS[name]
    model, inputs = make(LAYERS)
    model.config.use_cache = False
    with torch.no_grad():
        for parameter in model.eval().parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][-1, -2:] = 0
    apply_rules(model, rule, example_inputs=inputs)
    exported = Exported(shaken(model), inputs, tmp_path, adapters="constant")
    assert set(exported.manifest["free"]["input_ids"]) == {"0", "1"}
    for rows, further in ((1, 0), (1, 3), (5, 0), (4, 2)):
        call_inputs = {key: torch.cat([value[:1]] * rows) for key, value in inputs.items()}
        call_inputs = {key: torch.cat([value, value[:, :further]], 1) for key, value in call_inputs.items()}
        call_inputs["input_ids"] = (call_inputs["input_ids"] + torch.arange(rows)[:, None]) % model.config.vocab_size
        call_inputs["attention_mask"] = torch.ones_like(call_inputs["input_ids"])
        if rows > 1:
            call_inputs["attention_mask"][1, -1:], call_inputs["attention_mask"][2, :2] = 0, 0
        same(exported.run(call_inputs), outputs(model, call_inputs))


def test_what_is_solved_in_an_exported_graph_is_what_torch_solves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elimination without pivots beside LAPACK, where it is hardest: rotations by almost half a turn."""
    raw = torch.randn(3, 12, 12, dtype=torch.float64) * 30
    skew, upper = raw - raw.mT, torch.randn(9, 9, dtype=torch.float64).triu(1) + 0.5 * torch.eye(9)
    tall = torch.randn(20, 6, dtype=torch.float64)
    wanted = cayley(skew), upper_inverse(upper), orthonormal_columns(tall)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    solutions = cayley(skew), upper_inverse(upper), orthonormal_columns(tall)
    eye = torch.eye(12, dtype=torch.float64)
    assert torch.allclose(solutions[0] @ solutions[0].mT, eye.expand(3, -1, -1), atol=1e-10)
    for have, want in zip(solutions[:2], wanted[:2], strict=True):
        assert torch.allclose(have, want, rtol=1e-9, atol=1e-9)
    assert torch.allclose(solutions[2] @ solutions[2].mT, wanted[2] @ wanted[2].mT, atol=1e-12)  # signs may differ
