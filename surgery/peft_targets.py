"""Which modules PEFT's configuration means, as PEFT reads it, and the same said by a rule's targets."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from surgery.base_rule import Rule
from surgery.errors import MatchError, SurgeryError
from surgery.match import Tree, base_modules, matches
from surgery.paths import chosen
from surgery.pattern import as_pattern
from surgery.peft_spelling import PREFIX

if TYPE_CHECKING:
    from surgery.peft_format import PeftConfig

__all__ = ["Modules", "choose", "chosen_by", "fields_of", "regular"]

R = TypeVar("R", bound=Rule)
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

    def matched(self, rule: Rule) -> set[str]:
        try:
            return {match.path for match in matches(self.tree, rule)}
        except MatchError:
            return set()


def chosen_by(config: Mapping[str, Any], modules: Modules) -> set[str]:
    """The paths that `target_modules` and the fields around it mean; empty where they name none."""
    if _is_all(config.get("target_modules")):
        return chosen({**config, "target_modules": ".*"}, modules.linear)
    return chosen(config, modules.by_path)


def _is_all(targets: Any) -> bool:
    return isinstance(targets, str) and targets.lower() == ALL


def choose(config: PeftConfig, kind: type[R], given: Mapping[str, Any]) -> R:
    """The rule on the modules that a configuration means: in its own words where they mean the same here."""
    targets, exclude = config.take("target_modules"), config.take("exclude_modules")
    layers, _ = config.take("layers_to_transform"), config.take("layers_pattern")
    for name, value in (("target_modules", targets), ("exclude_modules", exclude)):
        plain = isinstance(value, (str, type(None))) or isinstance(value, list) and all(map(_is_text, value))
        if not plain:
            raise SurgeryError(f"PEFT's {name} is no text and no list of names")
    if layers not in (None, []) and isinstance(targets, str):
        raise config.refuse(
            "layers_to_transform", "PEFT takes layers with a list of names alone", "name them in the text"
        )
    if config.data.get("layers_pattern") and layers is None:
        raise config.refuse(
            "layers_pattern", "PEFT takes it with layers_to_transform alone", "say which layers are meant"
        )
    if _is_all(targets):
        short = kind(targets=ALL, exclude=_words(exclude), **given)
        wanted = config.targeted
        return short if config.modules.matched(short) == wanted else kind(targets=regular(sorted(wanted)), **given)
    if not targets:
        return kind(targets=regular(sorted(config.targeted)), **given)
    wanted = config.targeted
    if not all(map(_plain, targets if isinstance(targets, list) else ())):  # in a list PEFT has names alone
        return kind(targets=regular(sorted(wanted)), **given)
    short = kind(targets=_words(targets), exclude=_words(exclude), layers=layers or None, **given)
    found = config.modules.matched(short)
    if not wanted and found:
        raise _none_left(config, sorted(found))
    same = not config.data.get("layers_pattern") and found == wanted
    return short if same or not wanted else kind(targets=regular(sorted(wanted)), **given)


def _none_left(config: PeftConfig, found: Sequence[str]) -> MatchError:
    """The targets fit modules here, and the fields around them leave none of these."""
    around = ("exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
    said = ", ".join(f"{name}={config.data[name]!r}" for name in around if config.data.get(name) not in (None, [], ""))
    return MatchError(
        f"PEFT's target_modules={str(config.data.get('target_modules'))[:100]} leave no module",
        why=f"they fit {found[0]}{', …' if len(found) > 1 else ''}, which {said[:200]} leaves out",
        fix="correct these fields",
    )


def _plain(name: str) -> bool:
    return name != ALL and not name.startswith("re:")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _words(value: Any) -> Any:
    """Targets as a rule says them: of PEFT's, a single text is a regular expression."""
    return f"re:{value}" if isinstance(value, str) and value else value or ()


def regular(paths: Sequence[str]) -> str:
    """A regular expression for exactly these paths."""
    return "re:" + "|".join(map(re.escape, paths))


def by_keys(keys: Iterable[str], modules: Modules, marks: tuple[str, ...]) -> list[str]:
    """Without targets PEFT asks a table of architectures; the file's own keys say where the adapter is."""
    ends = tuple(f".{mark}" for mark in marks)
    paths = (key.removeprefix(PREFIX).removesuffix(end) for key in keys for end in ends if key.endswith(end))
    return list(dict.fromkeys(path for path in paths if path in modules.by_path))


def fields_of(rule: Rule, modules: Modules, paths: Sequence[str]) -> dict[str, Any]:
    """`target_modules` and the fields around it, for a rule that is on these paths."""
    wanted, kept = set(paths), {}
    targets, exclude, layers = rule.targets, rule.exclude, rule.layers
    if all(map(_is_text, (*targets, *exclude))):  # type: ignore[misc]
        said = {"target_modules": _said(targets), "exclude_modules": _said(exclude) or None}
        kept = {**said, "layers_to_transform": list(layers) if layers is not None else None}  # type: ignore[arg-type]
    listed = {"target_modules": sorted(wanted)}
    for fields in (kept, listed):
        if fields.get("target_modules") and chosen_by(fields, modules) == wanted:
            return {name: value for name, value in fields.items() if value is not None}
    return {"target_modules": regular(sorted(wanted)).removeprefix("re:")}


def _said(targets: Any) -> Any:
    if len(targets) == 1 and targets[0].startswith("re:"):
        return targets[0].removeprefix("re:")
    return list(targets) if all(map(_plain, targets)) else None
