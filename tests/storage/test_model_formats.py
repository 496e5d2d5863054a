"""`merge_to(format=)`: whole models for llama.cpp and mlx-lm. transformers reads GGUF files, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery import SurgeryError, SurgeryWarning, merge, merge_to, remove
from tests.support.small_decoders import IDS, adapted, config_of, model_of

transformers: Any = pytest.importorskip("transformers")
gguf: Any = pytest.importorskip("gguf")

CLOSE: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5}


def contents(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """A GGUF file's fields and tensors."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


# llama.cpp ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_transformers_reads_the_gguf_file(tmp_path: Path, name: str) -> None:
    model = adapted(name)
    before = model(IDS).logits
    assert merge_to(model, tmp_path / "new/merged.gguf", format="gguf") == tmp_path / "new/merged.gguf"
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["merged.gguf"]
    assert torch.equal(model(IDS).logits, before)  # the model is as it was
    merge(model)
    plain = type(model).from_pretrained(tmp_path / "new", gguf_file="merged.gguf").eval()
    assert torch.allclose(plain(IDS).logits, model(IDS).logits, **CLOSE)
    state = model.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in plain.state_dict().items() if "weight" in key)


def test_a_gguf_file_says_the_sizes_and_permutes_heads(tmp_path: Path) -> None:
    model = model_of(rms_norm_eps=1e-3, tie_word_embeddings=True).bfloat16()
    fields, tensors = contents(merge_to(model, tmp_path / "plain.gguf", format="gguf"))  # without rules
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "Plain", "general.file_type": 32,
        "llama.block_count": 2, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 777.0, "llama.rope.dimension_count": 8, "llama.vocab_size": 64,
        "tokenizer.ggml.model": "none",
    }  # fmt: skip
    assert {name: fields[name] for name in expected} == expected
    assert fields["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-3)
    assert "output.weight" not in tensors  # the head is the embeddings
    query = model.model.layers[1].self_attn.q_proj.weight
    pairs = query.view(4, 2, 4, 32).transpose(1, 2).reshape(32, 32).contiguous()
    assert np.array_equal(tensors["blk.1.attn_q.weight"], pairs.view(torch.uint8).detach().numpy())
    norm = model.model.layers[0].input_layernorm.weight.float()
    assert np.array_equal(tensors["blk.0.attn_norm.weight"], norm.detach().numpy())  # vectors are float32


def test_llama_3_factors_are_a_tensor(tmp_path: Path) -> None:
    rope = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    model = model_of(rope_parameters={**rope, "original_max_position_embeddings": 64})
    _, tensors = contents(merge_to(model, tmp_path / "a.gguf", format="gguf"))
    # transformers divides its frequencies by these factors
    ours = 1 / (10000.0 ** (torch.arange(0, 8, 2) / 8)) / torch.tensor(tensors["rope_freqs.weight"])
    assert torch.allclose(ours, model.model.rotary_emb.inv_freq)


def test_a_gguf_file_in_another_dtype(tmp_path: Path) -> None:
    model = adapted()
    _, tensors = contents(merge_to(model, tmp_path / "a.gguf", format="gguf", dtype=torch.float16))
    merge(model)
    assert tensors["output.weight"].dtype == np.float16 and tensors["output_norm.weight"].dtype == np.float32
    assert np.array_equal(tensors["output.weight"], model.lm_head.weight.detach().half().numpy())
    large = model_of()
    with torch.no_grad():
        large.lm_head.weight[3, 4] = 1e6
    with pytest.raises(SurgeryError, match="do not fit float16"):
        merge_to(large, tmp_path / "b.gguf", format="gguf", dtype=torch.float16)
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def tokenizer_of(**options: Any) -> Any:
    """A tokenizer of bytes with merges, as GPT-2 has it, with a special token and another added one."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, trainers

    inner = tokenizers.Tokenizer(models.BPE(**options))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(special_tokens=["<|end|>"], vocab_size=300, show_progress=False)
    inner.train_from_iterator(["the cat and the hat on the mat"] * 4, trainer)
    inner.decoder = tokenizers.decoders.ByteLevel()  # type: ignore[assignment]
    inner.add_tokens(["hello"])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def test_the_vocabulary_is_written(tmp_path: Path) -> None:
    tokenizer = tokenizer_of()
    model = model_of(vocab_size=len(tokenizer) + 3)
    path = merge_to(model, tmp_path / "a.gguf", format="gguf", tokenizer=tokenizer)
    fields, _ = contents(path)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    known = [tokenizer.convert_ids_to_tokens(number) for number in range(len(tokenizer))]
    assert tokens == [*known, *(f"[PAD{len(tokenizer) + more}]" for more in range(3))]
    assert kinds[tokens.index("<|end|>")] == 3 and kinds[tokens.index("hello")] == 4 and kinds[-1] == 5
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    merges = tokenizer.backend_tokenizer.to_str()
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in json.loads(merges)["model"]["merges"]]
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Lowercase()
    with pytest.raises(SurgeryError, match="none of llama.cpp's pre-tokenizers"):
        merge_to(model, tmp_path / "b.gguf", format="gguf", tokenizer=tokenizer)
    with pytest.raises(SurgeryError, match="does not fit the model"):
        merge_to(model_of(vocab_size=16), tmp_path / "b.gguf", format="gguf", tokenizer=tokenizer_of())
    fields, _ = contents(merge_to(model, tmp_path / "b.gguf", format="gguf", tokenizer=False))
    assert fields["tokenizer.ggml.model"] == "none"


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "type": (lambda: model_of("Jamba", rope_parameters=None), {}, "for the model type 'jamba'"),
    "rope": (
        lambda: model_of(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}), {}, "'dynamic'",
    ),
    "activation": (lambda: model_of(hidden_act="gelu"), {}, "the activation 'gelu'"),
    "windows": (lambda: model_of("Qwen2", use_sliding_window=True), {}, "use_sliding_window=True"),
    "dtype": (model_of, {"dtype": torch.float64}, "in torch.float64"),
    "head": (
        lambda: transformers.LlamaForSequenceClassification(config_of("Llama")), {}, "no other head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("format", ["gguf", "mlx"])
@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_an_engine_computes_otherwise_is_refused(tmp_path: Path, case: str, format: str) -> None:
    build, options, words = REFUSED[case]
    place = tmp_path / ("new/a.gguf" if format == "gguf" else "new")
    with pytest.raises(SurgeryError, match=words):
        merge_to(build(), place, format=format, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


# What llama.cpp computes in one way alone, whatever its files say.
OTHERWISE: dict[str, tuple[str, dict[str, Any], str]] = {
    "theta": ("Gemma", {"head_dim": 16}, "its rope_theta is 10000, and that of the model 777.0"),
    "scale": ("Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 4}, "scales queries for 16 numbers"),
    "layers": ("Cohere2", {"head_dim": 8, "layer_types": ["full_attention"] * 2}, "one of 4 of its layers"),
    "rope": ("SmolLM3", {"no_rope_layers": [1, 0]}, "every fourth of its layers"),
    "heads": ("Granite", {"head_dim": 16}, "head_dim is 16"),
    "scaled": ("Nemotron", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, "'linear'"),
    "head": ("Gemma2", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERWISE)
def test_what_llama_cpp_computes_in_one_way_alone(tmp_path: Path, case: str) -> None:
    name, settings, words = OTHERWISE[case]
    config = config_of(name, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(SurgeryError, match=words):
        merge_to(model, tmp_path / "a.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


def test_windows_that_an_engine_does_not_have_are_told(tmp_path: Path) -> None:
    model = model_of("Mistral", sliding_window=8)
    with pytest.warns(SurgeryWarning, match="llama.cpp computes attention in full where this model has windows of 8"):
        merge_to(model, tmp_path / "a.gguf", format="gguf")
    with pytest.warns(SurgeryWarning, match="mlx-lm computes attention in full"):
        merge_to(model, tmp_path / "a", format="mlx")


def test_names_of_formats_and_files(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(SurgeryError, match="has no format 'gguff'"):
        merge_to(model, tmp_path / "a", format="gguff")  # type: ignore[arg-type]
    for name in ("a", "folder.gguf"):
        (tmp_path / "folder.gguf").mkdir(exist_ok=True)
        with pytest.raises(SurgeryError, match="does not name a GGUF file"):
            merge_to(model, tmp_path / name, format="gguf")
    with pytest.raises(SurgeryError, match="no rules were applied"):
        merge_to(remove(model), tmp_path / "a", adapter="default")


def test_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    model = model_of()
    model.model.layers[0].extra = nn.Linear(4, 4)
    with pytest.raises(SurgeryError, match="no place for 2 tensors"):
        merge_to(model, tmp_path / "a.gguf", format="gguf")
    assert not list(tmp_path.iterdir())


# mlx-lm ---------------------------------------------------------------------------------------------------------


def test_an_mlx_folder_says_what_mlx_lm_reads(tmp_path: Path) -> None:
    from safetensors import safe_open

    from surgery.adapter_files.plain_json import read_json

    model = adapted(tie_word_embeddings=True)
    merge_to(model, tmp_path / "m", format="mlx", dtype=torch.bfloat16)
    config = read_json(tmp_path / "m/config.json")
    assert config["rope_theta"] == 777.0 and config["rope_scaling"] is None and config["tie_word_embeddings"] is True
    index = read_json(tmp_path / "m/model.safetensors.index.json")
    merge(model)
    with safe_open(tmp_path / "m/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "mlx"} and set(file.keys()) == set(index["weight_map"])
        for key in file.keys():
            assert torch.equal(file.get_tensor(key), model.state_dict()[key].bfloat16())
    assert "lm_head.weight" not in index["weight_map"]
    loaded = type(model).from_pretrained(tmp_path / "m").eval()  # transformers reads it, too
    assert loaded.dtype == torch.bfloat16 and loaded(IDS).logits.isfinite().all()
