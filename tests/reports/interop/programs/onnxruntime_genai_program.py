"""onnxruntime-genai: its builder makes the graph with LoRA of zeros, whose tensors become inputs that adapters fill.

The builder writes the tensors of LoRA as constants, as `make_matmul_lora` in its base.py does. Microsoft's Olive turns
them into inputs of the graph; `_with_inputs` does this here, with a rank of any size for each module.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import job_file

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def open_base(job: dict[str, Any]) -> Any:
    numpy: Any = importlib.import_module("numpy")
    genai: Any = importlib.import_module("onnxruntime_genai")
    folder = Path(tempfile.mkdtemp(dir=Path(job["base"]).parent))
    _build(job["base"], folder)
    _with_inputs(folder / "model.onnx")
    model = genai.Model(str(folder))

    def generate(adapters: Any, name: str | None, prompt: list[int]) -> tuple[list[int], list[float]]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt) + job["new_tokens"], do_sample=False)
        generator = genai.Generator(model, parameters)
        if name is not None:
            generator.set_active_adapter(adapters, name)
        ids, values, tokens = list(prompt), list[float](), list[int]()
        while len(tokens) < job["new_tokens"]:
            generator.append_tokens(numpy.array([ids], dtype=numpy.int32))
            logits = generator.get_logits()[0, -1]
            values = values or job_file.log_softmax(logits)
            ids = [int(logits.argmax())]
            tokens += ids
        return tokens, values

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        adapters = genai.Adapters(model)
        for name, path in case["adapters"].items():
            (file,) = Path(path).glob("*.onnx_adapter")
            adapters.load(str(file), name)
        answers = []
        for step in case["steps"]:
            (name,) = step["active"] or [None]
            outputs = [generate(adapters, name, prompt) for prompt in job["prompts"]]
            answers.append({"tokens": [o[0] for o in outputs], "values": [o[1] for o in outputs]})
        return answers

    return answer


def _build(base: str, folder: Path) -> None:
    """The graph of the base with LoRA on all layers."""
    peft: Any = importlib.import_module("peft")
    transformers: Any = importlib.import_module("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=1, target_modules=LAYERS, task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(folder / "zeros")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", base, "-o", str(folder)]
    options = ["-p", "fp32", "-e", "cpu", "-c", str(folder / "cache")]
    subprocess.run([*command, *options, "--extra_options", f"adapter_path={folder / 'zeros'}"], check=True)


def _with_inputs(path: Path) -> None:
    """Give each tensor of LoRA an input of its name, whose default is zeros."""
    onnx: Any = importlib.import_module("onnx")
    numpy: Any = importlib.import_module("numpy")
    model = onnx.load(path)
    kept = []
    for tensor in model.graph.initializer:
        module, lora, half = tensor.name.partition(".lora_")
        if lora:
            rank, shape = f"rank of {module}", list(tensor.dims)
            axis = 1 if half.startswith("A") else 0
            shape[axis] = rank
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, shape))
            zeros = numpy.zeros([1 if size == rank else size for size in shape], numpy.float32)
            tensor = onnx.numpy_helper.from_array(zeros, tensor.name)
        kept.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    shapes = [value for value in model.graph.value_info if "lora" not in value.name.lower()]
    del model.graph.value_info[:]
    model.graph.value_info.extend(shapes)
    path.with_suffix(".onnx.data").unlink()
    onnx.save(model, path)


job_file.run(open_base)
