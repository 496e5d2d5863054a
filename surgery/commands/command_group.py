"""The group of all commands: with `--json`, wrong arguments are a JSON document, too."""

from __future__ import annotations

import sys
from typing import Any

from typer.core import TyperGroup

from surgery.commands.answer import print_json

__all__ = ["CommandGroup"]


class CommandGroup(TyperGroup):
    """A group of commands that prints errors of its parser as JSON if `--json` is among the words."""

    def main(self, args: Any = None, *, standalone_mode: bool = True, **extra: Any) -> Any:  # type: ignore[override]
        words = sys.argv[1:] if args is None else list(args)
        if not standalone_mode or "--json" not in words:
            return super().main(args, standalone_mode=standalone_mode, **extra)
        try:
            code = super().main(words, standalone_mode=False, **extra)
        except Exception as error:  # the parser's classes lie in click or in typer, by the version of typer
            if not hasattr(error, "format_message"):
                raise
            path = getattr(getattr(error, "ctx", None), "command_path", "surgery")
            text = f"{error.format_message()}\n  fix:   {path} --help lists the arguments"  # type: ignore[attr-defined]
            print_json({"error": {"type": type(error).__name__, "text": text}})
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)
