"""The adapters of the table, as data. A case is one row of docs/reference/engines.md.

Targets, ranks and other fields are those of the rules. A case is trained for a few steps at its base, so that every
tensor of the adapter differs from its start.
"""

from __future__ import annotations

from typing import Any

from tests.reports.interop.adapter_case import BOTH, NONE, A, AdapterCase, B, Step
from tests.reports.interop.pipeline_cases import PIPELINE_CASES

__all__ = ["CASES", "AdapterCase", "Step", "case_named"]

QV = ["q_proj", "v_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def _lora(targets: list[str], rank: int = 8, alpha: float = 16, **fields: Any) -> dict[str, Any]:
    return {"rule": "lora", "targets": targets, "rank": rank, "alpha": alpha, **fields}


def _one(name: str, *rules: dict[str, Any], **fields: Any) -> AdapterCase:
    return AdapterCase(name, {"a": list(rules)}, **fields)


_DECODER_CASES: tuple[AdapterCase, ...] = (
    _one("LoRA at q and v", _lora(QV)),
    _one("LoRA at all linears", _lora(ALL)),
    _one("LoRA at some layers", _lora(["re:.*layers\\.1\\..*(q_proj|down_proj)"])),
    _one("ranks by pattern", _lora(QV, rank_pattern={"v_proj": 4})),
    _one("alphas by pattern", _lora(QV, alpha_pattern={"v_proj": 4.0})),
    _one("rsLoRA", _lora(ATTENTION, rslora=True)),
    _one("DoRA", _lora(QV, dora=True)),
    _one("LoRA with lora_bias", _lora(["q_proj", "down_proj"], lora_bias=True)),
    _one("LoRA and trained biases", _lora(QV, bias="lora_only"), base="qwen2"),
    _one("LoRA at the head", _lora(["q_proj", "lm_head"])),
    _one("LoRA at the embedding", _lora(["q_proj", "embed_tokens"])),
    _one("LoRA and the head in full", _lora(QV), {"rule": "train", "targets": ["lm_head"]}),
    _one("LoRA and the embedding in full", _lora(QV), {"rule": "train", "targets": ["embed_tokens"]}),
    _one("LoRA and trained norms", _lora(QV), {"rule": "norm", "targets": ["input_layernorm"]}),
    _one("trained tokens", _lora(QV), {"rule": "tokens", "targets": ["embed_tokens"], "tokens": [5, 9]}),
    _one("new tokens", _lora(QV), {"rule": "resize-vocab", "targets": [], "tokens": 264}),
    _one("IA3", {"rule": "ia3", "targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]}),
    _one("LoHa", {"rule": "loha", "targets": QV, "rank": 4, "alpha": 8}),
    _one("LoKr", {"rule": "lokr", "targets": QV, "rank": 4, "alpha": 8}),
    _one("VeRA", {"rule": "vera", "targets": ["q_proj"], "rank": 16}),
    _one("OFT", {"rule": "oft", "targets": QV, "block_size": 16}),
    _one("LoRA in bfloat16", _lora(QV), dtype="bfloat16"),
    _one("large rank", _lora(QV, rank=100, alpha=100)),
    AdapterCase(
        "two adapters, switched", {"a": [_lora(QV)], "b": [_lora(["k_proj", "down_proj"], rank=4, alpha=4)]},
        steps=(NONE, A, B, A, NONE),
    ),
    AdapterCase(
        "two adapters at once", {"a": [_lora(QV)], "b": [_lora(["v_proj", "down_proj"], rank=4, alpha=4)]},
        steps=(NONE, BOTH, A, NONE),
    ),
    AdapterCase(
        "one adapter for each row", {"a": [_lora(QV)], "b": [_lora(["v_proj", "down_proj"], rank=4, alpha=4)]},
        steps=(NONE, Step(rows=("a", "b", None, "a")), NONE),
    ),
    _one("Mistral", _lora(ALL), base="mistral"),
    _one("Qwen 2", _lora(ALL), base="qwen2"),
    _one("Qwen 3", _lora(ALL), base="qwen3"),
    _one("Gemma 3", _lora(ALL), base="gemma3"),
    _one("GPT-2", _lora(["c_attn", "c_fc"]), base="gpt2"),
    _one("Mixtral, at the experts", {"rule": "expert-lora", "targets": ["experts"], "rank": 4}, base="mixtral"),
    _one("SmolLM2 135M", _lora(ALL), base="smollm2", tolerance=1e-3),
)  # fmt: skip

CASES = (*_DECODER_CASES, *PIPELINE_CASES)


def case_named(name: str) -> AdapterCase:
    (case,) = [case for case in CASES if case.name == name]
    return case
