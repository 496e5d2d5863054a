"""The decorator that registers rules by name, and lists of rules as JSON or YAML."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, TypeVar, dataclass_transform

from surgery.authoring.rule import Rule
from surgery.authoring.rule_arguments import path_problem
from surgery.authoring.rule_names import register
from surgery.errors import RuleError, near_misses

__all__ = ["rule", "rules_from_json", "rules_from_yaml", "rules_to_json", "rules_to_yaml"]

R = TypeVar("R", bound=Rule)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(dataclasses.field,))
def rule(name: str, *, version: int = 1):
    """Make a class a rule: a frozen dataclass, registered under a name for reading and writing.

    >>> from surgery import Rule, rule
    >>> @rule("doc-double", version=2)
    ... class DoubleRule(Rule):
    ...     def rewrite(self, site):
    ...         return site.output * 2
    >>> Rule.from_dict({"rule": "doc-double", "version": 2, "targets": ["query"]})
    DoubleRule(targets=('query',), exclude=(), layers=None, expect=None)

    Args:
        name: The name of the rule in files.
        version: The version of its fields, from 1. Default 1. `Rule.upgrade` converts older versions.

    Raises:
        RuleError: Another class has the name, or the class is not a subclass of `Rule`.

    Note:
        A package offers its rules through the entry point group `surgery.rules` (`name = "module:Class"`).
    """

    def decorate(cls: type[R]) -> type[R]:
        if not issubclass(cls, Rule):
            raise RuleError(f"{cls.__qualname__} is not a rule", why="it does not subclass Rule", fix="class …(Rule):")
        rule_class = dataclass(frozen=True, kw_only=True)(cls)
        rule_class.name, rule_class.version = name, version
        rule_class.__init__ = _check_fields(rule_class.__init__, rule_class)
        register(name, rule_class)
        return rule_class

    return decorate


def rules_to_json(rules: Iterable[Rule]) -> str:
    """Write rules as JSON text.

    >>> from surgery import rules_from_json, rules_to_json
    >>> from surgery.rules import LoraRule
    >>> rules = [LoraRule(["query", "value"], rank=4)]
    >>> rules_from_json(rules_to_json(rules)) == rules
    True

    Args:
        rules: The rules.

    Raises:
        RuleError: A rule contains a `Pattern.where`, or a value that is not data; or its class lacks `@rule`.
    """
    return json.dumps([rule.to_dict() for rule in rules], indent=2)


def rules_from_json(text: str) -> list[Rule]:
    """Read rules from JSON text that `rules_to_json` wrote.

    >>> from surgery import rules_from_json
    >>> rules_from_json('[{"rule": "bias", "targets": ["query"]}]')[0].targets
    ('query',)

    Raises:
        RuleError: The text is not JSON, or not a list of known rules.
    """
    if (problem := path_problem(text, "rules_from_json", "JSON")) is not None:
        raise problem
    try:
        data = json.loads(text)
    except (ValueError, TypeError) as error:
        raise RuleError("the rules are not JSON", why=str(error), fix="pass what rules_to_json wrote") from None
    return _rules(data)


def rules_to_yaml(rules: Iterable[Rule]) -> str:
    """Write rules as YAML text. Needs PyYAML (extra `yaml`). See `rules_to_json`."""
    return _yaml().safe_dump([rule.to_dict() for rule in rules], sort_keys=False)


def rules_from_yaml(text: str) -> list[Rule]:
    """Read rules from YAML text, with `safe_load`. Needs PyYAML (extra `yaml`). See `rules_from_json`."""
    if (problem := path_problem(text, "rules_from_yaml", "YAML")) is not None:
        raise problem
    yaml = _yaml()
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RuleError("the rules are not YAML", why=str(error), fix="pass what rules_to_yaml wrote") from None
    return _rules(data)


def _rules(data: Any) -> list[Rule]:
    if not isinstance(data, list):
        why = f"this is a {type(data).__name__}"
        raise RuleError("rules are a list of mappings", why=why, fix="write each rule as - rule: NAME, and its fields")
    return [Rule.from_dict(item) for item in data]


def _yaml() -> Any:
    try:
        import yaml  # type: ignore[import-untyped]
    except ImportError:
        raise RuleError("YAML needs PyYAML", fix="pip install 'model-surgery[yaml]', or use JSON") from None
    return yaml


_PEFT_FIELDS = {
    "r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets", "use_dora": "dora",
    "use_rslora": "rslora", "init_lora_weights": "init", "init_weights": "init", "exclude_modules": "exclude",
    "layers_to_transform": "layers", "num_virtual_tokens": "length", "adapter_len": "length",
}  # fmt: skip
_PEFT_ELSEWHERE = {
    "modules_to_save": "PEFT's modules_to_save is a separate rule here: TrainRule(targets)",
    "trainable_token_indices": "PEFT's trainable_token_indices is a separate rule: TokensRule(targets, tokens=[…])",
    "task_type": "a task type is not needed here; to train a new head, add TrainRule(targets)",
}


def _check_fields(init: Any, cls: type[Rule]) -> Any:
    """Wrap the dataclass's `__init__`: an unknown field is a `RuleError` that suggests similar names."""

    def __init__(self: Rule, *args: Any, **values: Any) -> None:
        names = [field.name for field in fields(cls)]
        for key in values:
            if key not in names:
                peft = _PEFT_FIELDS.get(key)
                hint = f"PEFT's {key} is {peft} here" if peft in names else _PEFT_ELSEWHERE.get(key)
                hint = hint or near_misses(key, names)
                raise RuleError(f"{cls.__name__} has no field {key!r}", why=hint, fix=f"its fields: {', '.join(names)}")
        if len(args) > 1:
            raise RuleError(
                f"{cls.__name__} takes only targets by position", fix=f"name the others: {', '.join(names[1:])}"
            )
        if args and "targets" in values:
            raise RuleError(f"{cls.__name__} got its targets twice")
        init(self, **({"targets": args[0]} if args else {}), **values)

    __init__.__wrapped__ = init  # type: ignore[attr-defined]
    return __init__
