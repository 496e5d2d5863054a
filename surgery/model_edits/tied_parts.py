"""The ties of weights that models of transformers declare: which parameter is to be the same as which other one."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = [
    "ALL",
    "FLAG",
    "KEYS",
    "class_ties",
    "computes_by_flag",
    "configs_of",
    "declared_ties",
    "tensor_named",
    "tied_parts",
]

FLAG, KEYS, ALL = "tie_word_embeddings", "_tied_weights_keys", "all_tied_weights_keys"


def tied_parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model and its parts that declare ties, in their class or, as Zamba, in `__init__`; with their paths."""
    for path, module in base_modules(model):
        declares = getattr(type(module), KEYS, None) or module.__dict__.get(KEYS)
        if declares and hasattr(module, "config"):
            yield path, module


def declared_ties(part: Any) -> dict[str, str]:
    """Returns the ties of a part without its children: parameter name → name of the parameter that it shares."""
    expanded = getattr(part, "get_expanded_tied_weights_keys", None)
    if expanded is not None:
        return expanded(all_submodels=False)
    if not getattr(part.config, FLAG, False):
        return {}
    names = {id(module): path for path, module in base_modules(part)}  # before transformers 5: the head alone
    head, embedding = part.get_output_embeddings(), part.get_input_embeddings()
    if head is None or embedding is None or not {id(head), id(embedding)} <= names.keys():
        return {}
    return {f"{names[id(head)]}.weight": f"{names[id(embedding)]}.weight"}


def class_ties(part: Any) -> dict[str, str]:
    """The ties that a part's class declares, whatever its flag says; patterns only while the flag is set."""
    keys = getattr(class_of(part), KEYS, None)
    if isinstance(keys, dict) and all(re.fullmatch(r"[\w.]+", name) for pair in keys.items() for name in pair):
        return {a: b for a, b in keys.items() if tensor_named(part, a) is not None}
    return declared_ties(part)


def configs_of(part: Any) -> list[Any]:
    """A part's configuration, and that of its text if it is another one."""
    text = getattr(part.config, "get_text_config", lambda: part.config)()
    return [part.config] if text is part.config else [part.config, text]


def computes_by_flag(part: nn.Module) -> bool:
    """Whether a forward reads the flag. UMT5's does: it scales the input of its head if the weights are tied."""
    try:
        return f".{FLAG}" in inspect.getsource(inspect.unwrap(class_of(part).forward))
    except (OSError, TypeError):
        return False


def tensor_named(part: nn.Module, name: str) -> Any:
    """The parameter or buffer of a dotted name; None if there is none."""
    path, _, last = name.rpartition(".")
    try:
        owner = submodule(part, path)
    except AttributeError:
        return None
    return {**owner._parameters, **owner._buffers}.get(last)
