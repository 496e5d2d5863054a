"""Directions for SteerRule, from the activations of contrasting inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PlanError, RuleError, hidden_of, plan_rules
from surgery.rules._shared.hidden_states import chosen_positions, positions_of
from surgery.rules.steer import SteerRule


def fit_direction(model: nn.Module, rule: SteerRule, positive: Iterable[Any], negative: Iterable[Any]) -> SteerRule:
    """The rule with directions: at each of its sites, mean activation over `positive` minus that over `negative`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.rules import SteerRule, fit_direction
    >>> model = nn.Sequential(nn.Identity(), nn.Linear(2, 2))
    >>> rule = fit_direction(model, SteerRule("0", features=2), [torch.ones(1, 2)], [torch.zeros(1, 2)])
    >>> rule.direction
    {'0': (1.0, 1.0)}

    The inputs are a list of calls each, as `example_inputs`: a tensor, a tuple or a mapping of arguments. The means
    are over rows and over the positions of the rule ("l1": the last token alone, as in CAA). The model is run in
    evaluation mode and left as it was. `RuleError` for inputs whose attention_mask has padding, since padded
    positions would be counted; `PlanError` where the rule can't go on the model.
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
        for given in calls:
            mask = given.get("attention_mask") if isinstance(given, Mapping) else None
            if mask is not None and not bool(mask.all()):
                raise RuleError(
                    "an input is padded", why="padded positions would be counted", fix="give rows one by one"
                )
            model(**given) if isinstance(given, Mapping) else model(*given if isinstance(given, tuple) else (given,))
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes:
            module.training = mode
    if missed := [path for path in at if path not in total]:
        raise RuleError(f"no call reached {', '.join(missed)}", fix="give inputs that use these modules")
    return {path: total[path] / count[path] for path in at}
