"""Follows a forward's chains of attributes through the live modules, and collects direct reads of parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from surgery.errors import qualified_name
from surgery.patterns.wrappers import unwrap
from surgery.planning.attribute_chains import CALL, WRAP, Chain
from surgery.planning.reached_attributes import MODULE_METHODS, inherited, leads_of, lookup
from surgery.planning.settled_branches import is_reachable
from surgery.planning.source_facts import Facts
from surgery.planning.source_reads import facts_of

__all__ = ["Bypass", "ReadSearch", "own_class"]


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


def own_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without rules."""
    cls = type(module)
    return getattr(cls, "_surgery_base", cls)


class _ModuleRef(NamedTuple):
    """A module of the model that a chain denotes."""

    path: str
    module: nn.Module
    own: bool = False  # reached through `self` of a child's forward, whose reads belong to that child's own search

    def child(self, name: str) -> Iterator[_ModuleRef]:
        if (module := self.module._modules[name]) is not None:
            yield _ModuleRef(f"{self.path}.{name}" if self.path else name, unwrap(module), self.own)

    @property
    def cls(self) -> type[nn.Module]:
        return own_class(self.module)


class _Parameter(NamedTuple):
    """A parameter that a chain denotes, with the place in the source that reads it."""

    owner: _ModuleRef
    name: str
    facts: Facts  # of the function that reads it
    line: int


class _Function(NamedTuple):
    """A function that a chain denotes; a method with its module."""

    code: Any  # a FunctionType
    owner: _ModuleRef | None = None


class ReadSearch:
    """Follows one module's forward, and collects the direct reads of parameters of `target`, or of any module."""

    def __init__(self, paths: dict[int, str], path: str, module: nn.Module, target: nn.Module | None = None):
        self.paths, self.target, self.entry = paths, target, _ModuleRef(path, module)
        self.ran: set[int] = set()  # modules that are called, or passed to code that may call them
        self.unsure: set[int] = set()  # modules that are passed to code which may call any child of theirs
        self.reads: dict[tuple, bool] = {}
        self.followed: set[tuple] = set()
        forward = lookup(self.entry.cls.__mro__, "forward")
        if isinstance(forward, FunctionType) and self.promising():
            self.read(forward)

    def read(self, method: FunctionType) -> None:
        """Follow a method of the entry module."""
        facts = facts_of(method)
        self.run(facts, {name: [self.entry] for name in facts.parameters[:1]}, self.entry, True, True)

    def promising(self) -> bool:
        """Whether the class may read parameters of children. Most classes do not; this takes microseconds."""
        names, module = leads_of(self.entry.cls), self.entry.module
        if "*" in names:
            return True
        children = (module._modules[name] if name in module._modules else module.__dict__.get(name) for name in names)
        return any(isinstance(child, nn.Module) and id(child) in self.paths for child in children)

    def places(self) -> list[Bypass]:
        """The direct reads."""
        return [Bypass(*place, conditional=not sure) for place, sure in self.reads.items()]

    def run(self, facts: Facts, arguments: dict[str, list], reader: _ModuleRef, sure: bool, returned: bool) -> None:
        """Follow a function. `sure`: every call reaches it; `returned`: its result counts as used."""
        key = (
            id(facts),
            sure,
            returned,
            *((name, _identity(thing)) for name in arguments for thing in arguments[name]),
        )
        if key in self.followed or len(self.followed) > 500:  # no known forward reaches so many functions
            return
        self.followed.add(key)
        if facts.dynamic or not facts.lines:
            self.unsure |= {
                id(thing.module) for refs in arguments.values() for thing in refs if isinstance(thing, _ModuleRef)
            }
        for chain, always in (*facts.uses, *((chain, True) for chain in facts.returns if returned)):
            self.use(self.things(chain, arguments, facts), reader, sure and always)
        for callee, passed, always in facts.calls:
            values = [(place, thing) for place, chain in passed for thing in self.things(chain, arguments, facts)]
            things = self.things(callee, arguments, facts)
            if _is_call_reachable(facts, callee, arguments):
                self.ran.update(id(thing.module) for thing in things if isinstance(thing, _ModuleRef))
            functions = [code for thing in things if (code := _callee(thing, values))]
            for function in functions:
                self.call(function, values, facts, reader, sure and always)
            if not functions:
                self.use([thing for _, thing in values], reader, sure and always)

    def call(self, function: _Function, values: list[tuple], caller: Facts, reader: _ModuleRef, sure: bool) -> None:
        """Follow a call, with the modules and parameters among its arguments."""
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
        # The caller follows the returned chains of plain functions, which begin at its own parameters.
        for chain in facts.returns if function.owner else ():
            self.use(self.things(chain, arguments, facts), reader, sure)
        if function.owner:
            arguments.update({name: [function.owner] for name in facts.parameters[:1]})
        if arguments:
            self.run(facts, arguments, function.owner or reader, sure, function.owner is None)

    def use(self, things: Iterable[Any], reader: _ModuleRef, sure: bool) -> None:
        """Note that code uses modules, parameters and functions."""
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
        """The things that one step of a chain leads to."""
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
            in_model = isinstance(value, nn.Module) and id(value) in self.paths
            return [_ModuleRef(self.paths[id(value)], value, thing.own)] if in_model else []
        value = lookup(thing.cls.__mro__, step)
        if isinstance(value, property) and isinstance(value.fget, FunctionType):
            return self.results(_Function(value.fget, thing), depth)
        return _bound(value, thing)

    def results(self, function: _Function, depth: int) -> Iterator[Any]:
        """The things that a method returns, as far as they are reached through its `self`."""
        facts = facts_of(function.code)
        if function.owner and facts.parameters and depth < 4:
            for chain in facts.returns:
                yield from self.things(chain, {facts.parameters[0]: [function.owner]}, facts, depth + 1)


def _is_call_reachable(facts: Facts, callee: Chain, arguments: dict[str, list]) -> bool:
    """Whether a call of the function can reach this inner call, by the module's present settings."""
    name = facts.parameters[0] if facts.parameters else ""
    modules = [thing.module for thing in arguments.get(name, ()) if isinstance(thing, _ModuleRef)]
    behind = facts.behind.get(callee, ())
    return len(modules) != 1 or not behind or any(is_reachable(tests, name, modules[0]) for tests in behind)


def _identity(thing: Any) -> tuple:
    return tuple(part if isinstance(part, str) else id(getattr(part, "module", part)) for part in thing)


def _bound(value: Any, ref: _ModuleRef) -> list[_Function]:
    """The function behind a class attribute of a module."""
    if isinstance(value, staticmethod):
        return [_Function(value.__func__)] if isinstance(value.__func__, FunctionType) else []
    # nn.Module's own methods (parameters(), to()) compute nothing, and calling a forward does not bypass it.
    if not isinstance(value, FunctionType) or value.__name__ == "forward" or value in MODULE_METHODS:
        return []
    return [_Function(value, ref)]


def _callee(thing: Any, values: list[tuple]) -> _Function | None:
    """The function that a call runs. A module's forward is followed only if a module is among its arguments."""
    if isinstance(thing, _ModuleRef) and any(isinstance(value, _ModuleRef) for _, value in values):
        thing = _Function(lookup(thing.cls.__mro__, "forward"), thing._replace(own=True))
    return thing if isinstance(thing, _Function) and isinstance(thing.code, FunctionType) else None


def _keys(module: nn.Module, key: Any) -> list[str]:
    """The names of the children that `module[key]` may be; all if the key is unknown."""
    names = list(module._modules.keys())
    if isinstance(key, int) and isinstance(module, (nn.Sequential, nn.ModuleList)):
        return names[key : key + 1 or None]
    return [name for name in names if name == key] if isinstance(key, str) else names
