"""The ties of weights that models of transformers declare: which parameter is to be the same as which other one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from torch import nn

from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["ALL", "FLAG", "KEYS", "computes_by_flag", "configs_of", "declared_ties", "tensor_named", "tied_parts"]

FLAG, KEYS, ALL = "tie_word_embeddings", "_tied_weights_keys", "all_tied_weights_keys"


def tied_parts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The model and its parts whose classes declare ties, with their paths."""
    for path, module in base_modules(model):
        if getattr(type(module), KEYS, None) and hasattr(module, "config"):
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
