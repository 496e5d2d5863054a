"""`Site`: one module as a rule's `rewrite` gets it, with values to compute with."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from torch import Tensor, fx, nn

from surgery.authoring.declaration import Declaration
from surgery.authoring.declared_tensors import DeclaredTensors, ParamSpec
from surgery.authoring.example_facts import Example, ExampleFacts
from surgery.authoring.match_effects import ReplacedMatch
from surgery.authoring.match_replacement import MatchReplacement
from surgery.complex_numbers import narrow
from surgery.errors import SiteError, near_misses
from surgery.forward.function_registries import takes_functions
from surgery.forward.hidden_state import hidden_of, with_hidden
from surgery.forward.own_forward import OwnForward
from surgery.forward.parameter_view import find_tensor, hidden_reference
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.forward.unnamed_inputs import FIRST, hidden_first
from surgery.forward.values import Value, ref_of
from surgery.packed.packed_parameters import UNPACKED, is_packed
from surgery.packed.packed_weight import packed_weight_of
from surgery.patterns.module_walk import RESERVED
from surgery.structures.skipped_ops import Passage
from surgery.structures.structure import Structure

__all__ = ["Site"]

NOTHING: Mapping[str, str] = types.MappingProxyType({})


class Site(DeclaredTensors, ExampleFacts, MatchReplacement):
    """One module while a rule rewrites it: its inputs, outputs and parameters as values to compute with.

    >>> from torch import nn
    >>> from surgery import Rule, apply_rules, rule
    >>> @rule("doc-offset")
    ... class OffsetRule(Rule):
    ...     identity = True
    ...     def rewrite(self, site):
    ...         return site.output + site.param("shift", (site.out_features,))
    >>> model = apply_rules(nn.Linear(3, 2), [OffsetRule(nn.Linear)])
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
        claimed: Mapping[str, str] = NOTHING,
    ):
        super().__init__(module, path, adapter)
        self.label, self.own = label, own
        self._example, self._owners, self._others = example, owners, others
        self.facts: dict[str, Any] = {} if facts is None else facts
        self.inside = False  # whether the rule looks into the forward
        self.claimed, self.claims, self.warnings = claimed, dict[str, str](), list[str]()
        self.replaced: list[ReplacedMatch] = []
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

    @property
    def rules(self) -> tuple[Declaration, ...]:
        """The rules of other adapters that are already on the module."""
        return self._others()

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
        """The weight's value in the graph; `site.replace(site.weight, …)` edits it.

        On a quantised module this is the dequantised weight, computed once in a call. A call with another weight is
        the plain map: activations that the module would quantise stay as they are.
        """
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
        if tensor is None and name not in self.own.packed:
            names = [key for key, _ in (*self.module.named_parameters(), *self.module.named_buffers())]
            raise SiteError(
                f"{type(self.module).__name__} has no tensor {name!r}",
                where=self.path,
                why=near_misses(name, names) or f"it has {', '.join(names) or 'none'}",
            )
        return self._value("state", name)

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

    def _check_editable(self, name: str) -> None:
        """Raise `SiteError` if the forward would not see a new value of the tensor."""
        tensor = find_tensor(self.module, name)
        owner = self.module.get_submodule(name.rpartition(".")[0])
        why = None
        if name == "weight" and (packed := packed_weight_of(self.module)) is not None:
            if not packed.is_plain_map:
                why = f"its weight is packed ({packed.layout}), and its forward is not the plain map"
        elif name in self.own.packed and name != "weight":
            why = None  # a stack: its forward is then that of the experts without quantisation
        elif type(tensor) not in (nn.Parameter, Tensor):
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


def _runs_torch_forward(module: nn.Module) -> bool:
    """Whether the module runs a forward of torch, which uses its parameters as they are."""
    base = getattr(type(module), "_surgery_base", type(module))
    return str(getattr(base.forward, "__module__", "")).startswith("torch.")
