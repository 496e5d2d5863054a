"""ComfyUI: its key maps and its arithmetic of weights, from a checkout that COMFYUI names.

ComfyUI's own models need its own sampling, so the weights go through ComfyUI and the pipeline of diffusers computes:
the weights get ComfyUI's names by its own maps, a file's tensors become patches by `load_lora`, `calculate_weight`
applies them, and the results go back. A tensor that ComfyUI does not load is an error here; it logs a warning.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import types
from pathlib import Path
from typing import Any

import job_file
import pipeline_calls

CONFIGS: dict[str, dict[str, Any]] = {  # ComfyUI's words for the small models of pipelines.py
    "StableDiffusionPipeline": {
        "num_res_blocks": [2, 2], "channel_mult": [1, 2], "transformer_depth": [1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 0, 0, 0], "transformer_depth_middle": 1,
    },
    "StableDiffusionXLPipeline": {
        "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 2, 2, 3, 3],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3], "transformer_depth_middle": 3,
    },
    "StableDiffusion3Pipeline": {"depth": 2},
    "FluxPipeline": {"depth": 2, "depth_single_blocks": 2, "hidden_size": 32},
}  # fmt: skip


def open_base(job: dict[str, Any]) -> Any:
    torch: Any = importlib.import_module("torch")
    safetensors: Any = importlib.import_module("safetensors.torch")
    comfy = _comfyui()

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        pipeline = pipeline_calls.opened(job["base"])
        weights = _Weights(torch, comfy, pipeline)
        answers = []
        for step in case["steps"]:
            patches = []
            for name in step["active"]:
                (file,) = Path(case["adapters"][name]).glob("*.safetensors")
                patches.append(weights.patches(safetensors.load_file(file)))
            weights.write(patches)
            answers.append({"values": [pipeline_calls.latents(pipeline, prompt) for prompt in job["prompts"]]})
        return answers

    return answer


def _comfyui() -> Any:
    sys.argv = [sys.argv[0], *sys.argv[1:3]]
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    sys.path.insert(0, os.environ["COMFYUI"])
    vision: Any = types.ModuleType("torchvision")  # its transforms serve one video model
    vision.transforms = types.ModuleType("torchvision.transforms")
    sys.modules |= {"torchvision": vision, "torchvision.transforms": vision.transforms}
    importlib.import_module("comfy.options").enable_args_parsing()
    for name in ("lora", "lora_convert", "model_base", "utils"):
        importlib.import_module(f"comfy.{name}")
    sys.argv = arguments
    for name in ("torchvision", "torchvision.transforms"):  # others ask whether it is there
        del sys.modules[name]
    return importlib.import_module("comfy")


class _Weights:
    """The weights of a pipeline under ComfyUI's names."""

    def __init__(self, torch: Any, comfy: Any, pipeline: Any):
        self.torch, self.comfy = torch, comfy
        kind = type(pipeline).__name__
        self.config = CONFIGS[kind]
        classes = {"StableDiffusion3Pipeline": comfy.model_base.SD3, "FluxPipeline": comfy.model_base.Flux}
        self.kind = classes.get(kind, comfy.model_base.BaseModel)
        denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
        maps = {"StableDiffusion3Pipeline": "mmdit_to_diffusers", "FluxPipeline": "flux_to_diffusers"}
        names = getattr(comfy.utils, maps.get(kind, "unet_to_diffusers"))(self.config)
        self.parts = [(denoiser, "diffusion_model.", names)]
        encoders = [("text_encoder", "clip_l.transformer."), ("text_encoder_2", "clip_g.transformer.")]
        if kind == "FluxPipeline":
            encoders[1] = ("text_encoder_2", "t5xxl.transformer.")
        for name, start in encoders:
            if (model := getattr(pipeline, name, None)) is None:
                continue
            paths = model.state_dict()
            wrapper = "" if hasattr(model, "text_model") or "T5" in type(model).__name__ else "text_model."
            own = {path: path if path.startswith("text_projection") else wrapper + path for path in paths}
            self.parts.append((model, start, own))
        self.original = {}
        for model, start, names in self.parts:
            self._read(model, start, names)
        self.map = self._key_map()

    def _read(self, model: Any, start: str, names: Any) -> None:
        """Put a model's weights under ComfyUI's names; several of ours are rows of one of theirs."""
        rows: dict[str, list[tuple[int, Any]]] = {}
        for ours, theirs in names.items():
            tensor = model.state_dict().get(ours)
            if tensor is None:
                continue
            name, offset, function = _place(theirs)
            first = offset[1] if offset else 0
            rows.setdefault(start + name, []).append((first, function(tensor) if function else tensor))
        for name, parts in rows.items():
            self.original[name] = self.torch.cat([tensor for _, tensor in sorted(parts, key=lambda part: part[0])])

    def _key_map(self) -> dict[str, Any]:
        tensors, config = self.original, self.config

        class Model(self.kind):
            def __init__(self) -> None:
                type(self).__mro__[-2].__init__(self)
                self.model_config = types.SimpleNamespace(unet_config=config)

            def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
                return tensors

        model = Model()
        clip = types.SimpleNamespace(
            state_dict=lambda: {name: tensor for name, tensor in tensors.items() if "diffusion_model." not in name}
        )
        keys = self.comfy.lora.model_lora_keys_unet(model, {})
        return self.comfy.lora.model_lora_keys_clip(clip, keys)

    def patches(self, file: dict[str, Any]) -> dict[Any, Any]:
        heard = _Heard()
        logging.getLogger().addHandler(heard)
        try:
            patches = self.comfy.lora.load_lora(self.comfy.lora_convert.convert_lora(file), self.map)
        finally:
            logging.getLogger().removeHandler(heard)
        unplaced = [key for key in patches if (key if isinstance(key, str) else key[0]) not in self.original]
        if heard.words or unplaced:
            words = [*heard.words, *(f"no weight for {key}" for key in unplaced)]
            raise RuntimeError(f"{len(words)} tensors are not loaded, such as: {words[0]}")
        return patches

    def write(self, several: list[dict[Any, Any]]) -> None:
        """The weights with patches, back in the pipeline."""
        lists: dict[str, list[Any]] = {}
        for patches in several:
            for key, patch in patches.items():
                name, offset, function = _place(key)
                lists.setdefault(name, []).append((1.0, patch, 1.0, offset, function))
        changed = {
            name: self.comfy.lora.calculate_weight(lists[name], tensor.clone(), name) if name in lists else tensor
            for name, tensor in self.original.items()
        }
        with self.torch.no_grad():
            for model, start, names in self.parts:
                tensors = model.state_dict()
                for ours, theirs in names.items():
                    if ours not in tensors:
                        continue
                    name, offset, function = _place(theirs)
                    value = changed[start + name]
                    value = value.narrow(*offset) if offset else value
                    tensors[ours].copy_(function(value) if function else value)


def _place(key: Any) -> tuple[str, Any, Any]:
    """A name of ComfyUI's, the part of its tensor, and a function of it, where there are such."""
    if isinstance(key, str):
        return key, None, None
    return key[0], key[1], key[2] if len(key) > 2 else None


class _Heard(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.words: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.words.append(record.getMessage())


job_file.run(open_base)
