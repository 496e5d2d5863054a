"""Adaption prompts in PEFT's files: on the last attentions of Llama, Mistral and GPT-2."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules.adaption import AdaptionRule

TARGETS = {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}  # by model_type, and PEFT knows no other


@peft_method
class Adaption(PeftMethod):
    peft_type, rule, targeted = "ADAPTION_PROMPT", AdaptionRule, False
    lacks = ("modules_to_save", "trainable_token_indices", "ensure_weight_tying", "layer_replication")

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        kind = _kind(config.model)
        if kind not in TARGETS:
            raise config.refuse(
                "peft_type", f"PEFT has it on {', '.join(TARGETS)}, and this is {kind or 'no such model'}"
            )
        paths = _ending(config.modules, config.take("target_modules", TARGETS[kind]))
        layers = config.take("adapter_layers", 0)
        if type(layers) is not int or not 0 < layers <= len(paths):
            raise config.refuse("adapter_layers", f"the model has {len(paths)} such attentions")
        paths = paths[-layers:]
        if _bias(config.modules, paths):
            raise config.refuse("target_modules", "PEFT adds the bias of the attention's output map once more")
        length = config.take("adapter_len", 0)
        return [AdaptionRule(config.regular(paths), length=length, mapped=kind != "gpt2")]

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        prompt = PeftEntry("adaption_prompt", lambda tensor: tensor.squeeze(0), lambda prompt: prompt.unsqueeze(0))
        return {"prompt": prompt, "gate": PeftEntry("adaption_gate")}

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        (rule, paths), *more = placed
        kind, name = _kind(modules.model), paths[0].rpartition(".")[2]
        why = "there are two" if more else None
        if kind not in TARGETS or rule.mapped == (kind == "gpt2"):
            why = "PEFT has it on Llama and Mistral, and with mapped=False on GPT-2"
        elif not _ending(modules, name) or _ending(modules, name)[-len(paths) :] != list(paths):
            why = "PEFT's is on the last attentions, all of one name"
        elif _bias(modules, paths) or not all(_plain(modules.by_path[path]) for path in paths):
            why = "PEFT computes something else on attentions with an output bias, or with heads of such a size"
        if why:
            raise SurgeryError("PEFT's format can't hold this AdaptionRule", why=why,
                               fix='save_adapter(…, format="surgery") holds any rules')  # fmt: skip
        return {"target_modules": name, "adapter_len": rule.length, "adapter_layers": len(paths)}


def _kind(model: Any) -> str | None:
    return getattr(getattr(model, "config", None), "model_type", None)


def _ending(modules: Any, name: Any) -> list[str]:
    return [path for path in modules.by_path if path.endswith(f".{name}")]


def _bias(modules: Any, paths: Any) -> bool:
    maps = [modules.by_path[path]._modules.get("o_proj") for path in paths]
    return any(output_map is not None and output_map._parameters.get("bias") is not None for output_map in maps)


def _plain(module: Any) -> bool:
    """Whether its keys have as many heads as PEFT takes them to have: by the sizes of the map."""
    maps = module._modules
    if "k_proj" not in maps:
        return True
    key, heads = maps["k_proj"], module.config.num_attention_heads
    return heads // (key.in_features // key.out_features or 1) * module.head_dim == key.out_features
