"""Where a structure is that a rule looked for in a module's forward in vain: in a child's, or behind a registry."""

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
from surgery.tracing.example_call import evaluating
from surgery.tracing.traced_forward import trace_for_call

__all__ = ["suggest_target"]


def suggest_target(
    structure: Structure, module: nn.Module, graph: fx.Graph, args: tuple, kwargs: dict[str, Any]
) -> str:
    """What to target instead, as a sentence for an error, or ''.

    `graph`: of the module's forward; `args`, `kwargs`: its own arguments in the example. Of sites that are alike, one
    is looked at. So paths begin at the site.
    """
    known = _known.setdefault(structure, weakref.WeakKeyDictionary()).setdefault(graph, {})
    classes = tuple([type(inner) for inner in module.modules()])
    if classes not in known:
        known[classes] = _looked_for(structure, module, args, kwargs)
    kind, name, more = known[classes]
    if kind == "child":
        return f"target its {name!r}, a {more}, whose own forward has {structure}"
    whose, target = (f"its {name!r}", "target that module, and ") if name else ("its forward", "")
    call = f"{whose} takes {more} from a registry and calls it as one operation"
    if kind == "within":
        return f"{call}, which has it: {target}go through it with site.find(…, leaves=False)"
    if kind == "function":
        return f"{call}, and it is not in there: {target}put a function around that one with site.around"
    return ""


# "child", its path, its class; "within", the path of who calls a function from a registry that has it, its name;
# "function", the same where it does not.
_Found = tuple[str, str, str]
_Known = weakref.WeakKeyDictionary[fx.Graph, dict[tuple[type, ...], _Found]]
_known: weakref.WeakKeyDictionary[Structure, _Known] = weakref.WeakKeyDictionary()


def _looked_for(structure: Structure, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> _Found:
    functions: list[_Found] = []
    for name, inner, given in _calls(module, _base_of(module), args, kwargs):
        try:
            with torch.no_grad(), evaluating(inner):
                graph = trace_for_call(inner, own_forward(inner, _base_of(inner)), *given).graph
        except SurgeryError:
            continue
        assert graph is not None
        if name and structure.find(as_digraph(graph, inner)):
            return "child", name, type(inner).__name__
        for function in _from_registries(graph):
            within = _is_within(structure, inner, *given)
            functions.append(("within" if within else "function", name, function))
    return next((one for one in functions if one[0] == "within"), functions[0] if functions else ("", "", ""))


def _is_within(structure: Structure, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether what the forward takes from registries has it."""
    try:
        with torch.no_grad(), evaluating(module):
            graph = trace_for_call(module, own_forward(module, _base_of(module)), args, kwargs, leaves=False).graph
    except SurgeryError:
        return False
    assert graph is not None
    return bool(structure.find(as_digraph(graph, module)))


def _base_of(module: nn.Module) -> Any:
    return getattr(type(module), "_surgery_base", type(module))


def _calls(
    module: nn.Module, base: Any, args: tuple, kwargs: dict[str, Any]
) -> list[tuple[str, nn.Module, tuple[tuple, dict[str, Any]]]]:
    """The module and what is in it, as far as its forward calls it, each with the arguments of its first call."""
    seen: dict[int, tuple[tuple, dict[str, Any]]] = {}

    def note(inner: nn.Module, args: tuple, kwargs: Any) -> None:
        seen.setdefault(id(inner), (args, dict(kwargs)))

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
    called = [(name, inner, seen[id(inner)]) for name, inner in module.named_modules() if id(inner) in seen]
    return [("", module, (args, kwargs)), *called]


def _from_registries(graph: fx.Graph) -> list[str]:
    """The functions that a traced forward takes from registries: they are given the module itself."""
    found = []
    for node in graph.nodes:
        first = node.args[0] if node.args else None
        if node.op == "call_function" and isinstance(first, fx.Node) and first.target == "_surgery_self":
            found.append(getattr(node.target, "__name__", str(node.target)))
    return found
