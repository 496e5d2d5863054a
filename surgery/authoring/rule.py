"""`Rule`, the class that rules subclass, and the capabilities that a rule may have besides its `rewrite`.

A capability is a base class of `Rule` with default hooks. `Placement`: which modules a rule takes. `Mergeable`: its
change of the base's parameters. `Combinable`: one rule for several adapters. `Routable`: several adapters in one batch.
`Swappable`: tensors for another rule's code. `Slottable`: the slot of an exported file that holds it.

`SlotRule` is the base class of the rules that are slots. Only they have its hooks.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from surgery.arithmetic.exact_fold import Change
from surgery.authoring.combination import Combination, Share
from surgery.authoring.declaration import Declaration
from surgery.authoring.equivalence import Equivalence
from surgery.authoring.live_site import LiveSite
from surgery.authoring.routed_site import Member
from surgery.authoring.site import Site
from surgery.errors import RuleError, SurgeryError
from surgery.structures.structure import Structure

__all__ = ["Combinable", "Mergeable", "Placement", "Routable", "Rule", "SlotRule", "Slottable", "Swappable"]


class Placement(Declaration):
    """The choice among matched modules, and further rules of the same adapter."""

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        """Returns the sites of a matched module as (path, module). Default: the module itself."""
        return [(path, module)]

    def structures(self) -> Sequence[Structure]:
        """Returns the structures that the rule rewrites, for rules that are placed by what forwards do.

        The plan searches the example call for them inside the matched modules. The rule's sites are then the lowest
        modules whose forwards can hold the matches, and `site.find` sees the operations of the children in between.

        Returns:
            The structures. Default: none; the sites are the matched modules.
        """
        return ()

    def spans_modules(self) -> bool:
        """Whether a match of `structures` may have operations of several modules. Default True."""
        return True

    def equivalence(self) -> Equivalence | None:
        """Returns how equal a rewritten module's results must be to those of its own forward, for `apply_rules`.

        Returns:
            The demand. Default None: the rule may change what the module computes.
        """
        return None

    def review(self, paths: Sequence[str]) -> Iterable[str | SurgeryError]:
        """Returns problems of the rule over all its sites, such as a pattern that matches no site. Default: none.

        A text is the reason alone. An error also says what to do.
        """
        return ()

    def rank_at(self, path: str) -> int | None:
        """Returns the rank of a matrix's change, by its path in `matrices`. A plan warns if the matrix is too small."""
        return None

    def matrices(self, module: nn.Module, path: str) -> Mapping[str, tuple[int, int]] | None:
        """Returns the sizes (out, in) of the changed matrices by path. Default None: only the module's weight."""
        return None

    def companions(self) -> Iterable[Rule]:
        """Returns further rules for the same adapter. They may match no module. Default: none."""
        return ()

    def alone(self) -> Rule:
        """Returns the same rule without companions."""
        return cast("Rule", self)

    def alike(self, path: str) -> Hashable | None:
        """Returns everything that `check` and `rewrite` read from a path, so that plans can share their answers.

        A plan consults the rule once for all modules of the same kind with equal results here. The kind of a module
        is its class, its plain settings (numbers, texts), and the shapes and dtypes of its own tensors. Return a value
        only if `check` and `rewrite` read nothing else: no tensor values, children, parents, example or other rules.

        Returns:
            A hashable value. Default None: the plan consults the rule for each module. A subclass does not inherit
            the result, because its hooks may read more.
        """
        return None


class Mergeable(Declaration):
    """The change of the base's parameters by a rule, for `merge`."""

    linear: ClassVar[bool] = False
    why_not_merged: ClassVar[str] = "the rule does not define merging (no `merged` method)"

    def merged(self, site: LiveSite) -> Mapping[str, Change]:
        """Returns the base's parameters with the rule folded in.

        A rule with `linear = True` does not need this hook: `merge` derives ΔW from its `rewrite`.

        Args:
            site: The site with the rule's tensors.

        Returns:
            Parameter name → a new tensor, or a `LowRank` or `Rows` change.
        """
        raise NotImplementedError

    def folded(self, site: LiveSite) -> tuple[Rule, Mapping[str, Tensor]]:
        """Returns a simpler rule that computes the same, and its tensors, for tensors that only training needs.

        An example is the MLP of a prefix.

        Args:
            site: The site. `site.params` has all tensors of the adapter there.

        Returns:
            The rule and its tensors by name. Default: the rule itself and `site.params`.
        """
        return cast("Rule", self), site.params

    def committed(self, site: LiveSite) -> nn.Module:
        """Returns an ordinary module for the site's place, which computes the same without the rule, for `commit`.

        Only for rules that can't be merged, because a module of the site's class can't hold what they do. The module
        is called as the site is called.

        Args:
            site: The site with the rule's tensors. `site.submodule(name, make)` builds the module of a rule's
                `site.submodule`, with these tensors.

        Raises:
            SiteError: No ordinary module computes the same.
        """
        raise NotImplementedError

    def restores(self, name: str) -> bool:
        """Whether the rule sets a tensor of the base to its value at training time, so that bases may differ in it."""
        return False

    @property
    def additive(self) -> bool:
        """Whether the rule only adds to the output, independently of other rules and of the base's parameters."""
        return self.linear

    @property
    def mergeable(self) -> bool:
        return self.linear or type(self).merged is not Mergeable.merged

    @property
    def replaces_module(self) -> bool:
        """Whether `commit` puts another module in the place of the site's module."""
        return type(self).committed is not Mergeable.committed


class Combinable(Declaration):
    """One rule in place of the rules of several adapters, for `combine`."""

    why_not_combined: ClassVar[str] = "the sum of its tensors does not compute the sum of their effects"

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, Mapping[str, Tensor]]:
        """Returns one rule and its tensors at a site, in place of those of several adapters.

        Args:
            shares: Each adapter's rule of this class, its tensors and its weight. The first share's rule is `self`.
            how: The method. `how.sum` sums tensors; `how.refusal` builds the error if it is not possible.
        """
        if how.untouched(shares):
            return cast("Rule", self), shares[0].params
        raise how.refusal(shares, self.why_not_combined)

    def united(self, rules: Mapping[str, Rule]) -> Mapping[str, Rule]:
        """Merges per-path rules of `combined` into as few distinct rules as possible; only `targets` may differ."""
        return rules


class Routable(Declaration):
    """Several adapters in one batch, each for its own rows, for `route`."""

    routable: ClassVar[bool] = True

    @classmethod
    def routed(cls, sites: Sequence[Member]) -> Tensor | None:
        """The joint rewrite for several adapters in one batch, each for its own rows. All rules are of this class.

        Only for rules whose `rewrite` can't run on each adapter's rows separately, such as rules that put functions
        around others.

        Args:
            sites: The site as each adapter sees it: `site.rule`, `site.param(…)` and, at a call,
                `site.rows.of(size, device)`. An edit of any of them (`around`, `replace`) is made once for all.
        """
        raise NotImplementedError


class Swappable(Declaration):
    """Conversion of a rule's tensors for another rule of its class, for `hotswap` and `pad_rank`."""

    def swapped(self, live: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        """Converts this rule's tensors so that the code of the rule `live` computes the same with them.

        Used by `hotswap` if the two rules have different code or tensor shapes, and by `pad_rank`.

        Args:
            live: The rule whose code runs.
            site: The site with this rule's tensors. Texts about rounded or dropped values go to `site.notes`.

        Raises:
            RuleError: The conversion is not possible. This is the default; the error names the different fields.
        """
        differing = self.differing_fields(live)
        texts = [f"{name}={getattr(live, name)!r} there, {getattr(self, name)!r} here" for name in differing]
        raise RuleError(
            f"a {self.label} can't take the place of one with other code",
            why=", ".join(texts) or "its tensors have other shapes",
            fix="load it as an adapter of its own: load_adapter",
        )

    def neutral(self, site: LiveSite) -> Mapping[str, Tensor] | None:
        """Returns tensors with which the rule changes nothing at a site, for `hotswap`; None if they are unknown.

        `site.params` has the initial tensors. Default: these, if `identity` is true.
        """
        return site.params if self.identity else None

    def padded(self, rank: int) -> Rule:
        """Returns the rule with tensors large enough for this rank, for `pad_rank`. Default: the rule itself."""
        return cast("Rule", self)


class Slottable(Declaration):
    """The slot of an exported file for a rule's tensors, for `export_onnx(adapters="slots")`.

    Attributes:
        slot_kind: The kind of slot that holds the rule. Default None: no slot holds it, because of `why_no_slot`.
        why_no_slot: Why no slot can hold the rule.
    """

    slot_kind: ClassVar[str | None] = None
    why_no_slot: ClassVar[str] = "it has no form that adapters could share"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        """Returns the rule of a slot that can hold any of these rules at a module, or None.

        Args:
            rules: Rules of several adapters, all of this `slot_kind`.
            module: The module.
            path: Its path.
        """
        return None

    def slotted(self, slot: Rule, site: LiveSite) -> Mapping[str, Tensor]:
        """Converts this rule's tensors to those of a slot's rule. Default: `site.params`.

        Numbers of the rule that the slot does not have, such as a scale, are folded into the tensors.
        """
        return site.params


@dataclass(frozen=True)
class Rule(Placement, Mergeable, Combinable, Routable, Swappable, Slottable):
    """The base class of all rules: targets, fields, and a `rewrite`. Subclass it with `@rule(name)`.

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

    Args:
        targets: The modules, as PEFT's target_modules: names, types, Patterns, `"all-linear"`, or a list of these.
            All other fields are keyword arguments.
        exclude: Modules to leave out, as PEFT's exclude_modules. Default: none.
        layers: Indices of layers, as PEFT's layers_to_transform. Default None: all layers.
        expect: The number of modules that the targets must match. Default None: any number above zero.

    Raises:
        RuleError: A field is unknown, or `validate` rejects its value.

    Most rules need only these hooks:

    - `rewrite`: the new output. The only hook that a rule must have.
    - `check`: why a module can't take the rule. `validate`: rejects values of fields. `initialise`: initial tensors.
    - `identity = True`: the output is unchanged at initialisation. The engine checks this on the example call.

    Further hooks, each for one function:

    - `merged` for `merge`, `committed` for `commit`, `combined` for `combine`, `folded` for `folded_adapter`,
      `routed` for `route`, and `swapped`, `neutral` and `padded` for `hotswap`. `slot` and `slotted` for exported files
      (`SlotRule`).
    - `hides`: why it can't be live after another adapter's rule at a site. `covered_by`: whether another rule of the
      same adapter does its work at a module.
    - `expand`: the inner sites of a container. `companions`: further rules. `alike`: modules that share an answer.

    Further class attributes:

    - `exclusive = True`: other rules of the same adapter can't be at its sites.
    - `repeatable = True`: several rules of this class and adapter can be at one site.
    - `skips_sites = True`: modules that it can't rewrite stay, with a warning, if it rewrites other modules.
    - `skips_calls = True`: where its rewrite returns NotImplemented for a later kind of call, the call runs without it.
    - `imports = True`: its fields name code to import, so `load_adapter` reads it only from trusted files.
    - `linear = True`: it adds to the output a linear function of the input, so `merge` derives ΔW from it.
    - `scalable = False`: its change can't be multiplied, so its weight is always 1.
    - `routable = False`: it can't work on some rows of a batch only.
    - `why_not_merged`, `why_not_combined`: the reason if it does not have `merged` or `combined`.
    """

    def check(self, module: nn.Module, path: str) -> str | None:
        """Returns why this module can't take the rule, or None. Planning calls it before any change."""

    def rewrite(self, site: Site) -> Tensor | None:
        """Computes the module's new output from the site's values, in plain PyTorch.

        Returns:
            The new output, or None if `site.replace` or `site.around` has made the edits.
        """
        raise NotImplementedError(f"{type(self).__name__} has no rewrite")

    def initialise(self, site: LiveSite) -> Mapping[str, Change] | None:
        """Fill tensors that depend on each other or on the base. Returns changes of the base's parameters, or None."""


class SlotRule(Rule):
    """The base class of rules that an exported file can have as slots: their tensors become inputs of its graph.

    `Rule.slot` returns such a rule, and it is inserted like any rule. The defaults of the inputs are its initial
    tensors: empty along `free` axes, else as `initialise` fills them. They must change nothing.

    >>> from torch import nn
    >>> from surgery import SlotRule, rule
    >>> @rule("doc-shift")
    ... class ShiftRule(SlotRule):
    ...     slot_kind = "shift"
    ...     def rewrite(self, site):
    ...         return site.output + site.param("shift", (site.out_features,))
    ...     @classmethod
    ...     def slot(cls, rules, module, path):
    ...         return cls()
    >>> ShiftRule.slot([ShiftRule("0")], nn.Linear(2, 2), "0")
    ShiftRule(targets=(), exclude=(), layers=None, expect=None)

    Attributes:
        zeros_are_none: Whether tensors of zeros change nothing. Default True.
        slot_first: Whether the rule replaces a parameter of the base, before all other edits. Default False.
    """

    zeros_are_none: ClassVar[bool] = True
    slot_first: ClassVar[bool] = False

    def free(self, tensor: str) -> tuple[int, str] | None:
        """Returns the axis of a tensor with any size at run time, and the name of this size ("rank").

        Tensors of a site with the same name have the same size.
        """
        return None

    def slot_notes(self, model: nn.Module, module: nn.Module) -> Mapping[str, Any]:
        """Returns further plain data about a site for the exported file's manifest.

        `convert_peft` and other code that works without the model reads it.
        """
        return {}

    def unslotted(self, tensors: Mapping[str, Tensor]) -> tuple[Rule, Mapping[str, Tensor]]:
        """Converts the slot's tensors to a rule and its tensors. The inverse of `slotted`."""
        return self, tensors
