"""Which modules PEFT's configuration means, as PEFT reads it, and the same said by a rule's targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import nn

from surgery.authoring.rule import Rule
from surgery.errors import MatchError
from surgery.patterns.module_walk import base_modules
from surgery.patterns.own_entries import own_child, parameter_names
from surgery.patterns.paths import regex_for, select_targets
from surgery.patterns.targets import as_pattern
from surgery.peft_format.key_history import PREFIX
from surgery.planning.matching import Tree, matches

__all__ = ["ALL", "Modules", "by_keys", "chosen_by", "fields_of", "is_all", "is_plain", "is_text"]

ALL = "all-linear"


@dataclass(frozen=True)
class Modules:
    """A model's modules by path, each once, as `named_modules` lists them."""

    model: nn.Module
    by_path: Mapping[str, nn.Module]

    @staticmethod
    def of(model: nn.Module) -> Modules:
        return Modules(model, {path: module for path, module in base_modules(model) if path})

    @cached_property
    def tree(self) -> Tree:
        return Tree.of(self.model)

    @cached_property
    def linear(self) -> list[str]:
        """What "all-linear" means, without the model's output head."""
        pattern = as_pattern(ALL)
        return [path for path in self.by_path if pattern.verdict(self.tree.candidate(path))]

    def parameters_of(self, targets: Iterable[str]) -> dict[str, list[str]]:
        """The parameters that `target_parameters` means, by their module's path; those with a parametrization, too."""
        by_path = {
            path: [name for name in _parameter_names(module) if _names(targets, f"{path}.{name}")]
            for path, module in self.by_path.items()
        }
        return {path: names for path, names in by_path.items() if names}

    def matched(self, rule: Rule) -> set[str]:
        try:
            return {match.path for match in matches(self.tree, rule)}
        except MatchError:
            return set()


def _parameter_names(module: nn.Module) -> list[str]:
    parametrized = own_child(module, "parametrizations")
    return [*parameter_names(module), *(parametrized._modules if parametrized is not None else ())]


def _names(targets: Iterable[str], full: str) -> bool:
    return any(f".{full}".endswith(f".{target}") for target in targets)


def chosen_by(config: Mapping[str, Any], modules: Modules) -> set[str]:
    """The paths that `target_modules` and the fields around it mean; empty where they name none."""
    if is_all(config.get("target_modules")):
        return select_targets({**config, "target_modules": ".*"}, modules.linear)
    return select_targets(config, modules.by_path)


def is_all(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL


def is_plain(name: str) -> bool:
    return name != ALL and not name.startswith("re:")


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def by_keys(keys: Iterable[str], modules: Modules, marks: tuple[str, ...]) -> list[str]:
    """Without targets PEFT asks a table of architectures; the file's own keys say where the adapter is."""
    ends = tuple(f".{mark}" for mark in marks)
    paths = (key.removeprefix(PREFIX).removesuffix(end) for key in keys for end in ends if key.endswith(end))
    return list(dict.fromkeys(path for path in paths if path in modules.by_path))


def fields_of(rule: Rule, modules: Modules, paths: Sequence[str]) -> dict[str, Any]:
    """`target_modules` and the fields around it, for a rule that is on these paths."""
    wanted, kept = set(paths), {}
    targets, exclude, layers = rule.targets, rule.exclude, rule.layers
    if all(map(is_text, (*targets, *exclude))):  # type: ignore[misc]
        names = {"target_modules": _as_peft(targets), "exclude_modules": _as_peft(exclude) or None}
        kept = {**names, "layers_to_transform": list(layers) if layers is not None else None}  # type: ignore[arg-type]
    listed = {"target_modules": sorted(wanted)}
    for fields in (kept, listed):
        if fields.get("target_modules") and chosen_by(fields, modules) == wanted:
            return {name: value for name, value in fields.items() if value is not None}
    return {"target_modules": regex_for(sorted(wanted)).removeprefix("re:")}


def _as_peft(targets: Any) -> Any:
    if len(targets) == 1 and targets[0].startswith("re:"):
        return targets[0].removeprefix("re:")
    return list(targets) if all(map(is_plain, targets)) else None
