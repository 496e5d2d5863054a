"""Prompt tuning, p-tuning and multitask prompts in PEFT's files: one matrix, a row a virtual token.

PEFT's virtual tokens stand before the text's first, [CLS] included: `after=0` here. Its classifiers see them, and of
the text the embeddings alone: `whole=True`. Of p-tuning a file holds what the network made.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from surgery import (
    PeftConfig,
    PeftEntry,
    PeftMethod,
    PeftPlace,
    Rule,
    SurgeryError,
    SurgeryWarning,
    class_of,
    peft_method,
)
from surgery.adapter_files.tensor_files import open_tensors
from surgery.rules._virtual_tokens import text_inputs
from surgery.rules.multitask import MultitaskPromptRule
from surgery.rules.multitask import task_of as calls_of
from surgery.rules.peft.tasks import HEADS, sizes_of, task_of, with_head
from surgery.rules.prompt import PromptRule

_AVERAGE, _EXACT, _SHARED = "AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"
_PASSED = (
    "token_dim num_layers num_attention_heads prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path "
    "tokenizer_kwargs encoder_reparameterization_type encoder_hidden_size encoder_num_layers encoder_dropout "
    "prompt_tuning_init_state_dict_path prompt_tuning_init_task"
).split()  # the start, the network and sizes: the file holds what became of them


class _Prompts(PeftMethod):
    targeted, prefix = False, "base_model."

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        config.silent(*_PASSED)
        model, task = config.model, config.data.get("task_type")
        if len(list(text_inputs.hosts(model, ""))) != 1:
            raise config.refuse("peft_type", "the model has no one place that takes a text with its mask")
        both = text_inputs.has_both(model)
        if (task == "SEQ_2_SEQ_LM" and not both) or (task in HEADS and both):
            raise config.refuse("task_type", f"PEFT can't call this {type(model).__name__} so")
        if config.take("num_transformer_submodules", 1) not in ((1, 2) if task == "SEQ_2_SEQ_LM" else (1,)):
            raise config.refuse("num_transformer_submodules", "a text has one place for virtual tokens")
        return [self.made_of(config, {"length": config.take("num_virtual_tokens", 0), "after": 0,
                                      "whole": _classifies(model)})]  # fmt: skip

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        return [rule.replace(**self.encoder_fields(config.data)) for rule in self.read(config)]

    def encoder_fields(self, data: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that tell of the start alone, and of the network."""
        start = data.get("prompt_tuning_init") or "RANDOM"
        if start == "TEXT":
            return {"init": "text", "text_ids": _text_ids(data)}
        if start not in ("RANDOM", "SAMPLE_VOCAB"):
            raise SurgeryError(f"PEFT's prompt_tuning_init={start!r} can't be held", why="this start is not supported")
        return {"init": {"RANDOM": "random", "SAMPLE_VOCAB": "vocab"}[start]}

    def made_of(self, config: PeftConfig, fields: dict[str, Any]) -> Rule:
        return PromptRule(**fields)

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        rule = place.rule
        assert isinstance(rule, PromptRule)
        if rule.after or (rule.after is None and place.facts.get("seen", {}).get("pooled")):
            raise _unsupported(rule, "PEFT's virtual tokens stand before the text's first: after=0")
        length, rows = rule.length, rule.length * submodules(place.config)

        def first(matrix: Tensor) -> Tensor:  # of an encoder-decoder PEFT keeps as many rows again, and uses none
            if matrix.shape[0] not in (length, rows):
                raise ValueError(f"it has {matrix.shape[0]} rows for {rows} virtual tokens")
            return matrix[:length]

        return {"prompt": PeftEntry("/prompt_embeddings", first)}

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        (rule, paths), *more = placed
        task, model = task_of(modules), modules.model
        if more or list(paths) != [path for path, _ in text_inputs.hosts(model, "")]:
            raise _unsupported(rule, "PEFT has one prompt, where the model takes its text")
        if task is None:
            raise _unsupported(rule, "PEFT asks the config of a model of transformers")
        if _classifies(model) != rule.whole:
            why = "PEFT's classifiers see the virtual tokens, too, and no token ids; its other outputs are cut here"
            raise _unsupported(rule, why, f"{rule.label}(whole={_classifies(model)}) is like PEFT's")
        width = next(model.get_submodule(paths[0]).get_input_embeddings().parameters()).shape[-1]
        return {
            "num_virtual_tokens": rule.length, "token_dim": width, "num_transformer_submodules": 1,
            "prompt_tuning_init": "RANDOM", "task_type": task, **sizes_of(model),
        }  # fmt: skip

    def complete(self, config: dict[str, Any], tensors: dict[str, Tensor], modules: Any) -> Any:
        return with_head(self.prefix, config, tensors, modules)


def submodules(config: Mapping[str, Any]) -> int:
    """How many parts of the model PEFT counts: it makes as many times the virtual tokens."""
    count = config.get("num_transformer_submodules")
    return count or (2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1)


@peft_method
class PTuning(_Prompts):
    peft_type, rule = "P_TUNING", PromptRule

    def encoder_fields(self, data: Mapping[str, Any]) -> dict[str, Any]:
        fields = {"layers": data.get("encoder_num_layers"), "dropout": data.get("encoder_dropout")}
        settings = {f"encoder_{name}": value for name, value in fields.items() if value is not None}
        kind = str(data.get("encoder_reparameterization_type") or "MLP").lower()
        return {"encoder": kind, "encoder_size": data.get("encoder_hidden_size"), **settings}


@peft_method
class PromptTuning(_Prompts):  # after p-tuning: what is written is without a network, and so this
    peft_type, rule = "PROMPT_TUNING", PromptRule


@peft_method
class Multitask(_Prompts):
    peft_type, rule = "MULTITASK_PROMPT_TUNING", MultitaskPromptRule

    def encoder_fields(self, data: Mapping[str, Any]) -> dict[str, Any]:
        return super().encoder_fields({**data, "prompt_tuning_init": "RANDOM"} if _source(data) else data)

    def start_tensors(self, config: Mapping[str, Any]) -> dict[str, Tensor]:
        """The prompt of another adapter, and what its tasks, or one of them, made of it."""
        start = _source(config)
        if start is None:
            return {}
        place = config.get("prompt_tuning_init_state_dict_path")
        if place is None:
            what = f"prompt_tuning_init_state_dict_path needs to be specified with {start} init method"
            raise SurgeryError(what, fix="the path of the tensors of a multitask prompt")
        file = open_tensors(Path(place))
        names = ("prompt_embeddings", "prefix_task_cols", "prefix_task_rows")[: 1 if start == _SHARED else 3]
        if missing := [name for name in names if name not in file.shapes]:
            why = f"it has no {', '.join(missing)}"
            raise SurgeryError(
                f"{start} can't start from {Path(place).name}", why=why, fix="give a multitask prompt's file"
            )
        tensors = {name: file.read(name).clone() for name in names}
        for name in names[1:]:
            tasks, task = tensors[name], config.get("prompt_tuning_init_task") or 0
            if start == _EXACT and not -len(tasks) <= task < len(tasks):
                raise SurgeryError(f"prompt_tuning_init_task={task} is not a task", why=f"the file has {len(tasks)}")
            tensors[name] = tasks[task].unsqueeze(0) if start == _EXACT else tasks.mean(0, keepdim=True)
        return tensors

    def made_of(self, config: PeftConfig, fields: dict[str, Any]) -> Rule:
        if submodules(config.data) != 1:
            why = "PEFT prompts the decoder, too, while training, and not when it generates"
            raise config.refuse("num_transformer_submodules", why)
        if config.data.get("task_type") in _WITHOUT_TASKS:
            raise config.refuse("task_type", "PEFT does not name a task there")
        tasks, ranks = config.take("num_tasks", 1), config.take("num_ranks", 1)
        return MultitaskPromptRule(**fields, tasks=tasks, ranks=ranks)

    def call_context(self, keywords: dict[str, Any]) -> AbstractContextManager[Any]:
        ids = keywords.pop("task_ids", None)
        return nullcontext() if ids is None else calls_of(ids)

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        more = {"columns": PeftEntry("/prefix_task_cols"), "rows": PeftEntry("/prefix_task_rows")}
        return super().entries(place) | more

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        config, rule = super().write(placed, modules), placed[0][0]
        if rule.task is not None:
            raise _unsupported(rule, "PEFT has no task for calls that name none")
        if config["task_type"] in _WITHOUT_TASKS:
            raise _unsupported(rule, "PEFT names no task where features are extracted or questions answered")
        return {**config, "num_tasks": rule.tasks, "num_ranks": rule.ranks}


def _source(config: Mapping[str, Any]) -> str | None:
    """The start from another multitask prompt that a configuration names."""
    start = config.get("prompt_tuning_init")
    return start if start in (_AVERAGE, _EXACT, _SHARED) else None


def _classifies(model: Any) -> bool:
    """Whether a head makes something of a text that is not by position."""
    by_position = ("ForMaskedLM", "ForTokenClassification", "ForQuestionAnswering", "Model")
    known = class_of(model).__name__.endswith(by_position) or hasattr(model, "prepare_inputs_for_generation")
    return not known and not text_inputs.has_both(model) and all(path for path, _ in text_inputs.hosts(model, ""))


def _text_ids(data: Mapping[str, Any]) -> list[int]:
    """The start's text in token ids, by the tokenizer that the configuration names."""
    from transformers import AutoTokenizer

    name, text = data.get("tokenizer_name_or_path"), data.get("prompt_tuning_init_text")
    if not name or not text:
        raise SurgeryError("a prompt that starts as a text needs it, and a tokenizer",
                           fix="prompt_tuning_init_text=…, tokenizer_name_or_path=…")  # fmt: skip
    options = dict(data.get("tokenizer_kwargs") or {})
    if options.pop("trust_remote_code", False):
        why = "`trust_remote_code` in tokenizer_kwargs is not followed: it may come from a file of others"
        warnings.warn(why, SurgeryWarning, stacklevel=2)
    return list(AutoTokenizer.from_pretrained(name, **options)(text)["input_ids"])


_WITHOUT_TASKS = ("QUESTION_ANS", "FEATURE_EXTRACTION")


def _unsupported(rule: Rule, why: str, fix: str = 'save_adapter(…, format="surgery") holds any rules') -> SurgeryError:
    return SurgeryError(f"PEFT's format can't hold this {rule.label}", why=why, fix=fix)
