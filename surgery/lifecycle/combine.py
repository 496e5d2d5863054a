"""`combine`: makes one adapter of several, each multiplied by a weight."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from surgery.authoring.combination import Combination, Method, Share, joint_dtype
from surgery.authoring.equal_rules import ByRule
from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.authoring.site_facts import MARK
from surgery.complex_numbers import is_number
from surgery.errors import MatchError, PlanError, SiteError, SurgeryError
from surgery.forward.parameter_view import tensor_at
from surgery.lifecycle.attach import PlacedRule, attach_idle
from surgery.lifecycle.combine_arguments import requested_combination
from surgery.lifecycle.rename_copy import check_whole
from surgery.patterns.paths import regex_for
from surgery.planning.matching import Tree, matches
from surgery.rewritten_model.verb_root import rewritten
from surgery.sharded_tensors import sharding_of
from surgery.state.adapter_naming import name_problem
from surgery.state.adapter_tensors import tensors_of
from surgery.state.in_use import check_free
from surgery.state.records import Applied, ModelState, sites
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

    Returns:
        The same model object.

    Raises:
        PlanError: rules that can't be combined by this method, or tensors with NaN, each with a site and a fix.
        SurgeryError: an unknown adapter, a name that is taken, a wrong value of an argument, a merged model, or an
            adapter that changed the base's weights at its start (PiSSA). In both cases the model is unchanged.

    PEFT: `add_weighted_adapter`. Sources: Yadav et al. 2023 (TIES), arXiv:2306.01708; Yu et al. 2023 (DARE),
    arXiv:2311.03099.
    """
    root, state = rewritten(model)
    how = requested_combination(state, weights, method, rank, density, majority_sign, clamp, seed)
    check_free(root)
    if (problem := name_problem(state, into)) is not None:
        raise problem
    for name in how.weights:
        check_whole(state, name, "be combined")
    for path, module, site in sites(root):
        if site.of(list(how.weights)) and (refused := sharding_of(module)) is not None:
            raise SiteError("adapters can't be combined here", where=path, why=refused[0], fix=refused[1])
    with torch.no_grad():
        kinds = list(_kinds(root, state, how))
        for kind in kinds:
            kind.combine(how)
    if problems := [problem for kind in kinds for problem in kind.problems]:
        raise PlanError(problems)
    rules = _rules(root, kinds)
    at = state.rules_at(how.weights)
    order = {
        id(applied): index for index, applied in enumerate(a for _, m, _ in sites(root) for a in at.get(id(m), ()))
    }
    placed = [
        (min(order[id(applied)] for applied, _ in at.records), new) for kind in kinds for at, new in kind.placements()
    ]
    attach_idle(root, into, rules, [new for _, new in sorted(placed, key=lambda pair: pair[0])], how.weights)
    return model


# The rules of one kind ----------------------------------------------------------------------------------------


@dataclass
class _KindAtSite:
    """The adapters' rules of one kind at one site with their tensors, and the rule and tensors that result."""

    path: str
    module: nn.Module
    records: list[tuple[Applied, Share]]
    rule: Rule | None = None
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass
class _Kind:
    """The rules of one name. `companion`: all of them are companions of other rules."""

    name: str
    rules: tuple[Rule, ...]
    companion: bool
    paths: dict[str, set[str]]  # by adapter
    at: list[_KindAtSite]
    problems: list[SurgeryError] = field(default_factory=list)

    def combine(self, how: Combination) -> None:
        how, reported = replace(how, rules=self.rules), set[tuple[str, str | None]]()
        for at in self.at:
            shares = [share for _, share in at.records]
            try:
                for share in shares:
                    _check_finite(share)
                with HookCall(shares[0].rule, "combined", at.path):
                    at.rule, at.tensors = cast(Rule, shares[0].rule).combined(shares, how)
            except SurgeryError as error:
                if (error.what, error.why) not in reported:  # many sites with the same error: the first
                    self.problems.append(error)
                reported.add((error.what, error.why))

    def placements(self) -> Iterator[tuple[_KindAtSite, PlacedRule]]:
        for at in self.at:
            assert at.rule is not None
            first, shares = at.records[0][0], [share for _, share in at.records]
            facts = {name: copy.deepcopy(fact) for name, fact in first.facts.items() if name != MARK}
            tensors = {name: _like(name, tensor, shares) for name, tensor in at.tensors.items()}
            yield at, PlacedRule(at.module, at.rule, tensors, facts, first.inside)


def _check_finite(share: Share) -> None:
    for name, tensor in share.params.items():
        if is_number(tensor) and not tensor.is_meta and not bool(torch.isfinite(tensor).all()):
            raise SurgeryError(
                f"the adapter {share.adapter!r} holds numbers that are not finite",
                where=share.site.path,
                why=f"{name} of its {share.rule.label} has NaN or infinity in it",
                fix="load the adapter again",
            )


def _like(name: str, tensor: Tensor, shares: Sequence[Share]) -> tuple[Tensor, bool]:
    """A copy of a tensor with the dtype, device and kind of the adapters' own; and whether it is a buffer."""
    own = [share.params[name] for share in shares if name in share.params]
    dtype = joint_dtype(own) if own else tensor.dtype
    device = own[0].device if own else tensor.device
    new = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor.detach())
    buffer = bool(own) and not isinstance(own[0], nn.Parameter)
    return (new, True) if buffer else (nn.Parameter(new, requires_grad=is_number(new)), False)


def _kinds(model: nn.Module, state: ModelState, how: Combination) -> Iterator[_Kind]:
    """The adapters' rules grouped by rule name, in the adapters' order, each with its sites."""
    listed = [rule for name, rules in state.adapters.items() if name in how.weights for rule in rules]
    at: dict[str, dict[int, _KindAtSite]] = {rule.name: {} for rule in listed}
    of = {name: state.rules_at((name,)) for name in how.weights}
    for path, module, site in sites(model):
        if site.merged is not None:
            why = f"its weights hold {', '.join(site.merged.adapters)}"
            raise SurgeryError("the model is merged", where=path, why=why, fix="unmerge(model) first")
        for name, weight in how.weights.items():
            tensors = tensors_of(module, name)
            for applied in of[name].get(id(module), ()):
                live = LiveSite(module, site.path, name, tensors, lambda key, _, module=module: tensor_at(module, key))
                params = {key: tensors[key] for key in applied.tensors}
                share = Share(weight, applied.rule, live, params)
                here = at.setdefault(applied.rule.name, {}).setdefault(id(module), _KindAtSite(site.path, module, []))
                here.records.append((applied, share))
    for kind, at_sites in ((kind, at_sites) for kind, at_sites in at.items() if at_sites):
        shares = [share for here in at_sites.values() for _, share in here.records]
        paths: dict[str, set[str]] = {}
        for share in shares:
            paths.setdefault(share.adapter, set()).add(share.site.path)
        distinct, named = ByRule[Rule](), ByRule[bool]()
        of_shares = [cast(Rule, share.rule) for share in shares]
        rules = {id(one): one for one in (distinct.get(rule, lambda rule=rule: rule) for rule in of_shares)}
        for rule in listed:
            named.get(rule, lambda: True)
        companion = not any([named.get(rule, lambda: False) for rule in rules.values()])
        yield _Kind(kind, tuple(rules.values()), companion, paths, list(at_sites.values()))


# The rules of the new adapter ---------------------------------------------------------------------------------


def _rules(model: nn.Module, kinds: Sequence[_Kind]) -> list[Rule]:
    """The new adapter's rules, each with targets that match its sites; companions are not listed."""
    tree = Tree.of(model)
    main = [kind for kind in kinds if not kind.companion]
    rules = [rule for kind in main for rule in _targeted(tree, kind)]
    coming = [companion for rule in rules for companion in rule.companions()]
    for kind in (kind for kind in kinds if kind.companion):
        wanted = {id(at.module) for at in kind.at}
        fitting = [rule for rule in coming if rule.name == kind.name and _sites(tree, rule) == wanted]
        if len(fitting) == 1:
            coming.remove(fitting[0])
            for at in kind.at:
                at.rule = fitting[0]
        else:
            rules += _targeted(tree, kind)
    if any(_sites(tree, rule) for rule in coming):  # companions would match sites where the adapters differ
        return _without_companions(tree, kinds)
    return rules


def _without_companions(tree: Tree, kinds: Sequence[_Kind]) -> list[Rule]:
    """As `_rules`, with every rule listed and no companions."""
    for at in (at for kind in kinds for at in kind.at):
        assert at.rule is not None
        at.rule = at.rule.alone()
    return [rule for kind in kinds for rule in _targeted(tree, kind)]


def _targeted(tree: Tree, kind: _Kind) -> list[Rule]:
    """One kind's rules, united if possible, with the adapters' own targets if these match the same sites."""
    by_path = {at.path: at.rule for at in kind.at if at.rule is not None}
    first = next(iter(by_path.values()))
    groups, known = dict[int, tuple[Rule, list[str]]](), ByRule[tuple[Rule, list[str]]]()
    for path, rule in first.united(by_path).items():
        bare = rule.replace(targets=(), exclude=(), layers=None, expect=None)
        group = known.get(bare, lambda bare=bare: (bare, []))
        groups[id(group)] = group
        group[1].append(path)
    results: list[Rule] = []
    for rule, paths in groups.values():
        chosen = set(paths)
        here = [at for at in kind.at if at.path in chosen]
        new = _with_own_targets(tree, kind, rule) if len(groups) == 1 else None
        results.append(new or _by_paths(tree, rule, {at.path: at.module for at in here}))
        for at in here:
            at.rule = results[-1]
    return results


def _with_own_targets(tree: Tree, kind: _Kind, rule: Rule) -> Rule | None:
    """The rule with the adapters' own targets; None unless these match the sites of all adapters."""
    first, *others = kind.rules
    own: dict[str, Any] = {"targets": first.targets, "exclude": first.exclude, "layers": first.layers}
    if all((other.targets, other.exclude, other.layers) == tuple(own.values()) for other in others):
        alike = all(paths == {at.path for at in kind.at} for paths in kind.paths.values())
        return rule.replace(**own) if alike else None
    if any(other.exclude or other.layers is not None for other in kind.rules):
        return None
    words = dict.fromkeys(word for other in kind.rules for word in cast(tuple, other.targets) if isinstance(word, str))
    joined = rule.replace(targets=tuple(words))
    return joined if _sites(tree, joined) == {id(at.module) for at in kind.at} else None


def _by_paths(tree: Tree, rule: Rule, wanted: Mapping[str, nn.Module]) -> Rule:
    new = rule.replace(targets=regex_for(list(wanted)))
    reached = _sites(tree, new)
    if reached != {id(module) for module in wanted.values()}:
        lost = [path for path, module in wanted.items() if id(module) not in reached]
        raise SiteError(
            f"no targets of one {rule.label} match the adapters' sites exactly",
            where=", ".join(lost[:3]) or None,
            why="modules were renamed since the rules were applied" if lost else "the targets match further modules",
            fix="combine adapters that have this rule at the same modules",
        )
    return new


def _sites(tree: Tree, rule: Rule) -> set[int]:
    try:
        matched = matches(tree, rule)
    except MatchError:
        return set()
    inner = set[int]()
    for match in matched:
        with HookCall(rule, "expand", match.path):
            inner.update(id(module) for _, module in rule.expand(match.module, match.path))
    return inner
