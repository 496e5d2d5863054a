"""A site as the author of a rule sees it while its rewrite is recorded: values to compute with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor, fx, nn

from surgery.arithmetic.complex_numbers import filled_by_reals, is_number, narrow
from surgery.authoring.declaration import Declaration
from surgery.authoring.forward_values import ForwardValues
from surgery.authoring.site_facts import MARK, SiteFacts
from surgery.authoring.site_module import SiteModule, site_module
from surgery.errors import SiteError, near_misses
from surgery.forward.function_registries import takes_functions
from surgery.forward.function_watch import unwatched
from surgery.forward.hidden_state import hidden_of, with_hidden
from surgery.forward.own_forward import OwnForward
from surgery.forward.packed_weights import UNPACKED, is_packed
from surgery.forward.parameter_view import calls_inside, find_tensor, hidden_reference, make_view
from surgery.forward.tape import Ref, Tape, Value, ref_of
from surgery.forward.unnamed_inputs import FIRST, hidden_first
from surgery.patterns.module_walk import RESERVED
from surgery.structures.passed_ops import Passage
from surgery.structures.structure import Structure
from surgery.tracing.example_call import call

__all__ = ["ParamSpec", "Site"]

Fill = Callable[[Tensor], Any]
# How to get a module's own arguments in the example call: (args, kwargs), or None where there is no example.
Example = Callable[[], "tuple[tuple, dict[str, Any]] | None"] | None


@dataclass(frozen=True)
class ParamSpec:
    """A tensor a rule asks for at a site; made only when the plan is carried out."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Fill
    trainable: bool
    buffer: bool
    tied: Tensor | None = None  # sites of a rule at which this is the same tensor have one between them

    def tie(self, rule: Declaration) -> tuple[int, str, int] | None:
        """What is equal of the sites that share this tensor; None where each has its own."""
        return None if self.tied is None else (id(rule), self.name, id(self.tied))


class Site(SiteFacts, ForwardValues):
    """One module while a rule rewrites it: `input`, `output` and parameters are values to compute with.

    >>> from torch import nn
    >>> from surgery import Rule, apply_rules, rule
    >>> @rule("doc-shift")
    ... class ShiftRule(Rule):
    ...     identity = True
    ...     def rewrite(self, site):
    ...         return site.output + site.param("shift", (site.out_features,))
    >>> model = apply_rules(nn.Linear(3, 2), [ShiftRule(nn.Linear)])
    >>> model.adapters.default.shift
    Parameter containing:
    tensor([0., 0.], requires_grad=True)

    Values take operators, methods, attributes and torch functions; Python can't branch on them (`SiteError`).
    `site.module` is the module itself, for its sizes and settings.
    """

    def __init__(
        self,
        module: nn.Module,
        path: str,
        adapter: str,
        label: str,
        own: OwnForward,
        example: Example = None,
        owners: tuple[nn.Module, ...] = (),
        facts: dict[str, Any] | None = None,
        others: Callable[[], tuple[Declaration, ...]] = tuple,
    ):
        super().__init__(module, path, adapter)
        self.label, self.own = label, own
        self._example, self._owners, self._others = example, owners, others
        self.facts: dict[str, Any] = {} if facts is None else facts
        self.inside = False  # whether the rule looks into the forward
        self.missed: dict[Structure, str] = {}
        self._nodes: dict[str | int, fx.Node] = {}
        self._passages: list[Passage] = []
        self._inner: dict[str, frozenset[str]] = {}
        self._replaced: dict[str, frozenset[str]] = {}
        self.tape = Tape(path or type(module).__name__)
        self.specs: dict[str, ParamSpec] = {}

    @property
    def input(self) -> Tensor:
        """The first input of the module's forward."""
        names = list(self.own.signature.parameters)
        if not names:
            raise SiteError("the module's forward takes no input", where=self.path)
        return self._value("input", FIRST if hidden_first(self.own.signature) else names[0])

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The inputs of the module's forward by name."""
        return {name: self._value("input", name) for name in self.own.signature.parameters}

    @property
    def output(self) -> Tensor:
        """What the forward returns at present, edits of earlier rules included."""
        return self._value("output", "")

    @property
    def base_output(self) -> Tensor:
        """What the module's own operation returns, before what any rule adds to it."""
        return self._value("base", "")

    @property
    def hidden(self) -> Tensor:
        """The output where it is a tensor, else the first tensor of the tuple, list, mapping or ModelOutput it is.

        Which of these it is, is found at each call. A scalar (a loss) is passed over.
        """
        return self.apply(hidden_of, self.output)

    def with_hidden(self, new: Tensor) -> Tensor:
        """The output with `new` in the place of `hidden`, in its dtype; the rest of a tuple or mapping as it was."""
        return self.apply(with_hidden, self.output, new)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """`function` of these values, run at each call with what they then are: it may look into them and branch.

        One node of the graph. It is saved by its name, so a lambda or a function inside another is a `SiteError`.
        """
        self._named(function)
        return cast(Tensor, self.tape.call("function", function, args, kwargs))

    def _named(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__qualname__", "")
        if not name or "<" in name:
            raise SiteError(
                f"{self.label} applies {name or function!r}, which has no name to import it by",
                where=self.path,
                fix="define the function at the top of a module",
            )

    @property
    def this(self) -> nn.Module:
        """The module that is being called, as a value: of a copied or unpickled model, the copy's own."""
        return cast(nn.Module, self.tape.value("this", ""))

    def around(self, function: Callable[..., Any], *values: Any, at: Tensor | None = None) -> None:
        """Put a function around the one that makes `at`, or each one that the own forward takes from a registry.

        transformers' attentions take theirs from such a registry: sdpa, eager, … At each call `function(*values)` makes
        what runs in the place of `inner(*args, **kwargs)`, as `made(inner, *args, **kwargs)`. It is saved by its name.
        `at`: the result of a torch function inside the forward, as `find` gives it. `SiteError` where it is something
        else, or the forward takes no function from a registry.
        """
        if at is not None:
            node = self._nodes.get(ref_of(cast(Value, at)).key)
            if node is None or node.op != "call_function":
                raise SiteError(f"{self.label} puts a function around {at!r}, which no function makes", where=self.path)
        elif not takes_functions(self.module):
            raise SiteError(
                f"{self.label} needs a forward that takes functions from a registry",
                where=self.path,
                why=f"{self.base_class.__name__}.forward takes none",
                fix="target attention modules of transformers",
            )
        self._named(function)
        self.tape.around(function, values, cast(Value, at))

    @functools.cached_property
    def example(self) -> tuple[tuple, dict[str, Any]] | None:
        """Copies of the module's own arguments in the example call, (args, kwargs); None without an example."""
        if self._example is None:
            return None
        with unwatched(self.tape):
            return self._example()

    @property
    def unreached(self) -> bool:
        """Whether there is an example call that never reaches this module."""
        return self._example is not None and self.example is None

    def needed_example(self, why: str) -> tuple[tuple, dict[str, Any]]:
        """`example`, by a rule that can't go without; `SiteError` with this reason where there is none."""
        if self.unreached:
            fix = "exclude it, or pass an example that uses it"
            raise SiteError(
                f"the example call never reaches a target of {self.label}", where=self.path, why=why, fix=fix
            )
        if self.example is None:
            fix = "pass example_inputs: apply_rules and load_adapter take them"
            raise SiteError(f"{self.label} needs example_inputs", where=self.path, why=why, fix=fix)
        return self.example

    @property
    def owners(self) -> tuple[nn.Module, ...]:
        """The modules that this one is in, the model first. Known while planning: keep what you read with `fact`."""
        return self._owners

    @property
    def rules(self) -> tuple[Declaration, ...]:
        """The rules that are on the module already, those of other adapters."""
        return self._others()

    def fact(self, name: str, find: Callable[[], Any]) -> Any:
        """What `find()` finds out about the module while planning: plain data, kept with the site and its copies.

        A copied or unpickled site records its rules anew, with no model around it and no example: it has its facts.
        """
        if name not in self.facts:
            with unwatched(self.tape):
                self.facts[name] = find()
        return self.facts[name]

    @property
    def mark(self) -> str:
        """A word for this adapter at this module that no other has, to leave on what outlives a call, such as a cache.

        It is the same after the adapter was renamed, and another for a copy of it.
        """
        return self.fact(MARK, lambda: uuid4().hex)

    def run(self, module: nn.Module | None = None, /, **inputs: Any) -> Any:
        """Call the module's own forward, without what rules did to it: in evaluation mode, without gradients, leaving
        no trace. For `fact`. `module`: another one of the model's, in place of the site's."""
        module = self.module if module is None else module
        base = getattr(module, "_surgery_base", type(module))
        with unwatched(self.tape):
            return call(make_view(module, base, {}) if type(module) is not base else module, inputs)

    def calls_inside(self, args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Any, tuple, dict[str, Any]]]:
        """Run the module's own forward; its calls of functions from registries: (function, args, kwargs)."""
        with unwatched(self.tape), torch.random.fork_rng():  # planning draws nothing
            return calls_inside(self.module, args, kwargs)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor that the adapter has here already: in copies, whose rules are recorded anew."""
        held_here = find_tensor(self.module, f"{RESERVED}.{self.adapter}.{name}")
        return None if held_here is None else tuple(held_here.shape)

    def call(self, input: Tensor, **tensors: Tensor | None) -> Tensor:
        """The module's own operation once more, on another input and with other tensors: `site.call(x, weight=A)`.

        All of the module's settings hold (stride, padding, groups, …); a tensor given as None is left out.
        """
        name = FIRST if hidden_first(self.own.signature) else next(iter(self.own.signature.parameters))
        return cast(Tensor, self.tape.call("own", None, {name: input}, tensors))

    @property
    def weight(self) -> Tensor:
        """The weight's value in the graph; `site.replace(site.weight, …)` edits it."""
        return self.tensor("weight")

    @property
    def bias(self) -> Tensor:
        """The bias's value in the graph. `SiteError` where the module has none."""
        return self.tensor("bias")

    @property
    def training(self) -> Tensor:
        """The module's training flag, read anew at each call."""
        return self._value("training", "")

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of the module, by name; with dots, one of its children's."""
        tensor = find_tensor(self.module, name)
        if tensor is None:
            names = [key for key, _ in (*self.module.named_parameters(), *self.module.named_buffers())]
            raise SiteError(
                f"{type(self.module).__name__} has no tensor {name!r}",
                where=self.path,
                why=near_misses(name, names) or f"it has {', '.join(names) or 'none'}",
            )
        return self._value("state", name)

    def param(
        self,
        name: str,
        value: Tensor | Sequence[int],
        init: float | Fill = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
        trainable: bool = True,
        tied: Tensor | None = None,
    ) -> Tensor:
        """A tensor of the adapter, named `<site>.adapters.<adapter>.<name>`: a trained parameter by default.

        `value` is its initial tensor, or its shape; then `init` is a number, or a function that fills a tensor in
        place (`nn.init.xavier_uniform_`). A shape's dtype is the module's, or float32 where that is half precision
        or quantised (PEFT's autocast_adapter_dtype). It is made on the module's device, when the plan is carried out.
        Of complex tensors `init` fills the real part, and the imaginary part is zero, as in PEFT.
        `tied`: sites of this rule that give the same tensor here share one parameter, as modules with tied weights do.
        """
        return self._declare(name, value, init, dtype, trainable, buffer=False, tied=tied)

    def buffer(
        self,
        name: str,
        value: Tensor | Sequence[int],
        init: float | Fill = 0.0,
        *,
        dtype: torch.dtype | str | None = None,
    ) -> Tensor:
        """A tensor of the adapter that is saved with it and not trained, such as a running mean; as `param`."""
        return self._declare(name, value, init, dtype, False, buffer=True)

    def submodule(
        self,
        name: str,
        make: Callable[[], nn.Module] | nn.Module,
        *,
        trainable: bool | None = None,
        inherit: Mapping[str, Tensor] | None = None,
    ) -> SiteModule:
        """A module of the adapter's own, to be called with values: `mlp = site.submodule("mlp", make)`.

        `make` makes it (`lambda: nn.Sequential(…)`, a class), so that planning draws no random numbers; or it is a
        module, which is copied. It is called as itself, whatever its forward does: it may branch, loop and have several
        inputs and outputs. Its tensors are the adapter's, `<name>_` and their names in the module with `_` for a dot;
        they start as torch makes them, in the dtype of `param`'s. It computes in that dtype, and what it returns has
        the dtype of its first input. `trainable`: whether its parameters train; None: as they are made. `inherit`:
        tensors to start with, by their names in the module, where they have the shape.
        """
        return site_module(self, name, make, trainable, inherit)

    def replace(self, old: Tensor, new: Any, *, only: Sequence[Tensor] = ()) -> None:
        """Put `new` in the place of `old` for everything that used it before this rule: a parameter, an input, a value.

        `only`: values inside the forward; then it is replaced as an operand of the operations that make them, and
        stays what it is for all others.

        Raises `SiteError` where the module's forward would not see another value in a parameter's place.
        """
        ref = ref_of(cast(Value, old))
        if ref.kind == "inside" and not only:
            self._check_overlap(str(ref.key), new)
        self.tape.replace(cast(Value, old), new, tuple([Ref("made", self.node_of(user).name) for user in only]))
        ref = self.tape.steps[-1].args[0]
        if ref.kind == "inside" and not only and self._nodes[ref.key].meta.get("viewed"):
            raise SiteError(
                f"{self.label} replaces {old!r}, which is written in place",
                where=self.path,
                why="the forward goes on with another view of the same memory, which would not see the new value",
                fix="write the new value there: value.copy_(new)",
            )
        if ref.kind == "state":
            self._check_editable(str(ref.key))

    def _value(self, kind: str, key: str) -> Tensor:
        if kind in ("output", "base"):
            self.tape.late = True
        # To a rule, and to its type checker, a value is used as the tensor it stands for.
        return cast(Tensor, self.tape.value(kind, key))

    def sample(self, ref: Ref) -> Any:
        """What a value is in the example, or of which shape: for decisions of Python on sizes (`TapeSamples`)."""
        graph = self.own.graph
        if ref.kind == "state":
            return find_tensor(self.module, str(ref.key))
        if ref.kind == "param":
            spec = self.specs[str(ref.key)]
            return torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        if graph is not None and (node := self._node_at(ref, graph)) is not None and "shape" in node.meta:
            return torch.empty(node.meta["shape"], dtype=node.meta["dtype"], device="meta")
        if ref.kind not in ("input", "output", "base") or self.example is None:
            raise LookupError(ref)
        args, kwargs = self.example
        if ref.kind != "input":
            return self.run(**self.own.signature.bind(*args, **kwargs).arguments)
        given = self.own.signature.bind(*args, **kwargs)
        given.apply_defaults()
        return given.arguments[str(ref.key)]

    def _node_at(self, ref: Ref, graph: fx.Graph) -> fx.Node | None:
        if ref.kind in ("output", "base"):
            found = graph.output_node().args[0]
            return found if isinstance(found, fx.Node) else None
        name = ("placeholder", lambda n: str(n.target).lstrip("*")) if ref.kind == "input" else ("", lambda n: n.name)
        return next((n for n in graph.nodes if name[1](n) == ref.key and n.op.startswith(name[0])), None)

    def _check_editable(self, name: str) -> None:
        tensor = find_tensor(self.module, name)
        owner = self.module.get_submodule(name.rpartition(".")[0])
        why = None
        if type(tensor) not in (nn.Parameter, Tensor):
            why = f"its {name} is a {type(tensor).__name__}, which its own code unpacks"
        elif isinstance(tensor, nn.Parameter) and narrow(tensor) and not _torchs(owner):
            why = f"its {name} is {tensor.dtype}, which its own code unpacks"
        elif self.own.opaque and (reference := hidden_reference(owner, name.rpartition(".")[2])):
            why = f"its forward uses the tensor through its attribute {reference!r}"
        if why:
            raise SiteError(
                f"{self.label} edits the {name} of a {type(self.module).__name__}, which can't be edited",
                where=self.path,
                why=why,
                fix="use a rule that works on the module's inputs and outputs"
                + (f"; or {UNPACKED}" if is_packed(tensor) else ""),
            )

    def _declare(
        self, name: str, value: Any, init: Any, dtype: Any, trainable: bool, buffer: bool, tied: Tensor | None = None
    ) -> Tensor:
        if not name.isidentifier() or hasattr(nn.Module, name) or name in _TAKEN:
            raise SiteError(f"{name!r} can't name a tensor", where=self.path, fix="use a plain identifier")
        if name in self.specs:
            raise SiteError(f"{self.label} asks for the tensor {name!r} twice", where=self.path)
        if isinstance(value, Tensor):
            shape, made = tuple(value.shape), value.dtype
            source = value.detach()
            fill: Fill = lambda tensor: tensor.copy_(source)  # noqa: E731
        else:
            shape, made = tuple(int(size) for size in value), self.dtype
            fill = filled_by_reals(init) if callable(init) else _constant(float(init))
        if any(size < 0 for size in shape):
            raise SiteError(f"the tensor {name!r} can't have the shape {shape}", where=self.path)
        if dtype is not None:
            made = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        trained = trainable and is_number(made)
        self.specs[name] = ParamSpec(name, shape, made, fill, trained, buffer, tied)
        return self._value("param", name)


def _torchs(module: nn.Module) -> bool:
    """Whether torch's own forward runs, which takes a parameter as it is."""
    base = getattr(type(module), "_surgery_base", type(module))
    return str(getattr(base.forward, "__module__", "")).startswith("torch.")


def _constant(value: float) -> Fill:
    return lambda tensor: tensor.fill_(value)


_TAKEN = frozenset(nn.Module().__dict__)
