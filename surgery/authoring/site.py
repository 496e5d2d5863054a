"""`Site`: one module as a rule's `rewrite` gets it, with values to compute with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast
from uuid import uuid4

import torch
from torch import Tensor, fx, nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.forward_values import ForwardValues
from surgery.authoring.site_facts import MARK, SiteFacts
from surgery.authoring.site_module import SiteModule, site_module
from surgery.complex_numbers import filled_by_reals, is_number, narrow
from surgery.errors import SiteError, near_misses
from surgery.forward.function_registries import takes_functions
from surgery.forward.function_watch import pause_watch
from surgery.forward.hidden_state import hidden_of, with_hidden
from surgery.forward.own_forward import OwnForward
from surgery.forward.packed_weights import UNPACKED, is_packed
from surgery.forward.parameter_view import calls_inside, find_tensor, hidden_reference, make_view
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.forward.unnamed_inputs import FIRST, hidden_first
from surgery.forward.values import Value, ref_of
from surgery.patterns.module_walk import RESERVED
from surgery.structures.passed_ops import Passage
from surgery.structures.structure import Structure
from surgery.tracing.example_call import call

__all__ = ["ParamSpec", "Site"]

Fill = Callable[[Tensor], Any]
# Returns a module's own arguments in the example call as (args, kwargs), or None if the call does not reach it.
Example = Callable[[], "tuple[tuple, dict[str, Any]] | None"] | None


@dataclass(frozen=True)
class ParamSpec:
    """A tensor that a rule declares at a site. Applying the plan creates it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    fill: Fill
    trainable: bool
    buffer: bool
    tied: Tensor | None = None  # sites of a rule with the same tensor here share one parameter

    def tie(self, rule: Declaration) -> tuple[int, str, int] | None:
        """Returns a key that is equal for sites that share this tensor; None if it is not shared."""
        return None if self.tied is None else (id(rule), self.name, id(self.tied))


class Site(SiteFacts, ForwardValues):
    """One module while a rule rewrites it: its inputs, outputs and parameters as values to compute with.

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

    Values support operators, methods, attributes and torch functions. `site.module` is the module itself, for its sizes
    and settings.

    Raises:
        SiteError: Python code branches on a value.
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
        """The first input of the module's forward. `SiteError` if the forward takes no input."""
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
        """The result of the forward, with the edits of earlier rules."""
        return self._value("output", "")

    @property
    def base_output(self) -> Tensor:
        """The result of the module's own forward, without the edits of any rule."""
        return self._value("base", "")

    @property
    def hidden(self) -> Tensor:
        """The output if it is a tensor, else the first tensor in the output's tuple, list, mapping or ModelOutput.

        Each call determines which of these the output is. Scalars, such as a loss, are skipped.
        """
        return self.apply(hidden_of, self.output)

    def with_hidden(self, new: Tensor) -> Tensor:
        """Returns the output with `new` in place of `hidden`, in the dtype of `hidden`. Other items stay."""
        return self.apply(with_hidden, self.output, new)

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Call `function` with the real tensors at each call of the site. It may branch on them.

        The call is one node of the graph.

        Args:
            function: A function at the top level of a module: it is saved by its name.
            *args: Its arguments: values, numbers, or containers of these.
            **kwargs: Its keyword arguments.

        Returns:
            The function's result as a value.

        Raises:
            SiteError: The function can't be imported by name, such as a lambda.
        """
        self._check_importable(function)
        return cast(Tensor, self.tape.call("function", function, args, kwargs))

    def _check_importable(self, function: Callable[..., Any]) -> None:
        name = getattr(function, "__qualname__", "")
        if not name or "<" in name:
            raise SiteError(
                f"{self.label} applies {name or function!r}, which has no name to import it by",
                where=self.path,
                fix="define the function at the top of a module",
            )

    @property
    def this(self) -> nn.Module:
        """The module that is called, as a value. In a copied or unpickled model it is the copy's module."""
        return cast(nn.Module, self.tape.value("this", ""))

    def around(self, function: Callable[..., Any], *values: Any, at: Tensor | None = None) -> None:
        """Wrap a function inside the forward: the function that computes `at`, or every function from a registry.

        transformers' attentions take their function (sdpa, eager, …) from such a registry. At each call,
        `function(*values)` returns a wrapper, and `wrapper(inner, *args, **kwargs)` runs in place of
        `inner(*args, **kwargs)`.

        Args:
            function: A function at the top level of a module: it is saved by its name.
            *values: Its arguments, such as parameters of the rule.
            at: The result of a torch function inside the forward, from `find`. Default None: every function that
                the forward takes from a registry.

        Raises:
            SiteError: `at` is not the result of a function, or the forward takes no function from a registry.
        """
        if at is not None:
            node = self._nodes.get(ref_of(cast(Value, at)).key)
            if node is None or node.op != "call_function":
                raise SiteError(
                    f"{self.label} puts a function around {at!r}, which is not the result of a function",
                    where=self.path,
                )
        elif not takes_functions(self.module):
            raise SiteError(
                f"{self.label} needs a forward that takes functions from a registry",
                where=self.path,
                why=f"{self.base_class.__name__}.forward does not take any",
                fix="target attention modules of transformers",
            )
        self._check_importable(function)
        self.tape.around(function, values, cast(Value, at))

    @functools.cached_property
    def example(self) -> tuple[tuple, dict[str, Any]] | None:
        """Copies of the module's arguments in the example call, as (args, kwargs); None without an example."""
        if self._example is None:
            return None
        with pause_watch(self.tape):
            return self._example()

    @property
    def unreached(self) -> bool:
        """Whether there is an example call that never reaches this module."""
        return self._example is not None and self.example is None

    def needed_example(self, why: str) -> tuple[tuple, dict[str, Any]]:
        """Returns `example`. Raises `SiteError` with this reason if there is no example."""
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
        """The modules that contain this module, the model first.

        They are known only while planning: store what you read from them with `fact`.
        """
        return self._owners

    @property
    def rules(self) -> tuple[Declaration, ...]:
        """The rules of other adapters that are already on the module."""
        return self._others()

    def fact(self, name: str, find: Callable[[], Any]) -> Any:
        """Call `find()` once while planning, and store its result with the site.

        A copied or unpickled site records its rules again without the model and the example, but with its facts.

        Args:
            name: The name of the fact.
            find: Returns the fact: plain data.
        """
        if name not in self.facts:
            with pause_watch(self.tape):
                self.facts[name] = find()
        return self.facts[name]

    @property
    def mark(self) -> str:
        """A word that identifies this adapter at this module, to mark objects that outlive a call, such as a cache.

        Renaming the adapter keeps the word. A copy of the adapter has another word.
        """
        return self.fact(MARK, lambda: uuid4().hex)

    def run(self, module: nn.Module | None = None, /, **inputs: Any) -> Any:
        """Call a module's own forward in evaluation mode, without rules, gradients or side effects. For `fact`.

        Args:
            module: Another module of the model. Default None: the site's module.
            **inputs: The arguments by name.
        """
        module = self.module if module is None else module
        base = getattr(module, "_surgery_base", type(module))
        with pause_watch(self.tape):
            return call(make_view(module, base, {}) if type(module) is not base else module, inputs)

    def calls_inside(self, args: tuple, kwargs: Mapping[str, Any]) -> list[tuple[Any, tuple, dict[str, Any]]]:
        """Run the module's own forward and return its calls of functions from registries: (function, args, kwargs)."""
        with pause_watch(self.tape), torch.random.fork_rng():  # planning must not advance the random state
            return calls_inside(self.module, args, kwargs)

    def shape_of(self, name: str) -> tuple[int, ...] | None:
        """Returns the shape of an existing tensor of the adapter, or None. In copies, rules are recorded again."""
        tensor = find_tensor(self.module, f"{RESERVED}.{self.adapter}.{name}")
        return None if tensor is None else tuple(tensor.shape)

    def call(self, input: Tensor, **tensors: Tensor | None) -> Tensor:
        """Run the module's own operation once more, with another input and other tensors: `site.call(x, weight=A)`.

        The module's settings (stride, padding, groups, …) stay.

        Args:
            input: The first argument of the forward.
            **tensors: Tensors in place of the module's parameters and buffers; None removes a tensor.
        """
        name = FIRST if hidden_first(self.own.signature) else next(iter(self.own.signature.parameters))
        return cast(Tensor, self.tape.call("own", None, {name: input}, tensors))

    @property
    def weight(self) -> Tensor:
        """The weight's value in the graph; `site.replace(site.weight, …)` edits it."""
        return self.tensor("weight")

    @property
    def bias(self) -> Tensor:
        """The bias's value in the graph. `SiteError` if the module does not have a bias."""
        return self.tensor("bias")

    @property
    def training(self) -> Tensor:
        """The module's training flag, read anew at each call."""
        return self._value("training", "")

    def tensor(self, name: str) -> Tensor:
        """Returns a parameter or buffer of the module by name. A dotted name leads to a child's tensor."""
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
        """Declare a parameter of the adapter, named `<site>.adapters.<adapter>.<name>`.

        >>> from torch import nn
        >>> from surgery import Rule, apply_rules, rule
        >>> @rule("doc-scale")
        ... class ScaleRule(Rule):
        ...     def rewrite(self, site):
        ...         return site.output * site.param("scale", (site.out_features,), init=1.0)
        >>> apply_rules(nn.Linear(3, 2), ScaleRule(nn.Linear)).adapters.default.scale
        Parameter containing:
        tensor([1., 1.], requires_grad=True)

        Args:
            name: A Python identifier.
            value: The initial tensor, or the shape.
            init: For a shape: a number, or a function that fills a tensor in place (`nn.init.xavier_uniform_`). It
                fills the real part of complex tensors, as in PEFT. Default 0.
            dtype: The dtype. Default None: the initial tensor's dtype; for a shape the module's dtype, or float32 if
                that is half precision or quantised (PEFT's autocast_adapter_dtype).
            trainable: Whether the parameter trains. Default True.
            tied: Sites of this rule with the same tensor here share one parameter. Default None.

        Returns:
            The parameter as a value. Applying the plan creates it on the module's device.

        Raises:
            SiteError: The name or the shape is invalid, or the name is in use.
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
        """Declare a tensor of the adapter that is saved and not trained, such as a running mean. See `param`."""
        return self._declare(name, value, init, dtype, False, buffer=True)

    def submodule(
        self,
        name: str,
        make: Callable[[], nn.Module] | nn.Module,
        *,
        trainable: bool | None = None,
        inherit: Mapping[str, Tensor] | None = None,
    ) -> SiteModule:
        """Declare a module of the adapter and return it for calls with values: `mlp = site.submodule("mlp", make)`.

        The module's forward may branch, loop, and have several inputs and outputs. It computes in the dtype of its
        tensors, and its result has the dtype of its first input.

        Args:
            name: The prefix of its tensors: a tensor `up.weight` becomes the adapter's `<name>_up_weight`.
            make: A function or class that creates the module (`lambda: nn.Sequential(…)`), so that planning draws no
                random numbers; or a module, which is copied.
            trainable: Whether its parameters train. Default None: as their `requires_grad` says.
            inherit: Initial tensors by their names in the module. Tensors of another shape are ignored.
        """
        return site_module(self, name, make, trainable, inherit)

    def replace(self, old: Tensor, new: Any, *, only: Sequence[Tensor] = ()) -> None:
        """Replace `old` by `new` for everything in the forward that uses it.

        Args:
            old: A parameter, an input, the output, or a value inside the forward.
            new: The new value.
            only: Values inside the forward: only the operations that compute them get `new`. Default: all users.

        Raises:
            SiteError: The forward would not see the new value, such as a parameter that its code unpacks.
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
                why="the forward continues with another view of the same memory, which would not see the new value",
                fix="write the new value in place: value.copy_(new)",
            )
        if ref.kind == "state":
            self._check_editable(str(ref.key))

    def _value(self, kind: str, key: str) -> Tensor:
        if kind in ("output", "base"):
            self.tape.late = True
        # Rules and type checkers use a value like the tensor that it represents.
        return cast(Tensor, self.tape.value(kind, key))

    def sample(self, ref: Ref) -> Any:
        """Returns a value's tensor in the example, or a meta tensor of its shape, for `TapeSamples`."""
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
        bound = self.own.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments[str(ref.key)]

    def _node_at(self, ref: Ref, graph: fx.Graph) -> fx.Node | None:
        if ref.kind in ("output", "base"):
            output = graph.output_node().args[0]
            return output if isinstance(output, fx.Node) else None
        name = ("placeholder", lambda n: str(n.target).lstrip("*")) if ref.kind == "input" else ("", lambda n: n.name)
        return next((n for n in graph.nodes if name[1](n) == ref.key and n.op.startswith(name[0])), None)

    def _check_editable(self, name: str) -> None:
        tensor = find_tensor(self.module, name)
        owner = self.module.get_submodule(name.rpartition(".")[0])
        why = None
        if type(tensor) not in (nn.Parameter, Tensor):
            why = f"its {name} is a {type(tensor).__name__}, which its own code unpacks"
        elif isinstance(tensor, nn.Parameter) and narrow(tensor) and not _runs_torch_forward(owner):
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
        if not name.isidentifier() or hasattr(nn.Module, name) or name in _RESERVED_NAMES:
            raise SiteError(f"{name!r} can't name a tensor", where=self.path, fix="use a plain identifier")
        if name in self.specs:
            raise SiteError(f"{self.label} declares the tensor {name!r} twice", where=self.path)
        if isinstance(value, Tensor):
            shape, tensor_dtype = tuple(value.shape), value.dtype
            source = value.detach()
            fill: Fill = lambda tensor: tensor.copy_(source)  # noqa: E731
        else:
            shape, tensor_dtype = tuple(int(size) for size in value), self.dtype
            fill = filled_by_reals(init) if callable(init) else _constant(float(init))
        if any(size < 0 for size in shape):
            raise SiteError(f"the tensor {name!r} can't have the shape {shape}", where=self.path)
        if dtype is not None:
            tensor_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        trained = trainable and is_number(tensor_dtype)
        self.specs[name] = ParamSpec(name, shape, tensor_dtype, fill, trained, buffer, tied)
        return self._value("param", name)


def _runs_torch_forward(module: nn.Module) -> bool:
    """Whether the module runs a forward of torch, which uses its parameters as they are."""
    base = getattr(type(module), "_surgery_base", type(module))
    return str(getattr(base.forward, "__module__", "")).startswith("torch.")


def _constant(value: float) -> Fill:
    return lambda tensor: tensor.fill_(value)


_RESERVED_NAMES = frozenset(nn.Module().__dict__)
