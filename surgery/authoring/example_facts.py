"""`ExampleFacts`: facts that a rule reads while planning, from the example call and the modules around the site."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

import torch
from torch import fx, nn

from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.site_facts import MARK, SiteFacts
from surgery.errors import SiteError
from surgery.forward.function_watch import pause_watch
from surgery.forward.own_forward import OwnForward
from surgery.forward.parameter_view import calls_inside, find_tensor, make_view
from surgery.forward.tape import Tape
from surgery.forward.tape_steps import Ref
from surgery.tracing.example_call import call

__all__ = ["Example", "ExampleFacts"]

# Returns a module's own arguments in the example call as (args, kwargs), or None if the call does not reach it.
Example = Callable[[], "tuple[tuple, dict[str, Any]] | None"] | None


class ExampleFacts(SiteFacts):
    """The base class of `Site` for rules that read the example call, or other modules of the model."""

    label: str
    own: OwnForward
    tape: Tape
    specs: dict[str, ParamSpec]
    facts: dict[str, Any]
    _example: Example
    _owners: tuple[nn.Module, ...]

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
