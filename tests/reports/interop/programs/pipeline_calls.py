"""A call of a small pipeline: two steps, on embeddings that its text encoders compute. The live model does the same."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any


def opened(folder: str) -> Any:
    """The pipeline in a folder. Components that it does not have, such as tokenizers, are None."""
    diffusers: Any = importlib.import_module("diffusers")
    index = json.loads((Path(folder) / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def latents(pipeline: Any, prompt: list[int]) -> list[float]:
    """The latents after two steps, as numbers of the size of the first noise's before it is scaled."""
    torch: Any = importlib.import_module("torch")
    with torch.no_grad():
        words = _embeddings(torch, pipeline, torch.tensor([prompt]))
        side = 8 * pipeline.vae_scale_factor * (2 if "Flux" in type(pipeline).__name__ else 1)
        seed = torch.Generator().manual_seed(0)
        options = dict(height=side, width=side, num_inference_steps=2, output_type="latent", generator=seed)
        images = pipeline(**words, **options).images.float()
        return (images / float(getattr(pipeline.scheduler, "init_noise_sigma", 1))).flatten().tolist()


def _embeddings(torch: Any, pipeline: Any, ids: Any) -> dict[str, Any]:
    kind = type(pipeline).__name__
    if kind == "FluxPipeline":
        pooled = pipeline.text_encoder(ids).pooler_output
        return {"prompt_embeds": pipeline.text_encoder_2(ids)[0], "pooled_prompt_embeds": pooled}
    if kind == "StableDiffusionPipeline":
        embeddings = pipeline.text_encoder(ids)[0]
        return {"prompt_embeds": embeddings, "negative_prompt_embeds": torch.zeros_like(embeddings)}
    first, second = (
        encoder(ids, output_hidden_states=True) for encoder in (pipeline.text_encoder, pipeline.text_encoder_2)
    )
    embeddings = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
    pooled = torch.cat([first[0], second[0]], -1) if kind == "StableDiffusion3Pipeline" else second[0]
    words = {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled}
    return {**words, **{f"negative_{name}": torch.zeros_like(tensor) for name, tensor in words.items()}}
