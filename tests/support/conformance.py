"""PEFT's checkpoints both ways, row by row: the models, the configurations, and what each cell of the table checks.

A row is a configuration of PEFT's on a small model. Its cells:

- `load`: PEFT saves, and loaded here the model gives the same output
- `merged`: … merged here, too
- `removed`: … and without the adapter the model is the base to the bit
- `save`: saved here in PEFT's format, PEFT loads it and gives the same output
- `trained`: PEFT's adapter and the one loaded here, trained for some steps by one optimizer, give the same output

"The same" is to within 1e-6 of the largest output, where that is above 1. Of a model with a prompt PEFT returns the
virtual tokens' outputs before the text's; those of the text are compared. After training it is to within a thousandth
of how far training moved the output.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import SurgeryError, load_adapter, merge, remove, save_adapter, summary, unmerge
from surgery.rules import task_of
from surgery.testing import Snapshot

CELLS = ("load", "merged", "removed", "save", "trained")
SLACK = 1e-6


def conv1d(out: int, inner: int) -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(out, inner)


class Chain(nn.Module):
    """Named layers one after the other, with a tanh between them; the input of `flat` is made flat."""

    def __init__(self, view: tuple[int, ...] = (), flat: str = "", **layers: Any):
        super().__init__()
        self.view, self.flat = view, flat
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        if self.view:
            x = x.reshape(x.shape[0], *self.view)
        for name, layer in self.named_children():
            x = torch.tanh(layer(x.flatten(1) if name == self.flat else x))
        return x


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha, self.lin0 = nn.MultiheadAttention(10, 2), nn.Linear(10, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin0(self.mha(x, x, x)[0])


class Matrix(nn.Module):
    """A linear map whose weight is a bare parameter."""

    def __init__(self, inner: int, out: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inner, out)), nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Experts(nn.Module):
    """Two stacks of experts in one module. Each input goes through its expert."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 16, 10)), nn.Parameter(torch.randn(3, 10, 16))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for expert in range(3):
            out = out + F.linear(torch.tanh(F.linear(x, self.up[expert])), self.down[expert])
        return out


def two() -> dict[str, Any]:
    return {"lin0": nn.Linear(8, 8), "lin1": nn.Linear(8, 8)}


def numbers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def words(*shape: int, most: int = 100) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, most, shape)


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any]]] = {
    "MLP": (lambda: Chain(lin0=nn.Linear(10, 20), lin1=nn.Linear(20, 2)), numbers(9, 10)),
    "MLP with norms": (
        lambda: Chain(norm0=nn.LayerNorm(10), lin0=nn.Linear(10, 20), norm1=nn.LayerNorm(20), lin1=nn.Linear(20, 2)),
        numbers(9, 10),
    ),
    "MLP of even sizes": (
        lambda: Chain(lin0=nn.Linear(16, 32), lin1=nn.Linear(32, 16), lin2=nn.Linear(16, 32)), numbers(9, 16),
    ),
    "layers": (
        lambda: Chain(body=nn.Sequential(OrderedDict(layers=nn.Sequential(*(Chain(**two()) for _ in range(3)))))),
        numbers(4, 8),
    ),
    "EmbConv1D": (
        lambda: Chain((), "lin0", emb=nn.Embedding(100, 5), conv1d=conv1d(1, 5), lin0=nn.Linear(10, 2)), words(9, 10),
    ),
    "Conv1D": (lambda: Chain(conv1d=conv1d(16, 8), lin0=nn.Linear(16, 8)), numbers(5, 8)),
    "Conv1d": (lambda: Chain((1, 10), "lin0", conv1d=nn.Conv1d(1, 1, 2), lin0=nn.Linear(9, 2)), numbers(9, 10)),
    "Conv1d of kernel 1": (
        lambda: Chain((3, 10), "lin0", conv1d=nn.Conv1d(3, 10, 1), lin0=nn.Linear(100, 2)), numbers(9, 30),
    ),
    "Conv2d": (lambda: Chain((5, 3, 3), "lin0", conv2d=nn.Conv2d(5, 10, 3), lin0=nn.Linear(10, 2)), numbers(2, 45)),
    "Conv2d of many patches": (
        lambda: Chain((5, 4, 5), "lin0", conv2d=nn.Conv2d(5, 10, 3), lin0=nn.Linear(60, 2)), numbers(2, 100),
    ),
    "Conv2d 1x1": (lambda: Chain((1, 3, 3), "lin0", conv2d=nn.Conv2d(1, 10, 1), lin0=nn.Linear(90, 2)), numbers(2, 9)),
    "Conv2d groups": (
        lambda: Chain((16, 3, 3), "lin0", conv2d=nn.Conv2d(16, 16, 3, groups=8), lin0=nn.Linear(16, 2)),
        numbers(2, 144),
    ),
    "Conv2d groups, padded": (
        lambda: Chain((16, 6, 6), "lin0", conv2d=nn.Conv2d(16, 32, 3, padding=1, groups=2), lin0=nn.Linear(1152, 2)),
        numbers(2, 576),
    ),
    "Conv3d": (lambda: Chain((5, 3, 3, 3), "lin0", conv3d=nn.Conv3d(5, 10, 3), lin0=nn.Linear(10, 2)), numbers(2, 135)),
    "MHA": (Attention, numbers(9, 1, 10)),
    "Matrices": (lambda: Chain(lin0=Matrix(10, 20), lin1=Matrix(20, 2)), numbers(9, 10)),
    "Experts": (lambda: Chain(experts=Experts(), lin0=nn.Linear(10, 2)), numbers(5, 10)),
}  # fmt: skip


SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 2}, "Mistral": {"num_key_value_heads": 1, "sliding_window": None},
    "GPT2": {"n_inner": 48}, "Roberta": {"pad_token_id": 1, "bos_token_id": 0}, "GPTNeoX": {"rotary_pct": 0.5},
    "Qwen2": {"num_key_value_heads": 2},
}  # fmt: skip


def of_transformers(name: str, **more: Any) -> Any:
    """A small model of a class of transformers; `more`: fields of its configuration."""
    import transformers

    kind = name.removesuffix("Model").removesuffix("LMHead").partition("For")[0]
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **KINDS.get(kind, {}), **more})
    return getattr(transformers, name)(config)


def _family(name: str) -> tuple[nn.Module, Any]:
    """A small model of a transformers class or a family of tests/support/tiny.py, and a padded text for it."""
    from tests.support import tiny

    if name in tiny.FAMILIES:
        return tiny.FAMILIES[name]()
    name, _, options = name.partition(" ")
    model, inputs = of_transformers(name, **(eval(f"dict({options})") if options else {})), tiny._text()  # noqa: S307
    inputs["input_ids"] = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, model.config.pad_token_id)
    return model, inputs


def _family_inputs(row: Row) -> Any:
    return _family(row.model)[1]


def twice(base: nn.Module, file: dict[str, Tensor]) -> nn.Module:
    """The base with LoRA's changes added to its weights by plain arithmetic; the attention's output map twice."""
    model, scale = copy.deepcopy(base), 1.0  # PEFT's defaults: alpha 8, rank 8
    with torch.no_grad():
        for key in [key for key in file if key.endswith("lora_A.weight")]:
            change = scale * file[key.replace("lora_A", "lora_B")] @ file[key]
            path = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight").replace("base_layer.", "")
            module: Any = model.get_submodule(path)
            weight = module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight
            weight += change * (2 if path.endswith("out_proj") else 1)
    return model


@dataclass(frozen=True)
class Row:
    """`refused`: the field for which loading is refused, and the reason."""

    method: str
    model: str
    fields: dict[str, Any] = field(default_factory=dict)
    refused: tuple[str, str] | None = None
    note: str = ""
    unmerged: bool = False  # there is no merged form
    by_hand: Callable[[nn.Module, dict[str, Tensor]], nn.Module] | None = None  # the reference, from base and file
    cell: str = "✓"  # the text of the table's cells
    grown: int = 0  # the number of words added to the vocabulary

    @property
    def name(self) -> str:
        settings = ", ".join(f"{key}={value!r}" for key, value in self.fields.items())
        return f"{self.model}{f' with {self.grown} words more' if self.grown else ''}: {settings}"

    @property
    def untrained(self) -> str:
        """Why training differs in PEFT: its arithmetic, or trained tensors that its file lacks."""
        fields = self.fields
        if self.by_hand is not None:
            return "half of what is trained here"
        if self.method == "PromptEncoder" or fields.get("prefix_projection"):
            return "PEFT trains the network, which is not in its file"
        if self.method == "LoHa" and fields.get("use_effective_conv2d"):
            return "PEFT's backward of w1_a takes the other factor's product"
        if fields.get("coft"):
            return "PEFT writes the projected rotation back into the parameter"
        return ""


def lora(model: str, *targets: str, **fields: Any) -> Row:
    return Row("Lora", model, {"target_modules": list(targets), **fields})


PARTS = {"lin0": ["lin0"], "lin1": ["lin1"], "both": ["lin0", "lin1"]}
TWICE = (
    "of `out_proj`, to which PEFT adds its change twice: B is doubled when it is read, halved when it is written. The "
    "reference is plain arithmetic: W + 2Δ there, W + Δ elsewhere"
)
DOUBLE: dict[str, Any] = {"note": TWICE, "by_hand": twice, "cell": "✓ W + 2Δ"}


def _lora() -> Iterator[Row]:
    yield Row("Lora", "MLP", {"target_modules": "lin0"})
    yield from (lora("MLP", *targets) for targets in PARTS.values())
    yield lora("MLP", "lin0", modules_to_save=["lin1"])
    yield lora("MLP", "lin0", lora_alpha=4, lora_dropout=0.1)
    yield lora("MLP", "lin0", use_dora=True)
    yield lora("MLP", "lin0", "lin1", use_dora=True)
    base = "it takes the smallest directions off the base's weight"
    yield Row("Lora", "MLP", {"target_modules": ["lin0"], "kasa_config": "Kasa()", "r": 4}, ("kasa_config", base))
    yield lora("MLP", "lin0", init_lora_weights="mica", r=4)
    yield Row("Lora", "MLP", {"target_modules": "lin1", "use_dora": True, "lora_alpha": 32})
    for init, targets in (("random", ["lin0"]), ("batch_average", ["lin0", "lin1"]), ("batch_average_once", ["lin0"])):
        yield lora("MLP", *targets, velora_config=f"Velora(num_groups=2, init_type={init!r})")
    for dora in ({}, {"use_dora": True}):
        for targets in (["conv1d"], ["emb"], ["emb", "conv1d"]):
            yield lora("EmbConv1D", *targets, **dora)
    yield lora("EmbConv1D", "conv1d", trainable_token_indices={"emb": [0, 10]})
    for model, layer in (("Conv1d", "conv1d"), ("Conv2d", "conv2d"), ("Conv3d", "conv3d")):
        yield lora(model, layer)
        yield lora(model, layer, use_dora=True)
        if model != "Conv1d":
            yield lora(model, layer, "lin0")
            yield lora(model, layer, "lin0", use_dora=True)
    channels = "PEFT's A looks at all channels, and B at those of its group: no kernel with groups does that"
    for model in ("Conv2d groups", "Conv2d groups, padded"):
        for dora in ({}, {"use_dora": True}):
            yield Row("Lora", model, {"target_modules": ["conv2d"], **dora}, ("lora_A", channels))
    yield lora("MLP", "lin0", "lin1", lora_bias=True, lora_alpha=32)
    yield lora("Conv2d", "conv2d", lora_bias=True, lora_alpha=32)
    yield lora("Conv3d", "conv3d", lora_bias=True, lora_alpha=32)
    yield Row("Lora", "MHA", {"target_modules": ["mha"]}, **DOUBLE)
    yield Row("Lora", "MHA", {"target_modules": ["mha", "lin0"]}, **DOUBLE)
    yield Row("Lora", "Matrices", {"target_parameters": ["lin0.weight"]})
    yield lora("MLP", "lin0", target_parameters=["lin1.weight"])
    for bias in ("all", "lora_only"):
        yield Row("Lora", "Matrices", {"target_parameters": ["lin0.weight"], "bias": bias})
    yield lora("MLP", "lin0", target_parameters=["lin1.weight"], bias="lora_only")
    drawn = "its matrices are drawn anew at each call"
    yield Row("Lora", "MLP", {"target_modules": ["lin0"], "monteclora_config": "Monteclora(num_samples=2)"},
              ("monteclora_config", drawn))  # fmt: skip
    # Beyond PEFT's own rows: the further fields that change what is computed.
    yield lora("MLP", "lin0", "lin1", rank_pattern={"lin1": 2}, alpha_pattern={"lin0": 3})
    yield lora("layers", "lin0", rank_pattern={r"layers\.1\..*": 4}, use_rslora=True)
    yield lora("MLP", "lin0", "lin1", use_rslora=True, lora_alpha=3)
    yield lora("MLP", "lin0", bias="all")
    yield lora("MLP", "lin0", bias="lora_only")
    yield lora("layers", "lin0", layers_to_transform=[0, 2])
    yield lora("layers", "lin0", layers_to_transform=1, layers_pattern="layers")
    yield lora("layers", "lin0", "lin1", exclude_modules=["1.lin0"])
    yield Row("Lora", "layers", {"target_modules": r".*\.(lin0|1\.lin1)"})
    yield Row("Lora", "layers", {"target_modules": "all-linear"})
    yield lora("MLP", "lin1", init_lora_weights="pissa", r=2)
    yield lora("MLP", "lin1", init_lora_weights="olora", r=2)
    yield lora("MLP with norms", "lin0", modules_to_save=["norm1", "lin1"])
    yield Row("Lora", "Experts", {"target_parameters": ["experts.up", "experts.down"], "r": 2})
    yield Row("Lora", "Experts", {"target_parameters": ["experts.down"], "rank_pattern": {"experts.down": 3}})
    yield lora("bert", "query", "value", modules_to_save=["classifier"], task_type="SEQ_CLS")
    yield lora("llama", "q_proj", "v_proj", "down_proj", task_type="CAUSAL_LM")
    yield lora("gpt2", "c_attn", fan_in_fan_out=True)
    yield lora("gpt2", "c_attn", trainable_token_indices=[5, 3])
    yield Row("Lora", "vit", {"target_modules": "all-linear", "exclude_modules": ["classifier"]})
    tied, long = "LlamaForCausalLM tie_word_embeddings=True", {"task_type": "CAUSAL_LM"}
    for model in ("LlamaForCausalLM", tied):
        for targets in (["lm_head"], ["embed_tokens", "q_proj"], ["embed_tokens", "lm_head"]):
            yield lora(model, *targets, **long)
        yield lora(model, "q_proj", modules_to_save=["embed_tokens", "lm_head"])
        for indices in ([5, 3], {"embed_tokens": [5, 3], "lm_head": [5, 3]}, {"embed_tokens": [5], "lm_head": [7, 1]},
                      {"lm_head": [5]}):  # fmt: skip
            yield lora(model, "q_proj", trainable_token_indices=indices)
        yield replace(lora(model, "embed_tokens", "lm_head", **long), grown=2)
        yield replace(lora(model, "q_proj", **long), grown=2)
        yield replace(lora(model, "q_proj", trainable_token_indices=[99, 5]), grown=2)
    yield lora("GPT2LMHeadModel", "wte")
    yield lora("GPT2LMHeadModel", "lm_head", "c_attn", use_dora=True)
    yield replace(lora("GPT2LMHeadModel", "c_attn"), grown=3)
    for model, name in (("LlamaForCausalLM", "up_proj"), ("GPT2LMHeadModel", "c_attn")):
        yield replace(lora(model, name, alora_invocation_tokens=[28, 71], task_type="CAUSAL_LM"), unmerged=True)
    yield lora("LlamaForSequenceClassification num_labels=3", "q_proj", task_type="SEQ_CLS")
    yield lora("LlamaForSequenceClassification num_labels=3", "score")
    yield lora("bert", "classifier", "query")
    yield lora("mixtral", "q_proj", target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)


def _on(method: str, *rows: tuple[str, Any] | tuple[str, Any, dict[str, Any]], **common: Any) -> Iterator[Row]:
    for model, targets, *more in rows:
        yield Row(method, model, {"target_modules": targets, **common, **(more[0] if more else {})})


SAVE = {"modules_to_save": ["lin1"]}
MLPS = (("MLP", "lin0"), ("MLP", ["lin0"]), ("MLP", ["lin1"]), ("MLP", ["lin0", "lin1"]), ("MLP", ["lin0"], SAVE))


def _others() -> Iterator[Row]:
    fed = [("lin0", []), ("lin0", "lin0"), (["lin0"], []), (["lin0"], ["lin0"]), (["lin0", "lin1"], ["lin1"])]
    for targets, forward in fed:
        yield Row("IA3", "MLP", {"target_modules": targets, "feedforward_modules": forward})
    for model, layer in (("Conv2d", "conv2d"), ("Conv3d", "conv3d"), ("EmbConv1D", "conv1d")):
        for forward in ([], [layer]):
            yield Row("IA3", model, {"target_modules": [layer], "feedforward_modules": forward})
    yield Row("IA3", "MLP", {"target_modules": ["lin0"], "feedforward_modules": [], **SAVE})
    yield from _on("Vera", *MLPS, ("MLP of even sizes", ["lin0", "lin1", "lin2"], {"r": 4}))
    kinds = (("Conv1d", ["conv1d"]), ("Conv2d", ["conv2d"]), ("Conv2d", ["conv2d", "lin0"]), ("Conv2d 1x1", ["conv2d"]))
    yield from _on("LoHa", *MLPS, *kinds, ("Conv2d", ["conv2d"], {"use_effective_conv2d": True}),
                   ("MLP", ["lin0", "lin1"], {"rank_pattern": {"lin1": 3}, "alpha_pattern": {"lin0": 5}}))  # fmt: skip
    yield from _on("LoKr", *MLPS, *kinds[1:], ("Conv2d", ["conv2d"], {"use_effective_conv2d": True}),
                   ("MLP", "lin0", {"decompose_both": True, "r": 1, "alpha": 1}))  # fmt: skip
    yield from _on("OFT", *MLPS, ("MLP of even sizes", ["lin0", "lin1"], {"r": 4}), r=2, oft_block_size=0)
    yield from _on("OFT", ("MLP", ["lin0"]), ("MLP", ["lin0"], {"coft": True, "eps": 0.01}),
                   ("MLP", ["lin0"], {"block_share": True}), ("MLP", ["lin0"], {"use_cayley_neumann": False}),
                   oft_block_size=5)  # fmt: skip
    for model, fields in (("Conv2d", {"r": 5}), ("Conv2d of many patches", {"r": 5, "coft": True, "eps": 0.01}),
                          ("Conv2d of many patches", {"r": 5, "block_share": True}),
                          ("Conv2d groups, padded", {"r": 8})):  # fmt: skip
        targets = ["conv2d", "lin0"] if "many" in model else ["conv2d"]
        note = "PEFT merges another function than it computes live; here this is not merged"
        yield Row("OFT", model, {"target_modules": targets, "oft_block_size": 0, **fields}, note=note, unmerged=True)
    yield from _on("BOFT", ("MLP", ["lin1"]), ("MLP", ["lin0"]), ("MLP", "lin0"), ("MLP", ["lin0", "lin1"]),
                   ("MLP", ["lin0"], SAVE), boft_block_size=2)  # fmt: skip
    yield from _on("BOFT", ("Conv2d", ["conv2d"]), boft_block_size=5)
    yield from _on("HRA", *MLPS, ("Conv2d", ["conv2d"]), ("MLP", ["lin0"], {"apply_GS": True}))
    yield from _on("Miss", *MLPS, ("MLP", ["lin0"], {"init_weights": "bat"}),
                   ("MLP", ["lin0"], {"init_weights": "mini", "mini_r": 2}), r=2)  # fmt: skip
    yield from _on("Road", *MLPS, ("MLP", ["lin0"], {"variant": "road_2"}), ("MLP", ["lin0"], {"variant": "road_4"}),
                   group_size=2)  # fmt: skip
    yield from _on("RandLora", *MLPS, ("MLP of even sizes", ["lin0", "lin1"], {"r": 4}), randlora_alpha=1)
    yield from _on("FourierFT", *MLPS, n_frequency=10, scaling=20.0)
    yield from _on("Shira", *MLPS, r=1)
    yield from _on("C3A", *MLPS, block_size=2)
    norms = (("MLP with norms", "norm0"), ("MLP with norms", ["norm0"]), ("MLP with norms", ["norm0", "norm1"]))
    yield from _on("LNTuning", *norms, ("MLP with norms", ["norm0"], {"modules_to_save": ["norm1"]}),
                   ("bert", ["LayerNorm"]))  # fmt: skip
    yield from _on("AdaLora", *MLPS, init_r=4, target_r=2, total_step=10)
    for method, more in (("IA3", {"feedforward_modules": ["down_proj"]}), ("LoHa", {}), ("OFT", {"oft_block_size": 8}),
                         ("HRA", {}), ("AdaLora", {"total_step": 9}), ("Vera", {"r": 8})):  # fmt: skip
        yield Row(method, "llama", {"target_modules": ["q_proj", "down_proj"], **more})


def _prefixes() -> Iterator[Row]:
    common = {"task_type": "CAUSAL_LM"}
    note = "no change of a weight; the prefix's keys are turned back by its length"
    for model, fields in (
        *(("llama", {"num_virtual_tokens": length}) for length in (4, 1, 9)),
        ("llama", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12}),
        ("mixtral", {"num_virtual_tokens": 4}),
        ("GPTNeoXForCausalLM", {"num_virtual_tokens": 4}),
        ("LlamaForSequenceClassification num_labels=3", {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
        ("LlamaForTokenClassification", {"num_virtual_tokens": 4, "task_type": "TOKEN_CLS"}),
        ("Qwen2ForQuestionAnswering", {"num_virtual_tokens": 4, "task_type": "QUESTION_ANS"}),
        ("LlamaModel", {"num_virtual_tokens": 4, "task_type": "FEATURE_EXTRACTION"}),
    ):  # fmt: skip
        yield Row("PrefixTuning", model, {**common, **fields}, note=note, unmerged=True)
    window = "its prefix leaves the window of attention as the text goes on"
    yield Row("PrefixTuning", "MistralForCausalLM sliding_window=4", {"num_virtual_tokens": 4, **common},
              ("peft_type", window))  # fmt: skip
    note = "no change of a weight; the text's learned positions are shifted by the prefix's length"
    for model, fields in (
        ("gpt2", {"num_virtual_tokens": 4}),
        ("gpt2", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 12}),
        ("GPT2ForSequenceClassification num_labels=3", {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
        ("bert", {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
        ("RobertaForTokenClassification", {"num_virtual_tokens": 4, "task_type": "TOKEN_CLS"}),
        ("ElectraForQuestionAnswering", {"num_virtual_tokens": 4, "task_type": "QUESTION_ANS"}),
        ("OPTForCausalLM ffn_dim=48, word_embed_proj_dim=32", {"num_virtual_tokens": 4}),
    ):
        yield Row("PrefixTuning", model, {**common, **fields}, note=note, unmerged=True)
    positions = "positions that are neither rotary nor those of one embedding"
    yield Row("PrefixTuning", "BloomForCausalLM", {"num_virtual_tokens": 4, **common}, ("peft_type", positions))
    decoder = "encoder-decoders have a prefix in the decoder alone"
    yield Row("PrefixTuning", "t5", {"num_virtual_tokens": 4, "task_type": "SEQ_2_SEQ_LM"},
              ("num_transformer_submodules", decoder))  # fmt: skip


PROMPT = "no change of a weight; the text's outputs are compared"
HEAD = "no change of a weight; the head sees the virtual tokens"
NETWORK = "no change of a weight; the file holds what the network made"


def _prompts() -> Iterator[Row]:
    texts = (
        ("llama", "CAUSAL_LM", PROMPT), ("gpt2", "CAUSAL_LM", PROMPT), ("t5", "SEQ_2_SEQ_LM", PROMPT),
        ("BertForTokenClassification", "TOKEN_CLS", PROMPT), ("RobertaForQuestionAnswering", "QUESTION_ANS", PROMPT),
        ("BertModel", "FEATURE_EXTRACTION", PROMPT), ("bert", "SEQ_CLS", HEAD),
        ("RobertaForSequenceClassification num_labels=3", "SEQ_CLS", HEAD),
        ("GPT2ForSequenceClassification num_labels=3", "SEQ_CLS", HEAD),
        ("LlamaForSequenceClassification num_labels=3", "SEQ_CLS", HEAD),
    )  # fmt: skip
    for model, task, note in texts:
        yield Row("PromptTuning", model, {"num_virtual_tokens": 4, "task_type": task}, note=note, unmerged=True)
    more = {"num_transformer_submodules": 1, "task_type": "SEQ_2_SEQ_LM"}
    yield Row("PromptTuning", "t5", {"num_virtual_tokens": 4, **more}, note=PROMPT, unmerged=True)
    saved = {"task_type": "CAUSAL_LM", "modules_to_save": ["lm_head"]}
    yield Row("PromptTuning", "llama", {"num_virtual_tokens": 1, **saved}, note=PROMPT, unmerged=True)
    for model, task, _ in texts[:8:2]:
        for kind, size in (("MLP", 12), ("LSTM", 8)):
            fields = {"encoder_reparameterization_type": kind, "encoder_hidden_size": size, "task_type": task}
            yield Row("PromptEncoder", model, {"num_virtual_tokens": 4, **fields}, note=NETWORK, unmerged=True)
    tasks = {"num_virtual_tokens": 4, "num_tasks": 3, "num_ranks": 2}
    for model, task, note in (*texts[:2], texts[3], *texts[6:]):
        yield Row("MultitaskPromptTuning", model, {**tasks, "task_type": task}, note=note, unmerged=True)
    decoder = "PEFT prompts the decoder, too, while training, and not when it generates"
    yield Row("MultitaskPromptTuning", "t5", {**tasks, "task_type": "SEQ_2_SEQ_LM"},
              ("num_transformer_submodules", decoder))  # fmt: skip
    gate = "no change of a weight"
    for model, layers, task in (("llama", 2, "CAUSAL_LM"), ("LlamaForCausalLM", 1, None), ("LlamaModel", 2, None),
                                ("MistralForCausalLM", 2, "CAUSAL_LM"), ("gpt2", 2, "CAUSAL_LM"),
                                ("GPT2LMHeadModel", 1, None), ("LlamaForSequenceClassification", 3, None)):  # fmt: skip
        fields = {"adapter_len": 3, "adapter_layers": layers, **({"task_type": task} if task else {})}
        yield Row("AdaptionPrompt", model, fields, note=gate, unmerged=True)
    bias = "PEFT adds the bias of the attention's output map once more"
    yield Row("AdaptionPrompt", "LlamaForCausalLM attention_bias=True", {"adapter_len": 3, "adapter_layers": 2},
              ("target_modules", bias))  # fmt: skip


ROWS = [*_lora(), *_others(), *_prefixes(), *_prompts()]
IDS = [f"{row.method}-{i}-{row.model}" for i, row in enumerate(ROWS)]


def build(row: Row) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """The row's model, and a call of it."""
    if row.model in MODELS:
        model, example = MODELS[row.model][0](), MODELS[row.model][1]()
        return model.eval(), lambda m: m(example)
    model, inputs = _family(row.model)
    if row.fields.get("num_tasks") and row.model == "t5":
        inputs["labels"] = inputs.pop("decoder_input_ids")
    if invocation := row.fields.get("alora_invocation_tokens"):  # another place in each text
        for number, text in enumerate(inputs["input_ids"]):
            text[number + 1 : number + 1 + len(invocation)] = torch.tensor(invocation)
    tasks = torch.tensor([2, 0]) if row.fields.get("num_tasks") else None

    def call(m: nn.Module) -> Tensor:
        if tasks is not None and type(m).__module__.startswith("peft."):
            return _result(m(**inputs, task_ids=tasks))
        with nullcontext() if tasks is None else task_of(tasks):
            return _result(m(**inputs))

    return model.eval(), call


def _result(output: Any) -> Tensor:
    if "start_logits" in output:
        return torch.stack([output["start_logits"], output["end_logits"]], -1)
    return output["logits"] if "logits" in output else output["last_hidden_state"]


def of_text(output: Tensor, plain: Tensor) -> Tensor:
    """PEFT's output for the text, without the outputs for virtual tokens."""
    return output[:, output.shape[1] - plain.shape[1] :] if output.dim() == plain.dim() == 3 else output


def in_peft(row: Row, model: nn.Module) -> Any:
    """PEFT's form of a copy of the model, its adapter as if it were trained."""
    import peft

    fields = copy.deepcopy(row.fields)  # PEFT adds to its lists
    for name, value in fields.items():
        if isinstance(value, str) and name.endswith("_config"):
            fields[name] = eval(value.replace("(", "Config(", 1), vars(peft) | vars(peft.tuners.lora.config))  # noqa: S307
    theirs = peft.get_peft_model(copy.deepcopy(model), getattr(peft, f"{row.method}Config")(**fields)).eval()
    keep = fields.get("init_lora_weights") in ("pissa", "olora")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and not (keep and "lora_" in name):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif keep and "lora_" in name:
                parameter.mul_(1.1)
    return theirs


def near(actual: Tensor, expected: Tensor) -> bool:
    return actual.shape == expected.shape and bool(
        (actual - expected).abs().max() <= SLACK * max(1.0, float(expected.abs().max()))
    )


def check(row: Row, folder: Path) -> dict[str, str]:
    """Every cell of a row: "" if it passes, else the reason."""
    import peft
    from safetensors.torch import load_file

    model, call = build(row)
    base = copy.deepcopy(model)
    for grown in (model, base) if row.grown else ():
        grown.resize_token_embeddings(SIZES["vocab_size"] + row.grown)  # type: ignore[operator]
    theirs = in_peft(row, base)
    theirs.save_pretrained(folder / "theirs", save_embedding_layers=True if row.grown else "auto")
    with torch.no_grad():
        plain = call(model)
        expected = of_text(call(theirs), plain)
        if row.by_hand is not None:
            peft_output, file = expected, load_file(folder / "theirs/adapter_model.safetensors")
            expected = call(row.by_hand(model, file))
            assert near(peft_output, expected), "PEFT's own is another"
    before = Snapshot(model)
    wrong: dict[str, str] = dict.fromkeys(CELLS, "")
    assert not near(plain, expected), "the adapter does nothing"
    if row.refused:
        try:
            load_adapter(model, folder / "theirs")
        except SurgeryError as error:
            as_expected = row.refused[0] in str(error) and not before.differences(model)
            return dict.fromkeys([*CELLS], "" if as_expected else f"another error: {error}")
        return dict.fromkeys([*CELLS], "was not refused")
    example = _family_inputs(row) if row.method == "PrefixTuning" else None
    load_adapter(model, folder / "theirs", example_inputs=example)
    with torch.no_grad():
        wrong["load"] = "" if near(call(model), expected) else "another output"
        if not row.unmerged:
            merge(model, untie=True)
            wrong["merged"] = "" if near(call(model), expected) else "another output"
            unmerge(model)
    save_adapter(model, folder / "ours", format="peft")
    remove(model)
    wrong["removed"] = "; ".join(before.differences(model)[:3])
    ours = copy.deepcopy(model)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder / "ours")).eval()
    with torch.no_grad():
        wrong["save"] = "" if near(of_text(call(again), plain), expected) else "another output"
    if not row.untrained:
        load_adapter(ours, folder / "theirs", example_inputs=example)
        wrong["trained"] = as_trained(ours, theirs, lambda m: of_text(call(m), plain), row.model != "t5")
    return wrong


def as_trained(ours: nn.Module, theirs: nn.Module, call: Callable[[Any], Tensor], counted: bool) -> str:
    """Compare the outputs after the same optimizer steps from the same tensors; "" or the reason.

    Adam scales each number separately, so an adapter with rotated coordinates would take other steps.
    """
    count = sum(parameter.numel() for parameter in theirs.parameters() if parameter.requires_grad)
    if counted and summary(ours).trainable != count:
        return f"{summary(ours).trainable} numbers are trained, {count} in PEFT"
    first = call(theirs).detach()
    rate = 0.3 / max(1e-12, sum(float(grad.pow(2).sum()) for grad in _grads(theirs, call).values()) ** 0.5)
    for model in (theirs, ours):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate, momentum=0.9)
        for _ in range(3):
            for parameter, grad in _grads(model, call).items():
                parameter.grad = grad
            optimizer.step()
    with torch.no_grad():
        expected, actual = call(theirs), call(ours)
    moved, apart = float((expected - first).abs().max()), float((expected - actual).abs().max())
    if moved < 1e-4:
        return "training does nothing"
    return "" if apart <= max(1e-3 * moved, SLACK * float(expected.abs().max())) else f"{apart / moved:.0e} apart"


def _grads(model: nn.Module, call: Callable[[Any], Tensor]) -> dict[Tensor, Tensor]:
    output = call(model).float()
    target = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad((output - target).pow(2).mean(), trained, allow_unused=True)
    return {parameter: grad for parameter, grad in zip(trained, grads, strict=True) if grad is not None}
