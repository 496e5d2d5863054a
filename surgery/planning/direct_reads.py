"""Finds bypasses: code of a module that reads a parameter of another module without calling that module.

Edits of the other module's forward have no effect on such a read. Bypasses are found in the source, without running the
model, in two steps. `surgery.planning.source_reads` reads each function once, and lists its uses and calls as chains of
attributes that begin at its arguments. `ReadSearch` follows the chains from a forward through the live modules.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule, unwrap
from surgery.planning.reached_attributes import leads_of
from surgery.planning.read_search import Bypass, ReadSearch, own_class

__all__ = ["bypasses", "bypasses_of", "fastpath_switch"]


def bypasses(model: nn.Module) -> dict[str, list[Bypass]]:
    """The bypasses in a model, by the path of the module whose parameters are read.

    >>> from torch import nn
    >>> from surgery.planning.direct_reads import bypasses
    >>> for path, places in bypasses(nn.MultiheadAttention(4, 2)).items():
    ...     print(path, sorted({place.parameter for place in places}))
    out_proj ['bias', 'weight']

    The keys are the paths and the order of `named_modules`. A read counts if the value is used: as an argument of a
    call, an operand or a result. Reading its dtype, device or shape, comparing it, or `isinstance` do not count, nor
    does a module's use of its own parameters. The search follows a forward's own methods and properties, those of
    children that it calls, and functions and forwards that get a module as an argument. Code without source is skipped.
    """
    modules = list(base_modules(model))
    paths = {id(module): path for path, module in modules}
    places_by_path: dict[str, list[Bypass]] = {path: [] for path in paths.values()}
    for path, module in modules:
        if leads_of(own_class(module)):
            for place in ReadSearch(paths, path, module).places():
                places_by_path[place.path].append(place)
    return {path: list(dict.fromkeys(places)) for path, places in places_by_path.items() if places}


def bypasses_of(model: nn.Module, path: str, aliases: Iterable[str] = ()) -> list[Bypass]:
    """The bypasses of one module, from the code of the modules above it.

    >>> from torch import nn
    >>> from surgery.planning.direct_reads import bypasses_of
    >>> {place.parameter for place in bypasses_of(nn.MultiheadAttention(4, 2), "out_proj")} == {"weight", "bias"}
    True

    `aliases` are the other paths of a shared module: the modules above those are read, too. For many paths of one model
    `bypasses` is faster. Raises AttributeError if the model has no such path.
    """
    target = submodule(model, path)
    above: dict[int, tuple[str, nn.Module]] = {}
    for name in (path, *aliases):
        parts, reader = name.split(".") if name else [], unwrap(model)
        for depth, part in enumerate(parts):
            above.setdefault(id(reader), (".".join(parts[:depth]), reader))
            reader = submodule(reader, part)
    paths = {id(target): path, **{key: name for key, (name, _) in above.items()}}
    searches = [ReadSearch(paths, name, reader, target) for name, reader in above.values()]
    return list(dict.fromkeys(place for search in searches for place in search.places()))


def fastpath_switch(module: nn.Module) -> tuple[str, Any] | None:
    """The attribute and the value that make a torch module call its children instead of reading their weights.

    >>> from torch import nn
    >>> from surgery.planning.direct_reads import fastpath_switch
    >>> fastpath_switch(nn.TransformerEncoderLayer(4, 2))
    ('activation_relu_or_gelu', 0)

    nn.TransformerEncoderLayer passes its children's weights to one fused kernel in evaluation without gradients. Its
    forward uses this attribute only to choose the kernel; the activation itself is in `activation`.
    nn.TransformerEncoder packs padded batches for that kernel, in a form that other layers don't take. None for any
    other module.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        return "activation_relu_or_gelu", 0
    return ("use_nested_tensor", False) if isinstance(module, nn.TransformerEncoder) else None
