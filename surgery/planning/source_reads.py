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
from types import FunctionType
from typing import Any

from surgery.planning.attribute_chains import (
    CALL,
    NO_CHAINS,
    Chain,
    Chains,
    attribute_of,
    closure_values,
    global_value,
    item_of,
    union,
    without_lines,
    wrapped,
)
from surgery.planning.settled_branches import Tests
from surgery.planning.source_facts import Facts

__all__ = ["facts_of"]

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


_facts: weakref.WeakKeyDictionary[FunctionType, Facts] = weakref.WeakKeyDictionary()


def facts_of(function: FunctionType) -> Facts:
    """The facts of a function, or of the function inside its decorators. Each function is read once."""
    if function not in _facts:
        inner = inspect.unwrap(function)
        _facts[function] = _SourceReader(inner if isinstance(inner, FunctionType) else function).facts
    return _facts[function]


class _SourceReader:
    """Runs one function abstractly: `env` maps each name to the chains that it may hold."""

    def __init__(self, function: FunctionType):
        code = function.__code__
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.facts = Facts(list(names), function.__module__ or "")
        self.globals = {**function.__globals__, **closure_values(function)}
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
        self.facts.uses = tuple((chain, without_lines(chain) in self.sure) for chain in self.uses)
        self.facts.behind = {chain: tuple(tests) for chain, tests in self.behind.items()}
        self.facts.calls = tuple(
            (callee, arguments, without_lines(callee) in self.sure) for callee, arguments in self.calls
        )

    def use(self, chains: Iterable[Chain]) -> Chains:
        for chain in chains:
            self.uses[chain] = None
            path = without_lines(chain)  # prefixes count, too: one branch may use weight, and another weight.t()
            self.sure.update(path[:end] for end in range(1, len(path) + 1))
        return NO_CHAINS

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
        """Read one statement; `env` maps names to chains."""
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
                env[node.name] = NO_CHAINS
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
            env[name] = frozenset().union(*(branch.get(name, NO_CHAINS) for branch in branches))

    def bind(self, target: ast.expr, value: Chains | list, env: dict[str, Chains]) -> None:
        match target:
            case ast.Name(id=name):
                env[name] = union(value)
            case ast.Tuple(elts=targets) | ast.List(elts=targets):
                if not isinstance(value, list) or len(value) != len(targets):
                    value = [item_of(union(value))] * len(targets)
                for part, part_value in zip(targets, value, strict=True):
                    self.bind(part, part_value, env)
            case ast.Starred(value=inner):
                self.bind(inner, wrapped(union(value)), env)
            case _:  # stored in an attribute or an element, which is not followed
                self.use(union(value))

    def elements(self, node: ast.expr, env: dict[str, Chains]) -> Chains | list:
        """The value of an expression; of a tuple, the value of each element."""
        if isinstance(node, (ast.Tuple, ast.List)) and not any(isinstance(part, ast.Starred) for part in node.elts):
            return [self.elements(part, env) for part in node.elts]
        return self.expr(node, env)

    def items(self, node: ast.expr, env: dict[str, Chains]) -> Chains | list:
        """The loop variable's value in a loop over an expression."""
        match node:
            case ast.Call(func=ast.Name(id="enumerate"), args=[first, *_]):
                return [NO_CHAINS, self.items(first, env)]
            case ast.Call(func=ast.Name(id="zip"), args=parts):
                return [self.items(part, env) for part in parts]
            case ast.Call(func=ast.Attribute(value=owner, attr="items" | "named_children")):
                return [NO_CHAINS, item_of(self.expr(owner, env))]
        return item_of(self.expr(node, env))

    def nested(self, arguments: ast.arguments, body: list[Any] | ast.expr, env: dict[str, Chains]) -> None:
        names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
        inner, before = {**env, **dict.fromkeys(names, NO_CHAINS)}, set(self.returns)
        if isinstance(body, list):
            self.block(body, inner)
        else:
            self.returns |= self.expr(body, inner)
        self.use(frozenset(self.returns - before))
        self.returns = before

    def expr(self, node: ast.expr, env: dict[str, Chains]) -> Chains:
        """The chains of an expression; values that it uses are noted."""
        match node:
            case ast.Name(id=name):
                return env[name] if name in env else global_value(self.globals.get(name))
            case ast.Attribute(value=value, attr=attr):
                self.facts.dynamic |= attr in _ANY_CHILD
                return attribute_of(self.expr(value, env), attr, node.end_lineno or 0)
            case ast.Subscript(value=value, slice=index):
                self.use(self.expr(index, env))
                chains = self.expr(value, env)
                key = index.value if isinstance(index, ast.Constant) else None
                return chains if isinstance(index, ast.Slice) else item_of(chains, key, node.lineno)
            case ast.Call():
                return self.call(node, env)
            case ast.Tuple(elts=parts) | ast.List(elts=parts) | ast.Set(elts=parts):
                return wrapped(union([self.expr(part, env) for part in parts]))
            case ast.Dict(values=parts):
                return wrapped(union([self.expr(part, env) for part in parts]))
            case ast.BoolOp(values=parts):
                return union([self.expr(part, env) for part in parts])
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
                return wrapped(self.expr(elt, inner))
            case ast.Lambda(args=arguments, body=body):
                self.nested(arguments, body, env)
                return NO_CHAINS
            case ast.Starred(value=value) | ast.Await(value=value):
                return item_of(self.expr(value, env))
        chains = union([self.expr(part, env) for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)])
        valued = isinstance(node, (ast.BinOp, ast.Yield, ast.YieldFrom)) or (
            isinstance(node, ast.UnaryOp) and not isinstance(node.op, ast.Not)
        )
        return self.use(chains) if valued else NO_CHAINS

    def readable(self, function: Any) -> bool:
        """Whether to follow a function. Functions of torch are taken to use all their arguments."""
        module = (getattr(function, "__module__", None) or "").partition(".")[0]
        return isinstance(function, FunctionType) and (module != "torch" or function.__module__ == self.facts.module)

    def call(self, node: ast.Call, env: dict[str, Chains]) -> Chains:
        """Note a call and its arguments; return the chains of its result."""
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        arguments: list[tuple[int | str, Chains]] = [(i, self.expr(value, env)) for i, value in enumerate(node.args)]
        arguments += [(word.arg or "", self.expr(word.value, env)) for word in node.keywords]
        first = arguments[0][1] if arguments else NO_CHAINS
        if isinstance(node.func, ast.Name):
            if name == "getattr" and len(node.args) > 1:
                attr = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
                self.facts.dynamic |= attr is None
                return attribute_of(first, attr, node.lineno) if isinstance(attr, str) else NO_CHAINS
            if name in _SAME:
                return union([chains for _, chains in arguments])
            if name == "next":
                return item_of(first)
            if name == "super" and "__class__" in self.globals:
                return frozenset([(self.facts.parameters[0], ((self.globals["__class__"], node.lineno),))])
        callees = self.expr(node.func, env)
        if isinstance(node.func, ast.Attribute) and name in ("values", "children"):
            return self.expr(node.func.value, env)
        passed = tuple((place, chain) for place, chains in arguments for chain in chains)
        followed = [chain for chain in callees if isinstance(chain[0], str) or self.readable(chain[0])]
        for chain in followed:
            self.calls[chain, () if name in _INERT else passed] = None
            self.behind.setdefault(chain, set()).add(self.tests)
            self.sure.add(without_lines(chain))
        if not followed and name not in _INERT:
            self.use(frozenset(chain for _, chain in passed))
        return frozenset((root, (*steps, (CALL, node.lineno))) for root, steps in followed)
