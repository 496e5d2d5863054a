"""`surgery.peft` beside PEFT: the same configurations, lines, files and outputs, method by method and verb by verb."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import surgery
import surgery.peft as ours
from surgery import LoadError, PlanError, SurgeryError, SurgeryWarning, apply_rules, base_state_dict
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support import ROOT
from tests.support.facade_models import CLOSE, bert, llama, moved, out, same_adapters, tiny, two
from tests.support.hub_server import hub
from tests.support.peers import peft

load_file: Any = pytest.importorskip("safetensors.torch").load_file

quiet = pytest.mark.filterwarnings("ignore")  # PEFT's own

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "lora by its defaults": ("LoraConfig", {"target_modules": None}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "all-linear": ("LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    "a regular expression": ("LoraConfig", {"r": 4, "target_modules": r".*\.0\.attention.*(query|key)"}),
    "patterns": ("LoraConfig", {"r": 4, "layers_to_transform": [0], "rank_pattern": {"query": 2}}),
    "biases": ("LoraConfig", {"r": 4, "bias": "lora_only"}),
    "pissa": ("LoraConfig", {"r": 2, "init_lora_weights": "pissa"}),
    "ia3": ("IA3Config", {"target_modules": ["key", "output.dense"]}),
    "ia3 by its defaults": ("IA3Config", {"target_modules": None}),
    "vera": ("VeraConfig", {"r": 4}),
    "loha": ("LoHaConfig", {"r": 2}),
    "lokr": ("LoKrConfig", {"r": 2}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {}),
    "hra": ("HRAConfig", {"r": 4}),
    "road": ("RoadConfig", {"group_size": 8}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "fourier": ("FourierFTConfig", {"n_frequency": 20}),
    "shira": ("ShiraConfig", {"r": 2}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "norms": ("LNTuningConfig", {"target_modules": ["LayerNorm"]}),
    "miss": ("MissConfig", {"r": 4}),
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
}


def line(model: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.print_trainable_parameters()
    return printed.getvalue()


# Configurations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(kind.__name__ for kind in ours.PeftConfig.kinds.values()))
def test_configurations_have_pefts_fields_and_defaults(name: str) -> None:
    def defaults(kind: Any) -> dict[str, Any]:
        found = {f.name: f.default_factory() if callable(f.default_factory) else f.default
                 for f in dataclasses.fields(kind)}  # fmt: skip
        if "runtime_config" in found:
            found["runtime_config"] = vars(found["runtime_config"])
        return found

    assert defaults(getattr(ours, name)) == defaults(getattr(peft, name))


def test_configurations_say_what_is_wrong() -> None:
    with pytest.raises(SurgeryError, match="Invalid task type: 'SEQ_CSL'(?s:.)*did you mean 'SEQ_CLS'"):
        ours.LoraConfig(task_type="SEQ_CSL")
    with pytest.raises(TypeError, match="rank"):
        ours.LoraConfig(rank=3)  # type: ignore[call-arg]
    with pytest.raises(SurgeryError, match="no configuration of 'LORRA'(?s:.)*LORA"):
        ours.PeftConfig.from_dict({"peft_type": "LORRA"})
    with pytest.warns(SurgeryWarning, match=r"Unexpected keyword arguments \['of_tomorrow'\] for class LoraConfig"):
        ours.PeftConfig.from_dict({"peft_type": "LORA", "of_tomorrow": 3})


def test_configurations_in_files(tmp_path: Path) -> None:
    mine = ours.LoraConfig(r=3, target_modules=["b", "a"], task_type=ours.TaskType.CAUSAL_LM)
    mine.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftConfig.from_pretrained(tmp_path / "ours")
    assert (theirs.r, theirs.target_modules, theirs.task_type) == (3, {"a", "b"}, "CAUSAL_LM")
    theirs.save_pretrained(tmp_path / "theirs")
    back = ours.PeftConfig.from_pretrained(tmp_path / "theirs")
    assert back.peft_version == mine.peft_version == theirs.peft_version
    assert back == mine and isinstance(back, ours.LoraConfig)
    with pytest.raises(SurgeryError, match="Can't find 'adapter_config.json'"):
        ours.PeftConfig.from_pretrained(tmp_path)


def test_the_targets_by_default_are_pefts() -> None:
    from peft.utils import constants

    from surgery.peft.defaults import with_defaults

    names = {"LN_TUNING": "LNTUNING"}
    for kind in ours.PeftConfig.kinds.values():
        table = f"TRANSFORMERS_MODELS_TO_{names.get(str(kind.method), kind.method)}_TARGET_MODULES_MAPPING"
        for model_type, targets in getattr(constants, table, {}).items():
            model: Any = nn.Module()
            model.config = {"model_type": model_type}
            needed: dict[str, Any] = {"total_step": 10} if kind.method == "ADALORA" else {}
            found: Any = with_defaults(kind(**needed), model)
            assert found.target_modules == (targets if isinstance(targets, str) else set(targets)), (table, model_type)
            if kind.method == "IA3":
                fed = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[model_type]
                assert found.feedforward_modules == set(fed)
    with pytest.raises(SurgeryError, match="Please specify `target_modules`"):
        ours.get_peft_model(nn.Sequential(nn.Linear(2, 2)), ours.LoraConfig())


# Each method --------------------------------------------------------------------------------------------------------


@quiet
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_pefts(name: str, task: str | None, tmp_path: Path) -> None:
    """The same counts, the same keys and shapes in the file; each reads the other's, and computes the same."""
    kind, fields = METHODS[name]
    fields = {"target_modules": ["query", "value"], "task_type": task, **fields}
    base, example = bert()
    made = {}
    for library, called in ((peft, "peft"), (ours, "ours")):
        made[called] = moved(library.get_peft_model(copy.deepcopy(base), getattr(library, kind)(**fields))).eval()
        made[called].save_pretrained(tmp_path / called)
    theirs, mine = made["peft"], made["ours"]
    if kind == "AdaLoraConfig":  # PEFT has a Parameter more a site, which counts its ranks
        assert theirs.get_nb_trainable_parameters()[0] == mine.get_nb_trainable_parameters()[0]
    else:
        assert line(theirs) == line(mine) or fields.get("bias")  # PEFT trains the base's own biases, and no copies
    a, b = ({k: v.shape for k, v in load_file(tmp_path / n / "adapter_model.safetensors").items()} for n in made)
    if kind == "RandLoraConfig":  # PEFT writes the random matrices for each site again
        a = {key: shape for key, shape in a.items() if key in b}
    assert a == b
    for folder, model in made.items():
        read = ours.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder)
        torch.testing.assert_close(out(read, example), out(model, example), **CLOSE)
        assert not any(parameter.requires_grad for parameter in read.parameters()) and not read.training
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(out(again, example), out(mine, example), **CLOSE)


VIRTUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix": ("PrefixTuningConfig", {}),
    "prefix with an mlp": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}),
    "prefix with an mlp of the model's width": ("PrefixTuningConfig", {"prefix_projection": True}),
    "prompt": ("PromptTuningConfig", {}),
    "prompt of the vocabulary": ("PromptTuningConfig", {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "p-tuning": ("PromptEncoderConfig", {"encoder_hidden_size": 16}),
    "p-tuning, lstm": ("PromptEncoderConfig", {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 1}),
    "adaption": ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
}


@quiet
@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_pefts(name: str, tmp_path: Path) -> None:
    kind, fields = VIRTUAL[name]
    length = {} if kind == "AdaptionPromptConfig" else {"num_virtual_tokens": 5}
    base, example = llama()
    made = {}
    for library, called in ((peft, "peft"), (ours, "ours")):
        config = getattr(library, kind)(task_type="CAUSAL_LM", **length, **fields)
        made[called] = moved(library.get_peft_model(copy.deepcopy(base), config)).eval()
        made[called].save_pretrained(tmp_path / called)
    assert isinstance(made["ours"], ours.PeftModelForCausalLM)
    if "an mlp" not in name:  # PEFT's MLP has another layer than the paper's
        assert line(made["peft"]) == line(made["ours"])
    for folder, model in made.items():
        for library in (ours, peft):
            read = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / folder).eval()
            a, b = out(read, example), out(model, example)
            torch.testing.assert_close(a[:, -7:], b[:, -7:], **CLOSE)  # PEFT's outputs hold the virtual tokens, too


@quiet
def test_a_prompt_starts_as_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizers: Any = pytest.importorskip("tokenizers")
    transformers: Any = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"good": 7, "or": 8, "bad": 9, "?": 0}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path)
    base, _ = llama()
    fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "good or bad", "num_virtual_tokens": 4}
    config = ours.PromptTuningConfig(task_type="CAUSAL_LM", tokenizer_name_or_path=str(tmp_path), **fields)
    model: Any = ours.get_peft_model(base, config)
    prompt = ours.get_peft_model_state_dict(model)["prompt_embeddings"]
    assert torch.equal(prompt, base.get_input_embeddings().weight[[7, 8, 9, 7]])
    with pytest.raises(SurgeryError, match="tokenizer_name_or_path"):
        ours.get_peft_model(llama()[0], ours.PromptTuningConfig(task_type="CAUSAL_LM", **fields))
    config.tokenizer_kwargs = {"trust_remote_code": True, "padding_side": "left"}  # a file's, for all that is known
    asked: list[dict[str, Any]] = []
    load = transformers.AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", lambda name, **options: (asked.append(options), load(name))[1]
    )
    with pytest.warns(UserWarning, match="trust_remote_code"):
        model = ours.get_peft_model(llama()[0], config)
    model.save_pretrained(tmp_path / "saved")
    for library in (peft, ours):  # the configuration tells how the prompt started, as PEFT's files do
        read = library.PromptTuningConfig.from_pretrained(tmp_path / "saved")
        assert read.prompt_tuning_init == "TEXT" and read.tokenizer_kwargs == config.tokenizer_kwargs
        library.PeftModel.from_pretrained(llama()[0], tmp_path / "saved")
    read.inference_mode = False
    with pytest.warns(UserWarning, match="trust_remote_code"):
        ours.PromptEmbedding(read, base.get_input_embeddings())
    assert asked == [{"padding_side": "left"}] * 2


@quiet
def test_positions_of_a_call_with_a_prefix_are_the_texts(tmp_path: Path) -> None:
    base, example = llama()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    theirs = moved(peft.get_peft_model(copy.deepcopy(base), config)).eval()
    theirs.save_pretrained(tmp_path)
    model = ours.PeftModel.from_pretrained(base, tmp_path).eval()
    for step in (1, 2):
        example["position_ids"] = (step * torch.arange(7)).expand(2, -1)
        torch.testing.assert_close(out(model, example), out(theirs, example), **CLOSE)


@quiet
@pytest.mark.parametrize("family", ["bloom", "t5"])
def test_what_pefts_format_can_not_hold_is_written_all_the_same(family: str, tmp_path: Path) -> None:
    """PEFT's prefix shifts positions. Where nothing makes up for that, a prefix is kept in the library's own format."""
    torch.manual_seed(0)
    if family == "t5":
        base, example = tiny.FAMILIES[family]()
    else:
        config = transformers.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
        base, example = transformers.BloomForCausalLM(config), {"input_ids": torch.randint(4, 60, (2, 7))}
    base.eval()
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    made = []
    for library in (peft, ours):
        config = library.PrefixTuningConfig(task_type=task, num_virtual_tokens=4)
        made.append(library.get_peft_model(copy.deepcopy(base), config))
    assert line(made[0]) == line(made[1])
    model = moved(made[1]).eval()
    with pytest.warns(SurgeryWarning, match="can't hold this PrefixRule"):
        model.save_pretrained(tmp_path)
    read = ours.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(out(read, example), out(model, example))
    moved(model, seed=3)
    model.load_adapter(tmp_path, "default")
    assert torch.equal(out(read, example), out(model, example))


def test_what_can_not_be_held_is_refused_and_the_model_as_it_was() -> None:
    model, _ = bert()
    before = Snapshot(model)
    for fields, match in (
        ({"init_lora_weights": "eva", "eva_config": {}}, "init_lora_weights='eva'"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"use_qalora": True}, "use_qalora"), ({"layer_replication": [(0, 9)]}, "there is no layer"),
        ({"target_modules": ["qurey"]}, "query"), ({"r": 0}, "rank=0"),
    ):  # fmt: skip
        with pytest.raises(SurgeryError, match=match):
            ours.get_peft_model(model, ours.LoraConfig(**{"target_modules": ["query"], **fields}))
        assert before.differences(model) == []
    with pytest.raises(SurgeryError, match="is not a configuration"):
        ours.get_peft_model(model, {"r": 3})
    with pytest.raises(SurgeryError, match="is not a model"):
        ours.get_peft_model("bert", ours.LoraConfig())  # type: ignore[arg-type]
    assert before.differences(model) == []


@quiet
def test_pefts_own_configuration_will_do() -> None:
    model, example = bert()
    mine = ours.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    assert isinstance(mine, ours.PeftModelForSequenceClassification)
    assert isinstance(mine.peft_config["default"], ours.LoraConfig)


# The façade ---------------------------------------------------------------------------------------------------------


def test_it_passes_for_the_model() -> None:
    base, example = bert()
    kind, expected = type(base), out(base, example)
    names = [name for name, _ in base.named_parameters()]
    model: Any = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["query"]))
    assert isinstance(model, nn.Module) and isinstance(model, kind) and isinstance(model, ours.PeftModel)
    assert type(base) is kind and model.get_base_model() is base is model.base_model.model
    assert torch.equal(out(model, example), expected)
    assert [name for name, _ in model.named_parameters() if ".adapters." not in name] == names
    assert model.config is base.config and list(model.state_dict()) == list(base.state_dict())
    model.remark = "on the model"
    assert base.remark == "on the model" and "remark" in model.__dict__
    del model.remark
    assert not hasattr(base, "remark") and not hasattr(model, "remark")
    assert model.train() is model and base.training
    assert model.to(torch.float64) is model and model.eval() is model and model.requires_grad_(False) is model
    assert base.classifier.weight.dtype is torch.float64
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = model.nothing_like_it
    inside = nn.ModuleDict({"inner": model})
    assert [name for name, _ in inside.named_parameters()][0] == "inner." + names[0]
    assert inside["inner"](**example)[0].shape == (2, 2) and "LoraConfig" not in repr(model)
    assert surgery.summary(model).added == surgery.summary(base).added > 0


def test_copies_and_pickles() -> None:
    model, example, _ = two(ours)
    expected = out(model, example)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model) and copied.get_base_model() is not model.get_base_model()
        assert torch.equal(out(copied, example), expected) and list(copied.peft_config) == ["default", "other"]
        copied.set_adapter("other")
        assert model.active_adapter == "default" and not torch.equal(out(copied, example), expected)
    assert copy.copy(model).get_base_model() is model.get_base_model()


@pytest.mark.slow("the façade is the model itself, which is compiled elsewhere")
@quiet
def test_compiled() -> None:
    model, example, _ = two(ours)
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**example).logits, out(model, example))
        model.set_adapter("other")
        torch.testing.assert_close(compiled(**example).logits, out(model, example))
    names = [name for name, _ in compiled.named_parameters()]
    assert names[0].removeprefix("_orig_mod.") == next(iter(dict(model.named_parameters())))


def test_exported() -> None:
    model, example, _ = two(ours)
    program: Any = torch.export.export(model, (), {**example, "use_cache": False})
    torch.testing.assert_close(program.module()(**example, use_cache=False).logits, out(model, example))
    assert model.model.layers is model.get_base_model().model.layers  # names are the model's own


@quiet
@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generate(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, _ = tiny.FAMILIES[family]()
    task = "SEQ_2_SEQ_LM" if family == "t5" else "CAUSAL_LM"
    made, texts = {}, {}
    for library, called in ((peft, "peft"), (ours, "ours")):
        made[called] = library.get_peft_model(
            copy.deepcopy(base), library.LoraConfig(task_type=task, r=4, init_lora_weights=False)
        ).eval()
        if called == "ours":
            same_adapters(made["peft"], made["ours"])
        texts[called] = made[called].generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=6, do_sample=False)
    assert torch.equal(texts["peft"], texts["ours"])
    kind = ours.PeftModelForSeq2SeqLM if family == "t5" else ours.PeftModelForCausalLM
    assert type(made["ours"]) is kind


# Verbs, beside PEFT's -----------------------------------------------------------------------------------------------


@quiet
def test_switching() -> None:
    theirs, example, _ = two(peft)
    mine, _, base = two(ours)
    plain = out(llama()[0], example)
    same_adapters(theirs, mine)

    def check() -> None:
        torch.testing.assert_close(out(mine, example), out(theirs, example), **CLOSE)
        assert mine.active_adapters == theirs.active_adapters and mine.active_adapter == theirs.active_adapter
        trained = {n for n, p in theirs.named_parameters() if p.requires_grad}
        assert {n.split(".adapters.")[1].split(".")[0] for n, p in mine.named_parameters() if p.requires_grad} == {
            n.split(".")[-2] for n in trained
        }
        assert line(mine) == line(theirs)

    check()
    for model in (theirs, mine):
        model.set_adapter("other")
    check()
    for model in (theirs, mine):
        model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(out(mine, example), out(theirs, example), **CLOSE)
    for model in (theirs, mine):
        model.set_adapter("default")
        with model.disable_adapter():
            assert torch.equal(out(model, example), plain)
            assert model.active_adapter == "default"
    check()
    for model in (theirs, mine):
        model.base_model.disable_adapter_layers()
        torch.testing.assert_close(out(model, example), plain)
        assert model.active_adapters == ["default"]
        model.base_model.enable_adapter_layers()
    check()
    mine.disable_adapter_layers()
    mine.set_adapter("other")
    assert torch.equal(out(mine, example), plain)
    mine.enable_adapter_layers()
    theirs.set_adapter("other")
    check()
    mine.set_adapter("default", inference_mode=True)
    assert not any(parameter.requires_grad for parameter in mine.parameters())
    with surgery.route(base, ["other", "default"]), pytest.raises(surgery.SurgeryError, match="are routed"):
        mine.set_requires_grad("other")
    mine.set_requires_grad("default")
    assert mine.get_nb_trainable_parameters()[0] > 0
    assert mine.active_peft_config is mine.peft_config["default"] and mine.peft_type == "LORA"


@quiet
def test_merging() -> None:
    theirs, example, _ = two(peft)
    mine, _, base = two(ours)
    same_adapters(theirs, mine)
    before, bits = out(mine, example), {k: v.clone() for k, v in base_state_dict(base).items()}
    for model in (theirs, mine):
        model.merge_adapter()
    torch.testing.assert_close(out(mine, example), out(theirs, example), **CLOSE)
    mine.unmerge_adapter()
    assert torch.equal(out(mine, example), before)
    assert all(torch.equal(tensor, bits[key]) for key, tensor in base_state_dict(base).items())
    for model in (theirs, mine):
        model.merge_adapter(["other"], safe_merge=True)
    mine.unmerge_adapter()
    theirs.unmerge_adapter()
    for verb in ("set_adapter", "disable_adapter"):
        mine.merge_adapter()
        with pytest.warns(SurgeryWarning, match="Unmerging the model first"):
            if verb == "set_adapter":
                mine.set_adapter("default")
            else:
                with mine.disable_adapter():
                    pass
        assert torch.equal(out(mine, example), before)
    plain = [model.merge_and_unload(safe_merge=True) for model in (theirs, mine)]
    assert plain[1] is base and not any("adapters" in key for key in base.state_dict())
    torch.testing.assert_close(out(plain[1], example), out(plain[0], example), **CLOSE)
    assert list(plain[1].state_dict()) == list(bits) and all(p.requires_grad for p in base.parameters())
    assert mine.peft_config == {} and mine.active_adapters == []
    again = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["q_proj"]))
    assert torch.equal(out(again, example), out(base, example))


def test_unload_and_delete() -> None:
    model, example, base = two(ours)
    fresh = llama()[0]
    expected = out(fresh, example)
    model.set_adapter("other")
    with pytest.warns(SurgeryWarning, match="Setting active adapter to default"):
        model.delete_adapter("other")
    assert model.active_adapter == "default" and list(model.peft_config) == ["default"]
    with pytest.raises(SurgeryError, match="Adapter other does not exist"):
        model.delete_adapter("other")
    model.merge_adapter()
    assert model.unload() is base and torch.equal(out(base, example), expected)
    assert all(torch.equal(a, b) for a, b in zip(base.state_dict().values(), fresh.state_dict().values(), strict=True))
    model.add_adapter("again", ours.LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.active_adapter == "again"
    model.delete_adapter("again")
    assert model.active_adapters == [] and torch.equal(out(model, example), expected)


def test_prefixes_are_not_merged() -> None:
    model, example = llama()
    made = ours.get_peft_model(model, ours.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    expected = out(made, example)
    with pytest.raises(PlanError, match="can't be merged"):
        made.merge_and_unload()
    assert torch.equal(out(made, example), expected) and made.active_adapter == "default"


@quiet
def test_state_dicts() -> None:
    theirs, example, _ = two(peft)
    mine, _, _ = two(ours)
    for name in ("default", "other"):
        a = peft.get_peft_model_state_dict(theirs, adapter_name=name)
        b = ours.get_peft_model_state_dict(mine, adapter_name=name)
        assert {key: tensor.shape for key, tensor in a.items()} == {key: tensor.shape for key, tensor in b.items()}
    same_adapters(theirs, mine)
    torch.testing.assert_close(out(mine, example), out(theirs, example), **CLOSE)
    state = {key: tensor * 2 for key, tensor in mine.state_dict().items()}
    doubled = ours.get_peft_model_state_dict(mine, state_dict=state)
    assert all(torch.equal(doubled[key], b * 2) for key, b in ours.get_peft_model_state_dict(mine).items())
    some = dict(list(doubled.items())[1:])
    found = ours.set_peft_model_state_dict(mine, {**some, "elsewhere": torch.ones(2)})
    assert found.missing_keys == list(doubled)[:1] and found.unexpected_keys == ["elsewhere"]
    before = out(mine, example)
    broken = {**doubled, list(doubled)[-1]: torch.ones(3)}
    with pytest.raises(LoadError, match="does not fit"):
        ours.set_peft_model_state_dict(mine, broken)
    assert torch.equal(out(mine, example), before)
    for call in (ours.get_peft_model_state_dict, lambda m, **k: ours.set_peft_model_state_dict(m, {}, **k)):
        with pytest.raises(SurgeryError, match="no adapter 'dfault'(?s:.)*default"):
            call(mine, adapter_name="dfault")


# Files --------------------------------------------------------------------------------------------------------------


@quiet
def test_folders_of_several_adapters(tmp_path: Path) -> None:
    mine, example, _ = two(ours)
    theirs, _, _ = two(peft)
    for model, called in ((theirs, "peft"), (mine, "ours")):
        model.save_pretrained(tmp_path / called)
        model.save_pretrained(tmp_path / called / "one", selected_adapters=["other"])
    found = [
        sorted(str(p.relative_to(tmp_path / n)) for p in (tmp_path / n).rglob("adapter_*")) for n in ("peft", "ours")
    ]
    assert found[0] == found[1] and len(found[0]) == 6
    expected = {}
    for name in ("default", "other"):
        mine.set_adapter(name)
        expected[name] = out(mine, example)
    for library in (peft, ours):
        model = library.PeftModel.from_pretrained(llama()[0], tmp_path / "ours", is_trainable=True)
        model.load_adapter(tmp_path / "ours" / "other", adapter_name="other")
        model.eval()
        assert model.active_adapter == "default" and list(model.peft_config) == ["default", "other"]
        torch.testing.assert_close(out(model, example), expected["default"], **CLOSE)
        model.set_adapter("other")
        torch.testing.assert_close(out(model, example), expected["other"], **CLOSE)
    assert torch.equal(out(model, example), expected["other"])
    for wrong in ({"selected_adapters": ["othr"]},):
        with pytest.raises(SurgeryError, match="(?s)invalid `selected_adapters`.*did you mean 'other'"):
            mine.save_pretrained(tmp_path / "none", **wrong)
    assert not (tmp_path / "none").exists()
    mine.save_pretrained(tmp_path / "idle", is_main_process=False)
    assert not (tmp_path / "idle").exists()


@quiet
def test_adapters_with_heads_of_their_own(tmp_path: Path) -> None:
    base, example = bert()
    config = ours.LoraConfig(task_type="SEQ_CLS", r=2, init_lora_weights=False)
    model = ours.get_peft_model(copy.deepcopy(base), config)
    model.add_adapter("other", config)
    assert model.active_adapter == "default"
    expected = {}
    for seed, name in enumerate(("default", "other")):
        model.set_adapter(name)
        expected[name] = out(moved(model.eval(), seed), example)
    model.save_pretrained(tmp_path)
    for library in (peft, ours):
        read = library.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        read.load_adapter(tmp_path / "other", "other")
        for name in ("other", "default"):
            read.set_adapter(name)
            torch.testing.assert_close(out(read.eval(), example), expected[name], **CLOSE)


@quiet
def test_targets_by_default_in_some_layers_alone(tmp_path: Path) -> None:
    base, example = llama()
    fields = {"layers_to_transform": [1], "layers_pattern": "layers", "init_lora_weights": False}
    model = ours.get_peft_model(copy.deepcopy(base), ours.LoraConfig(task_type="CAUSAL_LM", **fields)).eval()
    model.save_pretrained(tmp_path)
    read = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(out(read, example), out(model, example), **CLOSE)


def test_prompts_by_pefts_names_for_their_starts(tmp_path: Path) -> None:
    base, example = llama()
    kind = ours.PromptEncoderReparameterizationType.MLP
    fields: dict[str, Any] = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "encoder_hidden_size": 8}
    model = ours.get_peft_model(base, ours.PromptEncoderConfig(encoder_reparameterization_type=kind, **fields)).eval()
    model.save_pretrained(tmp_path, state_dict=model.state_dict())  # what the encoder makes of them, and no others
    read = ours.PeftModel.from_pretrained(llama()[0], tmp_path)
    torch.testing.assert_close(out(read, example), out(model, example), **CLOSE)
    assert isinstance(read.peft_config["default"], ours.PromptEncoderConfig)
    vocab = ours.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, prompt_tuning_init=ours.PromptTuningInit.SAMPLE_VOCAB
    )
    assert ours.get_peft_model(llama()[0], vocab).peft_config["default"].prompt_tuning_init == "SAMPLE_VOCAB"


def test_a_second_facade_knows_the_first_ones_adapters() -> None:
    model, _, base = two(ours)
    config = ours.LoraConfig(r=2, target_modules=["k_proj"])
    with pytest.raises(SurgeryError, match="Adapter with name 'default' already exists"):
        ours.get_peft_model(model, config)
    with pytest.warns(SurgeryWarning, match="for a second time"):
        again = ours.get_peft_model(model, config, "third")
    assert list(again.peft_config) == list(model.peft_config) == ["default", "other", "third"]
    assert again.get_base_model() is base and again.active_adapters == model.active_adapters == ["third"]


@quiet
def test_loading(tmp_path: Path) -> None:
    mine, example, _ = two(ours)
    mine.save_pretrained(tmp_path)
    expected = out(mine, example)
    config = ours.PeftConfig.from_pretrained(tmp_path)
    read = ours.PeftModel.from_pretrained(llama()[0], tmp_path, config=config, is_trainable=True)
    assert torch.equal(out(read, example), expected) and read.get_nb_trainable_parameters()[0] > 0
    frozen = ours.PeftModel.from_pretrained(llama()[0], tmp_path, adapter_name="mine")
    assert frozen.active_adapter == "mine" and frozen.get_nb_trainable_parameters()[0] == 0
    frozen.set_adapter("mine")  # as in PEFT: what is set is trained
    assert frozen.get_nb_trainable_parameters()[0] == read.get_nb_trainable_parameters()[0]
    moved(read)
    read.load_adapter(tmp_path, "default")  # into the adapter that is there
    assert torch.equal(out(read, example), expected)
    with pytest.warns(SurgeryWarning, match="another base"):
        other = ours.PeftModel.from_pretrained(llama(seed=9)[0], tmp_path)
    assert other.active_adapter == "default"
    moved(other)
    with pytest.warns(SurgeryWarning, match="another base"):
        other.load_adapter(tmp_path, "default")
    halved = {"r": 4, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]}  # in the place of the folder's own
    given = ours.PeftModel.from_pretrained(llama()[0], tmp_path, config=ours.LoraConfig(**halved))
    theirs = peft.PeftModel.from_pretrained(llama()[0], tmp_path, config=peft.LoraConfig(**halved))
    torch.testing.assert_close(out(given, example), out(theirs, example), **CLOSE)
    assert not torch.allclose(out(given, example), expected, **CLOSE)
    plain = llama()[0]
    before = Snapshot(plain)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\0" * 40)
    givens: list[dict[str, Any]] = [{}, {"config": config}]
    for given in givens:
        with pytest.raises(SurgeryError):
            ours.PeftModel.from_pretrained(plain, tmp_path, **given)
        assert before.differences(plain) == []
    with pytest.raises(SurgeryError, match="key_mapping"):
        mine.load_adapter(tmp_path, "new", key_mapping={"a": "b"})


@quiet
def test_auto_classes(tmp_path: Path) -> None:
    base, example = llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base").eval()
    config = ours.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    model = ours.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["base_model_name_or_path"]
    read = ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(read, ours.PeftModelForCausalLM) and torch.equal(out(read, example), out(model.eval(), example))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(out(theirs, example), out(model, example), **CLOSE)
    with pytest.raises(ValueError, match="with a task type"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")


# Low level ----------------------------------------------------------------------------------------------------------


def test_inject() -> None:
    base, example = llama()
    expected = out(base, example)
    assert ours.inject_adapter_in_model(ours.LoraConfig(r=2, target_modules=["q_proj"]), base, "mine") is base
    assert torch.equal(out(base, example), expected) and surgery.active(base) == ("mine",)
    with pytest.raises(SurgeryError, match="state_dict"):
        ours.inject_adapter_in_model(ours.LoraConfig(), base, "more", state_dict={})


@quiet
def test_weighted_adapters() -> None:
    if not hasattr(surgery, "combine"):
        pytest.skip("surgery has no combine")
    theirs, example, _ = two(peft)
    mine, _, _ = two(ours)
    same_adapters(theirs, mine)
    for model in (theirs, mine):
        model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "both", combination_type="cat")
        assert model.active_adapter == "default"
        model.set_adapter("both")
    torch.testing.assert_close(out(mine, example), out(theirs, example), **CLOSE)
    assert mine.peft_config["both"].r == theirs.peft_config["both"].r == 6
    assert line(mine) == line(theirs)
    with pytest.raises(SurgeryError, match="1 weights for 2 adapters"):
        mine.add_weighted_adapter(["default", "other"], [1.0], "third")


@quiet
def test_rows_with_adapters_of_their_own() -> None:
    if not hasattr(surgery, "route"):
        pytest.skip("surgery has no route")
    theirs, example, _ = two(peft)
    mine, _, _ = two(ours)
    same_adapters(theirs, mine)
    rows = {**example, "adapter_names": ["other", "__base__"]}
    torch.testing.assert_close(out(mine, rows), out(theirs, rows), **CLOSE)
    ids: dict[str, Any] = {"input_ids": example["input_ids"], "max_new_tokens": 4, "do_sample": False}
    ids["adapter_names"] = ["default", "other"]
    assert torch.equal(mine.generate(**ids), theirs.generate(**ids))
    with pytest.raises(SurgeryError, match="othr"):
        mine(**example, adapter_names=["othr", "default"])


def test_the_trainer_takes_a_quantised_model_with_adapters() -> None:
    from transformers.trainer_utils import validate_quantization_for_training

    model, _, base = two(ours)
    base.is_quantized = True
    base.hf_quantizer = types.SimpleNamespace(is_trainable=True, is_qat_trainable=False)
    validate_quantization_for_training(model)
    with pytest.raises(ValueError, match="purely quantized"):
        validate_quantization_for_training(base)
    assert surgery.active(model) == ("default",)  # and it is no adapter of PEFT's


def test_a_quantised_model_is_made_ready() -> None:
    model, _ = llama()
    model.to(torch.bfloat16)
    assert ours.prepare_model_for_kbit_training(model) is model
    assert all(p.dtype is torch.float32 and not p.requires_grad for p in model.parameters())
    assert model.is_activation_checkpointing


@quiet
def test_adapters_of_transformers_on_the_same_model_are_told_of(tmp_path: Path) -> None:
    config = {"r": 2, "target_modules": ["q_proj"]}
    first, _ = llama()
    first.add_adapter(peft.LoraConfig(**config))
    with pytest.raises(SurgeryError, match="has adapters of PEFT"):
        ours.get_peft_model(first, ours.LoraConfig(**config))
    model, _, base = two(ours)
    model.save_pretrained(tmp_path)
    for later in (lambda m: m.add_adapter(peft.LoraConfig(**config)), lambda m: m.load_adapter(str(tmp_path))):
        base = copy.deepcopy(model).get_base_model()
        later(base)
        for verb in (
            lambda m: surgery.activate(m, "other"), surgery.merge, surgery.remove, surgery.adapters,
            lambda m: apply_rules(m, LoraRule("k_proj"), adapter="third"),
        ):  # fmt: skip
            with pytest.raises(SurgeryError, match="PEFT's adapters were added to this model after|adapters of PEFT's"):
                verb(base)
    with pytest.raises(SurgeryError, match="PEFT's PeftModel"):
        ours.get_peft_model(peft.get_peft_model(llama()[0], peft.LoraConfig(**config)), ours.LoraConfig(**config))


def test_an_adapter_that_can_not_be_idle_goes_again() -> None:
    model, example, base = two(ours)
    expected = out(model, example)
    with pytest.raises(SurgeryError, match="can't be idle"):
        model.add_adapter("third", ours.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights="pissa"))
    assert list(model.peft_config) == list(surgery.adapters(base)) == ["default", "other"]
    assert torch.equal(out(model, example), expected) and model.active_adapter == "default"


def test_hub(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its endpoint when it is imported."""
    pytest.importorskip("huggingface_hub")
    code = """
import torch
from torch import nn
import surgery.peft as ours

def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

x = torch.ones(1, 4)
config = ours.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
model = ours.get_peft_model(base(), config)
model.add_adapter("other", config)
print(model.push_to_hub("me/topics", commit_message="two adapters", token="hf_x"))
read = ours.PeftModel.from_pretrained(base(), "me/topics")
assert torch.equal(read(x), model(x))
read.load_adapter("me/topics", "other", subfolder="other")
model.set_adapter("other")
read.set_adapter("other")
assert torch.equal(read(x), model(x))
"""
    with hub() as (address, held):
        env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, cwd=ROOT)
        assert ran.returncode == 0, ran.stderr[-2000:]
        assert "me/topics" in ran.stdout
        assert {"adapter_config.json", "other/adapter_config.json", "README.md"} <= held["me/topics"].keys()


class Sizes(nn.Module):
    """An embedding and a layer, without a config that tells the vocabulary."""

    def __init__(self, tokens: int):
        super().__init__()
        self.emb, self.lin = nn.Embedding(tokens, 8), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lin(self.emb(ids))


@quiet
def test_tensors_of_other_sizes_are_passed_over_if_asked(tmp_path: Path) -> None:
    made: dict[Any, Any] = {}
    for library in (peft, ours):
        torch.manual_seed(0)
        fields = {"target_modules": ["emb", "lin"], "r": 2, "init_lora_weights": False}
        saved = library.get_peft_model(Sizes(20), library.LoraConfig(**fields))
        folder = tmp_path / library.__name__
        saved.save_pretrained(folder)
        torch.manual_seed(0)
        base = Sizes(25)
        with pytest.raises(RuntimeError) as error:
            library.PeftModel.from_pretrained(copy.deepcopy(base), folder)
        assert all(words in error.value.args[0] for words in ("size mismatch", "20", "25"))
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
            model = library.PeftModel.from_pretrained(base, folder, ignore_mismatched_sizes=True)
        tensors, loaded = (library.get_peft_model_state_dict(each) for each in (saved, model))
        same = [key for key, tensor in tensors.items() if tensor.equal(loaded[key])]
        missing = library.get_peft_model(Sizes(25), library.LoraConfig(target_modules=["emb", "lin"], r=2))
        with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
            result = library.set_peft_model_state_dict(missing, tensors, ignore_mismatched_sizes=True)
        made[library] = [key.replace(".default", "") for key in same], len(result.unexpected_keys)
        assert [key for key in result.missing_keys if "lora_embedding_A" in key]
    assert made[peft] == made[ours] and "emb" in str(made[ours]) and "lora_embedding_A" not in str(made[ours])
    base = llama()[0]
    config = ours.LoraConfig(target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    saved = ours.get_peft_model(base, config)
    saved.save_pretrained(tmp_path / "llama", save_embedding_layers=True)
    wide = llama()[0]
    wide.resize_token_embeddings(wide.config.vocab_size + 5)
    with pytest.raises(RuntimeError, match="size mismatch"):
        ours.PeftModel.from_pretrained(wide, tmp_path / "llama")
    with pytest.warns(UserWarning, match="ignore_mismatched_sizes=True"):
        loaded = ours.PeftModel.from_pretrained(wide, tmp_path / "llama", ignore_mismatched_sizes=True)
    tensors, others = (ours.get_peft_model_state_dict(each, save_embedding_layers=False) for each in (saved, loaded))
    other = [key for key, tensor in tensors.items() if not tensor.equal(others[key])]
    assert other == ["base_model.model.model.embed_tokens.lora_embedding_A"]
