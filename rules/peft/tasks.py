"""What PEFT's task types mean to methods without target modules: how a model is called, which head is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from surgery import base_state_dict, class_of

# The ends of modules' paths that PEFT trains and saves with a task, named in its configuration or not.
HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_BY_NAME = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def ending(modules: Mapping[str, nn.Module], names: Sequence[str]) -> list[str]:
    """The modules that PEFT means: those whose path ends so, with no dot asked for, and the outermost alone."""
    paths = [path for path in modules if any(path.endswith(name) for name in names)]
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def task_of(modules: Any) -> str | None:
    """The task type under which PEFT calls a model with its text; None where PEFT can't: it asks the model's config."""
    model = modules.model
    if not hasattr(getattr(model, "config", None), "vocab_size") and not hasattr(model, "get_input_embeddings"):
        return None
    name = class_of(model).__name__
    task = next((task for end, task in _BY_NAME.items() if name.endswith(end)), None)
    if task is not None and ending(modules.by_path, HEADS[task]):
        return task
    if task is None and hasattr(model, "prepare_inputs_for_generation"):
        return "SEQ_2_SEQ_LM" if getattr(model.config, "is_encoder_decoder", False) else "CAUSAL_LM"
    return "FEATURE_EXTRACTION"


def with_head(
    prefix: str, config: dict[str, Any], tensors: dict[str, Tensor], modules: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A configuration and tensors with the base's head if they have none: PEFT loads no file of its task without."""
    heads = ending(modules.by_path, HEADS.get(config["task_type"], ()))
    if not heads:
        return config, tensors
    starts = tuple(f"{path}." for path in heads)
    head = {prefix + key: tensor for key, tensor in base_state_dict(modules.model).items() if key.startswith(starts)}
    others = [path for path in config.get("modules_to_save") or () if path not in heads and not path.startswith(starts)]
    return config | {"modules_to_save": [*heads, *others]}, {**head, **tensors}


def sizes_of(model: nn.Module) -> dict[str, int]:
    """Numbers that PEFT wants in a prompt's configuration and does not use for one."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    asked = {"num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads"}
    return {name: int(getattr(config, ours, None) or 1) for name, ours in asked.items()}
