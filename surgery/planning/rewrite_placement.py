"""Places rules that say which structures they rewrite: each match goes to the lowest module that can hold all of it.

The whole call of the example is searched as one graph. The operations of a match belong to modules; the site is the
lowest module around all of them whose forward can be rewritten. The children between the site and the operations are
inlined there: the site's graph has their operations. Every other child stays one call.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from surgery.authoring.rule import Rule
from surgery.authoring.site_facts import INLINED
from surgery.errors import MatchError, SurgeryError, abbreviate, collapse_similar
from surgery.patterns.pattern import Verdict
from surgery.planning.matching import Match, Tree, matches
from surgery.planning.plan import Plan
from surgery.state.records import site_state
from surgery.structures.fx_digraph import whole_graph
from surgery.structures.structure import Found, Occurrence, Structure
from surgery.tracing.example_call import evaluating
from surgery.tracing.inlining import inlining_objection
from surgery.weaving.class_objections import reason_against

__all__ = ["join_sites", "place_rule", "structures_verdict"]


@dataclass
class _Sites:
    """The sites so far: path → the paths that are inlined there; and matches without a site, with the reason."""

    tree: Tree
    inlined: dict[str, set[str]] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, owners: set[str], layers: set[str]) -> None:
        """Add a match: the modules whose operations it has, and the layers that it has as single operations."""
        callers = {*owners, *(_parent(path) for path in layers)}
        reason = ""
        for host in self._hosts(callers, layers if not owners else set()):
            if why := self._objection(host):
                reason = reason or f"{self._describe(host)}: {why}"
                continue
            inlined = set() if host in layers else {path for caller in callers for path in self._between(host, caller)}
            objections = ((path, inlining_objection(self.tree.modules[path])) for path in sorted(inlined))
            blocked = next(((path, why) for path, why in objections if why), None)
            if blocked is not None:
                where, why = blocked
                self.refused.append(f"its operations are in several modules, and {where} can't be inlined: {why}")
            else:
                self.inlined.setdefault(host, set()).update(inlined)
            return
        self.refused.append(reason)

    def _hosts(self, callers: set[str], layers: set[str]) -> Iterable[str]:
        """Yields the modules that could hold a match, the best first."""
        common = _common(callers)
        if len(layers) == 1 and (self._objection(common) or self._is_sequential(common)):
            yield from layers  # the layer itself, before its parent is inlined somewhere
        around = [common]
        while common:
            common = _parent(common)
            around.append(common)
        # A Sequential can't have tensors of an adapter, so other modules go first.
        yield from sorted(around, key=self._is_sequential)

    def _is_sequential(self, path: str) -> bool:
        return isinstance(self.tree.modules[path], nn.Sequential)

    def _objection(self, path: str) -> str | None:
        module = self.tree.modules[path]
        why = reason_against(module, adds_tensors=False)
        return why[0] if why else None

    def _between(self, host: str, caller: str) -> Iterable[str]:
        """Yields the called modules from a caller up to its host, without the host."""
        while caller != host:
            if type(self.tree.modules[caller]).forward is not nn.Module.forward:
                yield caller
            caller = _parent(caller)

    def _describe(self, path: str) -> str:
        return f"{path or 'the model itself'}, a {type(self.tree.modules[path]).__name__}"


def place_rule(plan: Plan, tree: Tree, rule: Rule, structures: Sequence[Structure]) -> list[Match] | None:
    """Returns the sites of a rule that says which structures it rewrites; None, with a problem, if there are none."""
    try:
        regions = [match.path for match in matches(tree, dataclasses.replace(rule, expect=None))]
        excluded = tree.hits(rule.exclude)
        placed = _place(plan, tree, rule, structures, regions, excluded)
        if rule.expect is not None and len(placed) != rule.expect:
            raise MatchError(
                f"{rule.label} expects {rule.expect} sites and finds {len(placed)}",
                where=abbreviate([match.path or "the model itself" for match in placed]) or None,
                fix="correct the pattern, targets or exclude, or the number in expect",
            )
    except SurgeryError as error:
        plan.problems.append(error)
        return None
    return placed


def _place(
    plan: Plan, tree: Tree, rule: Rule, structures: Sequence[Structure], regions: list[str], excluded: Iterable[str]
) -> list[Match]:
    if not plan.examples:
        raise MatchError(
            f"{rule.label} needs example_inputs",
            why="one call of the model shows its operations",
            fix="pass example_inputs: apply_rules and load_adapter take them",
        )
    sites, reasons, outside = _Sites(tree), list[str](), list[str]()
    inside, out = frozenset(regions), frozenset(excluded)
    for graph in _graphs(plan):
        for structure in structures:
            found = structure.find(graph) if rule.spans_modules() else _find_in_modules(graph, structure)
            reasons += [found.reason] if found.reason else []
            for match in found:
                owners, layers = _owners(graph, match.nodes)
                paths = owners | layers
                if any(_within(path, out) for path in paths) or not _within(_common(paths), inside):
                    outside += sorted(paths)
                else:
                    sites.add(owners, layers)
        reasons += _untraced(graph)
    if not sites.inlined:
        raise _not_found(rule, reasons, outside, sites.refused)
    plan.warnings += [f"{rule.label} leaves out a match: {why}" for why in collapse_similar(sites.refused)]
    return [_match(tree, path, sites.inlined[path]) for path in sorted(sites.inlined, key=tree.order.__getitem__)]


def _match(tree: Tree, path: str, inlined: Iterable[str]) -> Match:
    module, start = tree.modules[path], f"{path}." if path else ""
    names = tuple(sorted(inner.removeprefix(start) for inner in inlined))
    aliases = tuple(alias for alias in tree.paths[id(module)] if alias != path)
    return Match(path, module, aliases, {INLINED: names} if names else {})


def join_sites(tree: Tree, placed: Sequence[list[Match]]) -> list[list[Match]]:
    """Move sites that are inlined in other sites to these, for placed rules of one plan and those on the model.

    All rules at a site then inline the same children, so they see one graph.
    """
    if not placed:
        return []
    inlined: dict[str, set[str]] = {path: set(inner) for path, inner in _installed(tree)}
    for match in (match for sites in placed for match in sites):
        inlined.setdefault(match.path, set()).update(_absolute(match.path, match.facts.get(INLINED, ())))
    hosts: dict[str, str] = {}
    for inner in sorted(inlined, key=len, reverse=True):
        outer = next((path for path, paths in inlined.items() if inner in paths), None)
        if outer is not None:
            hosts[inner] = outer
            inlined[outer] |= inlined.pop(inner)
    result = []
    for sites in placed:
        paths = {_last(hosts, match.path): None for match in sites}
        result.append([_match(tree, path, inlined[path]) for path in paths])
    return result


def _last(hosts: dict[str, str], path: str) -> str:
    while path in hosts:
        path = hosts[path]
    return path


def _installed(tree: Tree) -> Iterable[tuple[str, set[str]]]:
    """The sites of rules on the model that inline children, with the paths of these."""
    for path, module in tree.modules.items():
        if path == tree.paths[id(module)][0] and (state := site_state(module)) is not None:
            names = {name for applied in state.applied for name in applied.facts.get(INLINED, ())}
            if names:
                yield path, set(_absolute(path, names))


def _absolute(path: str, names: Iterable[str]) -> Iterable[str]:
    return (f"{path}.{name}" if path else name for name in names)


def _graphs(plan: Plan) -> list[Any]:
    """The whole calls of the plan's examples as graphs, made once for all rules of the plan."""
    for index in range(len(plan.whole_graphs), len(plan.examples)):
        with evaluating(plan.model):
            plan.whole_graphs.append(whole_graph(plan.model, plan.examples[index]))
    return plan.whole_graphs


def _find_in_modules(graph: Any, structure: Structure) -> Found:
    """Find a structure among the operations of each module alone."""
    members: dict[str, dict[Any, Any]] = {}
    for node, data in graph.nodes(data=True):
        if data["op"] != "get_attr":
            path = data["path"] or ""
            members.setdefault(_parent(path) if data["op"] == "call_module" else path, {})[node] = data
    found, reason, order = list[Occurrence](), "", {node: index for index, node in enumerate(graph)}
    for nodes in members.values():
        matches = structure.find(_part(graph, nodes, order))
        found += matches
        reason = max(reason, matches.reason, key=_closeness)
    return Found(found, "" if found else reason)


def _part(graph: Any, nodes: dict[Any, Any], order: dict[Any, int]) -> Any:
    """Returns a part of a graph. What the part reads from other nodes are inputs."""
    import networkx

    own = networkx.DiGraph()
    sources = {source for node in nodes for source in graph.predecessors(node)}
    for node in sorted({*nodes, *sources}, key=order.__getitem__):
        own.add_node(node, **(nodes[node] if node in nodes else {**graph.nodes[node], **_INPUT}))
    own.add_edges_from(graph.in_edges(nodes, data=True))
    return own


def structures_verdict(model: nn.Module, rule: Rule, path: str, example_inputs: Any) -> Verdict:
    """Whether a rule's structures occur among the operations of a module and of those inside it; else how nearly."""
    if example_inputs is None:
        return Verdict(True, "pattern", "not searched, because there are no example_inputs")
    start = f"{path}." if path else ""
    with evaluating(model):
        graph = whole_graph(model, example_inputs)
    order = {node: index for index, node in enumerate(graph)}
    nodes = {
        node: data for node, data in graph.nodes(data=True)
        if data["op"] == "get_attr" or f"{data['path'] or ''}.".startswith(start) or not path
    }  # fmt: skip
    reasons = []
    for structure in rule.structures():
        part = _part(graph, nodes, order)
        found = structure.find(part) if rule.spans_modules() else _find_in_modules(part, structure)
        if found:
            places = dict.fromkeys(
                _common(owners | layers) for owners, layers in (_owners(graph, m.nodes) for m in found)
            )
            return Verdict(True, "pattern", f"found in {abbreviate([place or 'the model itself' for place in places])}")
        reasons.append(found.reason)
    untraced = [why for why in _untraced(graph) if not path or why.startswith(path)]
    return Verdict(False, "pattern", "; ".join([*reasons, *untraced]) or "its operations do not have the pattern")


def _closeness(reason: str) -> int:
    """How many operations of a pattern are in a nearest miss."""
    count = re.match(r"nearest miss, (\d+)", reason)
    return int(count[1]) if count is not None else 0


_INPUT: dict[str, Any] = {"op": "placeholder", "operation": "placeholder", "operands": (), "keywords": {}, "type": None}


def _owners(graph: Any, nodes: Iterable[Any]) -> tuple[set[str], set[str]]:
    """Returns the modules whose forwards have these nodes, and the layers that are single nodes."""
    owners, layers = set[str](), set[str]()
    for node in nodes:
        data = graph.nodes[node]
        if data["op"] == "call_module":
            layers.add(data["path"])
        elif data["op"] != "get_attr":
            owners.add(data["path"] or "")
    return owners, layers


def _untraced(graph: Any) -> list[str]:
    reasons = {f"{name} can't be traced: {data['reason']}" for name, data in graph.nodes(data=True) if "reason" in data}
    return collapse_similar(sorted(reasons))


def _not_found(rule: Rule, reasons: list[str], outside: list[str], refused: list[str]) -> MatchError:
    if refused:
        return MatchError(
            f"{rule.label} can't rewrite what it finds",
            why="; ".join(collapse_similar(list(dict.fromkeys(refused)))),
            fix="put the model into a module that calls it, or remove what stands against it",
        )
    if outside:
        return MatchError(
            f"{rule.label} finds its pattern only outside of its targets",
            where=abbreviate(list(dict.fromkeys(path or "the model itself" for path in outside))),
            fix="leave targets out to search everywhere, or correct targets, exclude or layers",
        )
    return MatchError(
        f"{rule.label} does not find its pattern in the example call",
        why="; ".join(dict.fromkeys(reasons)),
        fix="correct the pattern: graph_of(model, example_inputs) has the operations",
    )


def _within(path: str, regions: frozenset[str]) -> bool:
    """Whether a module or one around it is among these."""
    while path not in regions:
        if not path:
            return False
        path = _parent(path)
    return True


def _common(paths: Iterable[str]) -> str:
    first, *others = (path.split(".") if path else [] for path in paths)
    common = list[str]()
    for parts in zip(first, *others, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _parent(path: str) -> str:
    return path.rpartition(".")[0]
