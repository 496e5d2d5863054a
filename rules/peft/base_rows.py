"""The base's own tensors in PEFT's files: compared with the model's, and where they differ rows of the adapter.

PEFT writes the base's embeddings with an adapter that has them as targets, or whose vocabulary was resized
(`save_embedding_layers`), and loads them over the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PeftConfig, Rule, SurgeryError
from surgery.rules.peft.tasks import HEADS, ending
from surgery.rules.peft.tied_modules import tied_group
from surgery.rules.tokens import BaseRowsRule

_KEY = re.compile(r"base_model\.model\.(.+?)(?:\.token_adapter)?(?:\.base_layer)*\.(\w+)")


def base_rows(config: PeftConfig) -> Iterable[Rule]:
    """Rules for the rows of embeddings and heads that the file has otherwise than the model; equal ones are passed
    over. Anything else of the base that differs stays in the file as what is not of this adapter."""
    config.passed_over += [key for key in _shapes(config) if key.endswith(".trainable_tokens_original")]
    together: dict[int, list[tuple[str, str, nn.Module, Tensor]]] = {}
    for key, path, name in _of_base(config):
        module = config.modules.by_path[path]
        tensor = dict(_own(module))[name]
        together.setdefault(id(tensor), []).append((key, path, module, tensor))
    for group in together.values():
        yield from _compared(config, group)


def _compared(config: PeftConfig, group: list[tuple[str, str, nn.Module, Tensor]]) -> Iterator[Rule]:
    """One tensor of the base, which tied modules hold, with what the file has in its place."""
    key, path, module, own = group[0]
    ours = config.value(path, key.rpartition(".")[2]) if own.is_meta else own
    shapes, keys = _shapes(config), [key for key, *_ in group]
    matrix = isinstance(module, (nn.Embedding, nn.Linear)) and ours.dim() == 2
    if matrix and ours.is_floating_point() and len(shapes[key]) == 2 and shapes[key][1] == ours.shape[1]:
        if len({shapes[other] for other in keys}) == 1 and shapes[key][0] != len(ours):
            config.vocabulary.add(shapes[key][0])
            config.passed_over += keys
            return
    if any(shapes[other] != tuple(ours.shape) for other in keys):
        return
    if ours.is_meta or type(own) not in (nn.Parameter, Tensor) or not ours.is_floating_point():
        config.assumed.append(f"the file's {path} can't be compared with this base's, and is taken to be the same")
        config.passed_over += keys
        return
    assert config.file is not None
    tensors = [config.file.read(other) for other in keys]
    if any(not torch.equal(tensor, tensors[0]) for tensor in tensors[1:]):
        where = " and ".join(keys)
        raise SurgeryError("the file has two matrices for modules that share their weight here", where=where)
    differ = _differing(tensors[0], ours)
    if differ is None or not (len(differ) == 0 or matrix):
        return
    config.passed_over += keys
    if len(differ):
        rows = f"{len(differ)} of {len(ours)} rows"
        note = f"the file's {path} differs from this base's in {rows}: the file's are taken, as a part of the adapter"
        config.assumed.append(note)
        paths = [at for at, other in config.modules.by_path.items() if other._parameters.get("weight") is own]
        read = bool(config.data.get("use_dora")) and not config.targeted.isdisjoint(paths)
        yield BaseRowsRule(targets=config.regular(paths), tokens=tuple(differ.tolist()), in_weight=read)


def _differing(theirs: Tensor, ours: Tensor) -> Tensor | None:
    """The rows that differ by more than the rounding of the coarser dtype; None where the file has another kind."""
    if not theirs.is_floating_point():
        return None
    here = ours.detach().cpu()
    same = (theirs.to(here.dtype) == here) | (here.to(theirs.dtype) == theirs)
    return (~same.flatten(1).all(1) if same.dim() > 1 else ~same).nonzero().flatten()


def _of_base(config: PeftConfig) -> Iterator[tuple[str, str, str]]:
    """The keys of the base's tensors, with the module's path and the tensor's name."""
    data, by_path = config.data, config.modules.by_path
    task = data.get("task_type")
    heads = HEADS.get(task, ()) if isinstance(task, str) else ()
    saved = data.get("modules_to_save") or ()
    names = [name for name in (saved if isinstance(saved, list) else ()) if isinstance(name, str)]
    whole = ending(by_path, [*names, *heads])
    trained = tuple(f"{path}." for path in [*whole, *tied_group(config, whole)])
    biases = data.get("bias") not in (None, "none")
    for key in _shapes(config):
        path, name = base_key(key, by_path) or ("", "")
        ours = f"{path}.".startswith(trained) or (biases and name == "bias")
        if path and not ours and name in dict(_own(by_path[path])):
            yield key, path, name


def base_key(key: str, by_path: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The path of a module of the base and the name of its tensor, where a key may be of such."""
    hit = _KEY.fullmatch(key)
    if hit is None:
        return None
    plain = ".".join(part for part in hit[1].split(".") if part != "base_layer")
    path = next((candidate for candidate in (hit[1], plain) if candidate in by_path), None)
    return (path, hit[2]) if path else None


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for tensors in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in tensors.items() if tensor is not None)


def _shapes(config: PeftConfig) -> Mapping[str, Any]:
    return config.file.shapes if config.file is not None else {}
