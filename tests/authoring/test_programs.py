"""Random rewrites compared with the same Python in handwritten forwards: `make programs` runs 2,000."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import pickle
from collections.abc import Callable, Container
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from surgery import Rule, SurgeryError, activate, adapters, apply_rules, remove
from surgery.testing import Snapshot
from tests.support import programs
from tests.support.programs import BASES, SourceRule

# The rule of the second adapter may replace an operation that the first one edited: the warning about it is right.
pytestmark = pytest.mark.filterwarnings("ignore:.*an edit of the first has no effect:surgery.errors.SurgeryWarning")

COUNT = int(os.environ.get("PROGRAMS", "100"))
SEED = int(os.environ.get("PROGRAMS_SEED", "1"))


def outcome(model: Callable[[Tensor], Tensor], x: Tensor, seed: int = 3) -> tuple[Any, ...]:
    """The output, gradients and random state of a call; or its error."""
    torch.manual_seed(seed)
    x = x.clone().requires_grad_(True)
    try:
        y = model(x * 1.0)
    except (RuntimeError, ValueError) as error:
        return ("fails", str(error).split("\n")[0][:40])
    trained = sorted((n, p) for n, p in cast(nn.Module, model).named_parameters() if p.requires_grad)
    drawn = torch.random.get_rng_state()
    try:
        gradients = torch.autograd.grad(y.float().sum(), [x, *[p for _, p in trained]], allow_unused=True)
    except RuntimeError as error:
        gradients = ("no gradients", str(error).split("\n")[0][:60])
    return y.detach(), gradients, drawn


def same(actual: Any, expected: Any) -> bool:
    if isinstance(actual, Tensor):
        return (
            isinstance(expected, Tensor)
            and actual.dtype == expected.dtype
            and torch.equal(actual.nan_to_num(), expected.nan_to_num())
        )
    if isinstance(actual, (tuple, list)):
        return len(actual) == len(expected) and all(same(a, b) for a, b in zip(actual, expected, strict=True))
    return actual == expected


def pair_tensors(base: nn.Module, by_hand: nn.Module, adapters: list[str]) -> list[tuple[Tensor, Tensor]]:
    """Pairs of each adapter tensor and the tensor of the twin."""
    pairs = []
    for index, name in enumerate(adapters):
        for letter in "wm":
            adapter_tensors = {
                key: t
                for key, t in (*base.named_parameters(), *base.named_buffers())
                if key.endswith(f"{name}.{letter}")
            }
            pairs += [(t, getattr(by_hand, f"{letter}_{index}")) for t in adapter_tensors.values()]
    return pairs


def gradients_in_order(model: nn.Module, by_hand: nn.Module, names: Container[str] | None = None) -> None:
    for parameter in by_hand.parameters():
        parameter.requires_grad_(False)
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_(name.startswith("w_") if names is None else name in names)


def compare(model: nn.Module, twin: nn.Module, sizes: tuple[int, ...] = (3, 5), seed: int = 3) -> None:
    for rows in sizes:
        for training in (True, False):
            model.train(training)
            twin.train(training)
            x = torch.randn(rows, programs.SIZE, generator=torch.Generator().manual_seed(rows)).to(
                next(model.parameters()).dtype
            )
            mine, wanted = outcome(model, x, seed), outcome(twin, x, seed)
            assert same(mine, wanted), (mine, wanted)


def output_program(seed: int, count: int = 1) -> tuple[nn.Module, nn.Module, list[Any], Snapshot]:
    torch.manual_seed(seed)
    kinds = list(BASES)
    base = BASES[kinds[seed % len(kinds)]]()
    written = [programs.program(1000 * seed + index, f"p{index}v") for index in range(count)]
    by_hand = programs.by_hand(copy.deepcopy(base), written, [seed + index for index in range(count)])
    snapshot = Snapshot(base)
    for index, each in enumerate(written):
        apply_rules(base, SourceRule(type(base), source=each.as_rewrite(), seed=seed + index), adapter=f"a{index}")
    if count > 1:
        activate(base, [f"a{index}" for index in range(count)])
    gradients_in_order(base, by_hand)
    return base, by_hand, written, snapshot


def describe_program(seed: int, rewrites: list[str], by_hand: nn.Module | None = None) -> str:
    return f"\n# seed {seed}\n" + "\n# ---\n".join(rewrites)


@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT // 2))
def test_a_rewrite_does_what_its_python_says(seed: int) -> None:
    count = 2 if seed % 5 == 0 else 1
    try:
        model, twin, written, snapshot = output_program(seed, count)
    except SurgeryError as error:
        pytest.fail(f"refused: {error}")
    text = describe_program(seed, [each.as_rewrite() for each in written])
    compare(model, twin)
    moved = [name for name, buffer in model.named_buffers() if "adapters" not in name]
    for name in moved:
        assert same(model.get_buffer(name), twin.get_buffer(name)), text
    for mine, wanted in pair_tensors(model, twin, [f"a{index}" for index in range(count)]):
        assert same(mine, wanted), text
    copied, unpickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    compare(copied, copy.deepcopy(twin))
    compare(unpickled, copy.deepcopy(twin))
    compare(copy.deepcopy(model).bfloat16(), copy.deepcopy(twin).bfloat16())
    remove(model)
    buffer_lines = [f"buffer {name}" for name in moved]  # calls changed them, in the twin too
    left = [line for line in snapshot.differences(model) if "mode of" not in line]
    assert not [line for line in left if not line.startswith(tuple(buffer_lines))], text


@pytest.mark.parametrize("seed", range(SEED, SEED + COUNT // 2))
def test_a_replacement_is_what_a_hand_would_write_there(seed: int) -> None:
    torch.manual_seed(seed)
    inner = programs.inner_program(seed)
    base = programs.inner_base(inner)
    twin = programs.inner_by_hand(copy.deepcopy(base), inner, seed)
    text = describe_program(seed, [inner.forward(), *inner.as_rewrites()])
    snapshot = Snapshot(base)
    names = []
    for index, source in enumerate(inner.as_rewrites()):
        source_rule = SourceRule(type(base), source=source, seed=seed)
        try:
            apply_rules(base, source_rule, adapter=f"a{index}", example_inputs=torch.randn(3, 4))
            names.append(f"a{index}")
        except SurgeryError as error:
            assert "changes nothing" in str(error), f"{error}{text}"
    if not names:
        return
    activate(base, names)
    gradients_in_order(base, twin, {f"w_{name[1:]}" for name in names})
    compare(base, twin)
    compare(copy.deepcopy(base), copy.deepcopy(twin))
    compare(copy.deepcopy(base).bfloat16(), copy.deepcopy(twin).bfloat16())
    remove(base)
    assert not [line for line in snapshot.differences(base) if "mode of" not in line], text


def forms(model: nn.Module, twin: nn.Module, x: Tensor, features: set[str]) -> None:
    """Compiled as one graph, and exported strictly or not, the model gives the outputs of the twin."""
    if "hook" not in features:  # hooks of intermediate tensors break torch.compile's graph
        for training in (False, True):
            mine, wanted = copy.deepcopy(model).train(training), copy.deepcopy(twin).train(training)
            torch._dynamo.reset()
            assert same(outcome(torch.compile(mine, fullgraph=True, backend="eager"), x), outcome(wanted, x))
    if not features & {"hook", "draws"}:
        for strict in (False, True):
            mine, by_hand, wanted = (copy.deepcopy(each).eval() for each in (model, twin, twin))
            exported_output = call_exported(mine, x, strict)
            if isinstance(exported_output, str):  # torch asserts the dtype before autocast for a cast inside of it
                assert exported_output == call_exported(by_hand, x, strict)
            else:
                assert same(exported_output, wanted(x.clone()).detach())


def call_exported(model: nn.Module, x: Tensor, strict: bool) -> Tensor | str:
    """Call the exported model: its output, or the text of its error."""
    program = torch.export.export(model, (x.clone(),), strict=strict).module()
    try:
        return program(x.clone()).detach()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("seed", range(SEED, SEED + max(COUNT // 20, 1)))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo reads .grad of its inputs
def test_programs_compile_and_export(seed: int) -> None:
    model, twin, written, _ = output_program(seed)
    text = describe_program(seed, [each.as_rewrite() for each in written])
    features = written[0].features | ({"draws"} if isinstance(model, programs.Dropping) else set())
    x = torch.randn(3, 4)
    if same(outcome(copy.deepcopy(twin), x)[0], "fails"):
        pytest.skip("the same lines in a forward fail")
    try:
        forms(model, twin, x, features)
    except Exception as error:
        error.add_note(text)
        raise


@pytest.mark.parametrize("seed", range(SEED, SEED + max(COUNT // 20, 1)))
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_replacements_compile_and_export(seed: int) -> None:
    torch.manual_seed(seed)
    inner = programs.inner_program(seed)
    base = programs.inner_base(inner)
    twin = programs.inner_by_hand(copy.deepcopy(base), inner, seed)
    x, names = torch.randn(3, 4), []
    for index, source in enumerate(inner.as_rewrites()):
        with contextlib.suppress(SurgeryError):  # nothing to replace
            source_rule = SourceRule(type(base), source=source, seed=seed)
            apply_rules(base, source_rule, adapter=f"a{index}", example_inputs=x)
            names.append(f"a{index}")
    if not names:
        pytest.skip("there is nothing to replace")
    activate(base, names)
    gradients_in_order(base, twin, {f"w_{name[1:]}" for name in names})
    try:
        forms(base, twin, x, set())
    except Exception as error:
        error.add_note(describe_program(seed, [inner.forward(), *inner.as_rewrites()]))
        raise


@pytest.mark.parametrize("seed", range(SEED, SEED + max(COUNT // 20, 1)))
def test_programs_are_data(seed: int) -> None:
    """A rule of source code is saved with its adapter, and computes the same in another model."""
    model, twin, _, _ = output_program(seed)
    (adapter,) = adapters(model).values()
    again = [Rule.from_dict(json.loads(json.dumps(each.to_dict()))) for each in adapter.rules]
    other = BASES[list(BASES)[seed % len(BASES)]]()
    other.load_state_dict({name: tensor for name, tensor in twin.state_dict().items() if name[:2] not in ("w_", "m_")})
    apply_rules(other, again, adapter="a0")
    compare(other, twin)
