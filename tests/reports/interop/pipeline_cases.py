"""The adapters of pipelines that make images, as data; rows of the second table of docs/reference/engines.md."""

from __future__ import annotations

from typing import Any

from tests.reports.interop.adapter_case import BOTH, NONE, A, AdapterCase, B

__all__ = ["PIPELINE_CASES"]

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
CLIP = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def _lora(targets: list[str], rank: int = 4, alpha: float = 6, **fields: Any) -> dict[str, Any]:
    return {"rule": "lora", "targets": targets, "rank": rank, "alpha": alpha, **fields}


def _one(name: str, base: str, *rules: dict[str, Any], **fields: Any) -> AdapterCase:
    return AdapterCase(name, {"a": list(rules)}, base=base, kind="pipeline", **fields)


CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "proj_in", "time_emb_proj", "downsamplers.0.conv"]
PIPELINE_CASES: tuple[AdapterCase, ...] = (
    _one("SD 1.5: attention", "sd", _lora(ATTENTION)),
    _one("SD 1.5: ranks and alphas by pattern", "sd",
         _lora(ATTENTION, rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 1.0})),
    _one("SD 1.5: rsLoRA", "sd", _lora(ATTENTION, rslora=True)),
    _one("SD 1.5: DoRA", "sd", _lora(ATTENTION, dora=True)),
    _one("SD 1.5: LoRA with lora_bias", "sd", _lora(["to_q", "ff.net.2"], lora_bias=True)),
    _one("SD 1.5: convolutions", "sd", _lora(CONVOLUTIONS)),
    _one("SD 1.5: text encoder", "sd", _lora(CLIP, alpha_pattern={"fc1": 1.0})),
    _one("SD 1.5: UNet and text encoder", "sd", _lora(ATTENTION), _lora(CLIP, rank=2, alpha=1)),
    _one("SD 1.5: token embedding", "sd", _lora([*ATTENTION, "token_embedding"])),
    _one("SD 1.5: LoHa", "sd", {"rule": "loha", "targets": ATTENTION, "rank": 2, "alpha": 3}),
    _one("SD 1.5: LoKr", "sd", {"rule": "lokr", "targets": ATTENTION, "rank": 2, "alpha": 3}),
    _one("SD 1.5: LoHa of convolutions", "sd", {"rule": "loha", "targets": ["conv1", "conv2"], "rank": 2, "alpha": 3}),
    _one("SD 1.5: IA3", "sd", {"rule": "ia3", "targets": ["to_k", "to_v"]}),
    _one("SD 1.5: OFT", "sd", {"rule": "oft", "targets": ["to_q"], "block_size": 8}),
    _one("SD 1.5: trained norms", "sd", _lora(ATTENTION), {"rule": "norm", "targets": ["norm1"]}),
    _one("SD 1.5: bfloat16", "sd", _lora(ATTENTION), dtype="bfloat16"),
    AdapterCase("SD 1.5: two adapters, switched", {"a": [_lora(ATTENTION)], "b": [_lora(["to_q", "ff.net.2"], rank=2)]},
                base="sd", kind="pipeline", steps=(NONE, A, B, NONE, A, NONE)),
    AdapterCase("SD 1.5: two adapters at once", {"a": [_lora(ATTENTION)], "b": [_lora(["to_q", "ff.net.2"], rank=2)]},
                base="sd", kind="pipeline", steps=(NONE, BOTH, A, NONE)),
    _one("SDXL: attention", "sdxl", _lora(ATTENTION)),
    _one("SDXL: convolutions", "sdxl", _lora(CONVOLUTIONS)),
    _one("SDXL: UNet and both text encoders", "sdxl",
         _lora([*ATTENTION, "ff.net.0.proj"]), _lora(CLIP, rank=2, alpha=3)),
    _one("SDXL: DoRA", "sdxl", _lora(ATTENTION, dora=True)),
    _one("SD 3: attention", "sd3", _lora([*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"])),
    _one("SD 3: all blocks and text encoders", "sd3",
         _lora([*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear"]), _lora(CLIP, rank=2, alpha=3)),
    _one("Flux: attention", "flux", _lora([*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"])),
    _one("Flux: all blocks", "flux",
         _lora([*ATTENTION, "ff.net.0.proj", "ff.net.2", "norm1.linear", "proj_mlp", "proj_out", "norm.linear"])),
    _one("Flux: input and output", "flux", _lora(["x_embedder", "context_embedder", "norm_out.linear"])),
    _one("Flux: transformer and text encoder", "flux", _lora(ATTENTION), _lora(CLIP, rank=2, alpha=3)),
)  # fmt: skip
