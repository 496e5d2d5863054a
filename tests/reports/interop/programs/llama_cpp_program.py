"""llama.cpp by the low-level functions of llama-cpp-python: token ids go in, so the model needs no vocabulary."""

from __future__ import annotations

import ctypes
import importlib
from pathlib import Path
from typing import Any

import job_file


def open_base(job: dict[str, Any]) -> Any:
    cpp: Any = importlib.import_module("llama_cpp.llama_cpp")
    cpp.llama_backend_init()
    parameters = cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = cpp.llama_model_load_from_file(str(job["base"]).encode(), parameters)
    if not model:
        raise RuntimeError(f"llama.cpp does not open {job['base']}")
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch = 64, 64, 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = cpp.GGML_TYPE_F32  # the default, float16, rounds keys and values
    settings.flash_attn_type = cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context for {job['base']}")
    size = job["vocabulary"]

    def logits_after(ids: list[int], start: int) -> list[float]:
        batch = cpp.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place == len(ids) - 1
        code = cpp.llama_decode(context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = cpp.llama_get_logits_ith(context, len(ids) - 1)[:size]
        cpp.llama_batch_free(batch)
        return logits

    def generate(prompt: list[int]) -> tuple[list[int], list[float]]:
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        logits = logits_after(prompt, 0)
        values, tokens = job_file.log_softmax(logits), []
        while True:
            tokens.append(max(range(size), key=logits.__getitem__))
            if len(tokens) == job["new_tokens"]:
                return tokens, values
            logits = logits_after(tokens[-1:], len(prompt) + len(tokens) - 1)

    def opened(path: str) -> Any:
        (file,) = [Path(path)] if Path(path).is_file() else Path(path).glob("*.gguf")
        adapter = cpp.llama_adapter_lora_init(model, str(file).encode())
        if not adapter:
            raise RuntimeError(f"llama.cpp does not open {file.name}")
        return adapter

    def activate(adapters: list[Any]) -> None:
        pointers = (cpp.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
        scales = (ctypes.c_float * len(adapters))(*[1.0] * len(adapters))
        if code := cpp.llama_set_adapters_lora(context, pointers, len(adapters), scales):
            raise RuntimeError(f"llama_set_adapters_lora returned {code}")

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        adapters = {name: opened(path) for name, path in case["adapters"].items()}
        answers = []
        try:
            for step in case["steps"]:
                activate([adapters[name] for name in step["active"]])
                outputs = [generate(prompt) for prompt in job["prompts"]]
                answers.append({"tokens": [o[0] for o in outputs], "values": [o[1] for o in outputs]})
        finally:
            activate([])
            for adapter in adapters.values():
                cpp.llama_adapter_lora_free(adapter)
        return answers

    return answer


job_file.run(open_base)
