"""Multitask prompt tuning: one prompt for all tasks, scaled elementwise by a low-rank matrix per task."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from surgery import Combination, LiveSite, Member, Rule, Share, Site, SiteError, rule
from surgery.rules._shared import fields
from surgery.rules._virtual_tokens import text_inputs
from surgery.rules.prompt import PromptRule


@rule("multitask-prompt")
class MultitaskPromptRule(PromptRule):
    """[P ∘ (C_t R_t); e(x)]: a prompt P that all tasks share, times a low-rank matrix of the task t.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from surgery.rules import MultitaskPromptRule, task_of
    >>> from surgery import apply_rules
    >>> sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=4)
    >>> model = LlamaForCausalLM(LlamaConfig(vocab_size=30, intermediate_size=32, **sizes))
    >>> _ = apply_rules(model, [MultitaskPromptRule(length=5, tasks=3)])
    >>> {name: tuple(tensor.shape) for name, tensor in model.model.adapters.default.tensors().items()}
    {'prompt': (5, 16), 'columns': (3, 5, 1), 'rows': (3, 1, 16)}
    >>> with task_of([2, 0]):  # of the first row, and of the second
    ...     output = model(torch.tensor([[1, 2, 3], [4, 5, 6]]))

    A call names its tasks by `task_ids` (batch), where the model passes further keywords to its inner modules, as with
    a Trainer's batch. `task_of` names them everywhere, `generate` included. Tensors beside `prompt`: `columns` (tasks,
    length, ranks) and `rows` (tasks, ranks, features), PEFT's prefix_task_cols and prefix_task_rows.

    Args:
        tasks: number of tasks; default 1. PEFT: num_tasks.
        ranks: rank of each task's matrix; default 1. PEFT: num_ranks.
        task: the task of calls that name none; default None.

    The other fields are PromptRule's; `encoder` must be None.

    Raises:
        RuleError: a field is out of range.
        SiteError: a call names no task and `task` is None.

    Source: Wang et al. 2023, arXiv:2303.02861; PEFT's MultitaskPromptTuningConfig.
    """

    tasks: int = 1
    ranks: int = 1
    task: int | None = None

    def validate(self) -> None:
        super().validate()
        fields.whole(self, "tasks", "ranks")
        fields.whole(self, "task", least=0, optional=True)
        if self.task is not None and self.task >= self.tasks:
            raise self.bad("task", f"one of {self.tasks} tasks, from 0")
        if self.encoder is not None:
            raise self.bad("encoder", "None: there is none beside tasks")

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> Tensor | None:
        why = "its tasks are named for all rows of a batch"
        raise SiteError(f"a {cls.__name__} can't be routed", where=sites[0].path, why=why, fix="task_of: one a row")

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        return Rule.combined(self, shares, how)

    @property
    def slot_kind(self) -> str | None:  # type: ignore[override]
        return None if self.task is None else "prompt"

    why_no_slot = "a call names its task; one adapter a task (`task`) has one"

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        tensors = super().slotted(slot, site)
        return {
            "prompt": scale_by_task(tensors["prompt"], site.params["columns"], site.params["rows"], None, self.task)[0]
        }

    def virtual(self, site: Site) -> Tensor:
        prompt = super().virtual(site)
        columns = site.param("columns", (self.tasks, self.length, self.ranks), _normal)
        rows = site.param("rows", (self.tasks, self.ranks, site.facts["width"]), _normal)
        rest = text_inputs.starred(site)
        keywords = site.inputs[rest] if rest else None
        scaled = site.apply(scale_by_task, prompt, columns, rows, keywords, self.task)  # `show` prints the name
        return scaled


@contextmanager
def task_of(ids: int | list[int] | Tensor) -> Iterator[None]:
    """Set the task of all calls in the context, for rules that have tasks.

    >>> from surgery.rules import task_of
    >>> with task_of(1):
    ...     pass  # model.generate(…)

    Args:
        ids: one task for all rows, or a list or tensor (batch) with one task per row.
    """
    token = _current_task.set(ids)
    try:
        yield
    finally:
        _current_task.reset(token)


def scale_by_task(prompt: Tensor, columns: Tensor, rows: Tensor, keywords: Any, task: int | None) -> Tensor:
    """The prompt for each row's task, (rows or 1, length, features)."""
    ids = (keywords or {}).get("task_ids")
    ids = _current_task.get() if ids is None else ids
    ids = task if ids is None else ids
    if ids is None:
        raise SiteError(
            "task_ids cannot be None: a call names no task",
            why=f"the prompt is of {len(columns)} tasks",
            fix="with task_of(…):, task_ids= in the call, or the rule's `task`",
        )
    chosen = torch.as_tensor(ids, device=columns.device).reshape(-1)
    return prompt * (columns[chosen] @ rows[chosen])


def _normal(tensor: Tensor) -> None:
    nn.init.normal_(tensor, std=0.02)


_current_task: ContextVar[Any] = ContextVar("task", default=None)
