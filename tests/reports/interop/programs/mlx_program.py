"""MLX-LM: adapters by `load_adapters`, taken off by `remove_lora_layers`.

`remove_lora_layers` leaves DoRA and embeddings in place. The base is opened again where it does.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import job_file


def open_base(job: dict[str, Any]) -> Any:
    mx: Any = importlib.import_module("mlx.core")
    utils: Any = importlib.import_module("mlx_lm.utils")
    tuner: Any = importlib.import_module("mlx_lm.tuner.utils")
    mx.set_default_device(mx.cpu)

    def opened() -> Any:
        model, _ = utils.load_model(Path(job["base"]))
        model.eval()
        return model

    def generate(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
        ids, values = list(prompt), []
        for _ in range(job["new_tokens"]):
            logits = model(mx.array([ids]))[0, -1].tolist()
            values = values or job_file.log_softmax(logits)
            ids.append(max(range(len(logits)), key=logits.__getitem__))
        return ids[len(prompt) :], values

    def without_adapters(model: Any) -> Any:
        tuner.remove_lora_layers(model)
        left = [name for name, module in model.named_modules() if "lora_a" in module]
        return opened() if left else model

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        model, answers = opened(), []
        for step in case["steps"]:
            model = without_adapters(model)
            for name in step["active"]:
                tuner.load_adapters(model, case["adapters"][name])
                model.eval()
            outputs = [generate(model, prompt) for prompt in job["prompts"]]
            answers.append({"tokens": [o[0] for o in outputs], "values": [o[1] for o in outputs]})
        return answers

    return answer


job_file.run(open_base)
