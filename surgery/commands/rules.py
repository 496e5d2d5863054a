"""`surgery rules`: the rules that can be named in a file, and the fields of each."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import metadata
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.authoring.rule_names import SLOT
from surgery.commands.answer import Answer, Table

if TYPE_CHECKING:
    from surgery import Rule

__all__ = ["rules"]

GROUP = "surgery.rules"


def _names(incomplete: str = "") -> list[str]:
    """The names of installed rules, for the shell's completion, too; nothing is imported for them."""
    names = sorted(entry.name for entry in metadata.entry_points(group=GROUP) if not entry.name.endswith(SLOT))
    return [name for name in names if name.startswith(incomplete)]


def rules(
    name: Annotated[
        str | None,
        typer.Argument(metavar="RULE", help="List its fields.", autocompletion=_names, show_default=False),
    ] = None,
) -> Answer:
    """List all rules, or the fields of one rule.

    surgery rules lora
    """
    from surgery.authoring.rule_names import registered

    if name is None:
        kinds = [registered(each) for each in _names()]
        cells = [[kind.name, kind.__name__, _first_line(kind)] for kind in kinds]
        return Answer(
            {"rules": [_description(kind) for kind in kinds]}, [Table(["rule", "class", "what it does"], cells)]
        )
    kind = registered(name)
    described = _description(kind)
    cells = [[field["name"], field["type"], field["default"], field["doc"]] for field in described["fields"]]
    head = f"{kind.name} (surgery.rules.{kind.__name__}, version {kind.version}): {_first_line(kind)}"
    return Answer(described, [head, "", Table(["field", "type", "default", ""], cells)])


def _description(kind: type[Rule]) -> dict[str, Any]:
    docs: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        docs |= _documented(cls)
    return {
        "rule": kind.name,
        "class": kind.__name__,
        "version": kind.version,
        "doc": _first_line(kind),
        "fields": [
            {"name": field.name, "type": str(field.type), "default": _default(field), "doc": docs.get(field.name, "")}
            for field in dataclasses.fields(kind)
        ],
    }


def _first_line(kind: type) -> str:
    return (kind.__doc__ or "").strip().partition("\n")[0]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return repr(field.default)
    return "" if field.default_factory is dataclasses.MISSING else repr(field.default_factory())


def _documented(cls: type) -> dict[str, str]:
    """Field → its text under "Args:" in a class's docstring."""
    text = inspect.cleandoc(vars(cls).get("__doc__") or "")
    found = re.search(r"^(?:Args|Attributes):\n((?:[ ]{4}.*\n?|\n)*)", text, re.MULTILINE)
    docs: dict[str, str] = {}
    for names, described in re.findall(r"^    ([\w, ]+): (.*(?:\n {5,}.*)*)", found[1] if found else "", re.MULTILINE):
        docs |= {name.strip(): " ".join(described.split()) for name in names.split(",")}
    return docs
