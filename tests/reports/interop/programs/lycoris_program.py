"""lycoris-lora as sd-scripts starts it: a network from a file's weights, on the UNet and the text encoders."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import job_file
import pipeline_calls


def open_base(job: dict[str, Any]) -> Any:
    kohya: Any = importlib.import_module("lycoris.kohya")
    # lycoris makes a network of all layers before it reads the file. In UNets of diffusers it meets time_embedding by
    # its class and by its name, and stops there, so the names are left out.
    kohya.LycorisNetworkKohya.apply_preset({"unet_target_name": []})

    def network(pipeline: Any, path: str) -> Any:
        (file,) = Path(path).glob("*.safetensors")
        encoders = [getattr(pipeline, name, None) for name in ("text_encoder", "text_encoder_2")]
        encoders = [encoder for encoder in encoders if encoder is not None]
        texts = encoders if len(encoders) > 1 else encoders[0]
        made, weights = kohya.create_network_from_weights(1.0, str(file), pipeline.vae, texts, pipeline.unet)
        made.apply_to(texts, pipeline.unet, True, True)
        missing, unexpected = made.load_state_dict(weights, strict=False)
        if unexpected:
            raise RuntimeError(f"lycoris does not know {len(unexpected)} tensors, such as {unexpected[0]}")
        return made

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        answers = []
        pipeline = pipeline_calls.opened(job["base"])
        for step in case["steps"]:
            networks = [network(pipeline, case["adapters"][name]) for name in step["active"]]
            answers.append({"values": [pipeline_calls.latents(pipeline, prompt) for prompt in job["prompts"]]})
            for made in networks:
                made.restore()
        return answers

    return answer


job_file.run(open_base)
