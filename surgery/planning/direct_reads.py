"""Where a module's code reads a parameter of another module directly, past that module's own forward.

Such a reading goes past whatever a rule has put into that forward. It is found in the source, without running the
model, in two steps. `surgery.planning.source_reads` reads one function by itself, once: what it uses and calls, as
chains of attributes that begin at its arguments. `Search` follows the chains through the live modules, from a forward
on.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from surgery.patterns.module_walk import base_modules
from surgery.patterns.pattern import qualified_name
from surgery.patterns.wrappers import submodule, unwrap
from surgery.planning.settled_branches import goes
from surgery.planning.source_reads import CALL, WRAP, Chain, Facts, facts_of

__all__ = ["Bypass", "bypasses", "bypasses_of", "fastpath_switch"]


@dataclass(frozen=True)
class Bypass:
    """One reading: `reader`, a module of class `reader_type`, uses `parameter` of the module at `path`."""

    path: str
    parameter: str
    reader: str
    reader_type: str
    file: str
    line: int
    source: str
    conditional: bool = False  # it stands in a branch of an `if`, and the other does not read the parameter

    @property
    def in_fast_path(self) -> bool:
        """Whether torch's own encoder layer reads, which `fastpath_switch` stops; a subclass's code it does not."""
        return self.file == inspect.getsourcefile(nn.TransformerEncoderLayer)


def bypasses(model: nn.Module) -> dict[str, list[Bypass]]:
    """Every module of the model whose parameters another module's code reads directly, with the places.

    >>> from torch import nn
    >>> from surgery.planning.direct_reads import bypasses
    >>> for path, places in bypasses(nn.MultiheadAttention(4, 2)).items():
    ...     print(path, sorted({place.parameter for place in places}))
    out_proj ['bias', 'weight']

    The keys are paths as `named_modules` gives them, in its order. A reading counts where its value is used: as an
    argument of a call, an operand, a result. Looking at its dtype, device or shape, a comparison, an `isinstance`
    is none, nor is a module's use of its own parameters. Followed are a forward's own methods and properties, those
    of children it calls, functions and forwards that a module is handed to; code without source has no readings here.
    """
    modules = list(base_modules(model))
    paths = {id(module): path for path, module in modules}
    found: dict[str, list[Bypass]] = {path: [] for path in paths.values()}
    for path, module in modules:
        if _leads(_own_class(module)):
            for place in ReadSearch(paths, path, module).places():
                found[place.path].append(place)
    return {path: list(dict.fromkeys(places)) for path, places in found.items() if places}


def bypasses_of(model: nn.Module, path: str, aliases: Iterable[str] = ()) -> list[Bypass]:
    """What `bypasses(model)` says of one path, from the code of the modules above it alone.

    >>> from torch import nn
    >>> from surgery.planning.direct_reads import bypasses_of
    >>> {place.parameter for place in bypasses_of(nn.MultiheadAttention(4, 2), "out_proj")} == {"weight", "bias"}
    True

    `aliases` are the other paths of a shared module: what stands above those is read too. For many paths of one
    model `bypasses` is faster. Raises AttributeError where the model has no such path.
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
    """The attribute, and its value, that makes a torch module call its children where it would read past them.

    >>> from torch import nn
    >>> from surgery.planning.direct_reads import fastpath_switch
    >>> fastpath_switch(nn.TransformerEncoderLayer(4, 2))
    ('activation_relu_or_gelu', 0)

    nn.TransformerEncoderLayer hands its children's weights to one fused kernel in evaluation without gradients. Its
    forward asks this attribute for nothing else: what it computes is in `activation`. nn.TransformerEncoder packs
    padded batches for that kernel, in a form that other layers don't take. None for any other module.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        return "activation_relu_or_gelu", 0
    return ("use_nested_tensor", False) if isinstance(module, nn.TransformerEncoder) else None


def _own_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return getattr(cls, "_surgery_base", cls)  # a site's own code is its base's


class _Held(NamedTuple):
    path: str
    module: nn.Module
    own: bool = False  # come to over the `self` of a child's forward, whose readings are that child's own search

    def child(self, name: str) -> Iterator[_Held]:
        if (module := self.module._modules[name]) is not None:
            yield _Held(f"{self.path}.{name}" if self.path else name, unwrap(module), self.own)

    @property
    def cls(self) -> type[nn.Module]:
        return _own_class(self.module)


class _Parameter(NamedTuple):
    owner: _Held
    name: str
    facts: Facts  # of the function that reads it
    line: int


class _Function(NamedTuple):
    code: Any  # a FunctionType
    owner: _Held | None = None


class ReadSearch:
    """The readings that one module's forward leads to: of the parameters of `target`, or of anyone."""

    def __init__(self, paths: dict[int, str], path: str, module: nn.Module, target: nn.Module | None = None):
        self.paths, self.target, self.entry = paths, target, _Held(path, module)
        self.ran: set[int] = set()  # modules that are called, or handed to what may call them
        self.unsure: set[int] = set()  # modules that code has at hand which may call any child of theirs
        self.found: dict[tuple, bool] = {}
        self.done: set[tuple] = set()
        forward = _lookup(self.entry.cls.__mro__, "forward")
        if isinstance(forward, FunctionType) and self.promising():
            self.read(forward)

    def read(self, method: FunctionType) -> None:
        facts = facts_of(method)
        self.run(facts, {name: [self.entry] for name in facts.parameters[:1]}, self.entry, True, True)

    def promising(self) -> bool:
        """Most classes read nothing of their children: told from what is known of the class, in microseconds."""
        names, module = _leads(self.entry.cls), self.entry.module
        if "*" in names:
            return True
        held = (module._modules.get(name, module.__dict__.get(name)) for name in names)
        return any(isinstance(child, nn.Module) and id(child) in self.paths for child in held)

    def places(self) -> list[Bypass]:
        return [Bypass(*place, conditional=not sure) for place, sure in self.found.items()]

    def run(self, facts: Facts, given: dict[str, list], reader: _Held, sure: bool, returned: bool) -> None:
        """Follow one function. `sure`: every call comes here; `returned`: what it gives back counts as used."""
        key = (id(facts), sure, returned, *((name, _identity(thing)) for name in given for thing in given[name]))
        if key in self.done or len(self.done) > 500:  # functions from one forward: far above any seen, far below a hang
            return
        self.done.add(key)
        if facts.dynamic or not facts.lines:
            self.unsure |= {id(thing.module) for held in given.values() for thing in held if isinstance(thing, _Held)}
        for chain, always in (*facts.uses, *((chain, True) for chain in facts.returns if returned)):
            self.use(self.things(chain, given, facts), reader, sure and always)
        for called, arguments, always in facts.calls:
            values = [(place, thing) for place, chain in arguments for thing in self.things(chain, given, facts)]
            things = self.things(called, given, facts)
            if _reached(facts, called, given):
                self.ran.update(id(thing.module) for thing in things if isinstance(thing, _Held))
            functions = [code for thing in things if (code := _called(thing, values))]
            for function in functions:
                self.call(function, values, facts, reader, sure and always)
            if not functions:
                self.use([thing for _, thing in values], reader, sure and always)

    def call(self, function: _Function, values: list[tuple], caller: Facts, reader: _Held, sure: bool) -> None:
        facts = facts_of(function.code)
        names = facts.parameters[1:] if function.owner else facts.parameters
        given: dict[str, list] = {}
        for place, thing in values:
            name = place if isinstance(place, str) else names[place] if place < len(names) else ""
            # What a plain function of the same file does with a tensor can be read; a decorator may replace it.
            near = isinstance(thing, _Held) or (facts.module == caller.module and not facts.decorated)
            if function.owner and isinstance(thing, _Held) and thing.module is function.owner.module:
                thing = function.owner  # a module that its own forward is handed is its own
            if name in names and facts.lines and near:
                given.setdefault(name, []).append(thing)
            else:
                self.use([thing], reader, sure)
        for chain in facts.returns if function.owner else ():  # of its own parameters the caller follows them
            self.use(self.things(chain, given, facts), reader, sure)
        if function.owner:
            given.update({name: [function.owner] for name in facts.parameters[:1]})
        if given:
            self.run(facts, given, function.owner or reader, sure, function.owner is None)

    def use(self, things: Iterable[Any], reader: _Held, sure: bool) -> None:
        for thing in things:
            if isinstance(thing, _Held):
                self.ran.add(id(thing.module))
            if isinstance(thing, _Function) and thing.owner:  # handed on and called later: checkpoint(self.block, x)
                self.call(thing, [], facts_of(thing.code), reader, sure)
            if not isinstance(thing, _Parameter) or thing.owner.own or thing.owner.module is self.entry.module:
                continue
            owner, facts = thing.owner, thing.facts
            if self.target is None or owner.module is self.target:
                # A method of its own that others call instead of its forward: the caller's entry is the reader.
                by = self.entry if owner.module is reader.module else reader
                line = thing.line - 2 + facts.start  # one line was put before the source
                text = facts.lines[thing.line - 2].strip()
                path = self.paths.get(id(owner.module), owner.path)
                place = (path, thing.name, by.path, qualified_name(by.cls), facts.file, line, text)
                self.found[place] = self.found.get(place, False) or sure

    def things(self, chain: Chain, given: dict[str, list], facts: Facts, depth: int = 0) -> list[Any]:
        """What a chain is in the live model: modules, parameters, functions."""
        root, steps = chain
        found = given.get(root, []) if isinstance(root, str) else [_Function(root)]
        for step, line in steps:
            if step != WRAP and found:
                found = [after for thing in found for after in self.step(thing, step, facts, line, depth)]
        return found

    def step(self, thing: Any, step: Any, facts: Facts, line: int, depth: int) -> Iterable[Any]:
        if isinstance(thing, _Parameter):  # a view, an element or a cast of it
            return [thing]
        if isinstance(thing, _Function):
            return self.results(thing, depth) if step == CALL else []
        if step == CALL or isinstance(step, type):
            return []
        if step in ("forward", "__call__"):  # who calls it calls the module
            return [thing]
        if isinstance(step, tuple):
            kind, name = step
            if kind == "[]":
                return [child for key in _keys(thing.module, name) for child in thing.child(key)]
            value = _inherited(thing.cls, kind, name)
            return [_Function(value, thing)] if isinstance(value, FunctionType) and value not in _MODULE else []
        module = thing.module
        if step in module._modules:
            return thing.child(step)
        if step in module._parameters:
            return [_Parameter(thing, step, facts, line)] if module._parameters[step] is not None else []
        if step in module.__dict__:
            value = module.__dict__[step]
            known = isinstance(value, nn.Module) and id(value) in self.paths
            return [_Held(self.paths[id(value)], value, thing.own)] if known else []
        value = _lookup(thing.cls.__mro__, step)
        if isinstance(value, property) and isinstance(value.fget, FunctionType):
            return self.results(_Function(value.fget, thing), depth)
        return _bound(value, thing)

    def results(self, function: _Function, depth: int) -> Iterator[Any]:
        facts = facts_of(function.code)
        if function.owner and facts.parameters and depth < 4:
            for chain in facts.returns:
                yield from self.things(chain, {facts.parameters[0]: [function.owner]}, facts, depth + 1)


def _reached(facts: Facts, called: Chain, given: dict[str, list]) -> bool:
    """Whether a call comes to where this is called, as far as the module's settings tell."""
    name = facts.parameters[0] if facts.parameters else ""
    modules = [thing.module for thing in given.get(name, ()) if isinstance(thing, _Held)]
    behind = facts.behind.get(called, ())
    return len(modules) != 1 or not behind or any(goes(tests, name, modules[0]) for tests in behind)


def _identity(thing: Any) -> tuple:
    return tuple(part if isinstance(part, str) else id(getattr(part, "module", part)) for part in thing)


def _lookup(mro: Iterable[type], name: str) -> Any:
    return next((vars(cls)[name] for cls in mro if name in vars(cls)), None)


def _inherited(cls: type, after: type, name: str) -> Any:
    return _lookup(cls.__mro__[cls.__mro__.index(after) + 1 :] if after in cls.__mro__ else (), name)


_found_leads: weakref.WeakKeyDictionary[type, set[str]] = weakref.WeakKeyDictionary()


def _leads(cls: type[nn.Module]) -> set[str]:
    """The attributes over which the forward of a class may come to another module's parameters; `*`: over any."""
    found = _found_leads.get(cls)
    if found is None:
        found = _found_leads[cls] = _Leads(cls).names
    return found


class _Leads:
    """What `Search` may come to from a class, before there is a module: too much rather than too little."""

    def __init__(self, cls: type[nn.Module]):
        self.cls, self.names = cls, set[str]()
        self.todo: list[tuple[Facts, str]] = []
        self.follow(_lookup(cls.__mro__, "forward"))
        for facts, root in self.todo:  # grows on the way
            for chain in (*facts.returns, *(chain for chain, _ in facts.uses)):
                self.lead(chain, root)
            for called, arguments, _ in facts.calls:
                self.lead(called, root)
                for chain in (chain for _, chain in arguments if chain[0] == root):
                    if chain[1]:
                        self.lead(chain, root, handed=True)
                    elif isinstance(called[0], FunctionType):
                        self.follow(called[0], *facts_of(called[0]).parameters)
                    else:
                        self.names.add("*")

    def follow(self, function: Any, *roots: str) -> None:
        if isinstance(function, FunctionType) and function not in _MODULE:
            facts = facts_of(function)
            for entry in ((facts, root) for root in roots or facts.parameters[:1]):
                if entry not in self.todo:
                    self.todo.append(entry)

    def function(self, step: Any) -> FunctionType | None:
        if isinstance(step, tuple):
            after, name = step
            value = _inherited(self.cls, after, name) if isinstance(after, type) else None
        else:
            value = _lookup(self.cls.__mro__, step)
        value = value.fget if isinstance(value, property) else value
        return value if isinstance(value, FunctionType) and value not in _MODULE else None

    def lead(self, chain: Chain, root: str, handed: bool = False, depth: int = 0) -> None:
        steps = [step for step, _ in chain[1] if step != WRAP]
        if chain[0] != root or not steps:
            return
        if function := self.function(steps[0]):
            self.follow(function)
            facts = facts_of(function)
            after = [pair for pair in chain[1] if pair[0] != WRAP][1:]
            after = after[1:] if after and after[0][0] == CALL else after  # what it gives back, as a property does
            for own, more in facts.returns if depth < 4 else ():
                self.lead((own, (*more, *after)), facts.parameters[0], handed, depth + 1)
            return
        rest = steps[1 : steps.index(CALL)] if CALL in steps else steps[1:]
        # What a child's forward gives back leads nowhere: a call counts after an attribute of the child alone.
        if (handed and CALL not in steps) or any(isinstance(step, str) for step in rest):
            self.names.add(steps[0] if isinstance(steps[0], str) else "*")


def _bound(value: Any, held: _Held) -> list[_Function]:
    if isinstance(value, staticmethod):
        return [_Function(value.__func__)] if isinstance(value.__func__, FunctionType) else []
    # nn.Module's own methods (parameters(), to()) compute nothing, and who calls a forward bypasses nothing.
    if not isinstance(value, FunctionType) or value.__name__ == "forward" or value in _MODULE:
        return []
    return [_Function(value, held)]


def _called(thing: Any, values: list[tuple]) -> _Function | None:
    """The function that a call runs. A forward is one where it is handed a module: what it is handed is followed."""
    if isinstance(thing, _Held) and any(isinstance(value, _Held) for _, value in values):
        thing = _Function(_lookup(thing.cls.__mro__, "forward"), thing._replace(own=True))
    return thing if isinstance(thing, _Function) and isinstance(thing.code, FunctionType) else None


_MODULE = frozenset(value for value in vars(nn.Module).values() if isinstance(value, FunctionType))


def _keys(module: nn.Module, key: Any) -> list[str]:
    names = list(module._modules)
    if isinstance(key, int) and isinstance(module, (nn.Sequential, nn.ModuleList)):
        return names[key : key + 1 or None]
    return [name for name in names if name == key] if isinstance(key, str) else names
