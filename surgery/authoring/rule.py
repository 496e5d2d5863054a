"""`Rule`, the class that rules subclass, and the capabilities that a rule may have beside its `rewrite`.

A capability is a base class of `Rule` with the answers of a rule that says nothing. `Placement`: which modules a rule
takes, and what comes with it. `Mergeable`: its change of the base's parameters. `Combinable`: one rule for several
adapters'. `Routable`: several adapters in one batch. `Swappable`: tensors for another rule's code. `Slottable`: the
slots of exported files.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change
from surgery.authoring.combination import Combination, Share
from surgery.authoring.declaration import Declaration
from surgery.authoring.live_site import LiveSite
from surgery.authoring.routed_site import Member
from surgery.authoring.site import Site
from surgery.errors import RuleError

__all__ = ["Combinable", "Mergeable", "Placement", "Routable", "Rule", "Slottable", "Swappable"]


class Placement(Declaration):
    """Which of the matched modules a rule takes, and what comes with it."""

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        """The sites a matched module stands for; itself, unless a rule says otherwise."""
        return [(path, module)]

    def review(self, paths: Sequence[str]) -> Iterable[str]:
        """What is wrong with the rule seen over all its sites, such as a pattern that fits none of them."""
        return ()

    def rank_at(self, path: str) -> int | None:
        """The rank of the change of a matrix, by its path in `matrices`; told where the matrix can't have so much."""
        return None

    def matrices(self, module: nn.Module, path: str) -> Mapping[str, tuple[int, int]] | None:
        """The sizes (out, in) of the matrices that change, by path. None, the default: the module's weight alone,
        under the module's path."""
        return None

    def companions(self) -> Iterable[Rule]:
        """Further rules that come with this one, under the same adapter. They may match nothing."""
        return ()

    def alone(self) -> Rule:
        """The same rule without companions."""
        return cast("Rule", self)

    def alike(self, path: str) -> Hashable | None:
        """What `check` and `rewrite` take from a path, where the module's kind is all else that they look at.

        Its kind: its class, plain settings (numbers, texts), and the shapes and dtypes of its own tensors; neither
        their values nor what is around it, an example, or other rules. Modules without children that are of one kind
        and have equal answers here are asked about once, which makes plans fast. None, the default: each is asked
        about. A subclass does not inherit the answer: its own hooks may look at more.
        """
        return None


class Mergeable(Declaration):
    """What a rule changes of the base's parameters, for `merge`."""

    linear: ClassVar[bool] = False
    why_not_merged: ClassVar[str] = "the rule says nothing about merging (it has no `merged`)"

    def merged(self, site: LiveSite) -> Mapping[str, Change]:
        """The base's parameters with the rule folded in: name → a new tensor, or a `LowRank` or `Rows` change.

        A rule with `linear = True` needs none: `merge` derives ΔW from its `rewrite`.
        """
        raise NotImplementedError

    def folded(self, site: LiveSite) -> tuple[Rule, Mapping[str, Tensor]]:
        """A plainer rule that computes the same, and the adapter's tensors at this site as it wants them.

        For tensors that only training needs, such as a prefix's MLP. `site.params` holds all that the adapter has at
        the site; what comes back takes their place. By default the rule itself, with them.
        """
        return cast("Rule", self), site.params

    def restores(self, name: str) -> bool:
        """Whether it puts a tensor of the base as it was where the adapter was made: then bases may differ in it."""
        return False

    @property
    def additive(self) -> bool:
        """Whether it only adds to the output what does not depend on other rules or the base's parameters."""
        return self.linear

    @property
    def mergeable(self) -> bool:
        return self.linear or type(self).merged is not Mergeable.merged


class Combinable(Declaration):
    """One rule for those of several adapters, for `combine`."""

    why_not_combined: ClassVar[str] = "a sum of its tensors is no sum of what they do"

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        """One rule and its tensors at a site for those of several adapters, each with a weight (`combine`).

        `shares`: what each adapter has there, its rule of this kind (this one is the first's) and the tensors;
        `how.sum` adds tensors up as the method says, and `how.refusal` is the error where it can't be done.
        """
        if how.untouched(shares):
            return cast("Rule", self), shares[0].params
        raise how.refusal(shares, self.why_not_combined)

    def united(self, rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
        """The same rules by path, those of `combined`, with as few different ones as may be; they differ in targets."""
        return rules


class Routable(Declaration):
    """Several adapters in one batch, each for its own rows, for `route`."""

    routable: ClassVar[bool] = True

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> Tensor | None:
        """The rewrite for several adapters in one batch, each for its own rows; all their rules are of this class.

        Only for rules that can't be run on each adapter's rows by themselves, such as those that put functions around
        others. `sites` are one site as each adapter sees it: `site.rule`, `site.param(…)` and, at a call,
        `site.rows.of(size, device)`; what one of them records (`around`, `replace`) is done once for all.
        """
        raise NotImplementedError


class Swappable(Declaration):
    """A rule's tensors as another rule of its kind wants them, for `hotswap` and `pad_rank`."""

    def swapped(self, live: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        """This rule's tensors, `site.params`, as `live` wants them to compute the same: a rule of its kind in the code.

        For `hotswap`, where the two make different code or tensors of different shapes, and for `pad_rank`. What is
        rounded or left out on the way goes to `site.notes`. By default a `RuleError` that names the fields.
        """
        told = [f"{name}={getattr(live, name)!r} there, {getattr(self, name)!r} here" for name in self.differing(live)]
        raise RuleError(
            f"a {self.label} can't take the place of one with other code",
            why=", ".join(told) or "its tensors have other shapes",
            fix="load it as an adapter of its own: load_adapter",
        )

    def neutral(self, site: LiveSite) -> Mapping[str, Tensor] | None:
        """Tensors with which the rule does nothing at a site, for `hotswap`; None where none are known.

        `site.params` are those that it starts with: by default these, where `identity` holds.
        """
        return site.params if self.identity else None

    def padded(self, rank: int) -> Rule:
        """The rule with tensors that have room for this rank, for `pad_rank`; by default itself, which has none."""
        return cast("Rule", self)


class Slottable(Declaration):
    """The slots that exported files have for a rule's tensors, for `export_onnx(adapters="slots")`.

    Of a rule that slots may hold: `slot_kind`, their kind, or `why_no_slot`. Of a slot's rule: `zeros_are_none`,
    whether zeros in its tensors do nothing, and `slot_first`, whether it puts a parameter in the base's place, before
    all other edits.
    """

    slot_kind: ClassVar[str | None] = None
    why_no_slot: ClassVar[str] = "it has no form that adapters could share"
    zeros_are_none: ClassVar[bool] = True
    slot_first: ClassVar[bool] = False

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> Rule | None:
        """The rule of a slot that holds what any of these do at a module, for `export_onnx(adapters="slots")`, or None.

        `rules`: those of several adapters, all of this `slot_kind`. The slot's rule is inserted as any other, its
        tensors become inputs of the exported graph, and by default they are what it starts with: `free` axes empty,
        the others as `initialise` leaves them, which must change nothing.
        """
        return None

    def free(self, tensor: str) -> tuple[int, str] | None:
        """Of a slot's rule: the axis of a tensor that may have any size at run time, and a word for it ("rank").

        Where the words of two tensors of a site are the same, so are the sizes.
        """
        return None

    def slot_notes(self, model: nn.Module, module: nn.Module) -> Mapping[str, Any]:
        """Of a slot's rule: what else is to be said of a site, as plain data, in the exported file's manifest.

        For what makes adapters of files without the model at hand, such as `convert_peft`.
        """
        return {}

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        """This rule's tensors, `site.params`, as a slot's rule wants them; by default themselves.

        Numbers of the rule that the slot does not have, such as a scale, are folded into them.
        """
        return site.params

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        """Of a slot's rule: the rule, and its tensors, that these in a slot of it are; `slotted` the other way."""
        return cast("Rule", self), tensors


@dataclass(frozen=True)
class Rule(Placement, Mergeable, Combinable, Routable, Swappable, Slottable):
    """What goes where. Subclass it with `@rule(name)`, give it fields and a `rewrite`.

    >>> import torch
    >>> from torch import nn
    >>> from surgery import Rule, apply_rules, remove, rule
    >>> @rule("doc-gate")
    ... class GateRule(Rule):
    ...     init: float = 1.0
    ...     def rewrite(self, site):
    ...         return site.output * site.param("gate", torch.full((site.out_features,), self.init))
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> model = apply_rules(model, [GateRule("0", init=0.5)])
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['0.adapters.default.gate']

    Fields of every rule: `targets` (PEFT's target_modules: names, types, Patterns, `"all-linear"`, or a list),
    `exclude` (PEFT's exclude_modules), `layers` (PEFT's layers_to_transform: indices), `expect` (how many modules
    it must match). All but `targets` are given by name.

    Hooks, all optional but `rewrite`: `check` (why a module can't take the rule), `alike` (modules that need not be
    asked about one by one), `expand` (a container's inner sites), `companions` (further rules), `initialise`, `merged`,
    `folded`, `combined`; for `route` `routed`; for `hotswap` `swapped`, `neutral` and `padded`. Class attributes:
    `identity = True` promises an unchanged output at initialisation, which the engine checks on the example call;
    `exclusive = True` bars other rules of the same adapter from its sites; `imports = True` says that its fields name
    code to import, so that `load_adapter` takes it from a file only when told to trust it; `linear = True` says that it
    adds to the output what is linear in the input, so that `merge` derives ΔW from it; `scalable = False` says that
    what it changes can't be multiplied, so that it has no weights but 1; `routable = False` that it can't work on some
    rows of a batch alone; `why_not_merged` and `why_not_combined` are the reasons where there is no `merged` or no
    `combined`.

    Raises `RuleError` for an unknown field, or a value that `validate` refuses.
    """

    def check(self, module: nn.Module, path: str) -> str | None:
        """Why this module can't take the rule, or None. Called while planning, before anything is touched."""

    def rewrite(self, site: Site) -> Tensor | None:
        """Plain PyTorch on the site's values; returns the module's new output, or None after `site.replace`."""
        raise NotImplementedError(f"{type(self).__name__} has no rewrite")

    def initialise(self, site: LiveSite) -> Mapping[str, Change] | None:
        """Fill tensors that need each other or the base; return changes to the base's own parameters, if any."""
