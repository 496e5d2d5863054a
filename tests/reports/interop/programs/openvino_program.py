"""OpenVINO GenAI: the base is converted by optimum-intel, and its LLMPipeline takes token ids."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import job_file


def open_base(job: dict[str, Any]) -> Any:
    numpy: Any = importlib.import_module("numpy")
    openvino: Any = importlib.import_module("openvino")
    genai: Any = importlib.import_module("openvino_genai")
    exporter: Any = importlib.import_module("optimum.exporters.openvino")
    folder = tempfile.mkdtemp(dir=Path(job["base"]).parent)
    settings: Any = importlib.import_module("optimum.intel").OVConfig(dtype="fp32")
    exporter.main_export(job["base"], folder, task="text-generation-with-past", ov_config=settings)

    def generate(pipeline: Any, prompt: list[int], adapters: Any) -> list[int]:
        ids = numpy.array([prompt], dtype=numpy.int64)
        tokenized = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        config = genai.GenerationConfig()
        config.max_new_tokens, config.do_sample, config.ignore_eos = job["new_tokens"], False, True
        config.eos_token_id = 2
        return list(pipeline.generate(tokenized, config, adapters=adapters).tokens[0])

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        adapters = {}
        for name, path in case["adapters"].items():
            (file,) = Path(path).glob("*.safetensors")
            adapters[name] = genai.Adapter(str(file))
        every = genai.AdapterConfig(list(adapters.values()))
        options = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
        pipeline = genai.LLMPipeline(folder, "CPU", adapters=every, ATTENTION_BACKEND="SDPA", **options)
        answers = []
        for step in case["steps"]:
            active = genai.AdapterConfig([adapters[name] for name in step["active"]])
            answers.append({"tokens": [generate(pipeline, prompt, active) for prompt in job["prompts"]]})
        return answers

    return answer


job_file.run(open_base)
