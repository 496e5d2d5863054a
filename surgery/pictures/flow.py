"""Turns a woven graph into a figure: a box for each step that a paper would draw, and an arrow for each value.

Casts, changes of shape and reads of dtypes are left out. Values that parameters alone give are formulas in the box that
uses them. Small operations of a rule that follow each other are one box.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import fx, nn

from surgery.forward.parameter_view import base_forward
from surgery.inspection.readable_graph import acts, operands, simplify_graph
from surgery.pictures.box_text import BoxText, Tensors, is_plain_step
from surgery.pictures.figure import Arrow, Box, Figure, Owner
from surgery.pictures.formula import is_fact, is_torchs, name_of, passes_through
from surgery.state.records import SiteState

__all__ = ["figure_of"]

OWN_STEPS = 6  # an own forward with more steps is folded
MOST_INPUTS = 4  # of more inputs, the further ones are one box
SIGNS = {"add": "+", "iadd": "+", "sub": "−", "isub": "−", "mul": "⊙", "imul": "⊙", "matmul": "@", "cat": "concat"}


def figure_of(graph: fx.Graph, module: nn.Module, state: SiteState, letters: Mapping[Any, str]) -> Figure:
    """The figure of a woven graph. The graph is changed. `letters`: one-letter variables of the rules, by step."""
    return _Flow(simplify_graph(graph, ()), module, state, letters).figure()


class _Flow:
    def __init__(self, graph: fx.Graph, module: nn.Module, state: SiteState, letters: Mapping[Any, str]):
        self.state = state
        self.tensors = Tensors(module, state)
        self.rules = {f"{applied.rule.label} [{applied.adapter}]": applied for applied in state.applied}
        self.steps: list[fx.Node] = []  # the nodes that may become boxes, in the order of the forward
        self.sources: dict[fx.Node, fx.Node] = {}  # the step whose value a node passes on
        self.result: list[fx.Node] = []
        for node in graph.nodes:
            self._take(node)
        self.hosts = self._fused()
        self.text = BoxText(self.tensors, self.sources, letters)

    # Steps ----------------------------------------------------------------------------------------------------

    def _take(self, node: fx.Node) -> None:
        """Note a node that depends on an input; other nodes are parts of formulas."""
        inputs = [operand for operand in operands(node) if operand in self.sources and not is_fact(operand)]
        if node.op == "output":
            self.result = [self.sources[value] for value in inputs]
        elif node.op == "placeholder" or inputs and not is_fact(node):
            own = not node.meta.get("surgery")
            if inputs and (passes_through(node, own) or _is_part(node)):
                self.sources[node] = self.sources[inputs[-1] if name_of(node) == "with_hidden" else inputs[0]]
            else:
                self.sources[node] = node
                self.steps.append(node)
        elif node.op != "get_attr" and acts(node) and not node.users:
            self.sources[node] = node
            self.steps.append(node)

    def inputs_of(self, node: fx.Node) -> list[fx.Node]:
        """The steps whose values a step takes, each once."""
        values = [self.sources[value] for value in operands(node) if value in self.sources and not is_fact(value)]
        return list(dict.fromkeys(values))

    def owner(self, node: fx.Node) -> Owner | None:
        label = node.meta.get("surgery", "")
        if label in self.rules:
            return Owner(self.rules[label].adapter, self.rules[label].rule.label)
        for name in self.tensors.names_in(node, self.sources):
            if (owner := self.tensors.owner(name)) is not None:
                return owner
        return None

    def _fused(self) -> dict[fx.Node, fx.Node]:
        """The step whose box shows a small step of a rule: the only one that uses it, if it is small, too."""
        users: dict[fx.Node, set[fx.Node]] = {}
        for step in self.steps:
            for value in self.inputs_of(step):
                users.setdefault(value, set()).add(step)
        hosts = {}
        for step in reversed(self.steps):
            user = next(iter(users.get(step, ())), None)
            if user is None or len(users[step]) > 1 or step in self.result:
                continue
            if _is_small(step) and _is_small(user) and step.meta["surgery"] == user.meta["surgery"]:
                hosts[step] = hosts.get(user, user)
        return hosts

    def _reached(self) -> set[fx.Node]:
        """The steps that give the output, or that act without giving a value."""
        waiting = [*self.result, *(step for step in self.steps if acts(step) and not step.users)]
        reached: set[fx.Node] = set()
        while waiting:
            if (step := waiting.pop()) not in reached:
                reached.add(step)
                waiting += self.inputs_of(step)
        return reached

    def _left_out(self) -> set[fx.Node]:
        """The optional arguments that only the own forward takes, if there are others."""
        arguments = [step for step in self.steps if step.op == "placeholder"]
        by_rules = {value for step in self.steps if step.meta.get("surgery") for value in self.inputs_of(step)}
        free = [node for node in arguments if node.args or str(node.target).startswith("*")]
        optional = {node for node in free if node not in by_rules and node not in self.result}
        return optional if len(optional) < len(arguments) else optional - set(arguments[:1])

    # Boxes ----------------------------------------------------------------------------------------------------

    def figure(self) -> Figure:
        reached = self._reached() - self._left_out()
        parts = {step: [step] for step in self.steps if step in reached and step not in self.hosts}
        for step, host in self.hosts.items():
            if host in parts:
                parts[host].insert(0, step)
        homes = {part: step for step, group in parts.items() for part in group}
        folded = self._folded(list(parts))
        boxes, arrows = [], []
        for step, group in parts.items():
            key = folded.get(step, (step,))[0].name
            if step in folded and step is not folded[step][0]:
                pass
            elif step in folded:
                boxes.append(self._folded_box(folded[step]))
            else:
                more = self._tensors_box(step)
                boxes += [more] if more is not None else []
                arrows += [Arrow(more.key, step.name)] if more is not None else []
                boxes.append(self._box(step, group, more is not None))
            for part in group:
                for value in self.inputs_of(part):
                    if (home := homes.get(value)) is None:  # an argument that is left out
                        continue
                    source = folded.get(home, (home,))[0].name
                    if source != key:
                        arrows.append(Arrow(source, key))
        boxes.append(Box("output", "output", "output"))
        ends = [folded.get(homes[value], (homes[value],))[0].name for value in self.result]
        arrows += [Arrow(end, "output") for end in ends]
        return _with_few_inputs(Figure(tuple(boxes), tuple(dict.fromkeys(arrows))))

    def _folded(self, steps: Sequence[fx.Node]) -> Mapping[fx.Node, Sequence[fx.Node]]:
        """Runs of the own forward's steps that become one box. A run is an interval of the order, so no circles."""
        own = [step for step in steps if step.op != "placeholder" and self.owner(step) is None]
        if len(own) <= OWN_STEPS:
            return {}
        runs: list[list[fx.Node]] = [[]]
        for step in steps:
            if step.op == "placeholder":
                continue
            if step in own:
                runs[-1].append(step)
            elif runs[-1]:
                runs.append([])
        return {step: run for run in runs if len(run) > 1 for step in run}

    def _folded_box(self, run: Sequence[fx.Node]) -> Box:
        names = list(dict.fromkeys(name_of(step) for step in run if step.op != "call_module"))
        names = [*dict.fromkeys(str(step.target) for step in run if step.op == "call_module"), *names]
        some = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
        return Box(run[0].name, "folded", self.state.base.__name__, (f"{len(run)} operations", some))

    def _tensors_box(self, step: fx.Node) -> Box | None:
        """A box of its own for adapter tensors that a function takes which is not torch's."""
        if is_plain_step(step) or step.op == "placeholder":
            return None
        names = [name for name in self.tensors.names_in(step, self.sources) if self.tensors.owner(name) is not None]
        if not names:
            return None
        title, details = self.text.tensors_box(step, names)
        return Box(
            f"{step.name}_tensors", "tensors", title, details, self.tensors.owner(names[0]), self._trained(names)
        )

    def _box(self, step: fx.Node, group: Sequence[fx.Node], has_tensors_box: bool) -> Box:
        if step.op == "placeholder":
            return Box(step.name, "input", str(step.target).lstrip("*"))
        owner = self.owner(step)
        names = list(dict.fromkeys(name for part in group for name in self.tensors.names_in(part, self.sources)))
        ours = [name for name in names if self.tensors.owner(name) is not None]
        if has_tensors_box:
            owner = owner if step.meta.get("surgery") else None
            ours = []
        elif not ours and any(self.tensors.trains(name) for name in names):
            ours = names
        trained = self._trained(ours) if ours else None
        inputs = self.inputs_of(step)
        if len(group) == 1 and name_of(step) in SIGNS and is_torchs(step) and len(inputs) > 1:
            return Box(step.name, "sign", SIGNS[name_of(step)], (), owner)
        if step.target is base_forward:
            return Box(step.name, "operation", self.state.base.__name__, ("forward",), owner, trained)
        rule = self.rules.get(step.meta.get("surgery", ""))
        title, details = self.text.step(step, group, rule)
        return Box(step.name, "operation", title, details, owner, trained)

    def _trained(self, names: Iterable[str]) -> bool:
        return any(self.tensors.trains(name) for name in names)


def _with_few_inputs(figure: Figure) -> Figure:
    """The figure with one box for the further inputs, if there are more than four."""
    keys = [box.key for box in figure.boxes if box.kind == "input"]
    if len(keys) <= MOST_INPUTS:
        return figure
    further = keys[MOST_INPUTS - 1 :]
    more = Box(further[0], "input", f"{len(further)} more inputs")
    boxes = [more if box.key == more.key else box for box in figure.boxes if box.key not in further[1:]]
    arrows = [Arrow(more.key if arrow.source in further else arrow.source, arrow.target) for arrow in figure.arrows]
    return Figure(tuple(boxes), tuple(dict.fromkeys(arrows)))


def _is_part(node: fx.Node) -> bool:
    """Whether a node takes one of several results out of a tuple or a mapping."""
    return node.target is operator.getitem and isinstance(node.args[1], (int, str))


_LARGE = {
    "linear", "embedding", "matmul", "add", "sub", "mul", "truediv", "where", "dropout", "relu", "gelu", "silu", "tanh",
    "sigmoid", "layer_norm", "rms_norm", "einsum", "bmm", "mm", "conv1d", "conv2d", "conv3d", "softmax",
}  # fmt: skip


def _is_small(step: fx.Node) -> bool:
    """Whether a step is a detail of a rule, which may share a box with its neighbours."""
    torchs = step.op in ("call_function", "call_method") and is_torchs(step)
    return torchs and bool(step.meta.get("surgery")) and name_of(step) not in _LARGE
