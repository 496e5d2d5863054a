"""Random programs: the same lines of Python in a rewrite and in a plain forward."""

from __future__ import annotations

import linecache
import random
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from surgery import Rule, Site, Structure, rule
from surgery.forward.graph_functions import same_dtype

__all__ = ["BASES", "Inner", "Program", "SourceRule", "by_hand"]
__all__ += ["inner_base", "inner_by_hand", "inner_program", "program"]

SIZE = 4
Lines = list[str]


# Bases whose output is edited -------------------------------------------------------------------------------------


class Straight(nn.Module):
    m: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.m = nn.Buffer(torch.zeros(SIZE))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh()) + self.m


class Optional(Straight):
    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.one(x)
        if scale > 0.5:
            h = torch.sigmoid(h)
        return self.two(h) * scale


class Counting(Straight):
    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        self.m.add_(1.0)
        return y + self.m


class Dropping(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.dropout(self.one(x), 0.25, self.training))


class Overwriting(Straight):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


BASES: dict[str, Any] = {
    "linear": lambda: nn.Linear(SIZE, SIZE),
    "relu": lambda: nn.ReLU(inplace=True),
    "straight": Straight,
    "optional": Optional,
    "counting": Counting,
    "dropping": Dropping,
    "overwriting": Overwriting,
    "norm": lambda: nn.BatchNorm1d(SIZE),
}


# Programs on the output -------------------------------------------------------------------------------------------


@dataclass
class Program:
    """Lines before and after the call of the own forward; the last variable of the later lines is the output."""

    before: Lines
    after: Lines
    result: str
    features: set[str] = field(default_factory=set)

    def as_rewrite(self) -> str:
        return "\n".join(
            [*_HEAD, "x = site.input", *self.before, "y = site.output", *self.after, f"result = {self.result}"]
        )


_HEAD = ["w = site.param('w', W)", "m = site.buffer('m', M)", "training = site.training"]


class _Writer:
    def __init__(self, random: random.Random, stem: str):
        self.random, self.stem = random, stem
        self.count = 0
        self.features: set[str] = set()
        self.fresh: list[str] = []  # tensors that may be written to

    def name(self) -> str:
        self.count += 1
        return f"{self.stem}{self.count}"

    def lines(self, pool: list[str], length: int) -> Lines:
        lines: Lines = []
        for _ in range(length):
            lines += self.line(pool)
        return lines

    def line(self, pool: list[str]) -> Lines:
        a, b, new = self.random.choice(pool), self.random.choice(pool[-3:]), self.name()
        kind = self.random.choice([
            *["binary"] * 3, *["unary"] * 2, "plain", "linear", *["factory"] * 3, "view", "unpack", "chunk", "topk",
            *["fresh"] * 2, *["write"] * 2, "set", "iadd", "count", "average", "read", "rand", "drop", "noise",
            "no_grad", "autocast", "enable_grad", "hook", "where", "function", "loop", "mode", "list",
        ])  # fmt: skip
        templates: Lines = []
        if kind == "binary":
            templates = [
                f"{new} = " + self.random.choice(["{a} + {b}", "{a} - {b}", "{a} * {b}", "torch.maximum({a}, {b})"])
            ]
        elif kind == "unary":
            templates = [
                f"{new} = "
                + self.random.choice(["torch.tanh({a})", "{a}.cos()", "F.gelu({a})", "F.softmax({a}, -1)", "-{a}"])
            ]
        elif kind == "plain":
            templates = [f"{new} = " + self.random.choice(["{a} * 0.5", "1.5 - {a}", "2.0 * {a} + 1"])]
        elif kind == "linear":
            templates = [f"{new} = F.linear({{a}}, w.to({{a}}.dtype))"]
        elif kind == "factory":
            templates = [f"{new} = " + self.random.choice([
                "{a} + torch.arange({a}.shape[1], device={a}.device)", "{a} @ torch.eye(4).to({a}.dtype)",
                "{a} + torch.zeros({a}.shape[0], 1)", "{a} * torch.linspace(0, 1, {a}.shape[-1])",
                "{a} + torch.full_like({a}, 0.3)", "{a}.masked_fill(torch.ones(4, 4).tril()[1] == 0, 0.0)",
                "{a} + {a}.new_ones(4) / {a}.shape[0]", "{a} * torch.tensor([1.0, 2.0, 0.5, 1.0])",
            ])]  # fmt: skip
        elif kind == "view":
            templates = [f"{new} = {{a}}.reshape({{a}}.shape[0], 2, 2).transpose(1, 2).reshape({{a}}.shape)"]
        elif kind == "unpack":
            templates = [
                "rows, columns = {a}.shape",
                f"{new} = {{a}}.reshape(rows * columns).view(rows, columns) / columns",
            ]
        elif kind == "chunk":
            templates = ["left, right = {a}.chunk(2, -1)", f"{new} = torch.cat([right, left], -1)"]
        elif kind == "topk":
            templates = ["top, index = {a}.topk(2, -1)", f"{new} = torch.zeros_like({{a}}).scatter(-1, index, top)"]
        elif kind == "fresh":
            templates = [f"{new} = {{a}}.clone()"]
            self.fresh.append(new)
        elif kind in ("write", "set", "iadd") and self.fresh:
            f = self.random.choice(self.fresh)
            self.features.add("writes")
            templates = [{
                "write": self.random.choice([
                    f"{f}.mul_(0.5)", f"{f}.add_({{a}})", f"{f}[:, 1:].zero_()", f"F.relu({f}, inplace=True)",
                ]),
                "set": f"{f}[:, 0] = {{a}}[:, 1]",
                "iadd": f"{f} += {{a}}",
            }[kind]]  # fmt: skip
        elif kind == "count":
            self.features.add("writes")
            templates = ["m.add_(1.0)"]
        elif kind == "average":
            self.features.add("writes")
            templates = ["m.mul_(0.9).add_({a}.detach().float().mean(0))"]
        elif kind == "read":
            templates = [f"{new} = {{a}} - m"]
        elif kind == "rand":
            self.features.add("draws")
            templates = [f"{new} = {{a}} + torch.rand_like({{b}})"]
        elif kind == "noise":
            self.features.add("draws")
            templates = [f"{new} = {{a}} + torch.rand(4) * 0.1"]
        elif kind == "drop":
            self.features.add("draws")
            templates = [f"{new} = F.dropout({{a}}, 0.25, training)"]
        elif kind == "no_grad":
            templates = ["with torch.no_grad():", f"    {new} = {{a}} * 2.0"]
        elif kind == "enable_grad":
            templates = ["with torch.enable_grad():", f"    {new} = {{a}} * {{b}}"]
        elif kind == "autocast":
            templates = ["with torch.autocast('cpu', torch.bfloat16):", f"    {new} = ({{a}} @ w).to({{a}}.dtype)"]
        elif kind == "hook":
            self.features.add("hook")
            templates = [f"{new} = {{a}} * w.sum()", f"{new}.register_hook(doubled)"]
        elif kind == "where":
            templates = [f"{new} = torch.where({{a}} > 0, {{a}}, {{b}} * 0.1)"]
        elif kind == "function":
            templates = [f"{new} = gated({{a}}, {{b}})"]
        elif kind == "mode":
            templates = ["if training:", f"    {new} = {{a}} * 2.0", "else:", f"    {new} = {{a}} + {{b}}"]
        elif kind == "list":
            templates = [f"{new} = torch.cat([part * 2.0 for part in {{a}}.chunk(2, -1)], -1)"]
        elif kind == "loop":
            templates = [f"{new} = {{a}}", "for scale in (0.5, 2.0):", f"    {new} = {new} * scale + {{b}}"]
        lines = [line.format(a=a, b=b) for line in templates]
        if any(line.strip().startswith(f"{new} =") for line in lines):
            pool.append(new)
        return lines


def doubled(grad: Tensor) -> Tensor:
    return grad * 2


def gated(a: Any, b: Any) -> Any:
    gate = torch.sigmoid(a)
    return gate * a + (1 - gate) * b


def program(seed: int, stem: str = "v") -> Program:
    draw = random.Random(seed)
    writer = _Writer(draw, stem)
    pool = ["x"]
    before = writer.lines(pool, draw.randint(0, 3))
    pool.append("y")
    after = writer.lines(pool, draw.randint(1, 7))
    return Program(before, after, draw.choice(pool[-2:]), writer.features)


@rule("test-source")
class SourceRule(Rule):
    """A rule with generated source for its rewrite."""

    source: str = "result = None"
    seed: int = 0
    identity = False

    def rewrite(self, site: Site) -> Any:
        name = f"<program {hash(self.source)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)
        space: dict[str, Any] = {**NAMES, "site": site, **starts(self.seed)}
        exec(compile(self.source, name, "exec"), space)
        return space["result"]


def starts(seed: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"W": torch.randn(SIZE, SIZE, generator=draw), "M": torch.zeros(SIZE)}


NAMES: dict[str, Any] = {"torch": torch, "F": F, "doubled": doubled, "gated": gated}


def by_hand(base: nn.Module, programs: list[Program], seeds: list[int]) -> nn.Module:
    """The base with the programs written into its forward; it has the base's tensors."""
    cls: Any = type(base)
    lines = ["def forward(self, x):", "    training = self.training"]
    for kind in ("before", "after"):
        for index, each in enumerate(programs):
            body = [f"w, m = self.w_{index}, self.m_{index}", *getattr(each, kind)]
            if kind == "after":
                body += [f"result = {each.result}", "y = same_dtype(result, y)"]
            lines += [f"    {line}" for line in body]
        if kind == "before":
            lines.append("    y = Base.forward(self, x)")
    lines.append("    return y")
    return _build_program(base, cls, lines, seeds)


def _build_program(base: nn.Module, cls: Any, lines: Lines, seeds: list[int]) -> nn.Module:
    source = "\n".join(lines)
    name = f"<by hand {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = {**NAMES, "Base": cls, "same_dtype": same_dtype, "in_dtype": _in_dtype}
    exec(compile(source, name, "exec"), space)
    module = object.__new__(type(cls.__name__, (cls,), {"forward": space["forward"]}))
    module.__dict__.update(base.__dict__)
    for each in ("_parameters", "_buffers", "_modules"):
        module.__dict__[each] = dict(base.__dict__[each])
    for index, seed in enumerate(seeds):
        module.register_parameter(f"w_{index}", nn.Parameter(starts(seed)["W"]))
        module.register_buffer(f"m_{index}", starts(seed)["M"])
    return module


def _in_dtype(new: Tensor, dtype: torch.dtype) -> Tensor:
    return new.to(dtype) if new.is_floating_point() and new.dtype != dtype else new


# Programs inside of a forward -------------------------------------------------------------------------------------


@dataclass
class Inner:
    """A forward as lines, and rewrites of some lines: a pattern, and the expression that replaces it.

    `stacked`: each rewrite is a separate rule; the last rule for a value wins.
    """

    lines: Lines
    edits: list[tuple[str, str]]
    backwards: bool = False
    stacked: bool = False

    def forward(self) -> str:
        return "\n".join(["def forward(self, x):", *[f"    {line}" for line in self.lines]])

    def edited(self) -> Lines:
        """The lines with the replaced expressions."""
        lines = list(self.lines)
        for number, (pattern, new) in enumerate(self.edits):
            new = new.replace("w.to", f"self.w_{number if self.stacked else 0}.to")
            shape = _SHAPES[pattern]
            for index, line in enumerate(self.lines):
                target, _, expression = line.partition(" = ")
                bound = shape(expression)
                if bound is not None and not line.startswith("return"):
                    lines[index] = f"{target} = in_dtype({new.format(**bound)}, x.dtype)"
        return lines

    def as_rewrites(self) -> list[str]:
        """The sources of the rules."""
        return [self._as_rewrite([edit]) for edit in self.edits] if self.stacked else [self._as_rewrite(self.edits)]

    def _as_rewrite(self, edits: list[tuple[str, str]]) -> str:
        lines = ["w = site.param('w', W)", "result = None"]
        for pattern, new in edits:
            order = "[::-1]" if self.backwards else ""
            binds = {name: f"match.bindings['{name}']" for name in "ab"}
            lines += [f"for match in list(site.find(PATTERNS['{pattern}'])){order}:",
                      f"    site.replace(match.root, {new.format(**binds)})"]  # fmt: skip
        return "\n".join(lines)


PATTERNS = {
    "sigmoid": Structure(lambda a: torch.sigmoid(a)),
    "relu": Structure(lambda a: F.relu(a)),
    "product": Structure(lambda a, b: a * b),
    "tanh": Structure(lambda a: torch.tanh(a)),
}
NAMES["PATTERNS"] = PATTERNS


def _unary(name: str) -> Any:
    def bound(expression: str) -> dict[str, str] | None:
        if not expression.startswith(f"{name}(") or not expression.endswith(")"):
            return None
        return {"a": expression[len(name) + 1 : -1]}

    return bound


def _product(expression: str) -> dict[str, str] | None:
    parts = expression.split(" * ")
    return {"a": parts[0], "b": parts[1]} if len(parts) == 2 else None


_SHAPES: dict[str, Any] = {
    "sigmoid": _unary("torch.sigmoid"),
    "relu": _unary("F.relu"),
    "tanh": _unary("torch.tanh"),
    "product": _product,
}
_NEW = [
    "torch.exp({a}) * 0.1",
    "F.linear({a}, w.to({a}.dtype))",
    "F.gelu({a})",
    "{a} + torch.arange({a}.shape[1])",
    "{a} - {a}.detach() * 0.5",
]


def inner_program(seed: int) -> Inner:
    draw = random.Random(seed)
    pool, lines, fresh = ["x"], [], list[str]()
    for index in range(draw.randint(4, 10)):
        a, b, new = draw.choice(pool[-3:]), draw.choice(pool), f"t{index}"
        kind = draw.choice(["sigmoid", "relu", "tanh", "product", "add", "linear", "write", "relu_", "view"])
        if kind == "write" and fresh:
            lines.append(draw.choice([f"{fresh[-1]}.add_(1.0)", f"{fresh[-1]}[:, 0] = 0.5", f"{fresh[-1]} += {a}"]))
            continue
        expression = {
            "sigmoid": f"torch.sigmoid({a})", "relu": f"F.relu({a})", "tanh": f"torch.tanh({a})",
            "product": f"{a} * {b}", "add": f"{a} + {b}", "linear": f"self.one({a})", "view": f"{a}.flip(-1)",
        }.get(kind, f"{a} - 0.5")  # fmt: skip
        lines.append(f"{new} = {expression}")
        pool.append(new)
        if kind in ("linear", "add", "view"):
            fresh.append(new)
    lines.append(f"return {pool[-1]} + {draw.choice(pool)}")
    edits = [
        (name, "({a} + {b}) * 0.5" if name == "product" else draw.choice(_NEW))
        for name in draw.sample(list(PATTERNS), draw.randint(1, 2))
    ]
    stacked = draw.random() < 0.4
    if stacked and draw.random() < 0.5:
        edits.append((edits[0][0], "({a} + {b}) * 0.25" if edits[0][0] == "product" else draw.choice(_NEW)))
    return Inner(lines, edits, draw.random() < 0.3, stacked)


def inner_base(inner: Inner) -> nn.Module:
    source = inner.forward()
    name = f"<forward {hash(source)}>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    space: dict[str, Any] = dict(NAMES)
    exec(compile(source, name, "exec"), space)
    cls = type("Inside", (Straight,), {"forward": space["forward"], "__module__": __name__})
    return cls()


def inner_by_hand(base: nn.Module, inner: Inner, seed: int) -> nn.Module:
    lines = ["def forward(self, x):", *[f"    {line}" for line in inner.edited()]]
    return _build_program(base, type(base), lines, [seed] * len(inner.edits))
