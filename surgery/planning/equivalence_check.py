"""Compares rewritten modules with their own forwards: outputs and gradients, on the example and in other sizes.

A tolerance has two parts. Rounding: each operation rounds to the dtype, and n operations and sums of K numbers are off
by about eps · (2 √n + √K), relative to the largest value. Condition: the own forward runs once more on inputs that
differ in their last bit; what its results change by says how much the module magnifies rounding.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from surgery.authoring.equivalence import Equivalence
from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.forward.parameter_view import make_view
from surgery.planning.plan import Plan
from surgery.state.records import site_state
from surgery.tracing.state_restoration import restore_state
from surgery.transaction.gradient_flags import set_flag
from surgery.transaction.neutral_context import ambient
from surgery.transaction.object_contents import contents, copied

__all__ = ["check_equivalence"]


@dataclass
class _Results:
    """The tensors of one run by name, and the gradients of a weighted sum of its outputs."""

    outputs: dict[str, Tensor]
    gradients: dict[str, Tensor]

    def named(self) -> dict[str, Tensor]:
        return {**self.outputs, **self.gradients}


def check_equivalence(plan: Plan) -> None:
    """Compare each rewritten site of rules that demand it. Raises `SurgeryError` for the first difference."""
    observed = [("the example", observation) for observation in plan.observations] + plan.resized
    checked = set[tuple[type, str]]()
    for steps in _comparable(plan):
        module, kind = steps[0].module, type(steps[0].module)
        for words, observation in observed:
            if not observation.reached(module) or (words != "the example" and (kind, words) in checked):
                continue
            checked.add((kind, words))
            args, kwargs, _ = observation.calls[id(module)]
            _compare(steps, module, words, args, kwargs)
            if words == "the example" and (kind, "float32") not in checked:
                checked.add((kind, "float32"))
                _compare_in_float32(steps, module, args, kwargs)


def _comparable(plan: Plan) -> Iterator[list[PlannedRule]]:
    """The steps at each site all of whose live rules demand equal results."""
    steps_at: dict[int, list[PlannedRule]] = {}
    for step in plan.steps:
        steps_at.setdefault(id(step.module), []).append(step)
    for steps in steps_at.values():
        state = site_state(steps[0].module)
        live = state.live() if state is not None else []
        if live and all(applied.rule.equivalence() is not None for applied in live):
            yield steps


def _compare_in_float32(steps: Sequence[PlannedRule], module: nn.Module, args: Any, kwargs: Any) -> None:
    """Compare a copy of a half-precision module in float32, where rounding hides less."""
    tensors = [*module.parameters(), *module.buffers()]
    halves = {tensor.dtype for tensor in (*tensors, *contents((args, kwargs), Tensor))} & {
        torch.float16,
        torch.bfloat16,
    }
    if not halves or sum(tensor.numel() for tensor in tensors) > _MOST:
        return
    try:
        wide = copy.deepcopy(module).float()
    except Exception:  # a module that can't be copied or converted, such as one with packed weights
        return
    args, kwargs = tree_map_only(Tensor, lambda x: x.float() if x.is_floating_point() else x, (args, kwargs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SurgeryWarning)  # the module itself has warned
        _compare(steps, wide, "the example, in a copy in float32", args, kwargs)


_MOST = 50_000_000  # numbers in a module that is copied


def _compare(steps: Sequence[PlannedRule], module: nn.Module, words: str, args: Any, kwargs: Any) -> None:
    demands = [demand for step in steps if (demand := step.rule.equivalence()) is not None]
    demand = Equivalence(
        any(demand.exact for demand in demands),
        max((d.tolerance for d in demands if d.tolerance is not None), default=None),
        any(demand.omits for demand in demands),
    )
    state = site_state(module)
    assert state is not None
    base, forward = state.base, state.base.forward

    def run_own(*args: Any, **kwargs: Any) -> Any:
        own: Any = make_view(module, base, {})  # in the module's present mode
        own.__dict__["_modules"] = {name: child for name, child in module._modules.items() if name != "adapters"}
        return forward(own, *args, **kwargs)

    def run_new(*args: Any, **kwargs: Any) -> Any:
        rewritten: Any = type(module).forward
        return rewritten(module, *args, **kwargs)

    for training in (False, True):
        with _mode(module, training):
            before = _run(run_own, module, args, kwargs)
            if training and not _same(before, _run(run_own, module, args, kwargs, seed=1)):
                continue  # the forward draws random numbers, and a rewrite may draw them in another order
            after = _run(run_new, module, args, kwargs, before.outputs if demand.omits else None)
            if demand.omits and after.outputs.keys() < before.outputs.keys():
                before = _run(run_own, module, args, kwargs, after.outputs)
            top = max(map(_largest, before.gradients.values()), default=0.0)
            nudged = None if demand.exact else _run(run_own, module, args, kwargs, before.outputs, nudge=True)
        for name, expected in before.named().items():
            allowed = 0.0
            if nudged is not None and name in nudged.named():
                allowed = _allowed(
                    expected, nudged.named()[name], module, demand, top if name in before.gradients else None
                )
            problem = _difference(expected, after.named().get(name), allowed)
            if problem is not None:
                mode = ", in training" if training else ""
                raise _error(steps, name, problem, f"{words}{mode}", demand)


def _run(
    forward: Callable[..., Any],
    module: nn.Module,
    args: Any,
    kwargs: Any,
    only: Collection[str] | None = None,
    nudge: bool = False,
    seed: int = 0,
) -> _Results:
    """Run a forward. `only`: the names of the outputs that count; default None: all."""
    inputs: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape, generator=generator).to(tensor) if nudge else None
        value = tensor if noise is None else tensor * (1 + torch.finfo(tensor.dtype).eps * (2 * noise - 1))
        inputs.append(value.requires_grad_())
        return inputs[-1].clone()  # the forward may write to it

    generator = torch.Generator().manual_seed(0)
    with ambient(), torch.enable_grad(), restore_state(module):
        torch.manual_seed(seed)
        args, kwargs = tree_map_only(Tensor, leaf, (copied(args), copied(kwargs)))
        output = forward(*args, **kwargs)
        outputs = {name: tensor for name, tensor in _tensors(output) if only is None or name in only}
        total = _weighted_sum(outputs.values(), generator)
        named = {f"the gradient of input {i}": tensor for i, tensor in enumerate(inputs)}
        parameters = ((name, p) for name, p in module.named_parameters() if "adapters" not in name.split("."))
        named |= {f"the gradient of {name}": p for name, p in parameters if p.requires_grad}
        gradients: dict[str, Tensor] = {}
        if total is not None and total.requires_grad and named:
            try:
                found = torch.autograd.grad(total, list(named.values()), allow_unused=True)
            except RuntimeError:  # the forward writes to what its backward needs, or kept a graph of an earlier call
                named, found = {}, ()
            for (name, tensor), gradient in zip(named.items(), found, strict=True):
                gradients[name] = torch.zeros_like(tensor) if gradient is None else gradient.detach()
    return _Results({name: tensor.detach() for name, tensor in outputs.items()}, gradients)


def _tensors(value: Any, name: str = "the output") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors in an output, each with its place."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _tensors(item, f"{name}[{index}]")
    else:
        yield from ((f"{name}, tensor {index}", tensor) for index, tensor in enumerate(contents(value, Tensor)))


def _weighted_sum(tensors: Any, generator: torch.Generator) -> Tensor | None:
    """A sum of floating-point tensors with random weights, in double precision."""
    generator = torch.Generator().manual_seed(generator.initial_seed())
    total = None
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.requires_grad:
            weights = torch.randn(tensor.shape, generator=generator).to(tensor)
            part = torch.nan_to_num(tensor * weights, posinf=0, neginf=0).sum()
            total = part if total is None else total + part.to(total)
    return total


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set the mode, and let all floating-point parameters require gradients."""
    modes = [(inner, inner.training) for inner in module.modules()]
    frozen = [p for p in module.parameters() if p.is_floating_point() and not p.requires_grad]
    try:
        for inner, _ in modes:
            inner.training = training
        for parameter in frozen:
            set_flag(parameter, True)
        yield
    finally:
        for inner, mode in modes:
            inner.training = mode
        for parameter in frozen:
            set_flag(parameter, False)


def _same(one: _Results, other: _Results) -> bool:
    pairs = ((tensor, other.named()[name]) for name, tensor in one.named().items())
    return all(_difference(tensor, again, 0.0) is None for tensor, again in pairs)


def _allowed(expected: Tensor, nudged: Tensor, module: nn.Module, demand: Equivalence, gradient: float | None) -> float:
    """Returns the largest difference between two tensors that rounding explains.

    `gradient`: for a gradient, the largest value of all gradients. Where the parts of a gradient cancel to 0, their
    rounding is relative to them.
    """
    largest = _largest(expected) or gradient or 0.0
    if demand.tolerance is not None:
        return demand.tolerance * largest
    if not expected.is_floating_point() or expected.shape != nudged.shape:
        return 0.0
    dtypes = {tensor.dtype for tensor in (expected, *module.parameters()) if tensor.is_floating_point()}
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    sizes = [size for tensor in (expected, *module.parameters()) for size in tensor.shape]
    rounding = 2 * math.sqrt(_operations(module)) + (math.sqrt(max(sizes, default=1)) if eps < 1e-6 else 0)
    condition = _largest(torch.nan_to_num(expected - nudged, posinf=0, neginf=0))
    return (1 if gradient is None else 2) * eps * rounding * largest + 16 * condition


def _operations(module: nn.Module) -> int:
    state = site_state(module)
    counts = [len(variant.traced.graph.nodes) for variant in state.variants] if state is not None else []
    return max(counts, default=1)


def _largest(tensor: Tensor) -> float:
    values = tensor.detach().abs()
    values = values[torch.isfinite(values)] if values.is_floating_point() else values.double()
    return float(values.max()) if values.numel() else 0.0


def _difference(expected: Tensor, actual: Tensor | None, allowed: float) -> str | None:
    """Returns how two tensors differ by more than is allowed, or None."""
    if actual is None:
        return "is missing"
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        before, after = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (expected, actual))
        return f"is {after} and was {before}"
    equal = (expected == actual) | ((expected != expected) & (actual != actual))
    if bool(equal.all()):
        return None
    distance = (expected.double() - actual.double()).abs() if not expected.is_complex() else (expected - actual).abs()
    distance = torch.where(equal, torch.zeros_like(distance), torch.nan_to_num(distance, nan=math.inf))
    worst = float(distance.max())
    if worst <= allowed:
        return None
    place = tuple(int(index) for index in torch.unravel_index(distance.argmax(), distance.shape))
    return (
        f"differs by up to {worst:.3g}, and {allowed:.3g} is allowed: "
        f"at {list(place)} it is {actual[place].item():.6g} and was {expected[place].item():.6g}"
    )


def _error(steps: Sequence[PlannedRule], name: str, problem: str, where: str, demand: Equivalence) -> SurgeryError:
    labels = ", ".join(dict.fromkeys(step.rule.label for step in steps))
    asked = "the rule asks for the same bits" if demand.exact else "the rule says that it computes the same"
    return SurgeryError(
        f"{labels} changes what the module computes",
        where=f"{steps[0].path or 'the model itself'}, on {where}",
        why=f"{asked}, and {name} {problem}",
        fix="correct the replacement or where=…; tolerance=… allows more; equivalent=False if it is meant to compute "
        "something else",
    )
