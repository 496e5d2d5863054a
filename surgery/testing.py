"""Assertions for the tests of rule authors: the invariants that every rule must keep."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.lifecycle.apply import apply_rules
from surgery.lifecycle.remove import remove
from surgery.merging.merge import merge, unmerge
from surgery.planning.planner import make_plan
from surgery.rewritten_model.state_dict import adapter_state_dict
from surgery.tracing.example_call import call, equal, random_state
from surgery.transaction.gradient_flags import is_lazy

__all__ = ["Snapshot", "assert_equivalent", "assert_reversible"]


class Snapshot:
    """Records a model's exact state: bits and identity of tensors, key order, classes, flags, hooks and modes.

    >>> from torch import nn
    >>> from surgery.testing import Snapshot
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> before = Snapshot(model)
    >>> _ = model.eval()
    >>> before.differences(model)
    ["mode of '' is False, was True", "mode of '0' is False, was True"]

    Args:
        model: The model to record. It is not changed.
    """

    def __init__(self, model: nn.Module):
        self.facts = _facts(model)
        self.bits = {name: _bits(tensor) for name, tensor in _tensors(model).items()}

    def differences(self, model: nn.Module) -> list[str]:
        """Returns one line for each difference between the recorded state and the model's present state."""
        now = _facts(model)
        changes = [f"{key} is {now.get(key)!r}, was {was!r}" for key, was in self.facts.items() if now.get(key) != was]
        changes += [f"{key} is new: {value!r}" for key, value in now.items() if key not in self.facts]
        tensors = _tensors(model)
        for name, bits in self.bits.items():
            if name in tensors and not torch.equal(_bits(tensors[name]), bits):
                changes.append(f"bits of {name} differ")
        return changes


def assert_reversible(
    model: nn.Module,
    rules: Sequence[Rule] | Rule,
    *,
    example_inputs: Any = None,
    disturb: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
) -> None:
    """Check that apply → remove, and apply → merge → unmerge → remove, restore the model bit for bit.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.testing import assert_reversible
    >>> from surgery.rules import LoraRule
    >>> assert_reversible(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2), example_inputs=torch.randn(3, 4))

    Args:
        model: The model to test on. It is changed and restored.
        rules: One rule or several.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments, or a dict of keyword arguments. With it,
            the outputs are compared, too. Default None: the model is not called, so a rule whose calls fail passes.
        disturb: Called with the model after `apply_rules`, to change the adapter's tensors as training would.
            Default None: random noise is added.
        seed: The seed of that noise. Default 0.

    Raises:
        AssertionError: The model or its output is not restored. The text lists each difference.

    Note:
        Rules that can't be merged are only applied and removed.
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    before = Snapshot(model)
    random = random_state()  # the same numbers at each call, for models that draw some
    output = None if example_inputs is None else call(model, example_inputs, random)

    def check(what: str) -> None:
        differences = before.differences(model)
        if example_inputs is not None and not equal(call(model, example_inputs, random), output):
            differences.append("the output differs")
        assert not differences, f"after {what}:\n  " + "\n  ".join(differences)

    def apply() -> None:
        apply_rules(model, rules, example_inputs=example_inputs)
        if disturb is not None:
            disturb(model)
        else:
            _add_noise(model, seed)

    apply()
    remove(model)
    check("apply → remove")
    if all(step.rule.mergeable for step in make_plan(model, rules, "default", example_inputs).steps):
        apply()
        live = None if example_inputs is None else call(model, example_inputs, random)
        _merge(model)
        unmerge(model)
        if example_inputs is not None:
            assert equal(call(model, example_inputs, random), live), "unmerging did not give the live output back"
        remove(model)
        check("apply → merge → unmerge → remove")


def assert_equivalent(
    model: nn.Module,
    rules: Sequence[Rule] | Rule,
    reference: Callable[..., Any],
    example_inputs: Any,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    seed: int = 0,
) -> None:
    """Check that the rewritten model computes what a plain PyTorch reference computes, live and merged.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.testing import assert_equivalent
    >>> from surgery.rules import LoraRule
    >>> layer = nn.Sequential(nn.Linear(4, 4))
    >>> def by_hand(tensors, x):
    ...     A, B = tensors["0.adapters.A"], tensors["0.adapters.B"]
    ...     return layer[0].weight @ x.T + layer[0].bias[:, None] + 4 * B @ A @ x.T
    >>> assert_equivalent(layer, [LoraRule("0", rank=2)], lambda t, x: by_hand(t, x).T, torch.randn(3, 4))

    Args:
        model: The model to test on. It is changed and restored.
        rules: One rule or several.
        reference: Called as `reference(tensors, *args, **kwargs)` with the adapter's tensors by the names of
            `adapter_state_dict`, and the example's arguments. Returns the expected output.
        example_inputs: Inputs of one call: a tensor, a tuple of arguments, or a dict of keyword arguments.
        rtol: The relative tolerance. Default 1e-5, for float32.
        atol: The absolute tolerance. Default 1e-6, for float32.
        seed: The seed of the noise that is first added to the adapter's tensors. Default 0.

    Raises:
        AssertionError: An output differs from the reference by more than the tolerances.
    """
    from surgery.tracing.example_call import arguments

    apply_rules(model, rules, example_inputs=example_inputs)
    try:
        _add_noise(model, seed)
        args, kwargs = arguments(example_inputs)
        tensors = adapter_state_dict(model)
        output = call(model, example_inputs)
        try:
            _merge(model)
            merged = call(model, example_inputs)
            unmerge(model)
        except SurgeryError:
            merged = output
    finally:
        remove(model)
    with torch.no_grad():
        expected = reference(tensors, *args, **kwargs)
    torch.testing.assert_close(output, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(merged, expected, rtol=rtol, atol=atol)


def _merge(model: nn.Module) -> None:
    """Merge for a while; what rounding swallows does not matter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*swallowed more than", SurgeryWarning)
        merge(model)


def _add_noise(model: nn.Module, seed: int = 0) -> None:
    """Add small random numbers to the adapter's trained parameters."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name and parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
                parameter.add_((noise * 0.1).to(parameter.device, parameter.dtype))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in tensors.items() if not is_lazy(tensor)}


def _bits(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "__tensor_flatten__"):  # quantised and sharded tensors consist of plain tensors
        return torch.cat([_bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]])  # type: ignore[attr-defined]
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).cpu()


def _facts(model: nn.Module) -> dict[str, Any]:
    """Returns everything but the bits, by a name for reports."""
    facts: dict[str, Any] = {"keys": tuple(model.state_dict())}
    for path, module in model.named_modules(remove_duplicate=False):
        facts[f"class of {path!r}"] = type(module)
        facts[f"mode of {path!r}"] = module.training
        facts[f"attributes of {path!r}"] = tuple(sorted(module.__dict__))
        facts[f"children of {path!r}"] = tuple(module._modules.keys())
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            facts[f"{kind[1:]} of {path!r}"] = tuple(id(hook) for hook in module.__dict__[kind].values())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shape = None if is_lazy(parameter) else tuple(parameter.shape)
        facts[f"parameter {name}"] = (id(parameter), parameter.requires_grad, parameter.dtype, shape)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        facts[f"buffer {name}"] = (id(buffer), buffer.dtype, None if is_lazy(buffer) else tuple(buffer.shape))
    return facts
