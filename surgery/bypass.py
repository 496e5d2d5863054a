"""Where a module's code reads a parameter of another module directly, past that module's own forward.

Such a reading goes past whatever a rule has put into that forward. It is found in the source, without running the
model, in two steps. `_Source` reads one function by itself, once: what it uses and calls, as chains of attributes that
begin at its arguments. `_Search` follows the chains through the live modules, from a module's forward on.
"""

from __future__ import annotations

import ast
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from torch import nn

from surgery.pattern import qualified_name

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
    conditional: bool = False  # it stands in one branch of an `if`: there are calls which never come to it

    @property
    def in_fast_path(self) -> bool:
        """Whether torch's own encoder layer reads, which `fastpath_switch` stops; a subclass's code it does not."""
        return self.file == inspect.getsourcefile(nn.TransformerEncoderLayer)


def bypasses(model: nn.Module) -> dict[str, list[Bypass]]:
    """Every module of the model whose parameters another module's code reads directly, with the places.

    >>> from torch import nn
    >>> from surgery.bypass import bypasses
    >>> for path, places in bypasses(nn.MultiheadAttention(4, 2)).items():
    ...     print(path, sorted({place.parameter for place in places}))
    out_proj ['bias', 'weight']

    The keys are paths as `named_modules` gives them, in its order. A reading counts where its value is used: as an
    argument of a call, an operand, a result. Looking at its dtype, device or shape, a comparison, an `isinstance`
    is none, nor is a module's use of its own parameters. Followed are a forward's own methods and properties, those
    of children it calls, and functions that a module is handed to; code without source has no readings here.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: dict[str, list[Bypass]] = {path: [] for path in paths.values()}
    for path, module in model.named_modules():
        for place in _Search(paths, path, module).places():
            found[place.path].append(place)
    return {path: places for path, places in found.items() if places}


def bypasses_of(model: nn.Module, path: str, aliases: Iterable[str] = ()) -> list[Bypass]:
    """What `bypasses(model)` says of one path, from the code of the modules above it alone.

    >>> from torch import nn
    >>> from surgery.bypass import bypasses_of
    >>> {place.parameter for place in bypasses_of(nn.MultiheadAttention(4, 2), "out_proj")} == {"weight", "bias"}
    True

    `aliases` are the other paths of a shared module: what stands above those is read too. For many paths of one
    model `bypasses` is faster. Raises AttributeError where the model has no such path.
    """
    target = model.get_submodule(path)
    above: dict[int, tuple[str, nn.Module]] = {}
    for name in (path, *aliases):
        parts, reader = name.split(".") if name else [], model
        for depth, part in enumerate(parts):
            above.setdefault(id(reader), (".".join(parts[:depth]), reader))
            child = reader._modules.get(part)
            reader = child if child is not None else reader.get_submodule(part)
    paths = {id(target): path, **{key: name for key, (name, _) in above.items()}}
    searches = [_Search(paths, name, reader, target) for name, reader in above.values()]
    return list(dict.fromkeys(place for search in searches for place in search.places()))


def fastpath_switch(module: nn.Module) -> tuple[str, Any] | None:
    """The attribute, and its value, that makes a module call its children where it would read their parameters.

    >>> from torch import nn
    >>> from surgery.bypass import fastpath_switch
    >>> fastpath_switch(nn.TransformerEncoderLayer(4, 2))
    ('activation_relu_or_gelu', 0)

    nn.TransformerEncoderLayer hands its children's weights to one fused kernel in evaluation without gradients. Its
    forward asks this attribute for nothing else: what it computes is in `activation`. None for any other module.
    """
    return ("activation_relu_or_gelu", 0) if isinstance(module, nn.TransformerEncoderLayer) else None


# --- the source of one function -------------------------------------------------------------------------------------

CALL, WRAP = "()", "~"  # steps of a chain beside attributes: the result of a call; an element of a tuple made here
Step = tuple[Any, int]  # an attribute's name, CALL, WRAP, ("[]", key), or (class, name) for super().name; and its line
Chain = tuple[Any, tuple[Step, ...]]  # begins at an argument's name, or at a function
Chains = frozenset[Chain]
_NONE: Chains = frozenset()

# What is learned of a tensor through these says nothing of its values.
_ABOUT = set(
    "dtype device shape ndim size dim numel nelement element_size stride is_contiguous requires_grad requires_grad_"
    " grad data_ptr is_meta is_cuda is_cpu layout is_sparse is_quantized is_nested itemsize nbytes get_device"
    " is_floating_point is_complex new_zeros new_ones new_empty new_full new_tensor storage untyped_storage".split()
)
# What is handed to these is asked for the same, or shown.
_INERT = set(
    "isinstance issubclass hasattr type id len print str repr callable is_tensor is_floating_point is_complex"
    " result_type has_torch_function has_torch_function_unary has_torch_function_variadic to type_as view_as expand_as"
    " reshape_as zeros_like ones_like empty_like full_like rand_like randn_like debug info warning warning_once".split()
)
_SAME = {"list", "tuple", "set", "iter", "reversed", "sorted", "cast"}


@dataclass(eq=False)
class _Facts:
    parameters: list[str]
    module: str
    file: str = ""
    start: int = 0
    lines: tuple[str, ...] = ()
    decorated: bool = False
    returns: Chains = _NONE
    uses: tuple[tuple[Chain, bool], ...] = ()  # and whether every run of the function comes there
    calls: tuple[tuple[Chain, tuple[tuple[int | str, Chain], ...], bool], ...] = ()


_facts: weakref.WeakKeyDictionary[FunctionType, _Facts] = weakref.WeakKeyDictionary()


def _facts_of(function: FunctionType) -> _Facts:
    if function not in _facts:
        plain = inspect.unwrap(function)
        _facts[function] = _Source(plain if isinstance(plain, FunctionType) else function).facts
    return _facts[function]


class _Source:
    """Reads one function: an abstract run in which a name holds the chains it may stand for."""

    def __init__(self, function: FunctionType):
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.facts = _Facts(list(names), function.__module__ or "")
        self.known = {**function.__globals__, **_cells(function)}
        self.uses: dict[Chain, None] = {}
        self.calls: dict[tuple, None] = {}
        self.returns: set[Chain] = set()
        self.sure: set[tuple] = set()  # of uses and calls, those that the block being read always comes to
        try:
            lines, start = inspect.getsourcelines(function)
            # Under an `if`, an indented method is a block like any other: no dedent that a docstring could spoil.
            node = ast.parse("if 1:\n" + "".join(lines) if lines[0][0].isspace() else "\n" + "".join(lines))
        except (OSError, TypeError, SyntaxError, IndexError):
            return
        found = next((n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
        if found is None or found.name != code.co_name:
            return
        self.block(found.body, {name: frozenset([(name, ())]) for name in self.facts.parameters})
        self.facts.file, self.facts.start, self.facts.lines = inspect.getsourcefile(function) or "", start, tuple(lines)
        self.facts.decorated = bool(found.decorator_list)
        self.facts.returns = frozenset(self.returns)
        self.facts.uses = tuple((chain, _plain(chain) in self.sure) for chain in self.uses)
        self.facts.calls = tuple((called, given, _plain(called) in self.sure) for called, given in self.calls)

    def use(self, chains: Iterable[Chain]) -> Chains:
        for chain in chains:
            self.uses[chain] = None
            self.sure.add(_plain(chain))
        return _NONE

    def apart(self, read: Callable[[], Any]) -> tuple[Any, set[tuple]]:
        """Read a branch; what it is sure to come to is not yet what the whole is sure to come to."""
        before, self.sure = self.sure, set()
        found, inside, self.sure = read(), self.sure, before
        return found, inside

    def block(self, body: list[Any], env: dict[str, Chains]) -> None:
        for node in body:
            self.statement(node, env)

    def statement(self, node: Any, env: dict[str, Chains]) -> None:
        match node:
            case ast.Assign(targets=targets, value=value):
                for target in targets:
                    self.bind(target, self.elements(value, env), env)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self.bind(target, self.expr(value, env), env)
            case ast.AugAssign(target=target, value=value):
                self.use(self.expr(target, env) | self.expr(value, env))
            case ast.Return(value=ast.expr() as value):
                self.returns |= self.expr(value, env)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.nested(node.args, node.body, env)
                env[node.name] = _NONE
            case ast.ClassDef():
                pass
            case _:
                self.compound(node, env)

    def compound(self, node: Any, env: dict[str, Chains]) -> None:
        """Any other statement: its expressions, then each of its blocks; after it a name is what any of them left."""
        branches = [dict(env)]
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self.bind(node.target, self.items(node.iter, env), env)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.expr(child, env)
            elif isinstance(child, ast.withitem):
                held = self.expr(child.context_expr, env)
                if child.optional_vars is not None:
                    self.bind(child.optional_vars, held, env)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                branches.append(dict(env))
                self.apart(lambda child=child: self.compound(child, branches[-1]))
        sure: dict[str, set[tuple]] = {"body": set(), "orelse": set(), "finalbody": set()}
        for name in sure:
            if block := getattr(node, name, None):
                branches.append(dict(env))
                for _ in range(2 if isinstance(node, (ast.For, ast.AsyncFor, ast.While)) else 1):
                    _, sure[name] = self.apart(lambda block=block: self.block(block, branches[-1]))
        self.sure |= sure["body"] & sure["orelse"] if isinstance(node, ast.If) else sure["body"] | sure["finalbody"]
        for name in {name for branch in branches for name in branch}:
            env[name] = frozenset().union(*(branch.get(name, _NONE) for branch in branches))

    def bind(self, target: ast.expr, value: Chains | list, env: dict[str, Chains]) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = _union(value)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                if not isinstance(value, list) or len(value) != len(targets):
                    value = [_item(_union(value))] * len(targets)
                for part, each in zip(targets, value, strict=True):
                    self.bind(part, each, env)
            case ast.Starred(value=inner):
                self.bind(inner, _wrap(_union(value)), env)
            case _:  # an attribute or an element: kept where it can't be followed
                self.use(_union(value))

    def elements(self, node: ast.expr, env: dict[str, Chains]) -> Chains | list:
        """The value of an expression, a tuple's by element."""
        if isinstance(node, (ast.Tuple, ast.List)) and not any(isinstance(part, ast.Starred) for part in node.elts):
            return [self.elements(part, env) for part in node.elts]
        return self.expr(node, env)

    def items(self, node: ast.expr, env: dict[str, Chains]) -> Chains | list:
        """What a loop over an expression gives at each turn."""
        match node:
            case ast.Call(func=ast.Name(id="enumerate"), args=[first, *_]):
                return [_NONE, self.items(first, env)]
            case ast.Call(func=ast.Name(id="zip"), args=parts):
                return [self.items(part, env) for part in parts]
            case ast.Call(func=ast.Attribute(value=held, attr="items" | "named_children")):
                return [_NONE, _item(self.expr(held, env))]
        return _item(self.expr(node, env))

    def nested(self, arguments: ast.arguments, body: list[Any] | ast.expr, env: dict[str, Chains]) -> None:
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        inner, before = {**env, **dict.fromkeys(names, _NONE)}, set(self.returns)
        if isinstance(body, list):
            self.block(body, inner)
        else:
            self.returns |= self.expr(body, inner)
        self.use(frozenset(self.returns - before))
        self.returns = before

    def expr(self, node: ast.expr, env: dict[str, Chains]) -> Chains:
        match node:
            case ast.Name(id=name):
                return env[name] if name in env else _known(self.known.get(name))
            case ast.Attribute(value=value, attr=attr):
                return _attribute(self.expr(value, env), attr, node.end_lineno or 0)
            case ast.Subscript(value=value, slice=index):
                self.use(self.expr(index, env))
                held = self.expr(value, env)
                key = index.value if isinstance(index, ast.Constant) else None
                return held if isinstance(index, ast.Slice) else _item(held, key, node.lineno)
            case ast.Call():
                return self.call(node, env)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return _wrap(_union([self.expr(part, env) for part in parts]))
            case ast.Dict(values=parts):
                return _wrap(_union([self.expr(part, env) for part in parts]))
            case ast.BoolOp(values=parts):
                return _union([self.expr(part, env) for part in parts])
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.expr(test, env)
                (one, sure), (other, too) = (
                    self.apart(lambda part=part: self.expr(part, env)) for part in (body, orelse)
                )
                self.sure |= sure & too
                return one | other
            case ast.NamedExpr(target=target, value=value):
                self.bind(target, held := self.expr(value, env), env)
                return held
            case ast.ListComp(elt=elt) | ast.SetComp(elt=elt) | ast.GeneratorExp(elt=elt) | ast.DictComp(value=elt):
                inner = dict(env)
                for loop in node.generators:  # type: ignore[attr-defined]
                    self.bind(loop.target, self.items(loop.iter, inner), inner)
                    for test in loop.ifs:
                        self.expr(test, inner)
                return _wrap(self.expr(elt, inner))
            case ast.Lambda(args=arguments, body=body):
                self.nested(arguments, body, env)
                return _NONE
            case ast.Starred(value=value) | ast.Await(value=value):
                return _item(self.expr(value, env))
        held = _union([self.expr(part, env) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)])
        valued = isinstance(node, (ast.BinOp, ast.Yield, ast.YieldFrom)) or (
            isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not)
        )
        return self.use(held) if valued else _NONE

    def readable(self, function: Any) -> bool:
        """A function to follow; a library's is taken to use what it is given."""
        module = (getattr(function, "__module__", None) or "").partition(".")[0]
        return isinstance(function, FunctionType) and (module != "torch" or function.__module__ == self.facts.module)

    def call(self, node: ast.Call, env: dict[str, Chains]) -> Chains:
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        arguments: list[tuple[int | str, Chains]] = [(i, self.expr(value, env)) for i, value in enumerate(node.args)]
        arguments += [(word.arg or "", self.expr(word.value, env)) for word in node.keywords]
        first = arguments[0][1] if arguments else _NONE
        if isinstance(node.func, ast.Name):
            if name == "getattr" and len(node.args) > 1:
                attr = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                return _attribute(first, attr, node.lineno) if isinstance(attr, str) else _NONE
            if name in _SAME:
                return _union([held for _, held in arguments])
            if name == "next":
                return _item(first)
            if name == "super" and "__class__" in self.known:
                return frozenset([(self.facts.parameters[0], ((self.known["__class__"], node.lineno),))])
        called = self.expr(node.func, env)
        if isinstance(node.func, ast.Attribute) and name in ("values", "children"):
            return self.expr(node.func.value, env)
        given = tuple((place, chain) for place, held in arguments for chain in held)
        followed = [chain for chain in called if isinstance(chain[0], str) or self.readable(chain[0])]
        for chain in followed:
            self.calls[chain, () if name in _INERT else given] = None
            self.sure.add(_plain(chain))
        if not followed and name not in _INERT:
            self.use(frozenset(chain for _, chain in given))
        return frozenset((root, (*steps, (CALL, node.lineno))) for root, steps in followed)


def _plain(chain: Chain) -> tuple:
    return (chain[0], *(step for step, _ in chain[1]))


def _union(value: Chains | list) -> Chains:
    return frozenset().union(*map(_union, value)) if isinstance(value, list) else value


def _wrap(chains: Chains) -> Chains:
    return frozenset((root, (*steps, (WRAP, 0))) for root, steps in chains)


def _item(chains: Chains, key: Any = None, line: int = 0) -> Chains:
    unwrapped = {(r, s[:-1]) for r, s in chains if s and s[-1][0] == WRAP}
    return frozenset(unwrapped | {(r, (*s, (("[]", key), line))) for r, s in chains if not s or s[-1][0] != WRAP})


def _attribute(chains: Chains, name: str, line: int) -> Chains:
    found = set()
    for root, steps in chains:
        last = steps[-1][0] if steps else None
        if isinstance(last, type):
            found.add((root, (*steps[:-1], ((last, name), line))))
        elif isinstance(root, (ModuleType, type)):
            found |= _known(vars(root).get(name))
        elif last != WRAP and name not in _ABOUT:
            found.add((root, (*steps, (name, line))))
    return frozenset(found)


def _known(value: Any) -> Chains:
    value = value.__func__ if isinstance(value, staticmethod) else value
    return frozenset([(value, ())]) if isinstance(value, (FunctionType, ModuleType, type)) else _NONE


def _cells(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # a name that is bound later
            pass
    return found


# --- the live modules -----------------------------------------------------------------------------------------------


class _Held(NamedTuple):
    path: str
    module: nn.Module

    def child(self, name: str) -> Iterator[_Held]:
        if (module := self.module._modules[name]) is not None:
            yield _Held(f"{self.path}.{name}" if self.path else name, module)

    @property
    def cls(self) -> type[nn.Module]:
        cls = type(self.module)
        return getattr(cls, "_surgery_base", cls)  # a site's own code is its base's


class _Parameter(NamedTuple):
    owner: _Held
    name: str
    facts: _Facts  # of the function that reads it
    line: int


class _Function(NamedTuple):
    code: Any  # a FunctionType
    owner: _Held | None = None


class _Search:
    """The readings that one module's forward leads to: of the parameters of `target`, or of anyone."""

    def __init__(self, paths: dict[int, str], path: str, module: nn.Module, target: nn.Module | None = None):
        self.paths, self.target, self.entry = paths, target, _Held(path, module)
        self.found: dict[tuple, bool] = {}
        self.done: set[tuple] = set()
        forward = _lookup(self.entry.cls.__mro__, "forward")
        if isinstance(forward, FunctionType) and self.promising():
            facts = _facts_of(forward)
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

    def run(self, facts: _Facts, given: dict[str, list], reader: _Held, sure: bool, returned: bool) -> None:
        """Follow one function. `sure`: every call comes here; `returned`: what it gives back counts as used."""
        key = (id(facts), sure, returned, *((name, _identity(thing)) for name in given for thing in given[name]))
        if key in self.done or len(self.done) > 500:  # functions from one forward: far above any seen, far below a hang
            return
        self.done.add(key)
        for chain, always in (*facts.uses, *((chain, True) for chain in facts.returns if returned)):
            self.use(self.things(chain, given, facts), reader, sure and always)
        for called, arguments, always in facts.calls:
            values = [(place, thing) for place, chain in arguments for thing in self.things(chain, given, facts)]
            functions = [thing for thing in self.things(called, given, facts) if isinstance(thing, _Function)]
            for function in functions:
                self.call(function, values, facts, reader, sure and always)
            if not functions:
                self.use([thing for _, thing in values], reader, sure and always)

    def call(self, function: _Function, values: list[tuple], caller: _Facts, reader: _Held, sure: bool) -> None:
        facts = _facts_of(function.code)
        names = facts.parameters[1:] if function.owner else facts.parameters
        given: dict[str, list] = {}
        for place, thing in values:
            name = place if isinstance(place, str) else names[place] if place < len(names) else ""
            # What a plain function of the same file does with a tensor can be read; a decorator may replace it.
            near = isinstance(thing, _Held) or (facts.module == caller.module and not facts.decorated)
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
            if isinstance(thing, _Function) and thing.owner:  # handed on and called later: checkpoint(self.block, x)
                self.call(thing, [], _facts_of(thing.code), reader, sure)
            if not isinstance(thing, _Parameter) or thing.owner.module is self.entry.module:
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

    def things(self, chain: Chain, given: dict[str, list], facts: _Facts, depth: int = 0) -> list[Any]:
        """What a chain is in the live model: modules, parameters, functions."""
        root, steps = chain
        found = given.get(root, []) if isinstance(root, str) else [_Function(root)]
        for step, line in steps:
            if step != WRAP and found:
                found = [after for thing in found for after in self.step(thing, step, facts, line, depth)]
        return found

    def step(self, thing: Any, step: Any, facts: _Facts, line: int, depth: int) -> Iterable[Any]:
        if isinstance(thing, _Parameter):  # a view, an element or a cast of it
            return [thing]
        if isinstance(thing, _Function):
            return self.results(thing, depth) if step == CALL else []
        if step == CALL or isinstance(step, type):
            return []
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
            return [_Held(self.paths[id(value)], value)] if known else []
        value = _lookup(thing.cls.__mro__, step)
        if isinstance(value, property) and isinstance(value.fget, FunctionType):
            return self.results(_Function(value.fget, thing), depth)
        return _bound(value, thing)

    def results(self, function: _Function, depth: int) -> Iterator[Any]:
        facts = _facts_of(function.code)
        if function.owner and facts.parameters and depth < 4:
            for chain in facts.returns:
                yield from self.things(chain, {facts.parameters[0]: [function.owner]}, facts, depth + 1)


def _identity(thing: Any) -> tuple:
    return tuple(part if isinstance(part, str) else id(getattr(part, "module", part)) for part in thing)


def _lookup(mro: Iterable[type], name: str) -> Any:
    return next((vars(cls)[name] for cls in mro if name in vars(cls)), None)


def _inherited(cls: type, after: type, name: str) -> Any:
    return _lookup(cls.__mro__[cls.__mro__.index(after) + 1 :] if after in cls.__mro__ else (), name)


_found_leads: weakref.WeakKeyDictionary[type, set[str]] = weakref.WeakKeyDictionary()


def _leads(cls: type[nn.Module]) -> set[str]:
    """The attributes over which the forward of a class may come to another module's parameters; `*`: over any."""
    if cls not in _found_leads:
        _found_leads[cls] = _Leads(cls).names
    return _found_leads[cls]


class _Leads:
    """What `_Search` may come to from a class, before there is a module: too much rather than too little."""

    def __init__(self, cls: type[nn.Module]):
        self.cls, self.names = cls, set[str]()
        self.todo: list[tuple[_Facts, str]] = []
        self.follow(_lookup(cls.__mro__, "forward"))
        for facts, root in self.todo:  # grows on the way
            for chain in (*facts.returns, *(chain for chain, _ in facts.uses)):
                self.lead(chain, root)
            for called, arguments, _ in facts.calls:
                self.lead(called, root)
                # A child's forward does not bypass what it is given; a function or a method may.
                child = called[0] == root and len(called[1]) == 1 and not self.function(called[1][0][0])
                for chain in (chain for _, chain in arguments if chain[0] == root and not child):
                    if chain[1]:
                        self.lead(chain, root, handed=True)
                    elif isinstance(called[0], FunctionType):
                        self.follow(called[0], *_facts_of(called[0]).parameters)
                    else:
                        self.names.add("*")

    def follow(self, function: Any, *roots: str) -> None:
        if isinstance(function, FunctionType) and function not in _MODULE:
            facts = _facts_of(function)
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
            facts = _facts_of(function)
            for own, more in facts.returns if depth < 4 else ():
                self.lead((own, (*more, *chain[1][1:])), facts.parameters[0], handed, depth + 1)
            return
        rest = steps[1 : steps.index(CALL)] if CALL in steps else steps[1:]
        # What a child's forward gives back leads nowhere: a call counts after an attribute of the child alone.
        if (handed and CALL not in steps) or any(isinstance(step, str) for step in rest):
            self.names.add(steps[0] if isinstance(steps[0], str) else "*")


def _bound(value: Any, held: _Held) -> list[_Function]:
    if isinstance(value, staticmethod):
        return [_Function(value.__func__)] if isinstance(value.__func__, FunctionType) else []
    # nn.Module's own methods (parameters(), to(), __call__) compute nothing, and who calls a forward bypasses nothing.
    if not isinstance(value, FunctionType) or value.__name__ == "forward" or value in _MODULE:
        return []
    return [_Function(value, held)]


_MODULE = frozenset(value for value in vars(nn.Module).values() if isinstance(value, FunctionType))


def _keys(module: nn.Module, key: Any) -> list[str]:
    names = list(module._modules)
    if isinstance(key, int) and isinstance(module, (nn.Sequential, nn.ModuleList)):
        return names[key : key + 1 or None]
    return [name for name in names if name == key] if isinstance(key, str) else names
