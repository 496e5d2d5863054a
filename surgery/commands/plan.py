"""`surgery plan`: what rules would do to a model, without its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from surgery.commands.answer import Answer
from surgery.commands.model_folder import model_on_meta
from surgery.commands.options import ClassName, ModelPath, RulesPath, Trust
from surgery.commands.rules_file import read_rules

if TYPE_CHECKING:
    from torch import nn

    from surgery import Plan

__all__ = ["answer_of_plan", "plan"]


def plan(model: ModelPath, rules: RulesPath, class_name: ClassName = None, trust: Trust = False) -> Answer:
    """Show what rules would do to a model: sites, tensors, parameters, problems.

    Reads config.json alone, no weights. The exit code is 1 if there are problems.

        surgery plan models/bert lora.yaml
    """
    from surgery import plan_rules

    chosen = read_rules(rules, trust)
    net = model_on_meta(model, class_name)
    return answer_of_plan(net, plan_rules(net, chosen))


def answer_of_plan(model: nn.Module, plan: Plan, further: dict[str, Any] | None = None) -> Answer:
    """A plan as an answer. `further`: data of the command that planned."""
    base = sum(parameter.numel() for parameter in model.parameters())
    share = 100 * plan.trainable / (base + plan.added) if base else 0.0
    counts = {"base": base, "added": plan.added, "trainable": plan.trainable}
    text = f"{type(model).__name__}: {base:,} parameters; the rules add {plan.added:,} and train {share:.4f} %"
    data = {**plan.to_dict(), "model": type(model).__name__, "parameters": counts, **(further or {})}
    return Answer(data, [str(plan), text], code=0 if plan else 1)
