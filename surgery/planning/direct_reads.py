"""Finds bypasses: code of a module that reads a parameter of another module without calling that module.

Edits of the other module's forward have no effect on such a read. Bypasses are found in the source, without running the
model, in two steps. `surgery.planning.source_reads` reads each function once, and lists what it uses and calls, as
chains of attributes that begin at its arguments. `ReadSearch` follows the chains from a forward through the live
modules.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from surgery.errors import qualified_name
from surgery.patterns.module_walk import base_modules
from surgery.patterns.wrappers import submodule, unwrap
from surgery.planning.class_leads import MODULE_METHODS, inherited, leads_of, lookup
from surgery.planning.settled_branches import is_reachable
from surgery.planning.source_reads import CALL, WRAP, Chain, Facts, facts_of

__all__ = ["Bypass", "bypasses", "bypasses_of", "fastpath_switch"]


@dataclass(frozen=True)
class Bypass:
    """One direct read: `reader`, a module of class `reader_type`, uses `parameter` of the module at `path`."""

    path: str
    parameter: str
    reader: str
    reader_type: str
    file: str
    line: int
    source: str
    conditional: bool = False  # one branch of an `if` reads the parameter, and another does not

    @property
    def in_fast_path(self) -> bool:
        """Whether the code of torch's encoder layer reads, which `fastpath_switch` switches off; not a subclass's."""
        return self.file == inspect.getsourcefile(nn.TransformerEncoderLayer)


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
        if leads_of(_own_class(module)):
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


def _own_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return getattr(cls, "_surgery_base", cls)  # a site's own code is its base's


class _ModuleRef(NamedTuple):
    path: str
    module: nn.Module
    own: bool = False  # reached through `self` of a child's forward, whose reads belong to that child's own search

    def child(self, name: str) -> Iterator[_ModuleRef]:
        if (module := self.module._modules[name]) is not None:
            yield _ModuleRef(f"{self.path}.{name}" if self.path else name, unwrap(module), self.own)

    @property
    def cls(self) -> type[nn.Module]:
        return _own_class(self.module)


class _Parameter(NamedTuple):
    owner: _ModuleRef
    name: str
    facts: Facts  # of the function that reads it
    line: int


class _Function(NamedTuple):
    code: Any  # a FunctionType
    owner: _ModuleRef | None = None


class ReadSearch:
    """Follows one module's forward, and collects the direct reads of parameters of `target`, or of any module."""

    def __init__(self, paths: dict[int, str], path: str, module: nn.Module, target: nn.Module | None = None):
        self.paths, self.target, self.entry = paths, target, _ModuleRef(path, module)
        self.ran: set[int] = set()  # modules that are called, or passed to code that may call them
        self.unsure: set[int] = set()  # modules that are passed to code which may call any child of theirs
        self.reads: dict[tuple, bool] = {}
        self.done: set[tuple] = set()
        forward = lookup(self.entry.cls.__mro__, "forward")
        if isinstance(forward, FunctionType) and self.promising():
            self.read(forward)

    def read(self, method: FunctionType) -> None:
        facts = facts_of(method)
        self.run(facts, {name: [self.entry] for name in facts.parameters[:1]}, self.entry, True, True)

    def promising(self) -> bool:
        """Whether the class may read parameters of children. Most classes do not; this takes microseconds."""
        names, module = leads_of(self.entry.cls), self.entry.module
        if "*" in names:
            return True
        children = (module._modules.get(name, module.__dict__.get(name)) for name in names)
        return any(isinstance(child, nn.Module) and id(child) in self.paths for child in children)

    def places(self) -> list[Bypass]:
        return [Bypass(*place, conditional=not sure) for place, sure in self.reads.items()]

    def run(self, facts: Facts, given: dict[str, list], reader: _ModuleRef, sure: bool, returned: bool) -> None:
        """Follow one function. `sure`: every call reaches it; `returned`: its result counts as used."""
        key = (id(facts), sure, returned, *((name, _identity(thing)) for name in given for thing in given[name]))
        if key in self.done or len(self.done) > 500:  # functions from one forward: far above any seen, far below a hang
            return
        self.done.add(key)
        if facts.dynamic or not facts.lines:
            self.unsure |= {
                id(thing.module) for refs in given.values() for thing in refs if isinstance(thing, _ModuleRef)
            }
        for chain, always in (*facts.uses, *((chain, True) for chain in facts.returns if returned)):
            self.use(self.things(chain, given, facts), reader, sure and always)
        for called, arguments, always in facts.calls:
            values = [(place, thing) for place, chain in arguments for thing in self.things(chain, given, facts)]
            things = self.things(called, given, facts)
            if _reached(facts, called, given):
                self.ran.update(id(thing.module) for thing in things if isinstance(thing, _ModuleRef))
            functions = [code for thing in things if (code := _called(thing, values))]
            for function in functions:
                self.call(function, values, facts, reader, sure and always)
            if not functions:
                self.use([thing for _, thing in values], reader, sure and always)

    def call(self, function: _Function, values: list[tuple], caller: Facts, reader: _ModuleRef, sure: bool) -> None:
        facts = facts_of(function.code)
        names = facts.parameters[1:] if function.owner else facts.parameters
        arguments: dict[str, list] = {}
        for place, thing in values:
            name = place if isinstance(place, str) else names[place] if place < len(names) else ""
            # A plain function of the same file can be read; a decorator may replace it.
            near = isinstance(thing, _ModuleRef) or (facts.module == caller.module and not facts.decorated)
            if function.owner and isinstance(thing, _ModuleRef) and thing.module is function.owner.module:
                thing = function.owner  # a module that is passed to its own forward is that forward's `self`
            if name in names and facts.lines and near:
                arguments.setdefault(name, []).append(thing)
            else:
                self.use([thing], reader, sure)
        for chain in (
            facts.returns if function.owner else ()
        ):  # the caller follows chains that begin at its own parameters
            self.use(self.things(chain, arguments, facts), reader, sure)
        if function.owner:
            arguments.update({name: [function.owner] for name in facts.parameters[:1]})
        if arguments:
            self.run(facts, arguments, function.owner or reader, sure, function.owner is None)

    def use(self, things: Iterable[Any], reader: _ModuleRef, sure: bool) -> None:
        for thing in things:
            if isinstance(thing, _ModuleRef):
                self.ran.add(id(thing.module))
            if isinstance(thing, _Function) and thing.owner:  # passed on and called later: checkpoint(self.block, x)
                self.call(thing, [], facts_of(thing.code), reader, sure)
            if not isinstance(thing, _Parameter) or thing.owner.own or thing.owner.module is self.entry.module:
                continue
            owner, facts = thing.owner, thing.facts
            if self.target is None or owner.module is self.target:
                # The module's own method, called by another module instead of its forward: the caller reads.
                by = self.entry if owner.module is reader.module else reader
                line = thing.line - 2 + facts.start  # one line was put before the source
                text = facts.lines[thing.line - 2].strip()
                path = self.paths.get(id(owner.module), owner.path)
                place = (path, thing.name, by.path, qualified_name(by.cls), facts.file, line, text)
                self.reads[place] = self.reads.get(place, False) or sure

    def things(self, chain: Chain, arguments: dict[str, list], facts: Facts, depth: int = 0) -> list[Any]:
        """The modules, parameters and functions that a chain denotes in the live model."""
        root, steps = chain
        reached = arguments.get(root, []) if isinstance(root, str) else [_Function(root)]
        for step, line in steps:
            if step != WRAP and reached:
                reached = [after for thing in reached for after in self.step(thing, step, facts, line, depth)]
        return reached

    def step(self, thing: Any, step: Any, facts: Facts, line: int, depth: int) -> Iterable[Any]:
        if isinstance(thing, _Parameter):  # a view, an element or a cast of it
            return [thing]
        if isinstance(thing, _Function):
            return self.results(thing, depth) if step == CALL else []
        if step == CALL or isinstance(step, type):
            return []
        if step in ("forward", "__call__"):  # calling it calls the module
            return [thing]
        if isinstance(step, tuple):
            kind, name = step
            if kind == "[]":
                return [child for key in _keys(thing.module, name) for child in thing.child(key)]
            value = inherited(thing.cls, kind, name)
            return [_Function(value, thing)] if isinstance(value, FunctionType) and value not in MODULE_METHODS else []
        module = thing.module
        if step in module._modules:
            return thing.child(step)
        if step in module._parameters:
            return [_Parameter(thing, step, facts, line)] if module._parameters[step] is not None else []
        if step in module.__dict__:
            value = module.__dict__[step]
            known = isinstance(value, nn.Module) and id(value) in self.paths
            return [_ModuleRef(self.paths[id(value)], value, thing.own)] if known else []
        value = lookup(thing.cls.__mro__, step)
        if isinstance(value, property) and isinstance(value.fget, FunctionType):
            return self.results(_Function(value.fget, thing), depth)
        return _bound(value, thing)

    def results(self, function: _Function, depth: int) -> Iterator[Any]:
        facts = facts_of(function.code)
        if function.owner and facts.parameters and depth < 4:
            for chain in facts.returns:
                yield from self.things(chain, {facts.parameters[0]: [function.owner]}, facts, depth + 1)


def _reached(facts: Facts, called: Chain, arguments: dict[str, list]) -> bool:
    """Whether a call of the function can reach this inner call, by the module's present settings."""
    name = facts.parameters[0] if facts.parameters else ""
    modules = [thing.module for thing in arguments.get(name, ()) if isinstance(thing, _ModuleRef)]
    behind = facts.behind.get(called, ())
    return len(modules) != 1 or not behind or any(is_reachable(tests, name, modules[0]) for tests in behind)


def _identity(thing: Any) -> tuple:
    return tuple(part if isinstance(part, str) else id(getattr(part, "module", part)) for part in thing)


def _bound(value: Any, ref: _ModuleRef) -> list[_Function]:
    if isinstance(value, staticmethod):
        return [_Function(value.__func__)] if isinstance(value.__func__, FunctionType) else []
    # nn.Module's own methods (parameters(), to()) compute nothing, and calling a forward does not bypass it.
    if not isinstance(value, FunctionType) or value.__name__ == "forward" or value in MODULE_METHODS:
        return []
    return [_Function(value, ref)]


def _called(thing: Any, values: list[tuple]) -> _Function | None:
    """The function that a call runs. A module's forward is followed only if a module is among its arguments."""
    if isinstance(thing, _ModuleRef) and any(isinstance(value, _ModuleRef) for _, value in values):
        thing = _Function(lookup(thing.cls.__mro__, "forward"), thing._replace(own=True))
    return thing if isinstance(thing, _Function) and isinstance(thing.code, FunctionType) else None


def _keys(module: nn.Module, key: Any) -> list[str]:
    names = list(module._modules)
    if isinstance(key, int) and isinstance(module, (nn.Sequential, nn.ModuleList)):
        return names[key : key + 1 or None]
    return [name for name in names if name == key] if isinstance(key, str) else names
