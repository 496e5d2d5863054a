"""The invariants every rule keeps, for the tests of people who write rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import SurgeryError
from surgery.lifecycle.apply import apply_rules
from surgery.lifecycle.remove import remove
from surgery.merging.merge import merge, unmerge
from surgery.model_record.state_dict import adapter_state_dict
from surgery.planning.planner import make_plan
from surgery.tracing.example_call import call, equal, random_state
from surgery.transaction.gradient_flags import is_lazy

__all__ = ["Snapshot", "assert_equivalent", "assert_reversible"]


class Snapshot:
    """A model's state to the bit: tensors and their identity, key order, classes, flags, hooks and modes.

    >>> from torch import nn
    >>> from surgery.testing import Snapshot
    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> before = Snapshot(model)
    >>> _ = model.eval()
    >>> before.differences(model)
    ["mode of '' is False, was True", "mode of '0' is False, was True"]
    """

    def __init__(self, model: nn.Module):
        self.facts = _facts(model)
        self.bits = {name: _bits(tensor) for name, tensor in _tensors(model).items()}

    def differences(self, model: nn.Module) -> list[str]:
        """What is not as it was, a line each."""
        now = _facts(model)
        found = [f"{key} is {now.get(key)!r}, was {was!r}" for key, was in self.facts.items() if now.get(key) != was]
        found += [f"{key} is new: {value!r}" for key, value in now.items() if key not in self.facts]
        tensors = _tensors(model)
        for name, bits in self.bits.items():
            if name in tensors and not torch.equal(_bits(tensors[name]), bits):
                found.append(f"bits of {name} differ")
        return found


def assert_reversible(
    model: nn.Module,
    rules: Sequence[Rule] | Rule,
    *,
    example_inputs: Any = None,
    disturb: Callable[[nn.Module], Any] | None = None,
    seed: int = 0,
) -> None:
    """Apply → remove, and apply → merge → unmerge → remove, give the model back to the bit.

    >>> from torch import nn
    >>> from surgery.testing import assert_reversible
    >>> from surgery.rules import LoraRule
    >>> assert_reversible(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])

    Between, the adapter's tensors are moved at random (or by `disturb`), as training would. Rules without a closed
    form are not merged. With example inputs, the output too comes back, and is the same after unmerging as before
    merging. Works on the model given, which is afterwards as it was; raises `AssertionError` with each difference.
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    before = Snapshot(model)
    random = random_state()  # the same numbers at each call, for models that draw some
    output = None if example_inputs is None else call(model, example_inputs, random)

    def check(what: str) -> None:
        found = before.differences(model)
        if example_inputs is not None and not equal(call(model, example_inputs, random), output):
            found.append("the output differs")
        assert not found, f"after {what}:\n  " + "\n  ".join(found)

    def applied() -> None:
        apply_rules(model, rules, example_inputs=example_inputs)
        if disturb is not None:
            disturb(model)
        else:
            _disturbed(model, seed)

    applied()
    remove(model)
    check("apply → remove")
    if all(step.rule.mergeable for step in make_plan(model, rules, "default", example_inputs).steps):
        applied()
        live = None if example_inputs is None else call(model, example_inputs, random)
        merge(model)
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
    """The rewritten model computes what plain PyTorch does, and merged it computes the same.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.testing import assert_equivalent
    >>> from surgery.rules import LoraRule
    >>> layer = nn.Sequential(nn.Linear(4, 4))
    >>> def by_hand(tensors, x):
    ...     A, B = tensors["0.adapters.A"], tensors["0.adapters.B"]
    ...     return layer[0].weight @ x.T + layer[0].bias[:, None] + 4 * B @ A @ x.T
    >>> assert_equivalent(layer, [LoraRule("0", rank=2)], lambda t, x: by_hand(t, x).T, torch.randn(3, 4))

    `reference(tensors, *inputs)` gets the adapter's tensors (as `adapter_state_dict` names them) and the example.
    The adapter's tensors are moved at random first. The model is afterwards as it was. Tolerances are float32's.
    """
    from surgery.tracing.example_call import arguments

    apply_rules(model, rules, example_inputs=example_inputs)
    try:
        _disturbed(model, seed)
        args, kwargs = arguments(example_inputs)
        tensors = adapter_state_dict(model)
        found = call(model, example_inputs)
        try:
            merge(model)
            merged = call(model, example_inputs)
            unmerge(model)
        except SurgeryError:
            merged = found
    finally:
        remove(model)
    with torch.no_grad():
        expected = reference(tensors, *args, **kwargs)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)
    torch.testing.assert_close(merged, expected, rtol=rtol, atol=atol)


def _disturbed(model: nn.Module, seed: int = 0) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name and parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
                parameter.add_((noise * 0.1).to(parameter.device, parameter.dtype))


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor for name, tensor in held.items() if not is_lazy(tensor)}


def _bits(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "__tensor_flatten__"):  # quantised and sharded tensors are made of plain ones
        return torch.cat([_bits(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]])  # type: ignore[attr-defined]
    return tensor.detach().clone().contiguous().reshape(-1).view(torch.uint8).cpu()


def _facts(model: nn.Module) -> dict[str, Any]:
    """All but the bits, each as a line that compares."""
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
