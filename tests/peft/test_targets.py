"""Which modules PEFT's configuration means, with which rank and scale, compared with PEFT's own layers."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery.rules  # noqa: F401  # brings the methods
from surgery import SurgeryError, load_adapter, plan_rules, save_adapter
from surgery.peft_format.methods import rules_by
from tests.support.conformance import conv1d, near, of_transformers
from tests.support.peers import peft

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k, self.lin = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.q_proj, self.k, self.lin, *self.experts):
            x = torch.tanh(layer(x))
        return x


class Model(nn.Module):
    """The same names at the root, in layers, below two numbers, and of a module that is reached twice."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head, self.q_proj, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.score = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.embed_tokens = nn.Embedding(5, 4)
        self.layers = nn.ModuleList([Block() for _ in range(2)])
        self.encoder: Any = nn.Module()
        self.encoder.h, self.encoder.q_proj = nn.ModuleList([Block(), Block()]), nn.Linear(4, 4)
        self.shared, self.conv = self.q_proj, conv1d(4, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed_tokens(ids)
        for layer in (
            *self.layers,
            *self.encoder.h,
            self.encoder.q_proj,
            self.q_proj,
            self.conv,
            self.head,
            self.score,
        ):
            x = torch.tanh(layer(x))
        return self.lm_head(x)


NAMES = (
    "q_proj k lin lm_head head layers.0.q_proj 0.q_proj experts.1 h.1.lin score.0 score 1 encoder.q_proj shared "
    "embed_tokens layers.1.experts.0 proj all-linear re:k conv"
).split()
TEXTS = [r".*q_proj", r"layers\.\d\.(k|lin)", "q_proj", r".*\.experts\.\d", "lm_head|encoder.*k", "ALL-LINEAR",
         "all-linear", r".*(?<!0)\.lin"]  # fmt: skip
PATTERNS = ["q_proj", r"layers\.0\..*", "k", "^q_proj", "encoder.h.1.lin", ".*", "lm_head"]


def drawn(seed: int) -> dict[str, Any]:
    """A configuration by chance."""
    pick = random.Random(seed)
    names = pick.sample(NAMES, pick.randint(1, 3))
    fields: dict[str, Any] = {"target_modules": pick.choice(TEXTS) if pick.random() < 0.3 else names}
    chances: dict[str, tuple[float, Any]] = {
        "exclude_modules": (0.4, pick.choice([*TEXTS[:5], pick.sample(NAMES, 2)])),
        "layers_to_transform": (0.4, pick.choice([0, 1, [0], [0, 1], [2]])),
        "layers_pattern": (0.3, pick.choice(["layers", "h", ["layers", "h"], ["x"], "experts", r"encoder\.h"])),
        "modules_to_save": (0.3, [pick.choice(["head", "score", "lm_head", "layers.1", "score.0"])]),
        "rank_pattern": (0.3, {pick.choice(PATTERNS): 2, "lin": 5}),
        "alpha_pattern": (0.3, {pick.choice(PATTERNS): 2}),
    }
    return fields | {name: value for name, (chance, value) in chances.items() if pick.random() < chance}


def by_peft(model: nn.Module, fields: dict[str, Any]) -> Any:
    """Path → (rank, scale), and the modules that are saved; None where PEFT raises."""
    try:
        wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**copy.deepcopy(fields)))
    except (ValueError, TypeError):
        return None
    found = list(wrapped.base_model.model.named_modules())
    layers = {path: m for path, m in found if isinstance(m, peft.tuners.lora.LoraLayer)}
    saved = {path for path, module in found if isinstance(module, peft.utils.ModulesToSaveWrapper)}
    return {path: (layer.r["default"], layer.scaling["default"]) for path, layer in layers.items()}, saved


def by_us(model: nn.Module, fields: dict[str, Any]) -> Any:
    try:
        plan = plan_rules(model, rules_by(model, {"peft_type": "LORA", "r": 8, "lora_alpha": 8, **fields}))
        plan.raise_problems()
    except SurgeryError:
        return None
    lora: dict[str, Any] = {step.path: step.rule for step in plan.steps if step.rule.label == "LoraRule"}
    trained = {step.path for step in plan.steps if step.rule.label == "TrainRule"}
    return {path: (rule.rank_at(path), rule.scale_at(path)) for path, rule in lora.items()}, trained


@pytest.mark.parametrize("seeds", [range(i, i + 12) for i in range(0, 60, 12)], ids=str)
def test_configurations_by_chance(seeds: range) -> None:
    model = Model()
    for seed in seeds:
        fields = drawn(seed)
        theirs, ours = by_peft(model, fields), by_us(model, fields)
        if theirs is None or ours is None:
            assert theirs is ours, fields
            continue
        within = {f"{path}." for path in theirs[1]}  # PEFT saves a container, we what is in it
        assert ours[0] == theirs[0], fields
        assert all(path in theirs[1] or path.startswith(tuple(within)) for path in ours[1]), fields
        assert all(any(f"{path}.".startswith(f"{saved}.") for path in ours[1]) for saved in theirs[1]), fields


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
        {"target_modules": ["lin", "layers.0.k"], "layers_to_transform": 1, "layers_pattern": "h"},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"lin": 3}},
        {"target_modules": "All-Linear", "modules_to_save": ["score"]},
    ],
    ids=str,
)
def test_files_cross_both_ways(fields: dict[str, Any], tmp_path: Path) -> None:
    model, ids = Model(), torch.tensor([[0, 3, 4]])
    config = peft.LoraConfig(init_lora_weights=False, r=4, **copy.deepcopy(fields))
    theirs = peft.get_peft_model(copy.deepcopy(model), config).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    base = copy.deepcopy(model)
    load_adapter(model, tmp_path / "theirs")
    assert near(model(ids), theirs(ids)) and not near(model(ids), base(ids))
    save_adapter(model, tmp_path / "ours", format="peft")
    again = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert near(again(ids), theirs(ids))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"target_modules": "k", "layers_to_transform": 1}, "with a list of names"),
        ({"target_modules": ["k"], "layers_pattern": "h"}, "with layers_to_transform"),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, "modules_to_save=['head'] leaves out"),
        ({"target_modules": ["k"], "layers_to_transform": 7}, "exclude or layers drop all"),
    ],
)
def test_what_peft_refuses_is_refused_with_the_reason(fields: dict[str, Any], told: str) -> None:
    assert by_peft(Model(), fields) is None
    with pytest.raises(SurgeryError) as caught:
        plan_rules(model := Model(), rules_by(model, {"peft_type": "LORA", **fields})).raise_problems()
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("BertForSequenceClassification", "SEQ_CLS"), ("BertForSequenceClassification", None),
        ("RobertaForSequenceClassification", "SEQ_CLS"), ("BertForTokenClassification", None),
        ("BertForQuestionAnswering", None),
        ("LlamaForCausalLM", "CAUSAL_LM"), ("GPT2LMHeadModel", None), ("BertModel", None),
    ],
)  # fmt: skip
def test_all_linear_on_models_with_heads(name: str, task: str | None) -> None:
    from surgery.peft import LoraConfig, get_peft_model

    model = of_transformers(name, num_hidden_layers=1)
    given: dict[str, Any] = {"target_modules": "all-linear", "r": 2, "task_type": task}
    theirs = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**given)).base_model
    ours: Any = get_peft_model(model, LoraConfig(**given))
    sites = {path for path, module in model.named_modules() if hasattr(module, "adapters")}
    sites = {path for path in sites if "A" in model.get_submodule(path).adapters.default.tensors()}
    assert ours is not None and sites == set(theirs.targeted_module_names)
