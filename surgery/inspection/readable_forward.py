"""Writes the forward of a site as people write it: the rules' own lines, with training and evaluation in one text.

The text runs in a class derived from the site's own class (`super().forward`), with `torch`, `F`, `nn` and the objects
in `Readable.names`. It leaves out these things:

- Checks of objects' parts, by which a forward verifies the kind of a call.
- The order of writes to a cache if a rule runs a forward more than once.
- Casts of values that are not floating-point tensors, and of results of functions that are declared to return the type
  of an argument. The engine leaves these values as they are.
- The cast of the result of an adapter's own module that has no floating-point input.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from torch import fx, nn

from surgery.authoring.site_facts import MARK
from surgery.errors import SurgeryWarning
from surgery.forward.own_forward import OwnForward
from surgery.forward.tape import Layer
from surgery.inspection.expressions import Expressions, path_text
from surgery.inspection.function_names import FunctionNames
from surgery.inspection.line_wrapping import wrapped
from surgery.inspection.parameter_names import name_parameters, parameters_in
from surgery.inspection.readable_graph import simplify_graph
from surgery.inspection.readable_lines import ANY, WIDTH, Line, lines_of
from surgery.inspection.variable_names import variable_names
from surgery.state.records import SiteState
from surgery.tracing.call_kind import describe_kind
from surgery.tracing.guards import describe_structure
from surgery.weaving.rewrite_recording import layer_of
from surgery.weaving.variant_building import Variant, traced_layers
from surgery.weaving.weave import weave, weave_traced

__all__ = ["Readable", "readable_forward"]


@dataclass(frozen=True)
class Readable:
    """The code of a site's forwards, one text for each different form, and the functions and objects that it names."""

    codes: tuple[str, ...]
    names: dict[str, Any]

    def __str__(self) -> str:
        return "\n\n".join(self.codes)


def readable_forward(module: nn.Module, state: SiteState, own: OwnForward) -> Readable:
    """The code of a site on which rules are live."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)  # `apply_rules` has already given these warnings
        return _readable(module, state, own)


def _readable(module: nn.Module, state: SiteState, own: OwnForward) -> Readable:
    writer = _ForwardWriter(module, state, own)
    if not any(applied.inside for applied in state.live()):
        layers = [layer_of(applied, module, state.path, own) for applied in state.live()]
        graphs = {training: weave(own, layers, training, lowered=False) for training in (False, True)}
        return Readable((writer.code(own, layers, graphs),), writer.names.space)
    return Readable(tuple(writer.codes()), writer.names.space)


class _ForwardWriter:
    """Writes the code of one site, with one table of function names for all its forms."""

    def __init__(self, module: nn.Module, state: SiteState, own: OwnForward):
        self.module, self.state, self.own = module, state, own
        self.names = FunctionNames([applied.facts[MARK] for applied in state.live() if MARK in applied.facts])

    def codes(self) -> Iterator[str]:
        """The code for each kind of call so far. Kinds that differ only in the mode share one text."""
        groups: dict[tuple, list[Variant]] = {}
        for variant in reversed(self.state.variants):
            groups.setdefault(variant.kind[1:], []).append(variant)
        differing = self._differing()
        kinds_by_code: dict[str, list[str]] = {}
        for variants in groups.values():
            modes = {variant.kind[0] for variant in variants}
            together = [variants] if len(modes) == len(variants) else [[variant] for variant in variants]
            for form in together:
                code = self.kind_code(form)
                kinds_by_code.setdefault(code, []).extend(self._kind_text(variant, differing) for variant in form)
        for code, kinds in kinds_by_code.items():
            yield "\n".join([*(f"# {kind}" for kind in dict.fromkeys(kinds) if len(kinds_by_code) > 1), code])

    def _differing(self) -> list[tuple[int, str]]:
        """The arguments in which the kinds of calls so far differ, each as (position in the kind, name)."""
        places = enumerate(self.own.signature.parameters, start=4)
        return [(at, name) for at, name in places if len({variant.kind[at] for variant in self.state.variants}) > 1]

    def _kind_text(self, variant: Variant, arguments: Sequence[tuple[int, str]]) -> str:
        """A kind of call in words; `arguments`: the positions and names to mention."""
        structures = [f"{name}: {describe_structure(variant.kind[at])}" for at, name in arguments]
        return ", ".join([describe_kind(variant.kind), *structures])

    def kind_code(self, variants: Sequence[Variant]) -> str:
        graphs, constants = {}, {}
        for variant in variants:
            own, layers = traced_layers(variant, self.module, self.state)
            graphs[variant.kind[0]], around = weave_traced(own, layers)
            constants |= {**variant.constants, **around}
        return self.code(own, layers, graphs, constants, variants[0].kind[1:3])

    def code(
        self,
        own: OwnForward,
        layers: Sequence[Layer],
        graphs: Mapping[bool, fx.Graph],
        constants: Mapping[str, Any] | None = None,
        autocast: tuple[Any, ...] = (),
    ) -> str:
        """The text of one form; `graphs` has a graph for each mode."""
        for graph in graphs.values():
            simplify_graph(graph, autocast)
        names = variable_names(self.state.live(), layers, self.module, self.state.path, own)
        expressions = Expressions(self.module, own.base, self.names, constants or {})
        signature = self._signature(own.signature)
        origins = {path: origin for graph in graphs.values() for path, origin in parameters_in(graph).items()}
        used_names = {"y", *own.signature.parameters, *self.names.used}
        parameters = name_parameters(list(origins.items()), used_names)
        bodies = []
        for training in sorted(graphs):
            lines = lines_of(graphs[training], expressions, parameters, names)
            bodies.append(list(self._with_parameters(lines, parameters, origins)))
        weights = {f"{x.label} [{x.adapter}]": x.weight for x in layers}
        body = _Body(own.base.__name__, weights)
        body.add_modes(*bodies)
        return "\n".join([f"def forward({signature}):", *body.text])

    def _with_parameters(
        self, lines: Sequence[Line], parameters: Mapping[str, str], origins: Mapping[str, str]
    ) -> Iterator[Line]:
        """The lines, with assignments of a rule's adapter tensors before the first line of the rule."""
        finished: set[str] = set()
        for line in lines:
            if line.origin not in finished:
                finished.add(line.origin)
                paths = [path for path in parameters if origins[path] == line.origin]
                while paths:  # as many on a line as fit
                    for count in range(len(paths), 0, -1):
                        variables = ", ".join(parameters[path] for path in paths[:count])
                        text = f"{variables} = {', '.join(path_text(self.module, path) for path in paths[:count])}"
                        if len(text) <= WIDTH:
                            break
                    yield Line(text, line.origin)
                    del paths[:count]
            yield line

    def _signature(self, signature: inspect.Signature) -> str:
        parameters = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        for parameter in signature.parameters.values():
            positional = parameter.kind is parameter.POSITIONAL_ONLY
            kind = parameter.POSITIONAL_OR_KEYWORD if positional else parameter.kind
            default = parameter.default
            if default is not parameter.empty:
                default = _Text(self.names.constant(default))
            parameters.append(inspect.Parameter(parameter.name, kind, default=default))
        return str(inspect.Signature(parameters))[1:-1]


class _Text:
    """A text whose repr is the text itself, for the defaults of a signature."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


class _Body:
    """Writes lines of one or two modes as indented text, with a comment where the rule changes, and `with` blocks."""

    def __init__(self, base: str, weights: Mapping[str, float]):
        self.base, self.weights = base, weights
        self.text: list[str] = []
        self.origin: str | None = ""
        self.blocks = ""
        self.depth = 1

    def add_modes(self, evaluation: Sequence[Line], training: Sequence[Line] | None = None) -> None:
        if training is None:
            return self._add_lines(evaluation)
        match = SequenceMatcher(None, evaluation, training, autojunk=False)
        for tag, a, b, c, d in match.get_opcodes():
            if tag == "equal":
                self._add_lines(evaluation[a:b])
            else:
                self._add_branches(evaluation[a:b], training[c:d])

    def _add_branches(self, evaluation: Sequence[Line], training: Sequence[Line]) -> None:
        """Add lines that differ between the modes as `if self.training:` and `else:`."""
        both = [*training, *evaluation]
        origins = {line.origin for line in both} - {ANY}
        if len(origins) == 1:
            self._comment(both[0].origin if both[0].origin != ANY else origins.pop())
        before, ends = self.origin, []
        parts = [("if self.training:", training), ("else:" if training else "if not self.training:", evaluation)]
        for head, lines in parts:
            if lines:
                self._write(head)
                self.depth += 1
                self.origin, self.blocks = before, ""
                self._add_lines(lines)
                ends.append(self.origin)
                self.depth -= 1
        self.blocks = ""
        ends += [before] if len(ends) == 1 else []
        self.origin = ends[0] if len(set(ends)) == 1 else None

    def _add_lines(self, lines: Sequence[Line]) -> None:
        for line in lines:
            if line.origin != ANY and line.origin != self.origin:
                self._comment(line.origin)
            if line.blocks and line.blocks != self.blocks:
                self._write(f"with {line.blocks}:")
            self.blocks = line.blocks
            self._write(line.text, bool(line.blocks))

    def _comment(self, origin: str) -> None:
        if origin == self.origin:
            return
        self.origin, self.blocks = origin, ""
        weight = self.weights.get(origin, 1.0)
        heading = f"{origin}, weight {weight:g}" if weight != 1.0 else origin
        self._write(f"# {heading}" if origin else f"# {self.base}.forward")

    def _write(self, text: str, deeper: bool = False) -> None:
        self.text += ["    " * (self.depth + deeper) + part for part in wrapped(text, WIDTH)]
