"""The engine's verbs: plan, apply, explain, remove. Each reads as the flow match → plan → trace → rewrite → install."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

from torch import nn

from surgery.authoring.rule import Rule
from surgery.authoring.rule_arguments import rule_problem
from surgery.lifecycle.insertion import carry_out
from surgery.patterns.pattern import Verdict
from surgery.patterns.wrappers import unwrap
from surgery.planning.matching import Tree, verdict_of
from surgery.planning.plan import Plan
from surgery.planning.planner import make_plan
from surgery.planning.rank_check import rank_warnings
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
) -> M:
    """Rewrite a model in place by rules; the same object comes back, adapted.

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

    Applying stacks: adapters there before stay live.

    `freeze`: whether the base's parameters stop requiring gradients, until `remove` gives their flags back. None, the
    default: where the rules bring parameters that train, as in PEFT; rules that only look (`CaptureRule`) leave the
    base as it trains. False: base and adapter train together.

    `example_inputs` (a tensor, a tuple of arguments or a dict of keyword arguments) is run once before anything is
    touched: targets that it never reaches are reported, held graphs are compared with the forwards they stand for, and
    rules that promise an unchanged output at the start are held to it. A list holds several examples, one for each kind
    of call: `[{"input_ids": ids}, {"input_ids": ids, "attention_mask": mask}]`. What rules that look into forwards need
    is made ready for them, in evaluation and in training, with and without gradients.

    All or nothing: raises `SurgeryError` (`PlanError` where several things are wrong) with the model as it was.
    """
    plan = make_plan(model, rules, adapter, example_inputs, freeze)
    plan.warnings += rank_warnings(plan.steps)
    carry_out(plan, stacklevel=4)
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
    """What `apply_rules` would do, and every reason why it would refuse; touches nothing.

    >>> from torch import nn
    >>> from surgery import plan_rules
    >>> from surgery.rules import LoraRule
    >>> print(plan_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2)]))
    adapter 'default': 1 edits, 32 trainable parameters; the base is frozen
    rule      site  type    tensors          trainable
    LoraRule     0  Linear  A[2, 8] B[8, 2]         32
    """
    plan = make_plan(model, rules, adapter, example_inputs, freeze)
    plan.warnings += rank_warnings(plan.steps)
    return plan


def explain(model: nn.Module, rule: Rule, path: str) -> Verdict:
    """Why a rule does or does not match the module at `path`, clause by clause; truth is the match.

    >>> from torch import nn
    >>> from surgery import explain
    >>> from surgery.rules import LoraRule
    >>> print(explain(nn.Sequential(nn.Linear(2, 2)), LoraRule("query"), "0"))
    no   LoraRule at 0: fails at targets
         no   targets: no target matches
              no   name('query'): its path is 0

    `MatchError` with near misses where the model has no such path.
    """
    if not isinstance(rule, Rule):
        raise rule_problem(rule)
    return verdict_of(Tree.of(unwrap(model)), rule, path)


# Applying -----------------------------------------------------------------------------------------------------


# Removing -----------------------------------------------------------------------------------------------------
