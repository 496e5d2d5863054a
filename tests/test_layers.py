"""The engine never imports the rule library."""

from __future__ import annotations

import ast
from pathlib import Path


def test_surgery_never_imports_rules() -> None:
    for file in (Path(__file__).parent.parent / "surgery").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "rules" for name in names), file
