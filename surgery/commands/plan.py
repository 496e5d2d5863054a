"""`surgery plan`: what rules would do to a model, without its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from surgery.commands.answer import Answer, error_data
from surgery.commands.example_call import model_and_call
from surgery.commands.option_words import parameters_of, use_options, with_options
from surgery.commands.options import ClassName, ModelPath, PlanningExample, RulesPath, Trust, WithExample
from surgery.commands.rules_file import read_rules

if TYPE_CHECKING:
    from torch import nn

    from surgery import Plan

__all__ = ["answer_of_plan", "plan"]


def plan(
    model: ModelPath,
    rules: RulesPath,
    example: PlanningExample = None,
    with_example: WithExample = False,
    class_name: ClassName = None,
    trust: Trust = False,
) -> Answer:
    """Show what rules would do to a model: sites, tensors, parameters, problems.

    Reads config.json alone; an example call needs the weights, too. The exit code is 1 if there are problems.

        surgery plan models/bert lora.yaml
    """
    from surgery import plan_rules

    chosen = read_rules(rules, trust)
    net, call = model_and_call(model, class_name, example, with_example)
    return answer_of_plan(net, plan_rules(net, chosen, example_inputs=call), plan)


def answer_of_plan(
    model: nn.Module, plan: Plan, command: Callable[..., Answer], further: dict[str, Any] | None = None
) -> Answer:
    """A plan as an answer. `command`: the command that planned. `further`: its data."""
    names = parameters_of(command)
    for problem in plan.problems:
        use_options(problem, names)
    plan.warnings = [with_options(warning, names) for warning in plan.warnings]
    base = sum(parameter.numel() for parameter in model.parameters())
    share = 100 * plan.trainable / (base + plan.added) if base else 0.0
    counts = {"base": base, "added": plan.added, "trainable": plan.trainable}
    text = f"{type(model).__name__}: {base:,} parameters; the rules add {plan.added:,} and train {share:.4f} %"
    problems = [error_data(problem, str(problem)) for problem in plan.problems]
    data = {
        **plan.to_dict(),
        "problems": problems,
        "model": type(model).__name__,
        "parameters": counts,
        **(further or {}),
    }
    return Answer(data, [str(plan), text], code=0 if plan else 1)
