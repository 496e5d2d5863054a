"""Directions for SteerRule, computed from the activations of contrasting inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PlanError, RuleError, hidden_of, plan_rules
from surgery.rules._shared.hidden_states import chosen_positions, positions_of
from surgery.rules.steer import SteerRule


def fit_direction(model: nn.Module, rule: SteerRule, positive: Iterable[Any], negative: Iterable[Any]) -> SteerRule:
    """Return the rule with a direction per site: mean activation over `positive` minus mean activation over `negative`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.rules import SteerRule, fit_direction
    >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    >>> rule = fit_direction(model, SteerRule("0", features=2), [torch.ones(1, 2)], [torch.zeros(1, 2)])
    >>> rule.direction
    {'0': (1.0, 1.0)}

    The model runs in evaluation mode; its training modes are restored. The means are over rows and over the rule's
    positions ("l1": only the last token, as in CAA).

    Args:
        model: the model that the rule goes on.
        rule: a SteerRule; its targets and positions are used.
        positive: calls of the model, each as `example_inputs`: a tensor, a tuple, or a mapping of arguments.
        negative: calls of the model to contrast with, in the same form.

    Returns:
        A SteerRule whose `direction` maps each site's path to its numbers.

    Raises:
        RuleError: an input's attention_mask has padding (padded positions would be counted), or no call reaches a site.
        PlanError: the rule can't go on the model.

    Source: Rimsky et al. 2024, arXiv:2312.06681 (CAA).
    """
    plan = plan_rules(model, [rule.replace(direction=None)], adapter="fit_direction")
    if not plan:
        raise PlanError(plan.problems)
    sums = [
        _mean(model, rule, {step.path: step.module for step in plan.steps}, calls) for calls in (positive, negative)
    ]
    return rule.replace(direction={path: sums[0][path] - sums[1][path] for path in sums[0]})


@torch.no_grad()
def _mean(model: nn.Module, rule: SteerRule, at: dict[str, nn.Module], calls: Iterable[Any]) -> dict[str, Tensor]:
    total, count, chosen = dict[str, Tensor](), dict[str, int](), positions_of(rule.positions)

    def listen(path: str) -> Any:
        def hear(module: nn.Module, args: Any, output: Any) -> None:
            hidden = hidden_of(output)
            hidden = hidden if chosen is None else chosen_positions(hidden, *chosen)
            rows = hidden.flatten(0, -2).double() if hidden.dim() > 1 else hidden.double().unsqueeze(0)
            total[path] = total.get(path, 0) + rows.sum(0)
            count[path] = count.get(path, 0) + len(rows)

        return hear

    modes = [(module, module.training) for module in model.modules()]
    hooks = [module.register_forward_hook(listen(path)) for path, module in at.items()]
    try:
        model.eval()
        for call in calls:
            mask = call.get("attention_mask") if isinstance(call, Mapping) else None
            if mask is not None and not bool(mask.all()):
                raise RuleError(
                    "an input is padded", why="padded positions would be counted", fix="give rows one by one"
                )
            model(**call) if isinstance(call, Mapping) else model(*call if isinstance(call, tuple) else (call,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if missed := [path for path in at if path not in total]:
        raise RuleError(f"no call reached {', '.join(missed)}", fix="give inputs that use these modules")
    return {path: total[path] / count[path] for path in at}
