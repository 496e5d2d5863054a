"""`apply_rules`, `plan_rules` and `explain`.

`apply_rules` is two steps. `make_plan` matches the targets, traces the forwards and records each rule's rewrite;
`install_plan` gives the sites their tensors and generated classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from surgery.authoring.rule import Rule
from surgery.authoring.rule_arguments import rule_problem
from surgery.lifecycle.insertion import install_plan
from surgery.patterns.pattern import Verdict
from surgery.patterns.wrappers import unwrap
from surgery.planning.matching import Tree, verdict_of
from surgery.planning.plan import Plan
from surgery.planning.planner import make_plan
from surgery.planning.rank_check import rank_warnings
from surgery.planning.rewrite_placement import structures_verdict
from surgery.progress import Progress
from surgery.transaction.neutral_context import neutrally, verb

__all__ = ["apply_rules", "explain", "plan_rules"]

M = TypeVar("M", bound=nn.Module)


@verb
def apply_rules(
    model: M,
    rules: Iterable[Rule] | Rule,
    *,
    adapter: str = "default",
    example_inputs: Any = None,
    freeze: bool | None = None,
    progress: Progress = False,
) -> M:
    """Rewrite a model in place by rules, as one new adapter.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, remove
    >>> from surgery.rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.randn(4, 8)
    >>> before = model(x)
    >>> apply_rules(model, [LoraRule("0", rank=2)]) is model
    True
    >>> torch.equal(model(x), before), isinstance(model[0], nn.Linear)
    (True, True)
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.A', '0.adapters.default.B']
    >>> _ = remove(model)

    Args:
        model: the model, or a wrapper such as `torch.compile`'s around it.
        rules: one rule or several.
        adapter: the name of the new adapter. Adapters that are on the model stay live.
        example_inputs: a tensor, a tuple of arguments or a dict of keyword arguments. A list holds several examples,
            one for each kind of call: `[{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]`. Planning runs
            each example once. It reports targets that no example reaches and compares traced graphs with their
            forwards. Graphs for rules that look into forwards are traced for evaluation and training, with and without
            gradients. Rules with `identity = True` must leave the output of each example unchanged.
        freeze: whether the base's parameters stop requiring gradients until `remove` restores their flags. None: they
            do if a rule adds parameters that train, as in PEFT. False: base and adapter train together.
        progress: True draws a bar on a terminal, with rich. A function is called with (what is done, steps done,
            steps in all). Default False.

    Returns:
        The same model object.

    Raises:
        PlanError: problems that planning found, all at once.
        SurgeryError: any other failure. After an error the model is unchanged.
    """
    plan = make_plan(model, rules, adapter, example_inputs, freeze)  # match, trace, rewrite
    plan.warnings += rank_warnings(plan.steps)
    install_plan(plan, stacklevel=4, progress=progress)
    return model


@neutrally()
def plan_rules(
    model: nn.Module,
    rules: Iterable[Rule] | Rule,
    *,
    adapter: str = "default",
    example_inputs: Any = None,
    freeze: bool | None = None,
) -> Plan:
    """Plan what `apply_rules` would do, without changing the model.

    >>> from torch import nn
    >>> from surgery import plan_rules
    >>> from surgery.rules import LoraRule
    >>> print(plan_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2)]))
    adapter 'default': 1 edits, 32 trainable parameters; the base is frozen
    rule      site  type    tensors          trainable
    LoraRule     0  Linear  A[2, 8] B[8, 2]         32

    Args:
        model: as for `apply_rules`, and so are the other parameters.
        rules: one rule or several.
        adapter: the name of the new adapter.
        example_inputs: one example call or several.
        freeze: whether the base's parameters stop requiring gradients.

    Returns:
        A `Plan`: the steps, the warnings and every problem that would make `apply_rules` fail.
    """
    with torch.random.fork_rng(devices=[]):  # the new tensors of structural rules start random
        plan = make_plan(model, rules, adapter, example_inputs, freeze)
    plan.warnings += rank_warnings(plan.steps)
    return plan


def explain(model: nn.Module, rule: Rule, path: str, example_inputs: Any = None) -> Verdict:
    """Explain, clause by clause, why a rule matches the module at `path` or does not.

    >>> from torch import nn
    >>> from surgery import explain
    >>> from surgery.rules import LoraRule
    >>> print(explain(nn.Sequential(nn.Linear(2, 2)), LoraRule("query"), "0"))
    no   LoraRule at 0: fails at targets
         no   targets: no target matches
              no   name('query'): its path is 0

    Args:
        model: the model.
        rule: the rule whose targets, `exclude` and `layers` are tested.
        path: the module's path, as in `model.named_modules()`.
        example_inputs: for a rule with a pattern, such as a RewriteRule: inputs of one call, as for `apply_rules`.
            The verdict then has a clause that says whether the module has the pattern, or how nearly it has it.
            Default None: the pattern is not searched.

    Returns:
        A `Verdict`; it is true if the rule matches.

    Raises:
        MatchError: the model has no module at `path`. The message lists similar paths.
    """
    if not isinstance(rule, Rule):
        raise rule_problem(rule)
    model = unwrap(model)
    verdict = verdict_of(Tree.of(model), rule, path)
    if not verdict or not rule.structures():
        return verdict
    pattern = structures_verdict(model, rule, path, example_inputs)
    reason = verdict.reason if pattern.ok else "fails at pattern"
    return dataclasses.replace(verdict, ok=pattern.ok, reason=reason, parts=(*verdict.parts, pattern))
