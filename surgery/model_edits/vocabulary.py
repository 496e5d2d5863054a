"""Changes the number of tokens that a model knows, as if it had been built so, and gives new rows initial values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.model_edits.edit_log import EditLog
from surgery.model_edits.vocabulary_use import VocabularyUse, find_embeddings, find_vocabulary_use
from surgery.patterns.module_class import class_of
from surgery.patterns.wrappers import submodule

__all__ = ["resize_vocabulary"]

# What new rows start as: "mean", "zeros", "normal", "copy"; or rows, for all modules or by path.
Start = str | Tensor | Mapping[str, Tensor]


def resize_vocabulary(
    edits: EditLog,
    paths: Sequence[str],
    tokens: int | None,
    *,
    multiple: int | None = None,
    start: Start = "mean",
    sources: Sequence[int | Sequence[int]] = (),
) -> None:
    """Change the number of tokens: embeddings, heads, biases, attributes and the configuration.

    Args:
        edits: the edits of the rule.
        paths: the paths of the embeddings; empty: the model's input embedding, with all that depends on its size.
        tokens: the new number; None: the present one.
        multiple: the number is rounded up to a multiple of this.
        start: what new rows start as.
        sources: for `start="copy"`, for each new row the row, or the rows whose mean it starts as.
    """
    paths = list(paths) or find_embeddings(edits.model)
    count = len(submodule(edits.model, paths[0])._parameters.get("weight", ()))  # type: ignore[arg-type]
    size = count if tokens is None else tokens
    size = size if multiple is None else -(-size // multiple) * multiple
    use = find_vocabulary_use(edits.model, paths, size)
    if size == count:
        edits.warnings.append(f"the vocabulary has {count} tokens already: ResizeVocabRule changes nothing")
    if size < count:
        _check_special_tokens(edits.model, use, count, size)
    _check_start(edits.model, use, start, sources, count, size)
    new: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for path, name in use.tensors if size != count else ():
        owner = submodule(edits.model, path)
        table: Any = owner._parameters if name in owner._parameters else owner._buffers
        old: Tensor = table[name]
        edits.refuse_offloaded(owner, name)
        if id(old) not in new:
            edits.before_resizing(owner, size)
            new[id(old)] = _resized(edits, use, old, path, name, size, start, sources)
            first = True
        else:
            first = False
        if table is owner._parameters:
            edits.set_parameter(owner, name, new[id(old)])  # type: ignore[arg-type]
        else:
            edits.set_buffer(owner, name, new[id(old)])
        if first and size > count:
            edits.store(path, name, start=count if old.dim() != 2 or old.shape[0] == count else None)
        names.setdefault(id(old), []).append(path)
    for path, name in use.attributes if size != count else ():
        edits.set_attribute(submodule(edits.model, path), name, size)
    if use.config is not None and size != count:
        edits.set_config(submodule(edits.model, use.part).config, use.config, use.part)
    if use.unplain is not None:
        edits.unplain.append(use.unplain)
    _add_steps(edits, use, names, count, size)


def _add_steps(edits: EditLog, use: VocabularyUse, names: Mapping[int, list[str]], count: int, size: int) -> None:
    """One line for each module whose weight is resized, with those that share it."""
    shared = {paths[0]: list(dict.fromkeys(paths[1:])) for paths in names.values()}
    seen = set[str]()
    for path, name in use.tensors:
        if name == "weight" and path not in seen and (path in shared or size == count):
            seen |= {path, *shared.get(path, ())}
            tied = f", tied to {', '.join(shared[path])}" if shared.get(path) else ""
            kind = class_of(submodule(edits.model, path)).__name__
            edits.steps.append((path, kind, f"{count} → {size} tokens{tied}"))


# New rows -------------------------------------------------------------------------------------------------------


def _resized(
    edits: EditLog,
    use: VocabularyUse,
    old: Tensor,
    path: str,
    name: str,
    size: int,
    start: Start,
    sources: Sequence[int | Sequence[int]],
) -> Tensor:
    """A tensor with another number of rows, and the values of the old one."""
    if type(old) not in (nn.Parameter, Tensor):
        raise SiteError(
            f"the {name} can't be resized",
            where=path,
            why=f"it is a {type(old).__name__}, whose numbers are packed",
            fix="resize the model before it is quantised",
        )
    across = old.dim() == 2 and old.shape[0] == 1  # a bias (1, tokens)
    rows = old.detach().movedim(1, 0) if across else old.detach()
    grown = torch.empty((size, *rows.shape[1:]), dtype=old.dtype, device=old.device)
    common = min(size, len(rows))
    grown[:common] = rows[:common]
    if size > len(rows) and not old.is_meta:
        grown[common:] = _rows(rows, size - common, path, start, sources, _deviation(edits.model, use))
    grown = grown.movedim(0, 1).contiguous() if across else grown
    return nn.Parameter(grown, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else grown


def _rows(
    old: Tensor, count: int, path: str, start: Start, sources: Sequence[int | Sequence[int]], deviation: float
) -> Tensor:
    """The values of new rows: (count, …)."""
    exact = old.to(torch.promote_types(old.dtype, torch.float32)) if old.is_floating_point() else old.double()
    mean = exact.mean(0)
    if isinstance(start, Mapping):
        start = start.get(path, "mean")
    if isinstance(start, Tensor):
        if old.dim() == 1 or old.shape[1:] != start.shape[1:]:
            return mean.expand(count, *mean.shape).to(old.dtype)
        return start.detach().to(old.device, old.dtype)
    new = mean.expand(count, *mean.shape).clone()
    if start == "zeros":
        new.zero_()
    elif start == "normal" and old.dim() > 1:
        new.copy_(torch.randn(new.shape, dtype=torch.float32) * deviation)
    elif start == "copy":
        for index, source in enumerate(sources):
            new[index] = exact[source] if isinstance(source, int) else exact[list(source)].mean(0)
    return new.to(old.dtype)


def _deviation(model: nn.Module, use: VocabularyUse) -> float:
    config: Any = use.config
    text = getattr(config, "get_text_config", lambda: config)()
    value = getattr(text, "initializer_range", getattr(text, "init_std", None))
    return float(value) if isinstance(value, (int, float)) else 0.02


# Checks ---------------------------------------------------------------------------------------------------------


def _check_start(
    model: nn.Module, use: VocabularyUse, start: Start, sources: Sequence[int | Sequence[int]], count: int, size: int
) -> None:
    """Raise `SiteError` if the given rows or their sources do not fit."""
    new = max(size - count, 0)
    if len(sources) > new:
        raise SiteError(
            f"there are {len(sources)} sources for {new} new rows",
            why=f"the vocabulary has {count} tokens and gets {size}",
            fix="give a source for each new token",
        )
    flat = [row for source in sources for row in ([source] if isinstance(source, int) else source)]
    if beyond := sorted({row for row in flat if row >= count}):
        raise SiteError(f"there is no row {beyond[0]} to copy", why=f"the vocabulary has {count} tokens")
    weights = {path: submodule(model, path)._parameters.get("weight") for path, name in use.tensors if name == "weight"}
    given = start if isinstance(start, Mapping) else dict.fromkeys(weights, start) if isinstance(start, Tensor) else {}
    if unknown := sorted(given.keys() - weights.keys()):
        raise SiteError(
            f"there are new rows for {unknown[0]}", why=f"the rule resizes {', '.join(weights)}", fix="correct the path"
        )
    for path, rows in given.items():
        weight = weights[path]
        if weight is not None and tuple(rows.shape) != (new, *weight.shape[1:]):
            raise SiteError(
                f"the new rows have the shape {tuple(rows.shape)}",
                where=path,
                why=f"{new} rows of {tuple(weight.shape[1:])} are needed",
                fix="give a tensor for each module by its path: init={path: tensor}",
            )


_TOKENS = re.compile(r".*(token_ids?|token_index|_tokens|token_map|decoder_ids)")


def _check_special_tokens(model: nn.Module, use: VocabularyUse, count: int, size: int) -> None:
    """Raise `SiteError` if a configuration names a token that would go."""
    part: Any = submodule(model, use.part)
    lost: list[str] = []
    for path, _ in use.tensors:
        padding = getattr(submodule(model, path), "padding_idx", None)
        if type(padding) is int and size <= padding < count:
            lost.append(f"{path}.padding_idx = {padding}")
    for title, config in (("config", getattr(part, "config", None)), ("generation_config", _generation_config(part))):
        for name, ids in _token_ids(config) if config is not None else ():
            beyond = sorted({token for token in ids if size <= token < count})
            lost += [f"{title}.{name} = {beyond[0]}"] if beyond else []
    if lost:
        raise SiteError(
            f"the vocabulary can't be cut to {size} tokens",
            why=f"the model uses tokens beyond it: {', '.join(dict.fromkeys(lost))}",
            fix="keep these tokens, or give them other numbers first",
        )


def _generation_config(part: Any) -> Any:
    return getattr(part, "generation_config", None)


def _token_ids(config: Any, prefix: str = "") -> Iterator[tuple[str, list[int]]]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _token_ids(value, f"{prefix}{name}.")
        elif _TOKENS.fullmatch(name):
            yield f"{prefix}{name}", list(_whole_numbers(value))


def _whole_numbers(value: Any) -> Iterator[int]:
    if type(value) is int:
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _whole_numbers(item)
