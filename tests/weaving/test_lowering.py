"""The fast form of a low-rank branch computes the same as the plain form: values, gradients and random draws.

It does not change tensors that hooks, users or autograd see.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from surgery import Rule, Site, apply_rules, remove, rule, show
from surgery.forward.graph_functions import tensor_of
from surgery.forward.own_forward import own_forward
from surgery.rules import LoraRule
from surgery.state.records import site_state
from surgery.weaving.low_rank_kernel import low_rank_linear
from surgery.weaving.lowering import lower
from surgery.weaving.rewrite_recording import layer_of
from surgery.weaving.weave import weave

# Two orders of summing products of this size in float32 differ by a few roundings of their largest terms.
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def linear(bias: bool = True, dtype: torch.dtype = torch.float32, inner: int = 12, out: int = 10) -> nn.Linear:
    return nn.Linear(inner, out, bias, dtype=dtype)


def adapt(layer: nn.Linear | None = None, adapter: str = "default", **fields: Any) -> nn.Linear:
    """Returns a Linear with LoRA whose B is not zero."""
    layer = apply_rules(layer or linear(), [LoraRule(nn.Linear, **{"rank": 3, "alpha": 6, **fields})], adapter=adapter)
    with torch.no_grad():
        box(layer, adapter).B.normal_()
    return layer


def box(layer: nn.Module, adapter: str = "default") -> Any:
    return getattr(layer.adapters, adapter)


def by_hand(layer: nn.Linear, x: Tensor, p: float = 0.0, adapters: tuple[str, ...] = ("default",)) -> Tensor:
    """Returns the rule's result in plain torch: alpha 6 divided by rank 3 is a scale of 2."""
    y = F.linear(x, layer.weight, layer.bias)
    for adapter in adapters:
        A, B = box(layer, adapter).A, box(layer, adapter).B
        branch = F.dropout(x.to(A.dtype), p, layer.training)
        y = (y + F.linear(F.linear(branch, A), B) * 2.0).to(y.dtype)
    return y


def results(layer: nn.Linear, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    """Returns the output, and every gradient of a weighted sum of the output."""
    x = x.detach().requires_grad_(x.requires_grad)
    layer.zero_grad()
    torch.manual_seed(1)
    y = run(x)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)).sum().backward()
    gradients = {"y": y.detach(), **{name: p.grad for name, p in layer.named_parameters() if p.grad is not None}}
    return gradients if x.grad is None else {**gradients, "x": x.grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def fast(layer: nn.Module, x: Tensor) -> bool:
    """Whether the fast form runs in training."""
    return type(layer(x).grad_fn).__name__ == "_LowRankLinearBackward"


INPUTS: dict[str, Callable[[], Tensor]] = {
    "1d": lambda: torch.randn(12),
    "2d": lambda: torch.randn(5, 12),
    "3d": lambda: torch.randn(2, 5, 12),
    "4d": lambda: torch.randn(2, 3, 4, 12),
    "one token": lambda: torch.randn(1, 1, 12),
    "one row": lambda: torch.randn(1, 12),
    "no rows": lambda: torch.randn(0, 12),
    "no tokens": lambda: torch.randn(2, 0, 12),
    "transposed": lambda: torch.randn(5, 2, 12).transpose(0, 1),
    "columns": lambda: torch.randn(12, 5).t(),
    "slice": lambda: torch.randn(2, 5, 24)[..., ::2],
    "expanded": lambda: torch.randn(1, 1, 12).expand(2, 5, 12),
}


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", INPUTS)
def test_values_gradients_and_draws_are_those_of_the_plain_form(shape: str, bias: bool, p: float) -> None:
    layer, x = adapt(linear(bias), dropout=p), INPUTS[shape]().requires_grad_()
    assert fast(layer, x)
    assert_same(results(layer, layer, x), results(layer, lambda x: by_hand(layer, x, p), x))
    layer.eval()
    assert_same(results(layer, layer, x), results(layer, lambda x: by_hand(layer, x), x))


@pytest.mark.parametrize("shape", INPUTS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(shape: str, mode: Callable[[], Any]) -> None:
    for p in (0.0, 0.4):
        layer, x = adapt(dropout=p), INPUTS[shape]()
        with mode():
            torch.manual_seed(2)
            y = layer(x)
            torch.manual_seed(2)
            torch.testing.assert_close(y, by_hand(layer, x, p), **CLOSE)
        assert not y.requires_grad and y.grad_fn is None


def test_a_seed_draws_the_masks_of_torchs_dropout() -> None:
    # A and B are identities here, so the output is the dropped-out input itself.
    layer = apply_rules(nn.Linear(6, 6, bias=False), [LoraRule(nn.Linear, rank=6, alpha=6, dropout=0.5)])
    with torch.no_grad():
        layer.weight.zero_()
        box(layer).A.copy_(torch.eye(6))
        box(layer).B.copy_(torch.eye(6))
    x = torch.randn(50, 6)
    torch.manual_seed(3)
    expected = F.dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(layer(x).detach(), expected)
    torch.manual_seed(3)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("trained", list(itertools.product([False, True], repeat=4)), ids=str)
def test_any_part_may_be_frozen(trained: tuple[bool, ...]) -> None:
    layer = adapt(dropout=0.3)
    for tensor, flag in zip((box(layer).A, box(layer).B, layer.weight, layer.bias), trained, strict=True):
        tensor.requires_grad_(flag)
    for needs_x in (False, True):
        if needs_x or any(trained):
            x = torch.randn(4, 12, requires_grad=needs_x)
            assert fast(layer, x)
            assert_same(results(layer, layer, x), results(layer, lambda x: by_hand(layer, x, 0.3), x))


def test_nothing_trained_gives_no_graph() -> None:
    layer = adapt().requires_grad_(False)
    assert layer(torch.randn(2, 12)).grad_fn is None


@pytest.mark.parametrize("p", [(0.0, 0.0), (0.4, 0.0), (0.3, 0.2)])
def test_stacked_adapters_are_one_call(p: tuple[float, float]) -> None:
    layer = adapt(adapt(dropout=p[0]), "second", dropout=p[1])
    code = show(layer, generated=True)
    assert code.count("low_rank_linear(") == 1 and "LoraRule [default], LoraRule [second]" in code
    x = torch.randn(2, 5, 12, requires_grad=True)
    assert fast(layer, x)

    def plain(x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        for adapter, chance in zip(("default", "second"), p, strict=True):
            y = y + F.linear(F.linear(F.dropout(x, chance), box(layer, adapter).A), box(layer, adapter).B) * 2.0
        return y

    assert_same(results(layer, layer, x), results(layer, plain, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    layer = adapt(linear(dtype=dtype), dtype=dtype)
    x = torch.randn(4, 12, dtype=dtype, requires_grad=True)
    assert fast(layer, x) and layer(x).dtype == dtype
    actual, expected = results(layer, layer, x), results(layer, lambda x: by_hand(layer, x), x)
    eps = torch.finfo(dtype).eps
    for name in expected:  # a few roundings of sums of up to twelve terms
        torch.testing.assert_close(actual[name], expected[name], rtol=16 * eps, atol=64 * eps)


# Where the plain form runs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_the_plain_arithmetic(base: torch.dtype) -> None:
    layer = adapt(linear(dtype=base), dropout=0.4)
    assert box(layer).A.dtype == torch.float32
    x = torch.randn(4, 12, dtype=base, requires_grad=True)
    assert layer(x).dtype == base and not fast(layer, x)
    actual, expected = results(layer, layer, x), results(layer, lambda x: by_hand(layer, x, 0.4), x)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_autocast_is_the_plain_arithmetic() -> None:
    layer, x = adapt(dropout=0.4), torch.randn(4, 12, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = results(layer, layer, x), results(layer, lambda x: by_hand(layer, x, 0.4), x)
        with torch.no_grad():
            assert layer(x).dtype == torch.bfloat16
    assert actual["y"].dtype == torch.bfloat16
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_backward_under_autocast(p: float) -> None:
    layer, x = adapt(dropout=p), torch.randn(4, 12, requires_grad=True)
    expected = results(layer, layer, x)
    torch.manual_seed(1)
    layer.zero_grad()
    y = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(torch.linspace(-1, 1, y.numel()).view(y.shape))
    assert torch.equal(box(layer).A.grad, expected["adapters.default.A"])
    assert torch.equal(x.grad, expected["x"])  # type: ignore[arg-type]


class Marked(Tensor):
    """A tensor subclass, which intercepts every operation."""


class Wrapped(nn.Parameter):
    """A parameter subclass, like quantised parameters."""


def test_tensors_of_other_kinds() -> None:
    layer, x = adapt(), torch.randn(4, 12)
    expected = by_hand(layer, x)
    marked = layer(x.as_subclass(Marked))  # type: ignore[arg-type]
    assert type(marked) is Marked and not fast(layer, x.as_subclass(Marked))
    torch.testing.assert_close(marked.as_subclass(Tensor), expected, **CLOSE)
    box(layer).A = Wrapped(box(layer).A.detach())
    assert not fast(layer, x)
    torch.testing.assert_close(layer(x), expected, **CLOSE)


def test_sparse_and_nested_inputs() -> None:
    layer, x = adapt(), torch.randn(4, 12)
    sparse = (x * (x > 0)).to_sparse()
    torch.testing.assert_close(layer(sparse), by_hand(layer, sparse.to_dense()), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that they are a prototype
        nested = layer(torch.nested.nested_tensor([x[:1], x[1:]]))
    for output, part in zip(nested.unbind(), (x[:1], x[1:]), strict=True):
        torch.testing.assert_close(output, by_hand(layer, part), **CLOSE)


def test_complex_numbers() -> None:
    weight = torch.randn(3, 4, dtype=torch.complex64)
    A, B = torch.randn(2, 4, dtype=torch.complex64), torch.randn(3, 2, dtype=torch.complex64, requires_grad=True)
    z = torch.randn(5, 4, dtype=torch.complex64)
    low_rank_linear(z, weight, None, (A, B, 2.0, 0.0, False)).abs().sum().backward()
    gradient = B.grad
    B.grad = None
    (z @ weight.t() + 2 * (z @ A.t() @ B.t())).abs().sum().backward()
    torch.testing.assert_close(gradient, B.grad, **CLOSE)


def test_meta_tensors_and_default_devices() -> None:
    layer = adapt().to("meta")
    assert layer(torch.randn(2, 5, 12, device="meta")).shape == (2, 5, 10)
    with torch.device("meta"), torch.no_grad():
        assert layer(torch.randn(1, 12)).shape == (1, 10)


# Transforms and compilers -------------------------------------------------------------------------------------


def compiled(run: Callable[..., Any], backend: Any = "aot_eager", **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(run, fullgraph=True, backend=backend, **options)


@pytest.mark.parametrize(
    ("shape", "train"),
    [("3d", True), ("3d", False), ("1d", False), ("no tokens", False), ("transposed", False), ("slice", False)],
)
def test_compiled(shape: str, train: bool) -> None:
    layer, x = adapt(dropout=0.3).train(train), INPUTS[shape]().requires_grad_()
    run = compiled(layer)
    # This backend draws its masks from torch's default generator, in the order of the plain form.
    assert_same(results(layer, run, x), results(layer, lambda x: by_hand(layer, x, 0.3), x))
    with torch.no_grad():
        torch.testing.assert_close(run.eval()(x), by_hand(layer.eval(), x), **CLOSE)


@pytest.mark.parametrize("factors", ["float32", "bfloat16"])
def test_compiled_in_half_precision(factors: str) -> None:
    layer = adapt(linear(dtype=torch.bfloat16), dtype=factors)
    x = torch.randn(3, 4, 12, dtype=torch.bfloat16, requires_grad=True)
    actual, expected = results(layer, compiled(layer), x), results(layer, lambda x: by_hand(layer, x), x)
    for name in expected:
        # bfloat16 has 8 bits: sums of ten rounded terms of a few units differ by some hundredths.
        torch.testing.assert_close(actual[name], expected[name], rtol=2e-2, atol=1e-1)


def test_compiled_under_autocast() -> None:
    layer, x = adapt(), torch.randn(3, 4, 12)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(layer)(x), by_hand(layer, x)
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=1e-1)


def test_compiled_inside_of_vmap() -> None:
    layer, x = adapt(), torch.randn(3, 4, 12)
    mapped = torch.func.vmap(lambda x: layer(x))
    torch.testing.assert_close(compiled(mapped, "eager")(x), by_hand(layer, x), **CLOSE)


def test_compiled_gradients_of_gradients() -> None:
    layer, x = adapt(), torch.randn(6, 12, requires_grad=True)
    gradients = {}
    for name, run in (("ours", compiled(layer, "eager")), ("plain", lambda x: by_hand(layer, x))):
        (grad,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        (gradients[name],) = torch.autograd.grad(grad.square().sum(), box(layer).A)
    torch.testing.assert_close(gradients["ours"], gradients["plain"], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_compiled_for_an_unknown_number_of_tokens(requires_grad: bool) -> None:
    layer, x = adapt(), torch.randn(6, 12)
    torch._dynamo.decorators.mark_unbacked(x, 0)
    x.requires_grad_(requires_grad)
    torch.testing.assert_close(compiled(layer)(x), by_hand(layer, x), **CLOSE)


def test_compilers_see_plain_products() -> None:
    seen: list[str] = []

    def backend(graph: fx.GraphModule, example: list[Tensor]) -> Any:
        seen.append(graph.code)
        return graph

    layer, x = adapt(), torch.randn(4, 12)
    with torch.no_grad():
        compiled(layer, backend)(x)
    compiled(layer, backend)(x)
    assert [(code.count("linear("), code.count(".mm(")) for code in seen] == [(3, 0), (1, 2)]
    assert not any("addmm" in code or "autograd" in code for code in seen)


def test_the_rank_leads_in_compiled_gradients() -> None:
    """A product with many rows and `rank` columns takes several times as long as its transpose."""
    sizes: list[list[int]] = []

    def note(graph: fx.GraphModule, example: list[Tensor]) -> Any:
        products = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        sizes.extend(list(node.meta["val"].shape) for node in products)
        return make_boxed_func(graph.forward)

    layer, x = adapt(), torch.randn(2, 20, 12, requires_grad=True)
    results(layer, compiled(layer, aot_autograd(fw_compiler=note, bw_compiler=note)), x)
    # Forward: A xᵀ. Backward: B's gradient, the gradient of A xᵀ, and A's gradient.
    thin = [size for size in sizes if 3 in size]
    assert sorted(thin) == [[3, 10], [3, 12], [3, 40], [3, 40]]


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict: bool) -> None:
    model = nn.Sequential(adapt()).eval()
    x = torch.randn(4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's notices about export
        program = torch.export.export(model, (x,), strict=strict)
    assert set(program.state_dict) == set(model.state_dict())
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("aten.linear.default") == 3 and "aten.mm.default" not in targets
    torch.testing.assert_close(program.module()(x), model(x), **CLOSE)


def test_jit_traced() -> None:
    layer, x = adapt(), torch.randn(4, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its tracer is legacy
        traced: Any = torch.jit.trace(layer, x)
        assert "PythonOp" not in str(traced.inlined_graph)
    more = torch.randn(7, 12)
    torch.testing.assert_close(traced(more), by_hand(layer, more), **CLOSE)


def test_symbolically_traced() -> None:
    model = nn.Sequential(adapt())
    x = torch.randn(4, 12)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x), **CLOSE)


def test_functional_transforms() -> None:
    layer, x = adapt(), torch.randn(6, 12)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    expected = torch.autograd.grad(by_hand(layer, x).square().sum(), [box(layer).A, box(layer).B])
    gradients = torch.func.grad(loss)(parameters, x)
    torch.testing.assert_close(gradients["adapters.default.A"], expected[0], **CLOSE)
    torch.testing.assert_close(gradients["adapters.default.B"], expected[1], **CLOSE)

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    torch.testing.assert_close(each["adapters.default.B"].sum(0), expected[1], **CLOSE)

    copies = {name: torch.stack([p, 2 * p]) for name, p in parameters.items()}
    outputs = torch.func.vmap(lambda p, x: torch.func.functional_call(layer, p, (x,)), (0, None))(copies, x)
    torch.testing.assert_close(outputs[0], by_hand(layer, x), **CLOSE)

    with torch.no_grad():  # only A differs between the copies, which share the base's output
        partial = {"adapters.default.A": torch.stack([parameters["adapters.default.A"], torch.zeros(3, 12)])}
        outputs = torch.func.vmap(lambda p, x: torch.func.functional_call(layer, p, (x,)), (0, None))(partial, x)
    torch.testing.assert_close(outputs[1], F.linear(x, layer.weight, layer.bias), **CLOSE)


def test_forward_mode() -> None:
    layer, x, direction = adapt(), torch.randn(6, 12), torch.randn(6, 12)
    expected = by_hand(layer, direction) - layer.bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns once when it loads its formulas
        with forward_ad.dual_level():
            forward_ad.make_dual(x, direction)
    tangent = torch.func.jvp(layer, (x,), (direction,))[1]
    torch.testing.assert_close(tangent, expected, **CLOSE)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, expected, **CLOSE)


def test_batched_gradients() -> None:
    for p in (0.0, 0.4):
        layer, x = adapt(dropout=p), torch.randn(2, 12, requires_grad=True)
        y = layer(x)
        directions = torch.eye(y.numel()).view(-1, *y.shape)
        inputs = [x, box(layer).A, box(layer).B]
        at_once = torch.autograd.grad(y, inputs, directions, is_grads_batched=True, retain_graph=True)
        one_by_one = [torch.autograd.grad(y, inputs, direction, retain_graph=True) for direction in directions]
        for gradient, expected in zip(at_once, zip(*one_by_one, strict=True), strict=True):
            torch.testing.assert_close(gradient, torch.stack(expected), **CLOSE)


@pytest.mark.parametrize("trained", ["adapter", "all"])
def test_gradients_of_gradients(trained: str) -> None:
    layer = adapt(linear(dtype=torch.float64, inner=4, out=3))
    layer = adapt(layer, "second")
    if trained == "all":
        layer.requires_grad_(True)
    names = [name for name, p in layer.named_parameters() if p.requires_grad]
    values = [dict(layer.named_parameters())[name].detach().requires_grad_() for name in names]
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(zip(names, tensors, strict=True)), (x,))

    assert type(run(x, *values).grad_fn).__name__ == "_LowRankLinearBackward"
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_gradients_of_gradients_keep_the_masks() -> None:
    layer, x = adapt(dropout=0.5), torch.randn(4, 12, requires_grad=True)

    def penalty(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
        torch.manual_seed(4)
        (first,) = torch.autograd.grad(run(x).square().sum(), x, create_graph=True)
        return list(torch.autograd.grad(first.square().sum(), [x, box(layer).A, box(layer).B]))

    actual, expected = penalty(layer), penalty(lambda x: by_hand(layer, x, 0.5))
    for gradient, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(
            gradient, reference, rtol=1e-4, atol=1e-3
        )  # sums of squares of values in the hundreds


def test_gradients_of_gradients_without_the_input_say_so() -> None:
    layer = adapt()
    box(layer).A.requires_grad_(False)
    x = torch.randn(4, 12, requires_grad=True)
    with pytest.raises(RuntimeError, match="need the layer's input"):
        torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    layer, x = adapt(dropout=0.4), torch.randn(4, 12, requires_grad=True)
    expected = results(layer, lambda x: by_hand(layer, x, 0.4), x)
    run: Any = lambda x: checkpoint(layer, x, use_reentrant=reentrant)  # noqa: E731
    assert_same(results(layer, run, x), expected)


# Hooks, users and autograd ------------------------------------------------------------------------------------


def test_hooks_see_the_whole_output_and_keep_what_they_saw() -> None:
    layer, x = adapt(), torch.randn(4, 12, requires_grad=True)
    seen: list[Any] = []
    handles = [
        layer.register_forward_hook(lambda m, args, y: seen.append(y)),
        layer.register_forward_hook(lambda m, args, y: y.mul_(2)),
        layer.register_full_backward_hook(lambda m, grad_in, grad_out: (grad_in[0] * 3,)),
        layer.register_full_backward_pre_hook(lambda m, grad_out: (grad_out[0] * 5,)),
    ]
    y = layer(x)
    assert seen[0] is not y or torch.equal(seen[0], y)
    torch.testing.assert_close(y, 2 * by_hand(layer, x), **CLOSE)
    y.sum().backward()
    expected = torch.autograd.grad(by_hand(layer, x).sum(), x)[0] * 2 * 3 * 5
    torch.testing.assert_close(x.grad, expected, **CLOSE)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 12), (2, 3, 12), (2, 1, 3, 12)])
def test_the_output_can_be_written_to(shape: tuple[int, ...], bias: bool) -> None:
    layer, x = adapt(nn.Linear(12, 10, bias=bias)), torch.randn(*shape)
    y = layer(x)
    y[..., :5] /= 2.0
    y.mul_(3.0).sum().backward()
    grad = box(layer).B.grad
    assert grad is not None
    layer.zero_grad()
    y = by_hand(layer, x)
    (1.5 * y[..., :5].sum() + 3.0 * y[..., 5:].sum()).backward()
    torch.testing.assert_close(grad, box(layer).B.grad, **CLOSE)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_input_is_never_written(gradients: bool) -> None:
    layer, x = adapt(dropout=0.4), torch.randn(4, 12)
    before = [tensor.clone() for tensor in (x, *layer.parameters())]
    with torch.set_grad_enabled(gradients):
        y = layer(x)
        if gradients:
            y.sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, *layer.parameters()), strict=True))


def test_what_is_kept_for_the_backward() -> None:
    layer = adapt(dropout=0.5)
    x = torch.randn(64, 12)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    own = {p.data_ptr() for p in layer.parameters()}
    sizes = sorted((tuple(t.shape), str(t.dtype)) for t in saved if t.data_ptr() not in own)
    assert sizes == [((3, 64), "torch.float32"), ((64, 12), "torch.bool"), ((64, 12), "torch.float32")]

    saved.clear()
    box(layer).A.requires_grad_(False)  # then only the mask is as large as the input
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.data_ptr() == x.data_ptr() for t in saved)

    saved.clear()
    box(layer).A.requires_grad_(True)
    box(layer).B.requires_grad_(False)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert not any(t.shape == (3, 64) for t in saved)


@rule("test-lowering-beside")
class BesideRule(Rule):
    """Uses the base's own output besides the adapted output."""

    form: str = "sum"

    def rewrite(self, site: Site) -> Any:
        if self.form == "input written":
            site.input.mul_(0.5)
        y, base = site.output, site.base_output
        if self.form == "pair":
            return (y, base)
        if self.form == "written":
            base.mul_(0.5)
            return y + base
        if self.form == "before":
            base.mul_(0.5)
            return None
        if self.form == "input written":
            return y * 1.0
        if self.form == "twice":
            return y + y
        if self.form == "view":
            return y + base.view(-1, 10).t().t().view_as(y)
        if self.form == "late":
            return base + torch.tanh(y)
        return y + 3.0 * base


@rule("test-lowering-input")
class InputRule(Rule):
    """Replaces the site's input."""

    def rewrite(self, site: Site) -> None:
        site.replace(site.input, site.input * 2.0)


@rule("test-lowering-branches")
class BranchRule(Rule):
    """Low-rank branches that resemble LoRA's, but differ in one detail."""

    form: str = "shared"

    def rewrite(self, site: Site) -> Any:
        A = site.param("A", torch.linspace(-1, 1, 36).view(3, 12))
        B = site.param("B", torch.linspace(1, -1, 30).view(10, 3))
        x = site.input.to(A.dtype)
        if self.form == "other input":
            x = torch.tanh(site.input).to(A.dtype)
        down = F.linear(x, A)
        if self.form == "shared":
            return (site.output + F.linear(down, B) * 2.0, down)
        if self.form == "shared draw":
            dropped = F.dropout(x, 0.5, site.training)  # type: ignore[arg-type]
            return (site.output + F.linear(F.linear(dropped, A), B) * 2.0, dropped)
        if self.form == "reversed":
            return F.linear(down, B) * 2.0 + site.output
        if self.form == "learned scale":
            return site.output + F.linear(down, B) * site.param("s", torch.tensor(0.5))
        if self.form == "biased":
            return site.output + F.linear(down, B, site.param("b", torch.ones(10))) * 2.0
        if self.form == "in place":
            x = F.dropout(x, 0.5, site.training, True)  # type: ignore[arg-type]
            return site.output + F.linear(F.linear(x, A), B) * 2.0
        return site.output + F.linear(down, B) * 2.0


BRANCHES = ("shared", "shared draw", "reversed", "learned scale", "biased", "in place", "other input", "plain")
STACKS: dict[str, tuple[Any, ...]] = {
    **{f"beside {form}": (LoraRule(nn.Linear, rank=3), BesideRule(nn.Linear, form=form))
       for form in ("sum", "pair", "written", "twice", "view", "late", "input written")},
    **{f"under {form}": (BesideRule(nn.Linear, form=form), LoraRule(nn.Linear, rank=3))
       for form in ("sum", "before", "twice", "late")},
    **{form: (BranchRule(nn.Linear, form=form),)
       for form in BRANCHES},
    "input below": (InputRule(nn.Linear), LoraRule(nn.Linear, rank=3)),
    "input above": (LoraRule(nn.Linear, rank=3), InputRule(nn.Linear)),
    "between": (LoraRule(nn.Linear, rank=3), BesideRule(nn.Linear, form="sum"), BranchRule(nn.Linear, form="plain")),
    "dora": (LoraRule(nn.Linear, rank=3, dora=True),),
    "bias": (LoraRule(nn.Linear, rank=3, lora_bias=True),),
    "three": tuple(LoraRule(nn.Linear, rank=rank) for rank in (1, 2, 3)),
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STACKS)
def test_every_stack_computes_its_own_unlowered_graph(name: str, training: bool) -> None:
    layer = linear()
    for index, applied_rule in enumerate(STACKS[name]):
        apply_rules(layer, [applied_rule], adapter=f"a{index}")
    with torch.no_grad():
        for tensor_name, tensor in layer.named_parameters():
            if "adapters" in tensor_name:
                tensor.add_(torch.randn_like(tensor))
    layer.train(training)
    state = site_state(layer)
    assert state is not None
    own = own_forward(layer, state.base)
    layers = [layer_of(applied, layer, "", own) for applied in state.applied]
    plain = fx.GraphModule(layer, weave(own, layers, training, lowered=False))
    x = torch.randn(4, 12)

    def run(call: Callable[[Tensor], Any], gradients: bool) -> list[Tensor]:
        torch.manual_seed(5)
        with torch.set_grad_enabled(gradients):
            leaf = x.clone().requires_grad_(gradients)
            y = call(leaf * 1.0)
            parts = list(y) if isinstance(y, tuple) else [y]
            if gradients:
                layer.zero_grad()
                sum(part.square().sum() for part in parts).backward()  # type: ignore[union-attr]
                parts += [leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]
        return parts

    for applied_rule, reference in zip(run(layer, True), run(plain, True), strict=True):
        # Sums of squares of values up to hundreds: the largest determines the rounding error.
        torch.testing.assert_close(
            applied_rule, reference, rtol=1e-4, atol=1e-5 * max(100.0, float(reference.detach().abs().max()))
        )
    for applied_rule, reference in zip(run(layer, False), run(plain, False), strict=True):
        torch.testing.assert_close(applied_rule, reference, **CLOSE)
    remove(layer)


@pytest.mark.parametrize("name", ["beside sum", "beside pair", "beside written", "beside view", "beside late"])
def test_a_base_output_that_somebody_else_uses_is_left_alone(name: str) -> None:
    layer = linear()
    for index, applied_rule in enumerate(STACKS[name]):
        apply_rules(layer, [applied_rule], adapter=f"a{index}")
    assert "low_rank_linear" not in show(layer, generated=True)


def test_only_what_is_lora_is_lowered() -> None:
    lowered = {}
    for name in BRANCHES:
        layer = apply_rules(linear(), STACKS[name])
        lowered[name] = "low_rank_linear" in show(layer, generated=True)
    assert lowered == {**dict.fromkeys(lowered, False), "plain": True}


def test_a_graph_without_branches_stays_as_it_is() -> None:
    graph = weave(own_forward(linear(), nn.Linear), [], training=False, lowered=False)
    before = str(graph)
    lower(graph)
    assert str(graph) == before


# Finding the tensors ------------------------------------------------------------------------------------------


def test_tensors_are_found_where_they_are_now() -> None:
    layer, x = adapt(), torch.randn(4, 12)
    expected = by_hand(layer, x)
    assert tensor_of(layer, "weight") is layer.weight and tensor_of(layer, "A", "default") is box(layer).A

    # A replica of DataParallel stores tensors as plain attributes.
    replica: Any = layer._replicate_for_data_parallel()
    adapters: Any = layer.adapters
    adapters_replica: Any = adapters._replicate_for_data_parallel()
    inner = box(layer)._replicate_for_data_parallel()
    adapters_replica._modules["default"], replica._modules["adapters"] = inner, adapters_replica
    for owner, name, tensor in (
        (replica, "weight", layer.weight),
        (replica, "bias", layer.bias),
        (inner, "A", box(layer).A),
        (inner, "B", box(layer).B),
    ):
        setattr(owner, name, tensor.detach() * 1.0)
    torch.testing.assert_close(replica(x), expected, **CLOSE)

    # A parametrization makes the tensor a property.
    class Twice(nn.Module):
        def forward(self, tensor: Tensor) -> Tensor:
            return 2 * tensor

    torch.nn.utils.parametrize.register_parametrization(box(layer), "B", Twice())
    base = F.linear(x, layer.weight, layer.bias)
    torch.testing.assert_close(layer(x) - base, 2 * (expected - base), **CLOSE)


def test_the_code_names_its_tensors() -> None:
    code = show(adapt(adapter="topics"), generated=True)
    assert "topics_A = " in code and "topics_B = " in code and "# LoraRule [topics]" in code
