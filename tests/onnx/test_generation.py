"""A file's decoder beside transformers' `generate`: the same tokens, or a refusal that says what `generate` adds.

ALL_ONNX=1 tries every family that decodes.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime", reason="runs files")
transformers: Any = pytest.importorskip("transformers", reason="decodes")

from surgery import SurgeryError, export_onnx  # noqa: E402
from surgery.onnx import OnnxRunner  # noqa: E402
from tests.support.families import FAMILIES  # noqa: E402
from tests.support.sampling import LAYERS  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

NEW, TEXT, SWITCH = 8, 6, 9  # rotations switch while tokens are added
SAMPLE = ["roberta", "openai_gpt"]  # with a cache, and without
DECODERS = [name for name, family in FAMILIES.items() if family.kind in ("decoder", "moe", "encoder", "state-space")]
CHOSEN = [*DECODERS, *(f"{name}-longrope" for name in DECODERS)] if os.environ.get("ALL_ONNX") else SAMPLE


def decoder(name: str, layers: int | None = None) -> nn.Module:
    """A family's decoder with a head; with `-longrope`, or of Phi-3, with rotations that change at a length."""
    family, _, rope = name.partition("-")
    torch.manual_seed(0)
    config: Any = copy.deepcopy(FAMILIES[family].make().config)
    if type(config) not in transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING:
        pytest.skip("it has no decoder")
    if layers is not None:
        config.num_hidden_layers = layers
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    if rope or family == "phi3":
        known = dict(getattr(config, "rope_parameters", None) or {})
        if "rope_theta" not in known:
            pytest.skip("it has no rotations, or several kinds")
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        half = int(size * known.get("partial_rotary_factor", 1.0)) // 2
        known |= {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": SWITCH}
        config.rope_parameters = known | {"short_factor": [1.0] * half, "long_factor": [4.0] * half}
        config.original_max_position_embeddings = SWITCH
    try:
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    except Exception as error:
        pytest.skip(f"it can't be made so: {error}"[:100])
    for parameter in model.parameters():  # larger, to avoid ties between tokens
        parameter.data.mul_(3.0 if parameter.dim() > 1 else 1.0)
    return model


@pytest.mark.parametrize("name", CHOSEN)
def test_a_file_decodes_as_generate_or_says_why_not(name: str, tmp_path: Path) -> None:
    model: Any = decoder(name, LAYERS if name in SAMPLE else None)
    text = torch.randint(3, min(90, model.get_input_embeddings().weight.shape[0]), (1, TEXT))
    mask = torch.ones_like(text)
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(text, attention_mask=mask, **settings)[0, TEXT:].tolist()
    example = {"input_ids": text, "attention_mask": mask}
    try:
        report = export_onnx(model, tmp_path / "m.onnx", example, cache=True, verify=False)
    except SurgeryError as error:
        if "returns no cache" not in str(error):
            pytest.skip(f"not exported: {error}"[:100])
        report = export_onnx(model, tmp_path / "m.onnx", example, verify=False)
    try:  # a file that onnxruntime can't open is one that says why not, as one whose sizes came out fixed
        runner = OnnxRunner(tmp_path / "m.onnx")
        actual = runner.generate(text.numpy(), NEW)[0, TEXT:].tolist()
    except SurgeryError as error:
        assert error.why, error
        assert "generate" not in str(error.what) or any("generate" in note for note in report.notices)
        assert "accepts exactly" not in error.why or any("is fixed at" in note for note in report.notices)
        return
    assert actual == expected


@pytest.mark.slow("the greedy texts of a Llama read a cache")
def test_a_cache_is_read_again_where_the_rotations_change(tmp_path: Path) -> None:
    model: Any = decoder("phi3")
    text = torch.randint(3, 90, (2, TEXT))
    example = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    report = export_onnx(model, tmp_path / "m.onnx", example, cache=True)
    assert report.manifest["generation"] == {"reread": SWITCH + 1} and report.parity is not None and report.parity.ok
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(text, attention_mask=torch.ones_like(text), **settings)[:, TEXT:].tolist()
    assert OnnxRunner(tmp_path / "m.onnx").generate(text.numpy(), NEW)[:, TEXT:].tolist() == expected


def test_settings_that_change_logits_are_told(tmp_path: Path) -> None:
    model: Any = decoder("gpt2", layers=LAYERS)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.no_repeat_ngram_size = 0
    report = export_onnx(model, tmp_path / "m.onnx", {"input_ids": torch.randint(3, 90, (1, 5))}, verify=False)
    (note,) = [note for note in report.notices if "generation config" in note]
    assert "repetition_penalty=1.3" in note and "ngram" not in note
