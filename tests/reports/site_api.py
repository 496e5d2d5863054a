"""An extension of griffe for the pages of the API: signatures of rules, and examples in docstrings as code."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Decorator, ExprCall, ExprKeyword, ExprName, Extension, Object

EXAMPLE = re.compile(r"^>>> .*(?:\n.*\S.*)*", re.MULTILINE)
DATACLASS = ExprName("dataclasses.dataclass")


class Pages(Extension):
    """`@rule` makes a dataclass, so its fields are the parameters of the class; lines after `>>>` are an example."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(lambda match: f"```pycon\n{match[0]}\n```", obj.docstring.value)

    def on_class_instance(self, *, cls: Class, **kwargs: Any) -> None:
        if any(str(decorator.value).startswith("rule(") for decorator in cls.decorators):
            keywords = [ExprKeyword(name, "True", function=DATACLASS) for name in ("frozen", "kw_only")]
            cls.decorators.append(Decorator(ExprCall(DATACLASS, keywords), lineno=None, endlineno=None))
