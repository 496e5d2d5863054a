"""LoRA's files as other programs write them: where a scale stands, under which keys, and whose model they are for."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import surgery.rules  # noqa: F401  # brings the methods
from surgery import (
    LoadError,
    SurgeryError,
    adapter_state_dict,
    apply_rules,
    base_state_dict,
    hotswap,
    load_adapter,
    save_adapter,
    summary,
)
from surgery.rules import LoraRule
from surgery.testing import Snapshot
from tests.support.peers import peft, transformers

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("quiet")]  # PEFT's own words


class Attention(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(size, size), nn.ModuleList([nn.Linear(size, size), nn.Dropout(0.0)])

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.to_out[0](torch.tanh(self.to_q(x))))


class Part(nn.Module):
    """A component of a pipeline: its attention stands at a path of its own."""

    def __init__(self, name: str = "mid", size: int = 8):
        super().__init__()
        self.add_module(name, Attention(size))

    def forward(self, x: Tensor) -> Tensor:
        return next(self.children())(x)


def factors(paths: Mapping[str, int], size: int = 8) -> dict[str, tuple[Tensor, Tensor]]:
    """Path → A and B, of these ranks."""
    return {path: (torch.randn(rank, size), torch.randn(size, rank)) for path, rank in paths.items()}


def keyed(held: Mapping[str, tuple[Tensor, Tensor]], before: str = "unet.") -> dict[str, Tensor]:
    sides = [(path, *one) for path, both in held.items() for one in zip("AB", both, strict=True)]
    return {f"{before}{path}.lora_{side}.weight": tensor for path, side, tensor in sides}


def by_hand(model: nn.Module, held: Mapping[str, tuple[Tensor, Tensor]], scales: Mapping[str, float]) -> nn.Module:
    made = copy.deepcopy(model)
    with torch.no_grad():
        for path, (A, B) in held.items():
            made.get_submodule(path).weight += scales[path] * B @ A  # type: ignore[operator]
    return made


def put(
    folder: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None, config: Any = None
) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    name = "pytorch_lora_weights" if config is None else "adapter_model"
    told = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (header or {}).items()}
    safetensors.torch.save_file(dict(tensors), str(folder / f"{name}.safetensors"), metadata=told)
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def same(model: Any, other: Any, x: Tensor) -> bool:
    return torch.allclose(model(x), other(x), atol=1e-5)


TWO = {"mid.to_q": 2, "mid.to_out.0": 4}
HEADERS: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "alpha": ({"r": 2, "lora_alpha": 8, "rank_pattern": {"to_out.0": 4}}, {"mid.to_q": 4, "mid.to_out.0": 2}),
    "patterns": (
        {"r": 4, "lora_alpha": 4, "rank_pattern": {"to_q": 2}, "alpha_pattern": {"mid.to_q": 6}},
        {"mid.to_q": 3, "mid.to_out.0": 1},
    ),
    "rslora": (
        {"r": 4, "lora_alpha": 8, "use_rslora": True, "rank_pattern": {"mid.to_q": 2}, "target_modules": ["to_q"]},
        {"mid.to_q": 8 / 2**0.5, "mid.to_out.0": 4},
    ),
}


@pytest.mark.parametrize("before", ["unet.", "transformer.", "text_encoder.", ""])
@pytest.mark.parametrize("case", HEADERS)
def test_the_header_tells_the_scale(case: str, before: str, tmp_path: Path) -> None:
    fields, scales = HEADERS[case]
    held, model, x = factors(TWO), Part(), torch.randn(3, 8)
    header = {f"{before}{name}": value for name, value in fields.items()}
    folder = put(tmp_path, keyed(held, before), {"lora_adapter_metadata": header})
    expected = by_hand(model, held, scales)
    report = load_adapter(model, folder)
    assert same(model, expected, x) and not report.assumed


@pytest.mark.parametrize("ends", [(".alpha", ".alpha"), (".lora.alpha", "_lora.alpha"), (".lora_A.alpha", ".alpha")])
def test_an_alpha_beside_each_layer(ends: tuple[str, str], tmp_path: Path) -> None:
    held, model, x = factors(TWO), Part(), torch.randn(3, 8)
    alphas = {f"unet.mid.to_q{ends[0]}": torch.tensor(3.0), f"unet.mid.to_out.0{ends[1]}": torch.tensor([2.0])}
    folder = put(tmp_path, keyed(held) | alphas)
    expected = by_hand(model, held, {"mid.to_q": 1.5, "mid.to_out.0": 0.5})
    report = load_adapter(model, folder)
    assert same(model, expected, x) and not report.assumed and report


def test_one_alpha_in_the_header(tmp_path: Path) -> None:
    held, model, x = factors(TWO), Part(), torch.randn(3, 8)
    expected = by_hand(model, held, {"mid.to_q": 0.5, "mid.to_out.0": 0.25})
    report = load_adapter(model, put(tmp_path, keyed(held), {"ss_network_alpha": "1.0"}))
    assert same(model, expected, x) and not report.assumed


def test_what_nothing_says_is_assumed_and_told(tmp_path: Path) -> None:
    held, model, x = factors(TWO), Part(), torch.randn(3, 8)
    expected = by_hand(model, held, {"mid.to_q": 1, "mid.to_out.0": 1})
    report = load_adapter(model, put(tmp_path, keyed(held)))
    assert same(model, expected, x) and len(report.assumed) == 1 and "does not say alpha" in str(report)
    some = keyed(held) | {"unet.mid.to_q.alpha": torch.tensor(4.0)}
    report = load_adapter(other := Part(), put(tmp_path / "some", some))
    assert "for 1 layers such as mid.to_out.0" in report.assumed[0]
    assert summary(other).trainable == 2 * (2 + 4) * 8


def test_forms_of_lora_that_the_keys_show(tmp_path: Path) -> None:
    model, x = Part(), torch.randn(3, 8)
    before = apply_rules(copy.deepcopy(model), [LoraRule("to_q", rank=2, alpha=2, dora=True, init="random")])
    saved = safetensors.torch.load_file(str(save_adapter(before, tmp_path / "a") / "adapter_model.safetensors"))
    tensors = {key.replace("base_model.model.", "unet."): tensor for key, tensor in saved.items()}
    load_adapter(model, put(tmp_path / "b", tensors))
    assert torch.equal(model(x), before(x))


@pytest.mark.parametrize(
    ("header", "extra", "told"),
    [
        ({"lora_adapter_metadata": "{"}, {}, "lora_adapter_metadata"),
        ({"lora_adapter_metadata": "[1]"}, {}, "is not a mapping"),
        ({"lora_adapter_metadata": {"text_encoder.r": 2}}, {}, "says nothing of unet"),
        ({"lora_adapter_metadata": {"unet.r": 2, "unet.lora_alpha": "x"}}, {}, "alpha"),
        ({"lora_adapter_metadata": {"unet.r": 2, "unet.lora_alpha": 2}}, {"unet.mid.to_q.alpha": 4.0}, "two alphas"),
        ({"ss_network_alpha": "None"}, {}, "is not a number"),
        ({}, {"unet.mid.to_q.alpha": float("nan")}, "is not a number"),
        ({}, {"unet.mid.to_q.alpha": 0.0}, "is not a number"),
        ({"lora_adapter_metadata": {"unet.r": 2, "unet.use_qalora": True}}, {}, "use_qalora"),
    ],
)
def test_a_scale_that_can_not_be_known_is_an_error(
    header: dict[str, Any], extra: dict[str, float], told: str, tmp_path: Path
) -> None:
    tensors = keyed(factors({"mid.to_q": 2})) | {key: torch.tensor(value) for key, value in extra.items()}
    before = Snapshot(model := Part())
    with pytest.raises(LoadError) as caught:
        load_adapter(model, put(tmp_path, tensors, header))
    assert told in str(caught.value) and not before.differences(model)


def test_an_alpha_beside_a_configuration_must_be_its(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["to_q"]}
    tensors = keyed(factors({"mid.to_q": 2}), "base_model.model.")
    key = "base_model.model.mid.to_q.alpha"
    assert load_adapter(Part(), put(tmp_path / "a", tensors | {key: torch.tensor(6.0)}, config=config))
    with pytest.raises(LoadError, match="two alphas"):
        load_adapter(Part(), put(tmp_path / "b", tensors | {key: torch.tensor(2.0)}, config=config))


# Several components in one file ---------------------------------------------------------------------------------


def test_each_component_takes_its_own(tmp_path: Path) -> None:
    parts = {"unet": Part("mid"), "text_encoder": Part("text", 6), "text_encoder_2": Part("text", 4)}
    sizes = {"unet": 8, "text_encoder": 6, "text_encoder_2": 4}
    held = {name: factors({f"{next(iter(part._modules))}.to_q": 2}, sizes[name]) for name, part in parts.items()}
    tensors = {key: tensor for name in parts for key, tensor in keyed(held[name], f"{name}.").items()}
    header = {f"{name}.{field}": value for name in parts for field, value in (("r", 2), ("lora_alpha", sizes[name]))}
    folder = put(tmp_path, tensors, {"lora_adapter_metadata": header})
    for name, part in parts.items():
        x = torch.randn(3, sizes[name])
        expected = by_hand(part, held[name], dict.fromkeys(held[name], sizes[name] / 2))
        report = load_adapter(part, folder)
        assert same(part, expected, x) and report and any(name in note for note in report.assumed)


def test_components_of_equal_sizes_are_asked_for(tmp_path: Path) -> None:
    held = {name: factors({"text.to_q": 2}) for name in ("text_encoder", "text_encoder_2")}
    folder = put(tmp_path, {k: t for name in held for k, t in keyed(held[name], f"{name}.").items()})
    with pytest.raises(LoadError, match="text_encoder and text_encoder_2"):
        load_adapter(Part("text"), folder)
    x, model = torch.randn(3, 8), Part("text")
    expected = by_hand(model, held["text_encoder_2"], {"text.to_q": 1})
    load_adapter(model, folder, component="text_encoder_2")
    assert same(model, expected, x)
    with pytest.raises(LoadError, match="no component 'vae'"):
        load_adapter(Part("text"), folder, component="vae")
    with pytest.raises(LoadError, match="text_encoder and text_encoder_2"):
        hotswap(model, "default", folder)
    live = model.state_dict()
    assert hotswap(model, "default", folder, component="text_encoder")
    fresh = Part("text")
    fresh.load_state_dict(base_state_dict(model))
    expected = by_hand(fresh, held["text_encoder"], {"text.to_q": 1})
    assert same(model, expected, x) and list(live) == list(model.state_dict())
    with pytest.raises(SurgeryError, match="tensors have no component="):
        hotswap(model, "default", adapter_state_dict(model), component="text_encoder")


# Keys -----------------------------------------------------------------------------------------------------------


def text_model() -> Any:
    sizes = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()


def llava() -> Any:
    text = dict(model_type="llama", vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                intermediate_size=24)  # fmt: skip
    vision = dict(model_type="clip_vision_model", hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                  intermediate_size=24, image_size=8, patch_size=4)  # fmt: skip
    torch.manual_seed(0)
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=39)
    return transformers.LlavaForConditionalGeneration(config).eval()


IDS = torch.tensor([[3, 5, 7, 1]])
PEFT = "base_model.model."
Respelt = Callable[[str], str]
SPELT: dict[str, Respelt] = {
    "an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
    "another name": lambda key: key.replace(".weight", ".my-adapter.weight"),
    "no prefix": lambda key: key.removeprefix(PEFT),
    "DataParallel": lambda key: f"module.{key}",
    "compiled": lambda key: f"_orig_mod.{key}",
    "both": lambda key: f"module._orig_mod.{key}",
    "compiled base": lambda key: key.replace(PEFT, f"{PEFT}_orig_mod."),
    "compiled base, no prefix": lambda key: key.replace(PEFT, "_orig_mod."),
    "FSDP": lambda key: key.replace("layers.0.", "layers.0._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "of the model without its head": lambda key: key.replace(f"{PEFT}model.", PEFT),
    "in another's text model": lambda key: key.replace(f"{PEFT}model.", f"{PEFT}model.language_model."),
}


@pytest.fixture(scope="module")
def theirs() -> Any:
    fields = {"r": 2, "rank_pattern": {r"layers\.1\..*q_proj": 3}, "alpha_pattern": {"v_proj": 5}, "use_dora": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **fields, init_lora_weights=False)
        made = peft.get_peft_model(text_model(), config).eval()
    return made


@pytest.mark.parametrize("how", SPELT)
def test_keys_as_others_write_them(how: str, theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = {SPELT[how](key): tensor for key, tensor in safetensors.torch.load_file(str(path)).items()}
    safetensors.torch.save_file(tensors, str(path))
    assert load_adapter(model := text_model(), tmp_path)
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-6)


def test_a_state_dict_of_the_whole_adapter(theirs: Any, tmp_path: Path) -> None:
    theirs.save_pretrained(tmp_path)
    state = {key: tensor for key, tensor in theirs.state_dict().items() if "lora_" in key}
    safetensors.torch.save_file(state, str(tmp_path / "adapter_model.safetensors"))
    assert load_adapter(model := text_model(), tmp_path)
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-6)
    both = state | {key.replace(".default", ".other"): tensor for key, tensor in state.items()}
    safetensors.torch.save_file({k: t.clone() for k, t in both.items()}, str(tmp_path / "adapter_model.safetensors"))
    with pytest.raises(LoadError, match="2 adapters: default, other"):
        load_adapter(text_model(), tmp_path)


LANGUAGE: dict[str, Respelt] = {
    "before": lambda key: key.replace("model.language_model.", "language_model.model."),
    "of the text model alone": lambda key: key.replace("model.language_model.", "model."),
    "of the model without its head": lambda key: key.replace("model.language_model.", "language_model."),
}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*language_model.*\.(q_proj|v_proj)"], ids=str)
@pytest.mark.parametrize("how", LANGUAGE)
def test_text_models_that_moved(how: str, targets: Any, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False, alpha_pattern={"v_proj": 3})
    theirs = peft.get_peft_model(llava(), config).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    held = {key: tensor for key, tensor in safetensors.torch.load_file(str(path)).items() if "language" in key}
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "vision" in name and "lora_B" in name:
                parameter.zero_()
    safetensors.torch.save_file({LANGUAGE[how](key): tensor for key, tensor in held.items()}, str(path))
    report = load_adapter(model := llava(), tmp_path)
    assert report and any("other paths in the file" in note for note in report.assumed)
    assert torch.allclose(model(IDS).logits, theirs(IDS).logits, atol=1e-6)


# Another model's ------------------------------------------------------------------------------------------------


def bert(size: int = 16, layers: int = 1) -> Any:
    sizes = dict(vocab_size=40, hidden_size=size, num_attention_heads=2, intermediate_size=24)
    return transformers.BertModel(transformers.BertConfig(num_hidden_layers=layers, **sizes)).eval()


def told(model: nn.Module, folder: Path) -> str:
    before = Snapshot(model)
    with pytest.raises(LoadError) as caught:
        load_adapter(model, folder)
    assert not before.differences(model)
    return str(caught.value)


def test_another_models_file_names_its_model(theirs: Any, tmp_path: Path) -> None:
    theirs.peft_config["default"].base_model_name_or_path = "some/Llama-1B"
    theirs.save_pretrained(tmp_path / "theirs")
    ours = apply_rules(text_model(), [LoraRule(["q_proj"], rank=2)])
    for format in ("peft", "surgery"):
        save_adapter(ours, tmp_path / format, format=format)  # type: ignore[arg-type]
        assert "made for a LlamaForCausalLM" in told(bert(), tmp_path / format)
    text = told(bert(), tmp_path / "theirs")
    assert "some/Llama-1B" in text and "this model is a BertModel" in text


def test_other_sizes_are_one_line_and_both_told(tmp_path: Path) -> None:
    before = apply_rules(bert(layers=6), [LoraRule(["query"], rank=2)])
    save_adapter(before, tmp_path)
    text = told(bert(24, layers=6), tmp_path)
    assert "6 tensors, such as" in text and "(2, 16)" in text and "(2, 24)" in text
    assert len(text.splitlines()) < 20
