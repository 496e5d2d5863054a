"""Checks the arguments that callers pass as a model or as rules, with a clear error and its fix."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from surgery.authoring.rule import Rule
from surgery.errors import RuleError, SurgeryError

__all__ = ["model_problem", "rule_problem", "rules_in"]

_ORDER = "the model is the first argument, the rules are the second: apply_rules(model, [LoraRule(targets=…)])"


def rules_in(rules: Any) -> tuple[tuple[Rule, ...], list[SurgeryError]]:
    """Returns the rules in a caller's argument, and one problem for each item that is not a rule.

    >>> from surgery.authoring.rule_arguments import rules_in
    >>> print(*rules_in("query")[1])
    'query' is a text, not a rule
      fix:   a rule takes the names of modules as its targets: LoraRule('query')
    """
    if isinstance(rules, Rule):
        return (rules,), []
    if rules is None or not isinstance(rules, Iterable) or isinstance(rules, (str, bytes, Mapping, type, nn.Module)):
        return (), [rule_problem(rules)]
    items = tuple(rules)
    if not items:
        return (), [RuleError("the list of rules is empty", fix="pass one or more rules: [LoraRule(targets=…)]")]
    problems = [rule_problem(item) for item in items if not isinstance(item, Rule)]
    return tuple(item for item in items if isinstance(item, Rule)), problems


def rule_problem(value: Any) -> SurgeryError:
    """Returns the error for a value that is not a rule, with a fix for the likely mistake."""
    kind = type(value).__name__
    if value is None:
        return RuleError("None is not a rule", fix="pass one rule or more: [LoraRule(targets=…)]")
    if isinstance(value, type):
        if issubclass(value, Rule):
            fix = f"create a rule: {value.__name__}(targets=…)"
            return RuleError(f"{value.__name__} is a class, not a rule", fix=fix)
        return RuleError(f"{value.__name__} is a class, not a rule", fix="pass a rule: LoraRule(targets=…)")
    if hasattr(value, "peft_type"):
        return RuleError(
            f"{kind} is a configuration of PEFT, not a rule",
            why="PEFT's fields have other names and defaults than a rule's",
            fix="call surgery.peft.get_peft_model(model, config); or write a rule: LoraRule(targets=…)",
        )
    if isinstance(value, nn.Module):
        return RuleError(f"{kind} is a module, not a rule", fix=_ORDER)
    if isinstance(value, (str, bytes, os.PathLike)):
        return _text_problem(value)
    if isinstance(value, Mapping):
        return RuleError(
            f"{_short(value)} is a mapping, not a rule",
            fix="read it: Rule.from_dict(data) reads one rule, rules_from_json or rules_from_yaml a list of rules",
        )
    if isinstance(value, (list, tuple)):
        return RuleError(f"{_short(value)} is a {kind} inside the list of rules", fix="pass one flat list of rules")
    return RuleError(f"{_short(value)} is not a rule", why=f"it is a {kind}", fix="pass a rule: LoraRule(targets=…)")


def model_problem(value: Any) -> SurgeryError | None:
    """Returns the error for a value that is not a model; None for a model."""
    if isinstance(value, nn.Module):
        return None
    if isinstance(value, type):
        fix = f"create a model: {value.__name__}(…)"
        return SurgeryError(f"{value.__name__} is a class, not a model", fix=fix)
    if isinstance(value, Rule) or (isinstance(value, (list, tuple)) and any(isinstance(item, Rule) for item in value)):
        return SurgeryError("the first argument is a rule, not a model", fix=_ORDER)
    fix = "pass a torch.nn.Module"
    if isinstance(value, (str, os.PathLike)):
        fix = f"load the model first: AutoModel.from_pretrained({os.fspath(value)!r})"
    return SurgeryError(f"{_short(value)} is not a model", why=f"it is a {type(value).__name__}", fix=fix)


def path_problem(text: Any, reader: str, kind: str) -> SurgeryError | None:
    """Returns the error for an argument that `reader` can't read as text, such as a path; None for text."""
    if isinstance(text, os.PathLike) or (isinstance(text, str) and _is_path(text)):
        path = os.fspath(text)
        return RuleError(
            f"{path!r} is a path, not {kind} text", fix=f"read the file first: {reader}(Path({path!r}).read_text())"
        )
    if isinstance(text, (str, bytes, bytearray)) or hasattr(text, "read"):
        return None
    return RuleError(f"{_short(text)} is not {kind} text", why=f"it is a {type(text).__name__}", fix="pass a string")


def _text_problem(value: Any) -> SurgeryError:
    if isinstance(value, bytes):
        return RuleError("bytes are not a rule", fix="rules_from_json(text) reads rules from text")
    text = os.fspath(value)
    if isinstance(value, os.PathLike) or _is_path(text):
        reader = "rules_from_json" if text.endswith(".json") else "rules_from_yaml"
        return RuleError(f"{text!r} is a path, not a rule", fix=f"read the rules: {reader}(Path({text!r}).read_text())")
    if "\n" in text or text.lstrip()[:1] in ("[", "{", "-"):
        fix = "rules_from_json(text) or rules_from_yaml(text) reads it"
        return RuleError(f"{_short(text)} is a text, not a rule", fix=fix)
    fix = f"a rule takes the names of modules as its targets: LoraRule({text!r})"
    return RuleError(f"{_short(text)} is a text, not a rule", fix=fix)


def _is_path(text: str) -> bool:
    return "\n" not in text and text.lower().endswith((".yaml", ".yml", ".json"))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
