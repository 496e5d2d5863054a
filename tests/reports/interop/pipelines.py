"""Small pipelines of diffusers with random weights, and the live side of their cases."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import Rule, apply_rules, deactivate, using
from tests.reports.interop.adapter_case import NONE, AdapterCase, Step
from tests.reports.interop.programs.pipeline_calls import latents
from tests.reports.interop.reference import LiveCase
from tests.support import ROOT

__all__ = ["PIPELINES", "LivePipeline", "pipeline_prompts", "write_pipeline"]

COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")


def diffusers() -> Any:
    """The package of this environment, or else that of `.venv-diffusers`."""
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError:
        sys.path += [str(folder) for folder in (ROOT / ".venv-diffusers").glob("lib/python*/site-packages")]
        return importlib.import_module("diffusers")


def pipeline_prompts() -> list[list[int]]:
    return [[0, 5, 9, 17, 33, 2], [0, 40, 41, 2]]


def _clip(projection: int = 0) -> Any:
    transformers: Any = importlib.import_module("transformers")
    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4)
    sizes |= dict(max_position_embeddings=16, bos_token_id=0, eos_token_id=2, pad_token_id=1)
    if not projection:
        return transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    config = transformers.CLIPTextConfig(**sizes, projection_dim=projection, hidden_act="gelu")
    return transformers.CLIPTextModelWithProjection(config)


def _t5() -> Any:
    transformers: Any = importlib.import_module("transformers")
    sizes = dict(vocab_size=64, d_model=16, d_ff=32, d_kv=4, num_layers=2, num_heads=4)
    return transformers.T5EncoderModel(transformers.T5Config(**sizes))


def _vae() -> Any:
    sizes = dict(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8, shift_factor=0.1)
    return diffusers().AutoencoderKL(**sizes)


_UNET: dict[str, Any] = dict(
    sample_size=8, in_channels=4, out_channels=4, layers_per_block=2, norm_num_groups=4, attention_head_dim=4
)


def _sd() -> Any:
    blocks = dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), block_out_channels=(16, 32))
    blocks |= dict(up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16)
    return diffusers().StableDiffusionPipeline(
        vae=_vae(), text_encoder=_clip(), tokenizer=None, unet=diffusers().UNet2DConditionModel(**_UNET, **blocks),
        scheduler=diffusers().DDIMScheduler(clip_sample=False, steps_offset=1), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl() -> Any:
    sizes = dict(block_out_channels=(16, 32, 32), transformer_layers_per_block=(1, 2, 3), use_linear_projection=True)
    sizes |= dict(down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"))
    sizes |= dict(up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=32)
    sizes |= dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=64)
    return diffusers().StableDiffusionXLPipeline(
        vae=_vae(), text_encoder=_clip(), text_encoder_2=_clip(16), tokenizer=None, tokenizer_2=None,
        unet=diffusers().UNet2DConditionModel(**_UNET, **sizes), scheduler=diffusers().EulerDiscreteScheduler(),
    )  # fmt: skip


def _sd3() -> Any:
    sizes = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=32)
    sizes |= dict(num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=128, pooled_projection_dim=32)
    sizes |= dict(pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm")
    return diffusers().StableDiffusion3Pipeline(
        transformer=diffusers().SD3Transformer2DModel(**sizes), vae=_vae(), text_encoder=_clip(16),
        scheduler=diffusers().FlowMatchEulerDiscreteScheduler(), text_encoder_2=_clip(16), text_encoder_3=None,
        tokenizer=None, tokenizer_2=None, tokenizer_3=None,
    )  # fmt: skip


def _flux() -> Any:
    sizes = dict(patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16)
    sizes |= dict(num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8))
    return diffusers().FluxPipeline(
        transformer=diffusers().FluxTransformer2DModel(**sizes, guidance_embeds=True), vae=_vae(),
        scheduler=diffusers().FlowMatchEulerDiscreteScheduler(), text_encoder=_clip(), text_encoder_2=_t5(),
        tokenizer=None, tokenizer_2=None,
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {"sd": _sd, "sdxl": _sdxl, "sd3": _sd3, "flux": _flux}


def pipeline_named(name: str) -> Any:
    """The pipeline in evaluation, the same numbers each time."""
    torch.manual_seed(0)
    pipeline = PIPELINES[name]()
    pipeline.set_progress_bar_config(disable=True)
    for part in pipeline.components.values():
        part.eval() if isinstance(part, nn.Module) else None
    return pipeline


def write_pipeline(name: str, folder: Path) -> Path:
    pipeline_named(name).save_pretrained(folder)
    return folder


class LivePipeline(LiveCase):
    """The components of a pipeline in one module, with the case's adapters. Their tensors are random."""

    def __init__(self, case: AdapterCase):
        self.case = case
        self.pipeline = pipeline_named(case.base)
        parts = {name: getattr(self.pipeline, name, None) for name in COMPONENTS}
        self.model = nn.ModuleDict({name: part for name, part in parts.items() if isinstance(part, nn.Module)})
        self.vocabulary = 64
        for number, (name, rules) in enumerate(case.adapters.items()):
            deactivate(self.model) if number else None
            torch.manual_seed(number + 1)
            apply_rules(self.model, [Rule.from_dict(rule) for rule in rules], adapter=name)
            with torch.no_grad():
                for parameter in (p for p in self.model.parameters() if p.requires_grad):
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        self._round()

    @staticmethod
    def prompts() -> list[list[int]]:
        return pipeline_prompts()

    @staticmethod
    def write_base(name: str, folder: Path, format: str) -> Path:
        return write_pipeline(name, folder)

    def answers(self, steps: list[Step]) -> list[dict[str, Any]]:
        answers = []
        for step in steps:
            with using(self.model, list(step.active)):
                answers.append({"values": [latents(self.pipeline, prompt) for prompt in pipeline_prompts()]})
        return answers

    def reasons_to_doubt(self, answers: list[dict[str, Any]]) -> str:
        """Why the case proves nothing: an adapter that hardly moves the latents."""
        (base,) = (torch.tensor(answer["values"]) for answer in self.answers([NONE]))
        for step, answer in zip(self.case.steps, answers, strict=True):
            if step != NONE and (torch.tensor(answer["values"]) - base).abs().max() < 0.01:
                return f"{'+'.join(step.active)} does not change the latents"
        return ""
