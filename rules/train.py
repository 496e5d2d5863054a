"""Full training of a module, per adapter; the original is kept. PEFT's modules_to_save."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor, nn

from surgery import Combination, LiveSite, Rule, Share, Site, SiteError, SlotRule, packed_weight_of, rule
from surgery.rules._shared import combining, complex_weights, fields

R = TypeVar("R", bound=Rule)


@rule("train")
class TrainRule(Rule):
    """Train all of a module's parameters, in copies that belong to the adapter.

    >>> from torch import nn
    >>> from surgery import apply_rules
    >>> from surgery.rules import TrainRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), [TrainRule("1")])
    >>> [name for name, p in model.named_parameters() if p.requires_grad]
    ['1.adapters.default.weight', '1.adapters.default.bias']

    A target with children (a classification head of several layers) stands for all modules inside it that own
    parameters. Buffers that are saved with the module, such as BatchNorm's running statistics, are copied, too. Copies
    have the dtypes and shapes of the base's tensors.

    Args:
        tied: whether modules that share a parameter in the base share its copy, if one rule names them; default False,
            each has its own. PEFT: ensure_weight_tying.

    Source: PEFT's LoraConfig.modules_to_save.
    """

    tied: bool = False

    identity = True
    exclusive = True

    def validate(self) -> None:
        fields.flag(self, "tied")

    def expand(self, module: nn.Module, path: str) -> Iterable[tuple[str, nn.Module]]:
        return owners_of_tensors(module, path)

    def check(self, module: nn.Module, path: str) -> str | None:
        if why := complex_weights.why_not(self, module):
            return why
        if packed_weight_of(module) is not None:
            return "its weight is packed, and codes have no gradient; LoraRule trains a change of such a weight"
        return None if dict(own_tensors(module)) else "it owns no parameters"

    def rewrite(self, site: Site) -> None:
        replace_all(site, tied=self.tied)

    def merged(self, site: LiveSite) -> dict[str, Tensor]:
        return merged_all(site)

    slot_kind = "train"

    @classmethod
    def slot(cls, rules: Sequence[Rule], module: nn.Module, path: str) -> SlotRule | None:
        return copies_slot([name for rule in rules for name in names_of(rule, module)], module)

    def slotted(self, slot: Rule, site: LiveSite) -> dict[str, Tensor]:
        return copies_slotted(slot, site)

    def combined(self, shares: Sequence[Share], how: Combination) -> tuple[Rule, combining.Tensors]:
        return combined_all(self, shares, how)


@rule("train-slot")
class CopiesSlotRule(SlotRule):
    """Some of a module's tensors, each instead of the base's: the form of TrainRule, BiasRule and NormRule in a slot.

    >>> from torch import nn
    >>> from surgery.rules.train import CopiesSlotRule
    >>> from surgery import apply_rules
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 2)), [CopiesSlotRule("0", names=["bias"])])
    >>> [name for name, _ in model[0].adapters.default.named_parameters()]
    ['bias']

    The tensors start as the base's, in their shapes and dtypes.

    Args:
        names: names of the tensors; those of a child contain dots.
    """

    names: Sequence[str] = ()
    identity = True
    slot_kind = "train"
    slot_first = True
    zeros_are_none = True

    def rewrite(self, site: Site) -> None:
        replace_all(site, self.names)


def trains_whole(rule: Rule) -> bool:
    """Whether a rule copies all tensors of its modules: TrainRule and NormRule."""
    return rule.exclusive and rule.slot_kind == CopiesSlotRule.slot_kind


def names_of(rule: Rule, module: nn.Module) -> Iterable[str]:
    """The names of the module's tensors that a rule copies."""
    chosen = getattr(rule, "trained", None)  # BiasRule's
    return chosen(module) if chosen is not None else [name for name, _ in own_tensors(module)]


def copies_slot(names: Iterable[str], module: nn.Module) -> SlotRule:
    """The slot for the tensors with these names, without counters, which count batches while training."""
    wanted = set(names)
    kept = [name for name, tensor in own_tensors(module) if name in wanted and tensor.is_floating_point()]
    return CopiesSlotRule(names=tuple(kept))


def copies_slotted(slot: Rule, site: LiveSite) -> dict[str, Tensor]:
    """An adapter's copies for a slot, and the base's own tensors where the adapter has no copy."""
    assert isinstance(slot, CopiesSlotRule)
    floating = {key for key, tensor in site.params.items() if tensor.is_floating_point()}
    own = {name: name.replace(".", "_") for name, _ in own_tensors(site.module)}
    if more := sorted((floating & set(own.values())) - {own[name] for name in slot.names}):
        fix = "export the model again with this adapter on it"
        raise SiteError(f"the slot has no {', '.join(more)}", where=site.path, fix=fix)
    tensors = {own[name]: site.params.get(own[name], site.tensor(name)) for name in slot.names}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def owners_of_tensors(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside this one that own parameters and run their own forward."""
    any_owner = False
    for name, inner in _walk(module, path):
        if any(parameter is not None for parameter in inner._parameters.values()):
            any_owner = True
            yield name, inner
    if not any_owner:
        yield path, module  # refused by check, with the reason


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    if not isinstance(module, nn.MultiheadAttention):  # runs its out_proj's parameters in its own forward
        for name, child in module.named_children():
            if name != "adapters":
                yield from _walk(child, f"{path}.{name}" if path else name)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and saved buffers by name; for MultiheadAttention, those of its out_proj, too."""
    yield from ((name, tensor) for name, tensor in module._parameters.items() if tensor is not None)
    transient = module._non_persistent_buffers_set
    yield from ((n, tensor) for n, tensor in module._buffers.items() if tensor is not None and n not in transient)
    if isinstance(module, nn.MultiheadAttention):
        yield from ((f"out_proj.{name}", tensor) for name, tensor in module.out_proj.named_parameters(recurse=False))


def replace_all(site: Site, only: Iterable[str] | None = None, tied: bool = False) -> None:
    """Replaces each of the module's tensors (or those in `only`) by the adapter's copy. `tied`: as `TrainRule`'s."""
    parameters = dict(site.module.named_parameters())
    for name, tensor in own_tensors(site.module):
        if only is None or name in only:
            own_name = name.replace(".", "_")
            if name in parameters:
                copied = site.param(own_name, tensor, tied=tensor if tied else None)
            else:
                copied = site.buffer(own_name, tensor)
            site.replace(site.tensor(name), copied)


def merged_all(site: LiveSite) -> dict[str, Tensor]:
    """The adapter's copies under the names of the module's own tensors."""
    by_name = {name.replace(".", "_"): (name, tensor) for name, tensor in own_tensors(site.module)}
    return {
        by_name[key][0]: tensor.detach().to(by_name[key][1].dtype)
        for key, tensor in site.params.items()
        if key in by_name
    }


def combined_all(rule: R, shares: Sequence[Share], how: Combination) -> tuple[R, combining.Tensors]:
    """Combines the adapters' copies into one: W + Σ w (T − W)."""
    site = shares[0].site
    base = {name.replace(".", "_"): site.tensor(name) for name, _ in own_tensors(site.module)}
    return combining.combine_copies(base, rule, shares, how)
