"""vLLM, offline, with one engine for all cases of a base.

The last slot stays empty. On a CPU, vLLM 0.32 gives the adapter of the last slot to rows without an adapter: in a batch
with other adapters, and everywhere after an adapter of the head was there.
"""

from __future__ import annotations

import importlib
from typing import Any

import job_file


def open_base(job: dict[str, Any]) -> Any:
    vllm: Any = importlib.import_module("vllm")
    request: Any = importlib.import_module("vllm.lora.request").LoRARequest
    size = job["vocabulary"]
    engine = vllm.LLM(
        job["base"],
        skip_tokenizer_init=True,
        enable_lora=True,
        max_loras=1 + sum(len(case["adapters"]) for case in job["cases"]),
        max_lora_rank=job["settings"]["max_lora_rank"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=64,
        max_logprobs=size,
        disable_log_stats=True,
    )
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=job["new_tokens"], logprobs=size, ignore_eos=True, detokenize=False
    )
    numbers: dict[str, int] = {}  # vLLM knows an adapter by its number

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        answers = []
        for step in case["steps"]:
            (active,) = step["active"] or [None]
            names = step["rows"] or [active] * len(job["prompts"])
            requests: list[Any] = []
            for name in names:
                folder = name and case["adapters"][name]
                number = folder and numbers.setdefault(folder, len(numbers) + 1)
                requests.append(folder and request(f"{case['name']} {name}", number, folder))
            prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
            outputs = [output.outputs[0] for output in engine.generate(prompts, sampling, lora_request=requests)]
            values = [[output.logprobs[0][token].logprob for token in range(size)] for output in outputs]
            answers.append({"tokens": [list(output.token_ids) for output in outputs], "values": values})
        return answers

    return answer


if __name__ == "__main__":
    job_file.run(open_base)
