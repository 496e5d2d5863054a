"""diffusers: `load_lora_weights`, `set_adapters`, `disable_lora` and `unload_lora_weights` of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import job_file
import pipeline_calls


def open_base(job: dict[str, Any]) -> Any:
    def answer(case: job_file.Case) -> list[job_file.Answer]:
        pipeline = pipeline_calls.opened(job["base"])
        for name, path in case["adapters"].items():
            (file,) = Path(path).glob("*.safetensors")
            pipeline.load_lora_weights(path, weight_name=file.name, adapter_name=name)
        answers = []
        for number, step in enumerate(case["steps"]):
            if step["active"]:
                pipeline.enable_lora()
                pipeline.set_adapters(step["active"])
            elif number + 1 == len(case["steps"]):
                pipeline.unload_lora_weights()
            else:
                pipeline.disable_lora()
            answers.append({"values": [pipeline_calls.latents(pipeline, prompt) for prompt in job["prompts"]]})
        return answers

    return answer


job_file.run(open_base)
