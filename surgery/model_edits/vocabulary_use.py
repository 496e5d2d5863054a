"""Finds all that has the size of a model's vocabulary: embeddings, heads, biases, attributes, the configuration."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from surgery.errors import SiteError
from surgery.model_edits.model_differences import differences, plain_attributes
from surgery.model_edits.plain_model import build_plain, configured
from surgery.patterns.module_class import class_of
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule

__all__ = ["VocabularyUse", "find_embeddings", "find_vocabulary_use"]

_COUNT = re.compile(r"(num|n)_?(embeddings|tokens|words|vocab|vocabulary)|(padded_)?vocab(ulary)?(_size)?|out_features")


@dataclass
class VocabularyUse:
    """What depends on the size of the vocabulary.

    Attributes:
        tensors: (path of a module, name): each has one row for each token.
        attributes: (path of a module, name) of numbers that equal the size.
        config: the configuration with the new size, if there is one.
        part: the path of the module that has the configuration.
        unplain: why no configuration has the new size.
    """

    tensors: list[tuple[str, str]] = field(default_factory=list)
    attributes: list[tuple[str, str]] = field(default_factory=list)
    config: Any = None
    part: str = ""
    unplain: str | None = None


def find_embeddings(model: nn.Module) -> list[str]:
    """Return the paths of the input embeddings, as the model or the first part with a configuration names them."""
    paths = {id(module): path for path, module in base_modules(model)}
    for _, module in base_modules(model):
        if hasattr(module, "get_input_embeddings"):
            try:
                embedding: Any = module.get_input_embeddings()  # type: ignore[operator]
            except (AttributeError, NotImplementedError):
                continue
            if id(embedding) in paths and isinstance(embedding._parameters.get("weight"), Tensor):
                return [paths[id(embedding)]]
    raise SiteError(
        f"this {class_of(model).__name__} does not say which module embeds its tokens",
        why="no get_input_embeddings of it returns a module with a weight",
        fix="name the embedding, and an untied head: ResizeVocabRule(['embed', 'head'], tokens=…)",
    )


def find_vocabulary_use(model: nn.Module, paths: Sequence[str], size: int) -> VocabularyUse:
    """Find what has the size of a vocabulary.

    A model with a configuration is compared with one that its class builds with another `vocab_size`. In other models,
    it is the tensors of the named modules, those that are tied to them, and numbers with a usual name.

    Args:
        model: the model.
        paths: the paths of the embeddings, and of heads that the class does not know.
        size: the new size.
    """
    count = _rows(model, paths[0])
    if any(_rows(model, path) != count for path in paths):
        sizes = ", ".join(f"{path} has {_rows(model, path)}" for path in paths)
        raise SiteError(
            "the targets have vocabularies of different sizes", why=sizes, fix="use a rule for each of them"
        )
    use, part = VocabularyUse(), configured(model, paths[0])
    if part is not None:
        prefix = f"{part}." if part else ""
        inner = [path.removeprefix(prefix) for path in paths if path.startswith(prefix)]
        found = _in_plain_model(submodule(model, part), inner, count, size)
        if found is not None:
            use.config, use.part, before, after = *found[:1], part, *found[1:]
            use.tensors = [
                (f"{prefix}{path}", name) for path, name in _changed_tensors(before, after, count, size) or ()
            ]
            for difference in differences(before, after):
                for name, values in difference.attributes.items():
                    if values == (count, size):
                        use.attributes.append((f"{prefix}{difference.path}", name))
        else:
            use.unplain = f"no field of {type(submodule(model, part).config).__name__} is the number of tokens"
    if use.config is None:
        use.tensors += [(path, name) for path in [*paths, *_heads(model, part, count)] for name in ("weight", "bias")]
        use.tensors += [(path, "final_logits_bias") for path, _ in base_modules(model)]
    use.tensors += [(path, "weight") for path in paths]
    use.tensors = list(_with_tied(model, [item for item in use.tensors if _is_use(model, *item, count)]))
    use.attributes += _attributes(model, use, count) if use.config is None else []
    use.attributes = [item for item in dict.fromkeys(use.attributes) if _number(model, *item) == count]
    return use


def _rows(model: nn.Module, path: str) -> int:
    weight = submodule(model, path)._parameters.get("weight")
    if weight is None or weight.dim() != 2:
        raise SiteError(
            f"this {class_of(submodule(model, path)).__name__} does not have a row for each token",
            where=path or "(the model itself)",
            fix="name an Embedding, or a Linear that is a head",
        )
    return weight.shape[0]


# Models with a configuration ------------------------------------------------------------------------------------


def _in_plain_model(
    module: Any, paths: Sequence[str], count: int, size: int
) -> tuple[Any, nn.Module, nn.Module] | None:
    """The configuration with which the class of a model builds these embeddings with another size.

    Returns it with the models of the present and of the new configuration; None if there is none.
    """
    before = build_plain(module, module.config)
    if before is None:
        return None
    fields = sorted(_vocabulary_fields(module.config, count), key=lambda place: (len(place), place[-1] != "vocab_size"))
    chosen: list[tuple[str, ...]] = []
    after: nn.Module | None = None
    covered = set[str]()
    for place in fields:
        built = build_plain(module, _with_fields(module.config, [*chosen, place], size))
        changed = _changed_tensors(before, built, count, size) if built is not None else None
        if built is None or changed is None:
            continue
        wanted = {path for path, name in changed if name == "weight" and path in paths}
        if wanted > covered:
            chosen, after, covered = [*chosen, place], built, wanted
    if after is None or covered != set(paths):
        return None
    shapes = _shapes(after)
    for place in [place for place in fields if place not in chosen]:  # such as decoder_vocab_size beside vocab_size
        built = build_plain(module, _with_fields(module.config, [*chosen, place], size))
        if built is not None and _shapes(built) == shapes:
            chosen, after = [*chosen, place], built
    return _with_fields(module.config, chosen, size), before, after


def _vocabulary_fields(config: Any, count: int, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from _vocabulary_fields(value, count, (*path, name))
        elif type(value) is int and value == count and ("vocab" in name or "tokens" in name):
            yield (*path, name)


def _with_fields(config: Any, places: Iterable[tuple[str, ...]], size: int) -> Any:
    new = copy.deepcopy(config)
    for *path, name in places:
        part = new
        for step in path:
            part = getattr(part, step)
        setattr(part, name, size)
    return new


def _shapes(model: nn.Module) -> dict[tuple[str, str], tuple[int, ...]]:
    return {
        (path, name): tuple(tensor.shape)
        for path, module in base_modules(model)
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    }


def _changed_tensors(before: nn.Module, after: nn.Module, count: int, size: int) -> list[tuple[str, str]] | None:
    """The tensors that have one row for each token; None if something else changed, too."""
    old, new = _shapes(before), _shapes(after)
    if old.keys() != new.keys():
        return None
    changed = [item for item in old if old[item] != new[item]]
    for item in changed:
        axis = _axis(old[item], count)
        if axis is None or new[item] != (*old[item][:axis], size, *old[item][axis + 1 :]):
            return None
    return changed


def _axis(shape: tuple[int, ...], count: int) -> int | None:
    """The axis of the tokens: the first of two, and the last of a bias (1, tokens)."""
    if shape and shape[0] == count:
        return 0
    return 1 if len(shape) == 2 and shape == (1, count) else None


# Models without a configuration ---------------------------------------------------------------------------------


def _heads(model: nn.Module, part: str | None, count: int) -> list[str]:
    """The path of the output embedding, if the model names one of that size."""
    owner: Any = submodule(model, part) if part is not None else model
    try:
        head = owner.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return []
    paths = [path for path, module in base_modules(model) if module is head]
    return [path for path in paths if len(submodule(model, path)._parameters.get("weight", ())) == count]  # type: ignore[arg-type]


def _attributes(model: nn.Module, use: VocabularyUse, count: int) -> list[tuple[str, str]]:
    changed = {path for path, _ in use.tensors}
    around = {".".join(path.split(".")[:depth]) for path in changed for depth in range(path.count(".") + 1)}
    return [
        (path, name)
        for path in (*changed, *around)
        for name, value in plain_attributes(submodule(model, path)).items()
        if _COUNT.fullmatch(name.lstrip("_")) and type(value) is int and value == count
    ]


# The model itself -----------------------------------------------------------------------------------------------


def _tensor(model: nn.Module, path: str, name: str) -> Tensor | None:
    try:
        module = submodule(model, path)
    except AttributeError:
        return None
    return module._parameters.get(name, module._buffers.get(name))


def _is_use(model: nn.Module, path: str, name: str, count: int) -> bool:
    tensor = _tensor(model, path, name)
    return tensor is not None and _axis(tuple(tensor.shape), count) is not None


def _number(model: nn.Module, path: str, name: str) -> Any:
    try:
        return submodule(model, path).__dict__.get(name)
    except AttributeError:
        return None


def _with_tied(model: nn.Module, uses: Sequence[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """These tensors and every other name of them, each once."""
    ids = {id(_tensor(model, *item)) for item in uses}
    yield from dict.fromkeys(uses)
    for path, module in base_modules(model):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and id(tensor) in ids and (path, name) not in uses:
                yield path, name
