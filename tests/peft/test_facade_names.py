"""PEFT's names and words on a model: properties, functions, errors and warnings, each beside PEFT's own."""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
import surgery.peft as ours
from surgery import SurgeryError
from surgery.testing import Snapshot
from tests.support.facade_models import bert, llama, moved, out, same_adapters, two
from tests.support.peers import peft

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own


def result(call: Callable[[], Any]) -> tuple[Any, str, list[str]]:
    """The builtin error of a call with the beginning of its text, and the beginnings of the warnings."""
    kind, text = None, ""
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            builtins = (KeyError, ValueError, TypeError, RuntimeError)
            kind, text = next(k for k in builtins if isinstance(error, k)), str(error)
    said = sorted({str(each.message)[:40] for each in record if "Model with `tie" not in str(each.message)})
    return kind, text.splitlines()[0][:25] if text else "", said


CALLS: dict[str, Callable[[Any, Any], Any]] = {
    "delete what is not there": lambda library, model: model.delete_adapter("othr"),
    "delete the active one": lambda library, model: model.delete_adapter("default"),
    "set what is not there": lambda library, model: model.set_adapter("othr"),
    "add a name again": lambda library, model: model.add_adapter(
        "other", library.LoraConfig(target_modules=["q_proj"])),
    "targets that are not there": lambda library, model: model.add_adapter(
        "third", library.LoraConfig(target_modules=["qq"])),
    "layers that are not there": lambda library, model: model.add_adapter(
        "third", library.LoraConfig(target_modules=["q_proj"], layers_to_transform=[9])),
    "all excluded": lambda library, model: model.add_adapter(
        "third", library.LoraConfig(target_modules=["q_proj"], exclude_modules=["q_proj"])),
    "merge twice": lambda library, model: (model.merge_adapter(), model.merge_adapter()),
    "merge one more": lambda library, model: (model.merge_adapter(), model.merge_adapter(["other"])),
    "merge by a text": lambda library, model: model.merge_adapter("default"),
    "unmerge what is not merged": lambda library, model: model.unmerge_adapter(),
    "combine what is not there": lambda library, model: model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c"),
    "save what is not there": lambda library, model: model.save_pretrained("none", selected_adapters=["othr"]),
    "rows of what is not there": lambda library, model: model(
        input_ids=torch.tensor([[1, 2]]), adapter_names=["othr"]),
    "tensors of what is not there": lambda library, model: library.get_peft_model_state_dict(
        model, adapter_name="othr"),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_errors_and_warnings_are_pefts(name: str) -> None:
    made = {library.__name__: two(library)[0] for library in (peft, ours)}
    mine, theirs = (result(lambda lib=lib: CALLS[name](lib, made[lib.__name__])) for lib in (ours, peft))
    if theirs[0] is KeyError:  # PEFT looks the name up in a dict, and says no more than the name
        assert mine[0] is KeyError and "othr" in mine[1]
    elif name in ("layers that are not there", "unmerge what is not merged"):  # PEFT warns at each of its layers
        assert mine[:2] == theirs[:2] and [text[:20] for text in mine[2]] == [text[:20] for text in theirs[2]]
    else:
        assert mine == theirs


def test_targets_that_are_not_there_are_an_error_of_their_own() -> None:
    model, _ = llama()
    before = Snapshot(model)
    wrong: list[dict[str, Any]] = [
        {"target_modules": ["q_prj"]}, {"target_modules": "q_prj"},
        {"target_modules": ["q_proj"], "exclude_modules": ".*"},
        {"target_modules": ["q_proj"], "layers_to_transform": [7]},
    ]  # fmt: skip
    for fields in wrong:
        with pytest.raises(ours.NoMatchingPeftModuleError) as caught:
            ours.get_peft_model(model, ours.LoraConfig(**fields))
        assert isinstance(caught.value, (ValueError)) and isinstance(caught.value, ours.PeftError)
        assert before.differences(model) == []
    with pytest.raises(ours.NoMatchingPeftModuleError, match="(?s)Target modules.*q_proj"):
        ours.get_peft_model(model, ours.LoraConfig(target_modules=["q_prj"]))


def test_the_prefix_is_in_the_adapters_names() -> None:
    for library in (peft, ours):
        model, example, _ = two(library)
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        marked = {name for name, _ in model.named_parameters() if model.prefix in name}
        assert trained and trained <= marked
        assert model.has_active_enabled_adapter and model.modules_to_save is None
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
        assert model.base_model_torch_dtype is torch.float32
    heads, _ = bert()
    made = ours.get_peft_model(heads, ours.LoraConfig(r=2, task_type="SEQ_CLS"))
    assert made.modules_to_save == {"classifier", "score"}


def test_the_configuration_is_the_object_that_was_given() -> None:
    for library in (peft, ours):
        config = library.LoraConfig(r=2, task_type="SEQ_CLS")
        model = library.get_peft_model(bert()[0], config)
        assert model.peft_config["default"] is config
        assert config.target_modules == {"query", "value"} and config.modules_to_save == ["classifier", "score"]
    config = ours.LoraConfig(r=2, target_modules=["qurey"])
    given = copy.copy(config)
    with contextlib.suppress(SurgeryError):
        ours.get_peft_model(bert()[0], config)
    assert config == given  # an error leaves the configuration as it was, too


def test_a_second_merge_of_others_merges_them_too() -> None:
    theirs, example, _ = two(peft)
    mine, _, _ = two(ours)
    same_adapters(theirs, mine)
    before = out(mine, example)
    for model in (theirs, mine):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="Already following adapters were merged default"):
            model.merge_adapter(["default", "other"])
    torch.testing.assert_close(out(mine, example), out(theirs, example), atol=2e-5, rtol=1e-4)
    mine.unmerge_adapter()
    assert torch.equal(out(mine, example), before)


def test_values_that_are_not_finite_are_not_merged() -> None:
    for library in (peft, ours):
        model, _, _ = two(library)
        for name, parameter in model.named_parameters():
            if model.prefix in name:
                parameter.data[0] = torch.nan
        with pytest.raises(ValueError, match="NaNs detected in the merged weights. The adapter default seems to be br"):
            model.merge_and_unload(safe_merge=True)


def test_forward_takes_rows() -> None:
    theirs, example, _ = two(peft)
    mine, _, base = two(ours)
    same_adapters(theirs, mine)
    rows = {**example, "adapter_names": ["other", "__base__"]}
    with torch.no_grad():
        torch.testing.assert_close(mine.forward(**rows).logits, theirs.forward(**rows).logits, atol=2e-5, rtol=1e-4)
        assert torch.equal(mine.forward(**example).logits, base(**example).logits)
    assert inspect.signature(mine.forward) == inspect.signature(base.forward)


def test_the_base_state_dict(tmp_path: Path) -> None:
    for library in (peft, ours):
        base, example = llama()
        state = {key: tensor.clone() for key, tensor in base.state_dict().items()}
        model = library.get_peft_model(
            base, library.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
        ).eval()
        expected = out(model, example)
        found = library.get_base_model_state_dict(model)
        assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
        with torch.no_grad():
            model.get_base_model().model.embed_tokens.weight.mul_(2)
        assert not torch.equal(out(model, example), expected)
        assert library.set_base_model_state_dict(model, state) == ([], [])
        assert torch.equal(out(model, example), expected)
        some = dict(list(state.items())[1:])
        with pytest.raises(RuntimeError, match="(?s)Error.*Missing key.*Unexpected key"):
            library.set_base_model_state_dict(model, {**some, "elsewhere": torch.ones(1)})
        found = library.set_base_model_state_dict(model, {**some, "elsewhere": torch.ones(1)}, strict=False)
        assert found == (list(state)[:1], ["elsewhere"])
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="while default are merged"):
        ours.set_base_model_state_dict(model, state)


def test_a_card_is_written(tmp_path: Path) -> None:
    for library in (peft, ours):
        folder = tmp_path / library.__name__
        model = library.get_peft_model(llama()[0], library.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.save_pretrained(folder / "new")
        text = (folder / "new/README.md").read_text()
        for words in ("library_name: peft", "pipeline_tag: text-generation", "- lora", "- transformers"):
            assert words in text, (library, words)
        (folder / "README.md").write_text("---\nmeta: hello\ntags:\n- mine\n---\nThis is a model card\n")
        for _ in range(2):
            model.save_pretrained(folder)
            text = (folder / "README.md").read_text()
            assert text.count("library_name: peft") == text.count("meta: hello") == text.count("This is a model") == 1
        assert "- lora" in text
    assert "- mine" in text  # which PEFT loses
    (folder / "README.md").write_text("Only words\n")
    model.save_pretrained(folder)
    text = (folder / "README.md").read_text()
    assert text.startswith("---\n") and "library_name: peft" in text and text.endswith("---\n\nOnly words\n")


def test_a_new_card_tells_the_adapters_and_how_they_are_loaded(tmp_path: Path) -> None:
    config = ours.LoraConfig(target_modules=["q_proj"], r=4, task_type="CAUSAL_LM", init_lora_weights=False)
    base, example = llama()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = ours.get_peft_model(base, config)
    model.add_adapter("news", ours.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    model.add_adapter("unsaved", ours.LoraConfig(target_modules=["v_proj"]))
    model.save_pretrained(tmp_path / "mail", selected_adapters=["default", "news"])
    text = (tmp_path / "mail/README.md").read_text()
    count = sum(tensor.numel() for tensor in ours.get_peft_model_state_dict(model).values())
    for words in (f"| `default` | LORA | CAUSAL_LM | 2 | {count:,} | this folder |", "| `news/` |", '"r": 4'):
        assert words in text
    assert f"- PyTorch {torch.__version__}" in text and "unsaved" not in text and "lora_dropout" not in text
    wanted = [out(model, example), (model.set_adapter("news"), out(model, example))[1]]
    pefts, native = re.findall(r"```python\n(.*?)```", text, re.DOTALL)  # run in the folder that holds the adapters
    with contextlib.chdir(tmp_path):
        names: dict[str, Any] = {}
        exec(pefts, names)
        loaded = names["model"].eval()
        found = [out(loaded, example), (loaded.set_adapter("news"), out(loaded, example))[1]]
        exec(native, names)
    torch.testing.assert_close(found, wanted)
    assert list(surgery.active(names["model"])) == ["default", "news"]


def test_the_card_of_files_that_peft_can_not_read_does_not_name_peft(tmp_path: Path) -> None:
    model = ours.get_peft_model(nn.Sequential(nn.Linear(8, 8)), ours.LoraConfig(r=2, target_modules=["0"]))
    surgery.save_adapter(model.get_base_model(), tmp_path, format="surgery")
    model.create_or_update_model_card(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "library_name: model-surgery" in text and "in model-surgery's format" in text
    assert "PeftModel" not in text and "load_adapter(model" in text


def test_checkpointing() -> None:
    for library in (peft, ours):
        model, example, _ = two(library)
        model.train()
        model.prepare_model_for_gradient_checkpointing(model)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model(**example).logits.sum().backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert trained and all(parameter.grad is not None for parameter in trained)


def test_a_quantised_model_keeps_half_precision_where_peft_keeps_it() -> None:
    for library in (peft, ours):
        for method, dtype in (("gptq", torch.bfloat16), (None, torch.float32)):
            model: Any = nn.Sequential(nn.Linear(4, 4).bfloat16())
            model.quantization_method = method
            library.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False, auto_clear_cache=False)
            assert model[0].weight.dtype is dtype and not model[0].weight.requires_grad


def test_mixed() -> None:
    theirs, mine = (
        library.get_peft_model(llama()[0], library.LoraConfig(r=2, target_modules=["q_proj"]), mixed=True)
        for library in (peft, ours)
    )
    for library, model in ((peft, theirs), (ours, mine)):
        assert isinstance(model, library.PeftMixedModel)
        model.add_adapter("second", library.LoHaConfig(r=2, target_modules=["v_proj"], init_weights=False))
        model.set_adapter(["default", "second"])
        model.eval()
    assert [type(config).__name__ for config in mine.peft_config.values()] == ["LoraConfig", "LoHaConfig"]
    assert mine.active_adapters == theirs.active_adapters == ["default", "second"]


@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_prompt_modules(kind: str) -> None:
    sizes = {"num_virtual_tokens": 3, "num_transformer_submodules": 2, "token_dim": 8}
    made = []
    for library in (peft, ours):
        torch.manual_seed(0)
        fields = {**sizes, "encoder_hidden_size": 4, "encoder_reparameterization_type": kind}
        made.append(library.PromptEncoder(library.PromptEncoderConfig(**fields)))
    assert made[0].state_dict().keys() == made[1].state_dict().keys()
    indices = torch.arange(6)[None]
    assert torch.equal(made[0](indices), made[1](indices))
    words = nn.Embedding(20, 8)
    for start in ("RANDOM", "SAMPLE_VOCAB"):
        prompts = []
        for library in (peft, ours):
            torch.manual_seed(0)
            config = library.PromptTuningConfig(**sizes, prompt_tuning_init=start)
            prompts.append(library.PromptEmbedding(config, words)(indices))
        assert torch.equal(*prompts)
    config = {**sizes, "encoder_hidden_size": 4, "encoder_num_layers": 7}
    for library in (peft, ours):
        with pytest.warns(UserWarning, match="^for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP"):
            library.PromptEncoder(library.PromptEncoderConfig(**config))


def test_configurations_by_a_mapping() -> None:
    for library in (peft, ours):
        config = library.get_peft_config({"peft_type": "IA3", "target_modules": ["k"]})
        assert type(config) is library.IA3Config is library.PEFT_TYPE_TO_CONFIG_MAPPING["IA3"]
        with pytest.raises(KeyError):
            library.get_peft_config({"peft_type": "LORRA"})


def test_transformers_takes_the_configuration() -> None:
    results = []
    for library in (peft, ours):
        model, example = llama()
        torch.manual_seed(3)
        model.add_adapter(library.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "mine")
        moved(model.eval())
        assert model.active_adapters() == ["mine"]
        results.append(out(model, example))
    assert torch.equal(*results)


def test_peft_itself_takes_the_configurations() -> None:
    kinds: list[Any] = list(ours.PeftConfig.kinds.values())
    for kind in kinds:
        if kind.method in ("LN_TUNING", "TRAINABLE_TOKENS") or kind.is_prompt_learning or kind.is_adaption_prompt:
            continue
        fields: dict[str, Any] = {"total_step": 10} if kind.method == "ADALORA" else {}
        fields |= {"feedforward_modules": []} if kind.method == "IA3" else {}
        model: Any = nn.Sequential(nn.Linear(256, 256))
        adapted = peft.get_peft_model(model, kind(target_modules=["0"], **fields))
        assert adapted(torch.ones(1, 256)).shape == (1, 256), kind


def test_rows_of_a_plain_model() -> None:
    """`forward` with adapter_names is a call of the model itself, whose batch the rows are of."""
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    made = []
    for library in (peft, ours):
        torch.manual_seed(1)
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)),
            library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False),
        )
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["2"], init_lora_weights=False))
        made.append(model.eval())
    same_adapters(*made)
    results = [model.forward(x, adapter_names=["other", "__base__", "default"]).detach() for model in made]
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=1e-4)
    assert made[0].targeted_module_names == made[1].targeted_module_names == ["0", "2"]


def test_rows_of_disabled_and_merged_adapters() -> None:
    x, names = torch.ones(3, 8), ["other", "__base__", "default"]
    for library in (peft, ours):
        model = library.get_peft_model(
            nn.Sequential(nn.Linear(8, 8)), library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        ).eval()
        model.add_adapter("other", library.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        mixed = model(x, adapter_names=names)
        with model.disable_adapter():
            base = model(x)
            assert torch.equal(model(x, adapter_names=names), base)  # as in PEFT, no row has an adapter
            assert torch.equal(model.forward(x, adapter_names=names), base)
        assert torch.equal(model(x, adapter_names=names), mixed) and not torch.equal(mixed, base)
        with pytest.raises(ValueError, match="Length of `adapter_names` should be .* but got 2 and 3 respectively"):
            model(x, adapter_names=names[:2])
        model.merge_adapter(["other"])
        with pytest.raises(ValueError, match="Cannot pass `adapter_names` when there are merged adapters, please call"):
            model(x, adapter_names=names)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x, adapter_names=names), mixed)


def test_loading_keeps_the_configuration(tmp_path: Path) -> None:
    for library in (peft, ours):
        folder = tmp_path / library.__name__
        library.get_peft_model(llama()[0], library.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
        config = library.LoraConfig.from_pretrained(folder)
        model = library.PeftModel.from_pretrained(llama()[0], folder, config=config)
        assert model.peft_config["default"] is config and config.inference_mode
        model.load_adapter(folder, "trained", is_trainable=True)
        assert model.active_adapter == "default"
        assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if ".default" in name)
        model.set_adapter("trained")
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained and all(".trained" in name for name in trained), library


def test_tensors_of_a_sharded_model() -> None:
    dist: Any = torch.distributed
    if not dist.is_available():
        pytest.skip("torch has no distributed package here")
    from torch.distributed.fsdp import FullyShardedDataParallel

    dist.init_process_group(backend="gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        base: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        config = ours.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, modules_to_save=["1"])
        model = ours.get_peft_model(base, config)
        expected = {key: tensor.clone() for key, tensor in ours.get_peft_model_state_dict(model).items()}
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        state = ours.get_peft_model_state_dict(sharded)
        assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    finally:
        dist.destroy_process_group()


def test_a_density_that_is_not_used_is_told() -> None:
    for library in (peft, ours):
        model, _, _ = two(library)
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "both", combination_type="svd", density=0.5)
        assert "both" in model.peft_config
    with pytest.warns(ours.PeftWarning, match="does not use density"):
        model.add_weighted_adapter(["default", "other"], [1.0, 0.5], "again", combination_type="cat", density=0.5)


def test_configurations_say_the_version_of_their_format() -> None:
    assert ours.LoraConfig().peft_version == peft.LoraConfig().peft_version
    assert ours.LoraConfig(peft_version="0.9").peft_version == "0.9"


class Inner(nn.Module):
    """A module of modules that PEFT's adapter_names do not take."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x, x, x)[0] if isinstance(self.inner, nn.MultiheadAttention) else self.inner(x)[0]


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_rows_of_modules_that_can_not_have_adapters_for_each(kind: str) -> None:
    for library in (peft, ours):
        inner = nn.MultiheadAttention(8, 2) if kind == "attention" else nn.GRU(8, 8, batch_first=True)
        model = nn.Sequential(nn.Linear(8, 8), Inner(inner)).eval()
        fields = {"attention": {"target_modules": ["inner"]}, "recurrent": {"target_modules": ["0"],
                  "modules_to_save": ["inner"]}}[kind]  # fmt: skip
        made = library.get_peft_model(model, library.LoraConfig(**fields)).eval()
        made.add_adapter("other", library.LoraConfig(**fields))
        words = (
            "lora.MultiheadAttention does not support" if kind == "attention" else "Mixed batching is only supported"
        )
        x = torch.randn(3, 8) if kind == "attention" else torch.randn(3, 4, 8)
        with pytest.raises(TypeError, match=words):
            made(x, adapter_names=["default", "other", "__base__"])
