"""What the façade refuses and warns of when a configuration goes on a model, beside PEFT's own words."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery.peft as ours
from surgery import SurgeryError, SurgeryWarning
from surgery.errors import group_problems
from tests.support import tiny
from tests.support.peers import peft


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(9, 8)
        self.first = nn.Linear(8, 12)
        self.bare = nn.Linear(12, 8, bias=False)
        self.conv = nn.Conv2d(2, 2, 1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.bare(self.first(self.emb(ids)))


class Settings:
    def __init__(self, tie: bool) -> None:
        self.tie_word_embeddings = tie

    def to_dict(self) -> dict[str, Any]:
        return {"tie_word_embeddings": self.tie_word_embeddings}


class Tied(nn.Module):
    _tied_weights_keys = ("lm_head.weight",)

    def __init__(self, tied: bool = True, says: bool | None = None) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(9, 8)
        self.inner = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 9, bias=False)
        self.config = Settings(tied if says is None else says)
        if tied:
            self.lm_head.weight = self.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.inner(self.embed_tokens(ids)))


def told(library: Any, make: Any) -> tuple[Any, list[tuple[type, str]]]:
    """The error with which a function of the library ends, and the warnings, with PEFT's kind of each."""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            make(library)
            error = None
        except Exception as raised:
            error = raised
    kinds = (RuntimeWarning, UserWarning, Warning)
    found = [(next(k for k in kinds if issubclass(each.category, k)), str(each.message)) for each in record]
    return error, [(kind, text) for kind, text in found if "exclude has" not in text]


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"target_modules": ["first"], "init_lora_weights": "orthogonal", "r": 3}),
    ("LoraConfig", {"target_modules": ["first"], "init_lora_weights": "orthogonal", "rank_pattern": {"first": 5}}),
    ("LoraConfig", {"target_modules": ["first"], "init_lora_weights": "mica", "r": 9}),
    ("LoraConfig", {"target_modules": ["emb"], "lora_bias": True}),
    ("LoraConfig", {"target_modules": ["first"], "bias": "some"}),
    ("LoraConfig", {"target_parameters": ["absent.weight"]}),
    ("LoraConfig", {"target_parameters": ["first"], "target_modules": []}),
    ("LoraConfig", {"target_parameters": ["first.weight"], "target_modules": ["first", "bare"]}),
    ("MissConfig", {"target_modules": ["first"], "r": 9}),
    ("C3AConfig", {"target_modules": ["first"], "block_size": 3}),
    ("C3AConfig", {"target_modules": ["first"], "block_size": 8}),
    ("RoadConfig", {"target_modules": ["first"], "group_size": 8}),
    ("RoadConfig", {"target_modules": ["conv"], "group_size": 2}),
]


@pytest.mark.parametrize(("name", "fields"), REFUSED, ids=str)
def test_what_peft_refuses_is_refused_in_its_words(name: str, fields: dict[str, Any]) -> None:
    base = Net()
    before = {key: id(value) for key, value in base.named_parameters()}

    def make(library: Any) -> None:
        library.get_peft_model(copy.deepcopy(base) if library is peft else base, getattr(library, name)(**fields))

    theirs, mine = told(peft, make)[0], told(ours, make)[0]
    assert isinstance(mine, SurgeryError)
    kind = next(k for k in (NotImplementedError, ValueError) if isinstance(theirs, k))
    assert isinstance(mine, kind) and re.split(r"\. (?:Curr|Make)", str(theirs))[0] in str(mine)
    assert {key: id(value) for key, value in base.named_parameters()} == before


def test_parameters_that_are_no_targets() -> None:
    base: Any = nn.Sequential(nn.Linear(8, 8))
    base.own = nn.Parameter(torch.ones(8, 8))
    for library in (peft, ours):
        with pytest.raises(ValueError, match=r"on the top-level module is not supported \(parameter 'own'\)"):
            library.get_peft_model(base, library.LoraConfig(target_parameters=["own"]))
    torch.nn.utils.parametrize.register_parametrization(base[0], "weight", nn.Identity())
    with pytest.raises(SurgeryError, match="its weight is parametrized"):
        ours.get_peft_model(base, ours.LoraConfig(target_parameters=["0.weight"]))


@pytest.mark.parametrize(("name", "target"), [
    ("LoraConfig", "in_proj"), ("LoraConfig", "out_proj"), ("LoraConfig", "conv1d"), ("RandLoraConfig", "out_proj"),
    ("IA3Config", "in_proj"),
])  # fmt: skip
def test_modules_that_mambas_kernels_bypass_are_refused(name: str, target: str) -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.MambaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, state_size=2, intermediate_size=16, time_step_rank=1
    )
    fields = {"feedforward_modules": []} if name == "IA3Config" else {"r": 2}

    def make(library: Any) -> None:
        model = transformers.MambaForCausalLM(settings)
        library.get_peft_model(model, getattr(library, name)(target_modules=[target], **fields))

    theirs, mine = told(peft, make)[0], told(ours, make)[0]
    refused = "Mamba-based models" in str(theirs)
    assert refused == (target != "in_proj")
    assert (isinstance(mine, ValueError) and "Mamba-based models" in str(mine)) if refused else mine is theirs is None


def test_a_problem_at_many_sites_is_one_line() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(7)))
    with pytest.raises(SurgeryError, match="must be less than or equal to in_features") as raised:
        ours.get_peft_model(model, ours.MissConfig(target_modules="[0-9]", r=9))
    assert len(group_problems(raised.value.problems)) == 1  # type: ignore[attr-defined]


WARNED: list[tuple[str, dict[str, Any]]] = [
    ("LoraConfig", {"target_modules": ["first"], "exclude_modules": ["absent"]}),
    ("LoraConfig", {"target_modules": ["first"], "exclude_modules": "abs.*"}),
    ("LoraConfig", {"target_modules": ["first"], "exclude_modules": ["bare"]}),
    ("LoraConfig", {"target_modules": ["first"], "rank_pattern": {"frist": 4, "first": 2}}),
    ("LoraConfig", {"target_modules": ["first"], "alpha_pattern": {"irst": 4}}),
    ("LoKrConfig", {"target_modules": ["first"], "alpha_pattern": {"b": 4, "a": 2}}),
    ("LoraConfig", {"target_modules": ["first", "bare"], "lora_bias": True}),
    ("LoraConfig", {"target_modules": ["absent"], "target_parameters": ["first.weight"]}),
    ("LoraConfig", {"target_modules": ["first"], "target_parameters": ["absent.weight"]}),
    ("IA3Config", {"target_modules": ["first"], "feedforward_modules": [], "exclude_modules": ["absent"]}),
]


@pytest.mark.parametrize(("name", "fields"), WARNED, ids=str)
def test_fields_without_an_effect_are_warned_of_in_pefts_words(name: str, fields: dict[str, Any]) -> None:
    def make(library: Any) -> None:
        library.get_peft_model(Net(), getattr(library, name)(**fields))

    theirs, mine = told(peft, make), told(ours, make)
    assert mine == theirs and mine[0] is None


@pytest.mark.parametrize("name", ["LoraConfig", "LoKrConfig"])
@pytest.mark.parametrize("model", [(True, None), (False, None), (True, False)])
@pytest.mark.parametrize("named", ["embed_tokens", "lm_head", None])
@pytest.mark.parametrize("field", ["modules_to_save", "target_modules"])
def test_adapters_on_tied_weights_are_warned_of(name: str, model: Any, named: str | None, field: str) -> None:
    fields: dict[str, Any] = {"target_modules": ["inner"]}
    fields[field] = [*fields.get(field, []), *([named] if named else [])]
    if name == "LoKrConfig" and named == "embed_tokens" and field == "target_modules":
        pytest.skip("LoKr does not go on embeddings")

    def make(library: Any) -> None:
        library.get_peft_model(Tied(*model), getattr(library, name)(**fields))

    theirs, mine = told(peft, make)[1], told(ours, make)[1]
    assert [text[:130] for _, text in mine] == [text[:130] for _, text in theirs]


@pytest.mark.parametrize("model", [(True, None), (False, None), (True, False)])
@pytest.mark.parametrize("named", ["lm_head", None])
def test_a_tying_without_tied_modules_is_warned_of(model: Any, named: str | None) -> None:
    fields = {"target_modules": ["inner"], "modules_to_save": [named] if named else None, "ensure_weight_tying": True}

    def make(library: Any) -> None:
        library.get_peft_model(Tied(*model), library.LoraConfig(**fields))

    theirs, mine = told(peft, make), told(ours, make)
    assert mine == theirs and bool(theirs[1]) == (model != (True, None) or named is None)  # that pair is tied


@pytest.mark.parametrize("model", [(True, None), (False, None), (True, False)])
def test_a_tying_of_rows_is_warned_of(model: Any) -> None:
    fields = {"target_modules": ["inner"], "trainable_token_indices": [1, 4], "ensure_weight_tying": True}

    def make(library: Any) -> None:
        library.get_peft_model(Tied(*model), library.LoraConfig(**fields))

    theirs, mine = told(peft, make), told(ours, make)
    assert mine == theirs and theirs[1]


def test_names_are_warned_of() -> None:
    def make(library: Any) -> None:
        config = library.LoraConfig(target_modules=["first"], base_model_name_or_path="other", revision="a")
        model = library.get_peft_model(Net(), config, adapter_name="lora", revision="b")
        assert model.peft_config["lora"].base_model_name_or_path is None and model.peft_config["lora"].revision == "b"

    theirs, mine = told(peft, make), told(ours, make)
    assert mine[0] is theirs[0] is None and sorted(mine[1]) == sorted(theirs[1]) and len(mine[1]) == 3


def test_a_second_time_is_warned_of() -> None:
    model = Net()
    config = ours.LoraConfig(target_modules=["first"])
    adapted = ours.get_peft_model(model, config)
    for again, name in ((model, "b"), (adapted, "c")):
        with pytest.warns(SurgeryWarning, match=r"PEFT for a second time.*make sure to call `.unload\(\)` before"):
            ours.get_peft_model(again, ours.LoraConfig(target_modules=["first"]), name)
    adapted.unload()
    ours.get_peft_model(adapted, config)
    transformer: Any = tiny.llama()[0]
    transformer.name_or_path = "a/base"
    config = ours.LoraConfig(target_modules=["q_proj"])
    assert ours.get_peft_model(transformer, config).peft_config["default"].base_model_name_or_path == "a/base"


def test_two_copies_of_a_module_are_not_live_together() -> None:
    def make(library: Any) -> None:
        fields = {"target_modules": ["first"], "modules_to_save": ["bare"]}
        model = library.get_peft_model(Net(), library.LoraConfig(**fields), mixed=True)
        model.add_adapter("other", library.LoHaConfig(**fields))
        model.add_adapter("plain", library.LoHaConfig(target_modules=["first"]))
        model.set_adapter(["default", "plain"])
        with pytest.raises(ValueError, match="Only one adapter can be set at a time for ModulesToSaveWrapper"):
            model.set_adapter(["default", "other"])
        if library is ours:  # PEFT has changed a part of the layers
            assert model.active_adapters == ["default", "plain"]

    for library in (peft, ours):
        error = told(library, make)[0]
        assert error is None, error


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptTuningConfig"])
def test_a_mixed_model_takes_no_prompts(name: str) -> None:
    def make(library: Any) -> None:
        model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["first"]), mixed=True)
        model.add_adapter("more", getattr(library, name)())

    theirs, mine = told(peft, make)[0], told(ours, make)[0]
    assert isinstance(theirs, ValueError) and isinstance(mine, ValueError) and isinstance(mine, SurgeryError)
    assert str(theirs).partition("Compatible")[0].strip() in str(mine)


def test_a_mixed_model_deletes_several_adapters_or_none() -> None:
    model: Any = ours.get_peft_model(Net(), ours.LoraConfig(target_modules=["first"]), mixed=True)
    for name in ("a", "b"):
        model.add_adapter(name, ours.LoHaConfig(target_modules=["first"]))
    with pytest.raises(
        ValueError, match=r"Adapter\(s\) \['x'\] not found, available adapters: \['a', 'b', 'default'\]"
    ):
        model.delete_adapter(["a", "x"])
    assert set(model.peft_config) == {"default", "a", "b"}
    model.merge_adapter(["b"])
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['b'\] while they are merged"):
        model.delete_adapter(["a", "b"])
    model.unmerge_adapter()
    model.delete_adapter(["a", "b"])
    assert set(model.peft_config) == {"default"} and model.active_adapters == ["default"]


@pytest.mark.parametrize("name", ["default", "other"])
def test_a_merged_adapter_is_not_deleted(name: str) -> None:
    def make(library: Any) -> None:
        model = library.get_peft_model(Net(), library.LoraConfig(target_modules=["first"]))
        model.add_adapter("other", library.LoraConfig(target_modules=["first"]))
        model.merge_adapter([name])
        with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) .* while they are merged. Please unmerge"):
            model.delete_adapter(name)
        assert set(model.peft_config) == {"default", "other"}

    assert told(peft, make)[0] is told(ours, make)[0] is None


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_no_module_has_are_a_warning(bias: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    with pytest.warns(RuntimeWarning, match="trains nothing"):
        adapted = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=["0"], bias=bias))
    assert {name for name, p in adapted.named_parameters() if p.requires_grad} == {
        "0.adapters.default.A",
        "0.adapters.default.B",
    }


CONTAINERS = {
    "ModuleDict": lambda: nn.ModuleDict({"one": nn.Linear(8, 8)}),
    "ModuleList": lambda: nn.ModuleList([nn.Linear(8, 8)]),
    "ParameterDict": lambda: nn.ParameterDict({"one": nn.Parameter(torch.ones(8, 8))}),
    "ParameterList": lambda: nn.ParameterList([nn.Parameter(torch.ones(8, 8))]),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_modules_to_save_names_the_modules_in_a_container(kind: str) -> None:
    for library in (peft, ours):
        model = nn.ModuleDict({"other": nn.Linear(8, 8), "held": CONTAINERS[kind]()})
        before = {name: type(module) for name, module in model.named_modules()}
        config = library.LoraConfig(r=2, target_modules=["other"], modules_to_save=["held"])
        with pytest.raises(TypeError, match=f"modules_to_save cannot be applied to modules of type .*{kind}"):
            library.get_peft_model(model, config)
        if library is ours:
            assert {name: type(module) for name, module in model.named_modules()} == before


def test_rows_of_one_token_are_not_merged_twice() -> None:
    for library in (peft, ours):
        first, second = (
            library.LoraConfig(r=2, target_modules=["inner"], trainable_token_indices={"embed_tokens": rows})
            for rows in ([0, 1], [1, 2])
        )
        model: Any = library.get_peft_model(Tied(False), first, "first")
        model.add_adapter("second", second)
        pattern = "(?s)second.*already defined and would result in undefined merging behavior"
        with pytest.raises(ValueError, match=pattern):
            model.merge_adapter(["first", "second"])
        model.merge_adapter(["first"])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already following adapters were merged")
            with pytest.raises(ValueError, match=pattern):
                model.merge_adapter(["second"])
        assert model.get_model_status().merged_adapters == ["first"]


def test_targets_that_do_not_exist() -> None:
    cases = (
        ("TrainableTokensConfig", {"target_modules": ["none"], "token_indices": [1]}, r"Target modules \['none'\] not"),
        (
            "LoraConfig",
            {"trainable_token_indices": {"none": [1]}, "target_modules": ["inner"]},
            "Target modules {'none",
        ),
        (
            "LoraConfig",
            {"target_modules": ["inner"], "modules_to_save": ["inner"]},
            "No modules were targeted for adaptation. This might be caused by a combination",
        ),
        (
            "LoraConfig",
            {"target_modules": ["inner"], "modules_to_save": ["embed_tokens"]}
            | {"trainable_token_indices": {"embed_tokens": [1]}},
            "The embedding layer is already marked to be trained fully",
        ),
        (
            "LoraConfig",
            {"target_modules": ["inner"], "trainable_token_indices": {"embed_tokens": [1], "lm_head": [2]}}
            | {"ensure_weight_tying": True},
            "Cannot ensure weight tying when different token indices are specified",
        ),
    )
    for library in (peft, ours):
        for name, fields, pattern in cases:
            config = getattr(library, name)(**fields)
            error, _ = told(library, lambda library, config=config: library.get_peft_model(Tied(), config))
            assert isinstance(error, ValueError) and re.search(pattern, str(error)), library
            assert re.search(pattern, repr(error)), library


def test_pissa_beside_another_adapter_is_told(tmp_path: Path) -> None:
    plain = ours.get_peft_model(nn.Sequential(nn.Linear(8, 8)), ours.LoraConfig(r=2, target_modules=["0"]))
    plain.save_pretrained(tmp_path)
    for library in (peft, ours):
        for start, name in (("pissa", "PiSSA"), ("olora", "OLoRA")):
            config = library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=start)
            model = library.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
            with pytest.warns(UserWarning, match=f"^{name} changes the base weights"):
                model.load_adapter(tmp_path, "other")


def test_a_merge_that_unties_says_so() -> None:
    for tied in (True, False):
        model: Any = tiny.llama(layers=1)[0]
        model.config.tie_word_embeddings = tied
        if tied:
            model.lm_head.weight = model.get_input_embeddings().weight
        config = ours.LoraConfig(r=2, target_modules=["embed_tokens"], init_lora_weights=False)
        with warnings.catch_warnings(record=True) as notes:
            warnings.simplefilter("always")
            merged = ours.get_peft_model(model, config).merge_and_unload()
        assert any("Setting `tie_word_embeddings=False`" in str(note.message) for note in notes) == tied
        assert not merged.config.tie_word_embeddings


@pytest.mark.filterwarnings("ignore")
def test_a_merge_corrects_a_config_that_says_tied_of_weights_that_are_not() -> None:
    """A file of the model would be loaded with one of the two weights in both places."""
    for library in (peft, ours):
        model: Any = tiny.llama(layers=1)[0]
        assert model.lm_head.weight is not model.get_input_embeddings().weight
        model.config.tie_word_embeddings = True
        made = library.get_peft_model(model, library.LoraConfig(target_modules=["embed_tokens"]))
        with pytest.warns(UserWarning, match="tie_word_embeddings=False"):
            merged = made.merge_and_unload()
        assert merged.config.tie_word_embeddings is False


def test_gradients_of_an_adapter_that_is_not_active() -> None:
    found = []
    for library in (peft, ours):
        config = library.LoraConfig(r=2, target_modules=["0"])
        model: Any = library.get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
        model.add_adapter("other", config)
        states = [dict(model.get_model_status().requires_grad)]
        model.set_requires_grad("other")
        model.set_requires_grad("default", requires_grad=False)
        states.append(dict(model.get_model_status().requires_grad))
        model.set_adapter("other")
        states.append(dict(model.get_model_status().requires_grad))
        found.append(states)
    assert found[0] == found[1]
    assert found[0][1] == {"default": False, "other": True}
