"""`combine`: one new adapter from several adapters, each multiplied by a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeVar

import torch
from torch import nn

from surgery.authoring.combination import Method
from surgery.errors import PlanError, SiteError
from surgery.lifecycle.attach import attach_idle
from surgery.lifecycle.combine_arguments import requested_combination
from surgery.lifecycle.combined_targets import rules_of_groups
from surgery.lifecycle.rename_copy import check_whole
from surgery.lifecycle.rule_groups import group_rules
from surgery.progress import Progress
from surgery.rewritten_model.structural_adapters import check_not_structural, warn_set_aside
from surgery.rewritten_model.verb_root import rewritten
from surgery.sharded_tensors import sharding_of
from surgery.state.adapter_naming import name_problem
from surgery.state.in_use import check_free
from surgery.state.records import sites
from surgery.transaction.neutral_context import verb

__all__ = ["combine"]

M = TypeVar("M", bound=nn.Module)


@verb
def combine(
    model: M,
    weights: Mapping[str, float],
    into: str,
    method: Method = "svd",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign: Literal["total", "frequency"] = "total",
    clamp: float | None = None,
    seed: int | torch.Generator | None = None,
    progress: Progress = False,
) -> M:
    """Combine several adapters, each multiplied by its weight, into one new idle adapter.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import activate, apply_rules, combine, rules_of
    >>> from surgery.rules import LoraRule
    >>> model = nn.Sequential(nn.Linear(8, 8))
    >>> for name in ("a", "b"):
    ...     _ = apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    >>> x = torch.randn(3, 8)
    >>> both = activate(model, ["a", "b"], weights=[0.7, -0.3])(x)
    >>> _ = combine(model, {"a": 0.7, "b": -0.3}, "c")
    >>> torch.allclose(activate(model, "c")(x), both, atol=1e-5), rules_of(model, "c")[0].rank
    (True, 4)

    The model's outputs do not change until `activate(model, into)`. Methods, for LoRA's ΔW = s B A with scale s and
    weight w:

    - "svd": the singular values and vectors of Σ w ΔW. Without `rank` the ranks add up and the result is Σ w ΔW; with
      `rank` the result is the best approximation of that rank.
    - "cat": the factors side by side, which also is Σ w ΔW; the ranks add up.
    - "linear": A = Σ ±√|w s| A and B = Σ √|w s| B, as in PEFT; w < 0 changes the sign of A. The ranks must be equal.
      The result is not Σ w ΔW: it has products of one adapter's A with another's B.
    - "magnitude_prune", "ties", "dare_linear" (or "dare"), "dare_ties": "linear" of pruned tensors; with the ending
      "_svd", "svd" of pruned ΔW.

    An adapter adds nothing at a site that it does not have. Other rules define their own combination; copies of the
    base's tensors (TrainRule, …) become W + Σ w (T − W), pruned as the method says.

    Args:
        model: the model.
        weights: a weight for each adapter's name.
        into: the name of the new adapter.
        method: see above.
        rank: the rank of the result, for "svd" and the methods that end in "_svd". The latter, and "svd" of DoRA, whose
            ΔW does not have a low rank, take the largest rank by default.
        density: the share of each tensor that pruning keeps, above 0 and at most 1.
        majority_sign: "ties" elects signs by the sum of the values ("total") or by their number ("frequency").
        clamp: the quantile at which the methods with "svd" clip their result (PEFT's svd_clamp).
        seed: a number or a generator from which "dare…" draws what it keeps. None: torch's global generator.
        progress: True draws a bar on a terminal, with rich. A function is called with (what is done, steps done,
            steps in all). Default False.

    Returns:
        The same model object.

    Raises:
        PlanError: rules that can't be combined by this method, or tensors with NaN, each with a site and a fix.
        SurgeryError: an unknown adapter, a name that is taken, a wrong value of an argument, a merged model, or an
            adapter that changed the base's weights at its start (PiSSA) or has structural rules alone. After an
            error the model is unchanged.

    Warns:
        SurgeryWarning: an adapter is on layers that a structural rule took out; the result is on the present ones.

    PEFT: `add_weighted_adapter`. Sources: Yadav et al. 2023 (TIES), arXiv:2306.01708; Yu et al. 2023 (DARE),
    arXiv:2311.03099.
    """
    root, state = rewritten(model)
    combination = requested_combination(state, weights, method, rank, density, majority_sign, clamp, seed)
    check_free(root)
    if (problem := name_problem(state, into)) is not None:
        raise problem
    check_not_structural(state, combination.weights, "be combined", "name the other adapters; the structure stays")
    for name in combination.weights:
        check_whole(state, name, "be combined")
    for path, module, site in sites(root):
        if site.of(list(combination.weights)) and (refusal := sharding_of(module)) is not None:
            raise SiteError("adapters can't be combined here", where=path, why=refusal[0], fix=refusal[1])
    with torch.no_grad():
        groups = list(group_rules(root, state, combination))
        for group in groups:
            group.combine(combination, progress)
    if problems := [problem for group in groups for problem in group.problems]:
        raise PlanError(problems)
    rules = rules_of_groups(root, groups)
    records_at = state.rules_at(combination.weights)
    order = {
        id(applied): index
        for index, applied in enumerate(a for _, m, _ in sites(root) for a in records_at.get(id(m), ()))
    }
    ordered = [
        (min(order[id(applied)] for applied, _ in at_site.records), new)
        for group in groups
        for at_site, new in group.placements()
    ]
    attach_idle(root, into, rules, [new for _, new in sorted(ordered, key=lambda pair: pair[0])], combination.weights)
    warn_set_aside(root, state, combination.weights, into)
    return model
