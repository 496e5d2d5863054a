"""`as_lora`: one plain LoRA from the changes of weights of any adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from surgery.arithmetic.exact_fold import LowRank
from surgery.authoring.equal_rules import ByRule
from surgery.authoring.rule import Rule
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import SurgeryError
from surgery.lifecycle.activation import using
from surgery.lifecycle.attach import PlacedRule, attach_idle
from surgery.lifecycle.combined_targets import rules_of_groups
from surgery.lifecycle.remove import remove
from surgery.lifecycle.rename_copy import check_whole, copied_rule, rename_adapter
from surgery.lifecycle.rule_groups import RuleAtSite, RuleGroup
from surgery.lifecycle.switching import switch, weights_now
from surgery.lora_conversion.report import LoraReport, LoraSite
from surgery.lora_conversion.site_conversion import ConvertedSite, convert_sites
from surgery.lora_conversion.truncated_svd import RankChoice
from surgery.progress import Progress
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names, name_problem
from surgery.state.in_use import check_free
from surgery.state.merged_tensors import merged_error
from surgery.state.records import Applied, ModelState, sites
from surgery.tracing.example_call import call, examples_in, random_state
from surgery.transaction.neutral_context import verb

__all__ = ["adapter_weights", "as_lora"]


@verb
def as_lora(
    model: nn.Module,
    adapter: str | Sequence[str] | Mapping[str, float] = "default",
    into: str | None = None,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    example_inputs: Any = None,
    progress: Progress = False,
) -> LoraReport:
    """Convert an adapter, or a weighted sum of adapters, into one plain LoRA. For programs that only take LoRA.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, as_lora, rules_of
    >>> from surgery.rules import IA3Rule
    >>> _ = torch.manual_seed(0)
    >>> model = apply_rules(nn.Sequential(nn.Linear(16, 4, bias=False)), IA3Rule("0", init="random"))
    >>> before = model(torch.ones(1, 16))
    >>> print(as_lora(model))
    LoRA at 1 weights, rank 4; only rounding is lost
    >>> torch.allclose(model(torch.ones(1, 16)), before, atol=1e-5), rules_of(model)[0].name
    (True, 'lora')

    The conversion takes any rule that `merge` takes. Where all rules at a site have known low-rank factors (LoRA,
    rsLoRA, VeRA, …), the factors are put side by side with their scales folded in, and nothing is lost while their
    ranks fit. The ΔW of other rules (IA3, LoHa, OFT, DoRA, …) is computed at this base's weights in float64, and its
    largest singular values are kept.

    An adapter that changed the base's weights at its start (PiSSA, OLoRA) becomes a LoRA of twice its rank on the base
    as it was, whose bits are restored.

    The new rules have the scale 1 (`alpha = rank`), no dropout, and float32 tensors, or float64 on a float64 base. A
    changed bias becomes LoRA's bias (`lora_bias`). Rules that hold copies of the base's tensors (TrainRule, NormRule),
    and rules that change only biases, stay as they are.

    Args:
        model: the model.
        adapter: the name of an adapter, or several names, whose changes are added up. A mapping gives each adapter's
            weight. Default "default".
        into: the name of the new adapter, which is idle. None (default): the LoRA takes the place of the adapter.
        rank: the rank at every site; factors of a lower rank are filled up with zeros. With a tolerance: the highest
            rank. None (default): as many as needed.
        tolerance: the share of each site's change ‖ΔW‖ that may be lost; the ranks are as low as it allows. None
            (default): without `rank`, only rounding errors are left out.
        example_inputs: an example or a list of examples, as for `apply_rules`. The report then says how much of the
            adapters' effect on the outputs is lost.
        progress: as in `apply_rules`; a step is a site. Default False.

    Returns:
        A `LoraReport`: rank and error of each weight, what stays as it is, and the outputs' errors.

    Raises:
        PlanError: one problem for each site with a rule without a ΔW (prompts, prefixes, ReFT, bottlenecks, …), with a
            change that LoRA can't hold, or whose change needs a higher rank than `rank` to keep the tolerance.
        SurgeryError: an unknown adapter, a name that is taken, a wrong value of an argument, a merged model, or an
            adapter that changed the model's structure, or that changed the base's weights at its start (PiSSA) and is
            to stay beside the LoRA. After an error the model is unchanged.

    PEFT: `convert_to_lora`.
    """
    root, state = rewritten(model)
    choice, weights = RankChoice(rank, tolerance), adapter_weights(state, adapter)
    names = list(weights)
    check_free(root)
    _check_adapters(root, state, names, into)
    converted = convert_sites(root, state, weights, choice, progress)
    rules, placed = _new_rules(root, state, names, converted)
    new = into if into is not None else _free_name(state)
    examples = [(example, random_state()) for example in examples_in(example_inputs) if example is not None]
    old = [_outputs(root, example, draws, weights) for example, draws in examples]
    before = weights_now(state)
    attach_idle(root, new, rules, placed, names)
    if into is None:
        remove(root, names[0])
        rename_adapter(root, new, names[0])
        switch(root, before)
    result = {into or names[0]: 1.0}
    losses = [
        _loss(outputs, *(_outputs(root, example, draws, live) for live in ({}, result)))
        for outputs, (example, draws) in zip(old, examples, strict=True)
    ]
    return _report(names, converted, tuple(losses))


def adapter_weights(state: ModelState, adapter: str | Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """The weight of each adapter, by name."""
    names = adapter_names(state, list(adapter) if isinstance(adapter, Mapping) else adapter)
    if not names:
        raise SurgeryError("no adapter is named", fix="name the adapters to convert")
    weights = dict.fromkeys(names, 1.0) | (dict(adapter) if isinstance(adapter, Mapping) else {})
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise SurgeryError(f"the weight {weight!r} of {name!r} is not a finite number")
    return weights


def _check_adapters(root: nn.Module, state: ModelState, names: Sequence[str], into: str | None) -> None:
    if into is None and len(names) > 1:
        raise SurgeryError("several adapters have no one name", fix="name the new adapter: as_lora(model, names, into)")
    if into is not None and (problem := name_problem(state, into)) is not None:
        raise problem
    for name in names:
        if structural := [rule.label for rule in state.adapters[name] if isinstance(rule, StructureRule)]:
            why = f"{structural[0]} changes the structure of the model, which no LoRA holds"
            fix = "put the structural rules into an adapter of their own"
            raise SurgeryError(f"the adapter {name!r} can't be converted to LoRA", why=why, fix=fix)
        if into is not None:  # the LoRA would go on the changed weights, which stay while the adapter is there
            check_whole(state, name, "be converted to LoRA beside it")
    for path, _, site in sites(root):
        if site.merged is not None:
            raise merged_error(path, site.merged.adapters)


# The new adapter ----------------------------------------------------------------------------------------------


def _new_rules(
    root: nn.Module, state: ModelState, names: Sequence[str], converted: Sequence[ConvertedSite]
) -> tuple[list[Rule], list[PlacedRule]]:
    """The rules of the new adapter with targets that match its sites, and each rule at each site."""
    lora = [(site, RuleAtSite(site.path, site.module, [], site.rule)) for site in converted if site.rule is not None]
    paths = {
        name: {site.path for site, _ in lora if any(applied.adapter == name for applied in site.chosen)}
        for name in names
    }
    first_of, originals = ByRule[Rule](), dict[int, Rule]()
    for site, _ in lora:
        for applied in site.replaced:
            rule = first_of.get(applied.rule, lambda applied=applied: applied.rule)
            originals[id(rule)] = rule
    groups = [RuleGroup("lora", tuple(originals.values()), False, paths, [at_site for _, at_site in lora])]
    kept = [
        (site, applied, RuleAtSite(site.path, site.module, [], applied.rule))
        for site in converted
        for applied in site.change.kept
    ]
    by_name: dict[str, list[tuple[Applied, RuleAtSite]]] = {}
    for _, applied, at_site in kept:
        by_name.setdefault(applied.rule.name, []).append((applied, at_site))
    for name, at_sites in by_name.items():
        own = tuple({id(applied.rule): applied.rule for applied, _ in at_sites}.values())
        own_paths = {adapter: {at.path for applied, at in at_sites if applied.adapter == adapter} for adapter in names}
        groups.append(RuleGroup(name, own, False, own_paths, [at_site for _, at_site in at_sites]))
    rules = rules_of_groups(root, groups)
    placed: list[PlacedRule] = []
    clones: dict[int, Tensor] = {}
    for site, applied, at_site in kept:
        placement = copied_rule(site.module, applied, clones)
        placement.rule = at_site.rule or applied.rule
        placed.append(placement)
    for site, at_site in lora:
        assert at_site.rule is not None
        tensors = {name: (nn.Parameter(tensor.clone()), False) for name, tensor in site.tensors.items()}
        placed.append(PlacedRule(site.module, at_site.rule, tensors))
    return rules, placed


def _free_name(state: ModelState) -> str:
    return next(
        name for number in range(len(state.adapters) + 1) if (name := f"as_lora_{number}") not in state.adapters
    )


def _outputs(root: nn.Module, example: Any, draws: list[Tensor], live: Mapping[str, float]) -> list[Tensor]:
    """The model's outputs on an example with these adapters live."""
    with using(root, list(live), list(live.values())):
        leaves = [leaf for leaf in tree_leaves(call(root, example, draws)) if isinstance(leaf, Tensor)]
    return [leaf.cpu().double() for leaf in leaves if leaf.is_floating_point()]


def _loss(old: list[Tensor], base: list[Tensor], now: list[Tensor]) -> float:
    """The difference of the outputs as a share of the adapters' own effect on them."""
    effect, lost = (
        math.sqrt(sum(float((x - y).square().sum()) for x, y in zip(old, other, strict=True))) for other in (base, now)
    )
    return lost / effect if effect else (math.inf if lost else 0.0)


def _report(names: Sequence[str], converted: Sequence[ConvertedSite], outputs: tuple[float, ...]) -> LoraReport:
    rows, norm, lost = list[LoraSite](), 0.0, 0.0
    for site in converted:
        for name, factors in site.factors.items():
            exact = isinstance(site.change.weights[name], LowRank) and not factors.lost
            rows.append(LoraSite(site.path, name, factors.rank, factors.norm, factors.error, exact))
            norm, lost = math.hypot(norm, factors.norm), math.hypot(lost, factors.lost)
    kept = tuple(
        ".".join(filter(None, (site.path, name))) for site in converted for a in site.change.kept for name in a.tensors
    )
    return LoraReport(tuple(names), tuple(rows), lost / norm if norm else 0.0, kept, (), outputs)
