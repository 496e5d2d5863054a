"""torchtune: its own model with LoRA, whose weights its converter makes of those of transformers."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import job_file

MLP = {"w1", "w2", "w3"}
UNREAD = ("rank_pattern", "alpha_pattern", "use_rslora", "lora_bias")


def open_base(job: dict[str, Any]) -> Any:
    torch: Any = importlib.import_module("torch")
    llama: Any = importlib.import_module("torchtune.models.llama3")
    weights: Any = importlib.import_module("torchtune.models.convert_weights")
    training: Any = importlib.import_module("torchtune.training.checkpointing._utils")
    config = json.loads((Path(job["base"]) / "config.json").read_text())
    heads = dict(num_heads=config["num_attention_heads"], num_kv_heads=config["num_key_value_heads"])
    sizes = dict(vocab_size=config["vocab_size"], num_layers=config["num_hidden_layers"], **heads)
    sizes |= dict(embed_dim=config["hidden_size"], intermediate_dim=config["intermediate_size"])
    rope = config.get("rope_parameters", config)["rope_theta"]
    sizes |= dict(max_seq_len=128, norm_eps=config["rms_norm_eps"], rope_base=rope)
    stored = training.safe_torch_load(str(Path(job["base"]) / "model.safetensors"))
    base = weights.hf_to_tune(stored, **heads, dim=config["hidden_size"])

    def model_with(adapter: str | None) -> Any:
        if adapter is None:
            model, tensors = llama.llama3(**sizes), {}
        else:
            tensors = training.safe_torch_load(str(Path(adapter) / "adapter_0.safetensors"))
            settings = json.loads((Path(adapter) / "adapter_config.json").read_text())
            unread = [name for name in UNREAD if settings.get(name)]
            if unread:  # its recipes take rank and alpha alone from a configuration
                raise RuntimeError(f"torchtune does not read {', '.join(unread)}")
            layers = {key.split(".")[-3] for key in tensors if ".lora_a." in key}
            model = llama.lora_llama3(
                sorted(layers - MLP - {"output"}),
                apply_lora_to_mlp=bool(layers & MLP),
                apply_lora_to_output="output" in layers,
                lora_rank=settings["r"],
                lora_alpha=settings["lora_alpha"],
                use_dora=bool(settings.get("use_dora")),
                **sizes,
            )
        missing, unexpected = model.load_state_dict({**base, **tensors}, strict=False)
        if missing or unexpected:
            raise RuntimeError(f"torchtune's model lacks {unexpected[:2]}, and the files {missing[:2]}")
        return model.eval()

    @torch.no_grad()
    def generate(model: Any, prompt: list[int]) -> tuple[list[int], list[float]]:
        ids, values = list(prompt), []
        for _ in range(job["new_tokens"]):
            logits = model(torch.tensor([ids]))[0, -1].float()
            values = values or logits.log_softmax(-1).tolist()
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :], values

    def answer(case: job_file.Case) -> list[job_file.Answer]:
        answers = []
        for step in case["steps"]:
            (name,) = step["active"] or [None]
            model = model_with(case["adapters"][name] if name else None)
            outputs = [generate(model, prompt) for prompt in job["prompts"]]
            answers.append({"tokens": [o[0] for o in outputs], "values": [o[1] for o in outputs]})
        return answers

    return answer


job_file.run(open_base)
