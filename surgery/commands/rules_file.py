"""Files of rules, as YAML or JSON."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.commands.paths import read_text
from surgery.errors import RuleError, SurgeryError

if TYPE_CHECKING:
    from surgery import Rule

__all__ = ["read_rules"]


def read_rules(file: Path, trust: bool) -> list[Rule]:
    """The rules of a file; "-" is the standard input. Errors name the file.

    `trust`: accept rules that name code to import.
    """
    from surgery import rules_from_json, rules_from_yaml

    if str(file) == "-":
        text, suffix = sys.stdin.read(), ".yaml"
    else:
        text, suffix = read_text(file), file.suffix
    try:
        rules = rules_from_json(text) if suffix == ".json" else rules_from_yaml(text)
    except SurgeryError as error:
        error.where = error.where or str(file)
        raise
    if not rules:
        raise RuleError("the file holds no rules", where=str(file), fix="write each rule as - rule: NAME")
    if not trust and (imports := [rule.name for rule in rules if rule.imports]):
        why = f"{imports[0]} names code to import"
        raise RuleError("a rule of the file is not trusted", where=str(file), why=why, fix="--trust, if you trust it")
    return rules
