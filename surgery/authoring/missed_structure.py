"""Suggests another target for a structure that is not in a module's forward but in a child's or a registry's."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import fx, nn

from surgery.errors import SurgeryError
from surgery.forward.own_forward import own_forward
from surgery.forward.parameter_view import make_view
from surgery.structures.fx_digraph import as_digraph
from surgery.structures.structure import Structure
from surgery.tracing.depth import Depth
from surgery.tracing.example_call import evaluating
from surgery.tracing.traced_forward import trace_for_call

__all__ = ["suggest_target"]


def suggest_target(
    structure: Structure, module: nn.Module, graph: fx.Graph, args: tuple, kwargs: dict[str, Any]
) -> str:
    """Returns what to target instead, as a sentence for an error, or ''.

    `graph` is the graph of the module's forward; `args` and `kwargs` are its arguments in the example. Sites with the
    same graph share the answer, so its paths begin at the site.
    """
    answers = _answers.setdefault(structure, weakref.WeakKeyDictionary()).setdefault(graph, {})
    classes = tuple([type(inner) for inner in module.modules()])
    if classes not in answers:
        answers[classes] = _search(structure, module, args, kwargs)
    kind, name, more = answers[classes]
    if kind == "child":
        return f"target its {name!r}, a {more}, whose own forward has {structure}"
    whose, target = (f"its {name!r}", "target that module, and ") if name else ("its forward", "")
    call = f"{whose} takes {more} from a registry and calls it as one operation"
    if kind == "within":
        return f"{call}, and that function contains it: {target}look into it with site.find(…, leaves=False)"
    if kind == "function":
        return f"{call}, and that function does not contain it: {target}put a function around it with site.around"
    return ""


# ("child", path, class): a child's forward contains the structure. ("within", path, function): the module at this path
# calls a function from a registry, which contains the structure. ("function", path, function): it does not contain it.
_Place = tuple[str, str, str]
_Answers = weakref.WeakKeyDictionary[fx.Graph, dict[tuple[type, ...], _Place]]
_answers: weakref.WeakKeyDictionary[Structure, _Answers] = weakref.WeakKeyDictionary()


def _search(structure: Structure, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> _Place:
    """Find a child or a registry function that contains the structure."""
    functions: list[_Place] = []
    for name, inner, arguments in _calls(module, _base_of(module), args, kwargs):
        try:
            with torch.no_grad(), evaluating(inner):
                graph = trace_for_call(inner, own_forward(inner, _base_of(inner)), *arguments).graph
        except SurgeryError:
            continue
        assert graph is not None
        if name and structure.find(as_digraph(graph, inner)):
            return "child", name, type(inner).__name__
        for function in _from_registries(graph):
            within = _is_within(structure, inner, *arguments)
            functions.append(("within" if within else "function", name, function))
    return next((place for place in functions if place[0] == "within"), functions[0] if functions else ("", "", ""))


def _is_within(structure: Structure, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether a function that the forward takes from a registry contains the structure."""
    try:
        with torch.no_grad(), evaluating(module):
            graph = trace_for_call(
                module, own_forward(module, _base_of(module)), args, kwargs, Depth(leaves=False)
            ).graph
    except SurgeryError:
        return False
    assert graph is not None
    return bool(structure.find(as_digraph(graph, module)))


def _base_of(module: nn.Module) -> Any:
    return getattr(type(module), "_surgery_base", type(module))


def _calls(
    module: nn.Module, base: Any, args: tuple, kwargs: dict[str, Any]
) -> list[tuple[str, nn.Module, tuple[tuple, dict[str, Any]]]]:
    """Returns the module and the modules inside that its forward calls, with the arguments of their first calls."""
    first_calls: dict[int, tuple[tuple, dict[str, Any]]] = {}

    def note(inner: nn.Module, args: tuple, kwargs: Any) -> None:
        first_calls.setdefault(id(inner), (args, dict(kwargs)))

    hooks = [
        inner.register_forward_pre_hook(note, with_kwargs=True)
        for inner in module.modules()
        if inner is not module and not isinstance(inner, (nn.ModuleList, nn.ModuleDict))
    ]
    try:
        with torch.no_grad(), evaluating(module):
            base.forward(make_view(module, base, {}), *args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    inner_calls = [
        (name, inner, first_calls[id(inner)]) for name, inner in module.named_modules() if id(inner) in first_calls
    ]
    return [("", module, (args, kwargs)), *inner_calls]


def _from_registries(graph: fx.Graph) -> list[str]:
    """Returns the functions that a traced forward takes from registries: their first argument is the module."""
    names = []
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if node.op == "call_function" and isinstance(first, fx.Node) and first.target == "_surgery_self":
            names.append(getattr(node.target, "__name__", str(node.target)))
    return names
