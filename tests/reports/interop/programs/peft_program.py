"""PEFT on transformers: the reference among the programs."""

from __future__ import annotations

import importlib
from typing import Any

import job_file


def open_base(job: dict[str, Any]) -> Any:
    torch: Any = importlib.import_module("torch")
    peft: Any = importlib.import_module("peft")
    transformers: Any = importlib.import_module("transformers")

    @torch.no_grad()
    def generate(model: Any, prompt: list[int], **words: Any) -> tuple[list[int], list[float]]:
        ids, values = list(prompt), []
        for _ in range(job["new_tokens"]):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False, **words).logits[0, -1].float()
            values = values or logits.log_softmax(-1).tolist()
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :], values

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        model = transformers.AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32).eval()
        adapted: Any = None
        for name, folder in case["adapters"].items():
            if adapted is None:
                adapted = peft.PeftModel.from_pretrained(model, folder, adapter_name=name)
            else:
                adapted.load_adapter(folder, adapter_name=name)
        adapted.eval()
        answers = []
        for step in case["steps"]:
            if step["active"]:
                adapted.base_model.set_adapter(step["active"])
                outputs = [generate(adapted, prompt) for prompt in job["prompts"]]
            elif step["rows"]:
                names = [[name or "__base__"] for name in step["rows"]]
                pairs = zip(job["prompts"], names, strict=True)
                outputs = [generate(adapted, prompt, adapter_names=name) for prompt, name in pairs]
            else:
                with adapted.disable_adapter():
                    outputs = [generate(adapted, prompt) for prompt in job["prompts"]]
            answers.append({"tokens": [o[0] for o in outputs], "values": [o[1] for o in outputs]})
        return answers

    return answer


job_file.run(open_base)
