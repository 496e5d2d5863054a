"""Reads from a function's source what it uses and calls of its arguments, as chains of attributes.

The source is run abstractly, once for each function. A name stands for the chains that it may hold, and the branches of
an `if` are joined. Using a tensor's values is distinguished from looking at its dtype, device or shape.
`surgery.planning.direct_reads` follows the chains through a model.
"""

from __future__ import annotations

import ast
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from surgery.planning.settled_branches import Tests

__all__ = ["CALL", "WRAP", "Chain", "Facts", "facts_of"]

CALL, WRAP = "()", "~"  # steps of a chain that are not attributes: a call's result; an element of a new tuple
Step = tuple[Any, int]  # an attribute's name, CALL, WRAP, ("[]", key), or (class, name) for super().name; and its line
Chain = tuple[Any, tuple[Step, ...]]  # begins at an argument's name, or at a function
Chains = frozenset[Chain]
_NONE: Chains = frozenset()

# Attributes of a tensor that do not depend on its values.
_ABOUT = set(
    "dtype device shape ndim size dim numel nelement element_size stride is_contiguous requires_grad requires_grad_"
    " grad data_ptr is_meta is_cuda is_cpu layout is_sparse is_quantized is_nested itemsize nbytes get_device"
    " is_floating_point is_complex new_zeros new_ones new_empty new_full new_tensor storage untyped_storage".split()
)
# Functions that use only such attributes of their arguments, or print them.
_INERT = set(
    "isinstance issubclass hasattr type id len print str repr callable is_tensor is_floating_point is_complex"
    " result_type has_torch_function has_torch_function_unary has_torch_function_variadic to type_as view_as expand_as"
    " reshape_as zeros_like ones_like empty_like full_like rand_like randn_like debug info warning warning_once".split()
)
# Attributes that give a module's children without their names.
_ANY_CHILD = {
    "_modules",
    "__dict__",
    "get_submodule",
    "named_modules",
    "modules",
    "named_children",
    "children",
    "apply",
}
_SAME = {"list", "tuple", "set", "iter", "reversed", "sorted", "cast"}


@dataclass(eq=False)
class Facts:
    """What the source of one function shows: returned chains, used chains, calls, and the tests around calls."""

    parameters: list[str]
    module: str
    file: str = ""
    start: int = 0
    lines: tuple[str, ...] = ()
    decorated: bool = False
    dynamic: bool = False  # it accesses attributes by names that are not in its source
    returns: Chains = _NONE
    uses: tuple[tuple[Chain, bool], ...] = ()  # with whether every run of the function reaches the use
    calls: tuple[tuple[Chain, tuple[tuple[int | str, Chain], ...], bool], ...] = ()
    behind: dict[Chain, tuple[Tests, ...]] = field(default_factory=dict)  # by called chain: the tests around the calls


_facts: weakref.WeakKeyDictionary[FunctionType, Facts] = weakref.WeakKeyDictionary()


def facts_of(function: FunctionType) -> Facts:
    if function not in _facts:
        plain = inspect.unwrap(function)
        _facts[function] = _Source(plain if isinstance(plain, FunctionType) else function).facts
    return _facts[function]


class _Source:
    """Runs one function abstractly: `env` maps each name to the chains that it may hold."""

    def __init__(self, function: FunctionType):
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.facts = Facts(list(names), function.__module__ or "")
        self.known = {**function.__globals__, **_cells(function)}
        self.uses: dict[Chain, None] = {}
        self.calls: dict[tuple, None] = {}
        self.behind: dict[Chain, set[Tests]] = {}
        self.tests: Tests = ()
        self.returns: set[Chain] = set()
        self.sure: set[tuple] = set()  # the uses and calls that every run of the present block reaches
        try:
            lines, start = inspect.getsourcelines(function)
            # An indented method parses as a block under `if 1:`; dedenting could break its docstring.
            node = ast.parse("if 1:\n" + "".join(lines) if lines[0][0].isspace() else "\n" + "".join(lines))
        except (OSError, TypeError, SyntaxError, IndexError):
            return
        definition = next((n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))), None)
        if definition is None or definition.name != code.co_name:
            return
        self.block(definition.body, {name: frozenset([(name, ())]) for name in self.facts.parameters})
        self.facts.file, self.facts.start, self.facts.lines = inspect.getsourcefile(function) or "", start, tuple(lines)
        self.facts.decorated = bool(definition.decorator_list)
        self.facts.returns = frozenset(self.returns)
        self.facts.uses = tuple((chain, _plain(chain) in self.sure) for chain in self.uses)
        self.facts.behind = {chain: tuple(tests) for chain, tests in self.behind.items()}
        self.facts.calls = tuple((called, arguments, _plain(called) in self.sure) for called, arguments in self.calls)

    def use(self, chains: Iterable[Chain]) -> Chains:
        for chain in chains:
            self.uses[chain] = None
            plain = _plain(chain)  # its prefixes count, too: one branch may use weight, another weight.t()
            self.sure.update(plain[:end] for end in range(1, len(plain) + 1))
        return _NONE

    def apart(self, read: Callable[[], Any]) -> tuple[Any, set[tuple]]:
        """Read a branch, and return separately what every run of the branch reaches."""
        before, self.sure = self.sure, set()
        result, inside, self.sure = read(), self.sure, before
        return result, inside

    @contextmanager
    def within(self, node: Any, name: str) -> Iterator[None]:
        """Read a block of a statement together with the test that leads to it."""
        before = self.tests
        if isinstance(node, ast.If):
            self.tests = (*before, (node.test, name == "body"))
        try:
            yield
        finally:
            self.tests = before

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
        """Any other statement: its expressions, then its blocks. Afterwards a name holds the chains of all blocks."""
        branches = [dict(env)]
        if isinstance(node, (ast.For, ast.AsyncFor)):
            self.bind(node.target, self.items(node.iter, env), env)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.expr):
                self.expr(child, env)
            elif isinstance(child, ast.withitem):
                value = self.expr(child.context_expr, env)
                if child.optional_vars is not None:
                    self.bind(child.optional_vars, value, env)
            elif isinstance(child, (ast.ExceptHandler, ast.match_case)):
                branches.append(dict(env))
                self.apart(lambda child=child: self.compound(child, branches[-1]))
        sure: dict[str, set[tuple]] = {"body": set(), "orelse": set(), "finalbody": set()}
        for name in sure:
            if block := getattr(node, name, None):
                branches.append(dict(env))
                for _ in range(2 if isinstance(node, (ast.For, ast.AsyncFor, ast.While)) else 1):
                    with self.within(node, name):
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
            case _:  # stored in an attribute or an element, which is not followed
                self.use(_union(value))

    def elements(self, node: ast.expr, env: dict[str, Chains]) -> Chains | list:
        """The value of an expression; of a tuple, the value of each element."""
        if isinstance(node, (ast.Tuple, ast.List)) and not any(isinstance(part, ast.Starred) for part in node.elts):
            return [self.elements(part, env) for part in node.elts]
        return self.expr(node, env)

    def items(self, node: ast.expr, env: dict[str, Chains]) -> Chains | list:
        """The loop variable's value in a loop over an expression."""
        match node:
            case ast.Call(func=ast.Name(id="enumerate"), args=[first, *_]):
                return [_NONE, self.items(first, env)]
            case ast.Call(func=ast.Name(id="zip"), args=parts):
                return [self.items(part, env) for part in parts]
            case ast.Call(func=ast.Attribute(value=owner, attr="items" | "named_children")):
                return [_NONE, _item(self.expr(owner, env))]
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
                self.facts.dynamic |= attr in _ANY_CHILD
                return _attribute(self.expr(value, env), attr, node.end_lineno or 0)
            case ast.Subscript(value=value, slice=index):
                self.use(self.expr(index, env))
                chains = self.expr(value, env)
                key = index.value if isinstance(index, ast.Constant) else None
                return chains if isinstance(index, ast.Slice) else _item(chains, key, node.lineno)
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
                (first, sure), (second, too) = (
                    self.apart(lambda part=part: self.expr(part, env)) for part in (body, orelse)
                )
                self.sure |= sure & too
                return first | second
            case ast.NamedExpr(target=target, value=value):
                self.bind(target, chains := self.expr(value, env), env)
                return chains
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
        chains = _union([self.expr(part, env) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)])
        valued = isinstance(node, (ast.BinOp, ast.Yield, ast.YieldFrom)) or (
            isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not)
        )
        return self.use(chains) if valued else _NONE

    def readable(self, function: Any) -> bool:
        """Whether to follow a function. Functions of torch are taken to use all their arguments."""
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
                self.facts.dynamic |= attr is None
                return _attribute(first, attr, node.lineno) if isinstance(attr, str) else _NONE
            if name in _SAME:
                return _union([chains for _, chains in arguments])
            if name == "next":
                return _item(first)
            if name == "super" and "__class__" in self.known:
                return frozenset([(self.facts.parameters[0], ((self.known["__class__"], node.lineno),))])
        called = self.expr(node.func, env)
        if isinstance(node.func, ast.Attribute) and name in ("values", "children"):
            return self.expr(node.func.value, env)
        passed = tuple((place, chain) for place, chains in arguments for chain in chains)
        followed = [chain for chain in called if isinstance(chain[0], str) or self.readable(chain[0])]
        for chain in followed:
            self.calls[chain, () if name in _INERT else passed] = None
            self.behind.setdefault(chain, set()).add(self.tests)
            self.sure.add(_plain(chain))
        if not followed and name not in _INERT:
            self.use(frozenset(chain for _, chain in passed))
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
    result = set()
    for root, steps in chains:
        last = steps[-1][0] if steps else None
        if isinstance(last, type):
            result.add((root, (*steps[:-1], ((last, name), line))))
        elif isinstance(root, (ModuleType, type)):
            result |= _known(vars(root).get(name))
        elif last != WRAP and name not in _ABOUT:
            result.add((root, (*steps, (name, line))))
    return frozenset(result)


def _known(value: Any) -> Chains:
    value = value.__func__ if isinstance(value, staticmethod) else value
    return frozenset([(value, ())]) if isinstance(value, (FunctionType, ModuleType, type)) else _NONE


def _cells(function: FunctionType) -> dict[str, Any]:
    cells = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            cells[name] = cell.cell_contents
        except ValueError:  # the name is bound later
            pass
    return cells
