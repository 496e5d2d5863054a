"""Routing: each row as if it ran alone with its adapter; on many models and rules, in threads, training, generate."""

from __future__ import annotations

import copy
import gc
import io
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import (
    Rule,
    SurgeryError,
    activate,
    active,
    apply_rules,
    class_of,
    deactivate,
    merge,
    remove,
    route,
    rule,
    unmerge,
    using,
)
from surgery.rules import (
    AdaptionRule,
    BottleneckRule,
    IA3Rule,
    LohaRule,
    LoraRule,
    NormRule,
    OftRule,
    PrefixRule,
    PromptRule,
    TokensRule,
    TrainRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support import tiny

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def disturb(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


def alone(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    """Run each row separately with its adapter."""
    rows = []
    for row, name in zip(x, names, strict=True):
        with using(model, name):
            rows.append(model(row.unsqueeze(0)))
    return torch.cat(rows)


RULES: dict[str, Any] = {
    "lora": [LoraRule(["0", "2"], rank=2, init="random"), LoraRule("0", rank=5, alpha=3, init="random")],
    "lora, biases": [LoraRule("0", rank=2, init="random", lora_bias=True), LoraRule("0", bias="all", init="random")],
    "dora": [LoraRule("0", rank=2, init="random", dora=True), LoraRule(["0", "2"], rank=2, init="random")],
    "ia3": [IA3Rule(["0", "2"], feedforward="2"), IA3Rule("0")],
    "loha, vera": [LohaRule("0", rank=2), VeraRule(["0"], rank=2)],
    "oft": [OftRule("0", block_size=4), OftRule("2", block_size=4)],
    "train": [TrainRule("2"), [TrainRule("0"), LoraRule("2", init="random")]],
    "bottleneck": [BottleneckRule("0", size=4), LoraRule("0", init="random")],
}


@pytest.mark.parametrize("kind", RULES)
@pytest.mark.parametrize("names", [["a", "b", None, "a"], ["b", "b", "b"], [None, None], [None, "b"], ["a"]])
def test_each_row_as_if_alone(kind: str, names: list[str | None]) -> None:
    model = two_layers()
    before = Snapshot(model)
    for name, rules in zip("ab", RULES[kind], strict=True):
        apply_rules(model, rules, adapter=name)
    disturb(model)
    x = torch.randn(len(names), 8)
    expected = alone(model, x, names)
    for live in (["a", "b"], ["a"], []):
        activate(model, live)
        classes = [type(module) for module in model.modules()]
        with route(model, names):
            with torch.no_grad():
                torch.testing.assert_close(model(x), expected, **CLOSE)
            torch.testing.assert_close(model(x), expected, **CLOSE)
        assert [type(module) for module in model.modules()] == classes and list(active(model)) == live
    if None in names and len(set(names)) == 1:
        with route(model, names):
            routed = model(x)
        assert torch.equal(routed, deactivate(model)(x))
    assert not before.differences(remove(model))


def test_many_rows_of_few_adapters_and_few_of_many() -> None:
    torch.manual_seed(0)
    model = two_layers()
    adapters = [f"a{index}" for index in range(9)]
    for index, name in enumerate(adapters):
        apply_rules(model, LoraRule(["0", "2"], rank=1 + index, alpha=index + 1, init="random"), adapter=name)
    cases: list[list[str | None]] = [
        [*adapters],
        [*["a0"] * 10, *["a1"] * 3, None],
        [*adapters[::-1], None],
        ["a3", "a5", "a3", "a5"],
    ]
    for names in cases:
        x = torch.randn(len(names), 8)
        with route(model, names), torch.no_grad():
            outputs = model(x), model(x)
        expected = alone(model, x, names)
        assert torch.equal(*outputs)
        torch.testing.assert_close(outputs[0], expected, **CLOSE)


def test_three_dimensions_and_flattened_rows() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            return self.second(y.reshape(-1, 8)).view(x.shape)

    model = Model().eval()
    for name in ("a", "b"):
        apply_rules(model, LoraRule(["first", "second"], rank=2, init="random"), adapter=name)
    names: list[str | None] = ["a", None, "b"]
    for length in (1, 3, 5):  # with three positions for three rows, shapes do not show the batch
        x = torch.randn(3, length, 8)
        expected = alone(model, x, names)
        with route(model, names):
            torch.testing.assert_close(model(x), expected, **CLOSE)


class PositionsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.transpose(0, 1)).transpose(0, 1))


@pytest.mark.parametrize("length", [3, 6, 5])
def test_rows_that_do_not_come_first_are_refused(length: int) -> None:
    model = PositionsFirst().eval()
    for name in ("a", "b"):
        apply_rules(model, LoraRule(["inner", "head"], rank=2, init="random"), adapter=name)
    x = torch.randn(3, length, 8)
    with (
        route(model, ["a", "b", None]),
        pytest.raises(SurgeryError, match="adapters of the rows|module is called with"),
    ):
        model(x)
    remove(model)
    for name in ("a", "b"):
        apply_rules(model, LoraRule("head", rank=2, init="random"), adapter=name)
    expected = alone(model, x, ["a", "b", None])
    with route(model, ["a", "b", None]):
        torch.testing.assert_close(model(x), expected, **CLOSE)


def test_experts_that_get_some_of_the_tokens_are_refused() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(8, 2)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, x: Tensor) -> Tensor:
            flat = x.reshape(-1, 8)
            chosen = self.router(flat).argmax(-1)
            out = torch.zeros_like(flat)
            for index, expert in enumerate(self.experts):
                out[chosen == index] = expert(flat[chosen == index])
            return out.view(x.shape)

    torch.manual_seed(1)
    model = Experts().eval()
    for name in ("a", "b"):
        apply_rules(model, LoraRule(r"re:experts\..*", rank=2, init="random"), adapter=name)
    for seed in range(5):
        torch.manual_seed(seed)
        with route(model, ["a", "b"]), pytest.raises(SurgeryError, match="adapters of the rows|module is called with"):
            model(torch.randn(2, 9, 8))


MODELS = {
    "bert": (tiny.bert, ["query", "value", "dense"]),
    "albert": (tiny.albert, ["query", "value"]),
    "distilbert": (tiny.distilbert, ["q_lin", "v_lin"]),
    "deberta": (tiny.deberta, ["dense"]),
    "gpt2": (tiny.gpt2, ["c_attn", "c_proj"]),
    "llama": (tiny.llama, "all-linear"),
    "t5": (tiny.t5, ["q", "v", "wi", "wo"]),
    "whisper": (tiny.whisper, ["q_proj", "v_proj", "fc1"]),
    "vit": (tiny.vit, ["q_proj", "v_proj", "fc1"]),
    "resnet": (tiny.resnet, ["convolution"]),
}


def rows_of(example: dict[str, Any], count: int) -> dict[str, Any]:
    def repeat_rows(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        many = value[:1].repeat(count, *[1] * (value.dim() - 1))
        if value.is_floating_point():
            return many + torch.randn_like(many)
        return (many + torch.arange(count).view(-1, *[1] * (value.dim() - 1))) % max(2, int(value.max()))

    return {
        name: repeat_rows(value) if "mask" not in name else value[:1].expand(count, -1)
        for name, value in example.items()
    }


@pytest.mark.parametrize("family", MODELS)
def test_families(family: str) -> None:
    make, targets = MODELS[family]
    model, example = make()
    model.eval()
    before = Snapshot(model)
    for index, name in enumerate("ab"):
        apply_rules(model, LoraRule(targets, rank=2 + index, init="random"), adapter=name)
    names: list[str | None] = ["a", None, "b", "a"]
    inputs = rows_of(example, len(names))
    with torch.no_grad():
        with route(model, names):
            mixed = _first(model(**inputs))
        for row, name in enumerate(names):
            with using(model, name):
                row_output = _first(
                    model(**{key: v[row : row + 1] if isinstance(v, Tensor) else v for key, v in inputs.items()})
                )
            torch.testing.assert_close(mixed[row], row_output[0], rtol=1e-4, atol=1e-5)
    assert not before.differences(remove(model))


def _first(output: Any) -> Tensor:
    return next(value for value in output.values() if isinstance(value, Tensor) and value.dim())


@pytest.mark.parametrize("length", [5, 3])  # with three tokens for three rows, shapes do not show the batch
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_generate(family: str, beams: int, length: int) -> None:
    model: Any = getattr(tiny, family)()[0].eval()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("all-linear", rank=2, init="random"), adapter=name)
    disturb(model)
    ids = torch.randint(3, 60, (3, length))
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    names: list[str | None] = ["a", None, "b"]
    with route(model, names):
        mixed = model.generate(ids, **options)
    for row, name in enumerate(names):
        with using(model, name):
            row_output = model.generate(ids[row : row + 1], **options)
        assert torch.equal(mixed[row], row_output[0])
    with route(model, names), pytest.raises(SurgeryError, match="3 adapters are named, and the call has 6 rows"):
        model(input_ids=ids.repeat(2, 1), decoder_input_ids=ids.repeat(2, 1)) if family == "t5" else model(
            ids.repeat(2, 1)
        )


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_training_reaches_the_adapters_of_the_rows_alone(dropout: float) -> None:
    model = two_layers().train()
    for name in ("a", "b", "c"):
        apply_rules(model, LoraRule(["0", "2"], rank=2, dropout=dropout, init="random"), adapter=name)
    activate(model, "c")
    x = torch.randn(4, 8)
    names: list[str | None] = ["a", "b", None, "a"]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with route(model, names):
        torch.manual_seed(0)
        y = model(x)
        y.square().sum().backward()
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    reached = {key.split(".")[-2] for key, p in model.named_parameters() if p.grad is not None}
    assert reached == {"a", "b"}
    if dropout:
        return
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for row, name in enumerate(names):
        with using(model, name):
            loss = model(x[row : row + 1]).square().sum()
            if name is not None:
                loss.backward()
    for key, grad in gradients.items():
        torch.testing.assert_close(grad, model.get_parameter(key).grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model: Any = tiny.llama()[0].train()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("all-linear", rank=2, init="random"), adapter=name)
    ids = torch.randint(3, 60, (2, 5))

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        with route(model, ["a", "b"]):
            model(ids, labels=ids).loss.backward()
        return {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    plain = gradients()
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    again = gradients()
    assert plain.keys() == again.keys() and len(plain) > 10
    for key, grad in plain.items():
        torch.testing.assert_close(again[key], grad, rtol=1e-4, atol=1e-5)


def test_after_a_step_the_bank_is_new() -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    x = torch.randn(2, 8)
    with route(model, ["a", "b"]), torch.no_grad():
        first = model(x)
        model.get_parameter("0.adapters.a.B").add_(1.0)
        second = model(x)
    assert not torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_memory_is_freed() -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    from surgery.routing.thread_state import thread_routing

    with route(model, ["a", "b", "a"]), torch.no_grad():
        model(torch.randn(3, 8))
        plan: Any = thread_routing.plans[id(model.get_submodule("0"))]  # type: ignore[index]
        bank = [weakref.ref(tensor) for tensor in plan.bank]
        size = sum(tensor.numel() for tensor in plan.bank)
        assert size <= 2 * sum(p.numel() for n, p in model.named_parameters() if "adapters" in n)
        del plan
    gc.collect()
    assert [ref() for ref in bank] == [None, None] and thread_routing.plans is None and not thread_routing.routings


@pytest.fixture
def hasty() -> Iterator[None]:
    """Make threads switch after a few steps."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("trial", range(5))
@pytest.mark.usefixtures("hasty")
def test_threads(trial: int) -> None:
    model = two_layers()
    for index in range(4):
        apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter=f"a{index}")
    activate(model, "a0")
    x = torch.randn(2, 8)
    expected = {index: alone(model, x, [f"a{index}", None]) for index in range(4)}
    live, wrong = model(x), []
    start = threading.Barrier(5)

    def work(index: int) -> None:
        start.wait()
        for _ in range(60):
            with torch.no_grad(), route(model, [f"a{index}", None]):
                for _ in range(3):
                    if not torch.allclose(model(x), expected[index], atol=1e-6):
                        wrong.append(index)

    def bystander() -> None:
        start.wait()
        for _ in range(200):
            with torch.no_grad():
                if not torch.allclose(model(x), live, atol=1e-6):
                    wrong.append(-1)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    threads.append(threading.Thread(target=bystander))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (
        not wrong
        and torch.equal(model(x), live)
        and all("surgery_recipe" in str(vars(type(m))) or type(m) is class_of(m) for m in model.modules())
    )


def test_others_wait_while_a_block_is_open() -> None:
    model = two_layers()
    apply_rules(model, LoraRule("0", rank=2), adapter="a")
    changes: list[Any] = [
        lambda: activate(model, "a"),
        lambda: deactivate(model),
        lambda: remove(model),
        lambda: merge(model),
        lambda: apply_rules(model, LoraRule("2", rank=2), adapter="b"),
        lambda: using(model, None).__enter__(),
        lambda: route(model, ["a"]).__enter__(),
    ]
    with route(model, ["a"]):
        for change in changes:
            with pytest.raises(SurgeryError, match="routed|block of route"):
                change()
    merge(model)
    with pytest.raises(SurgeryError, match="merged"):
        route(model, ["a"]).__enter__()
    unmerge(model)
    errors = []
    with using(model, "a"):
        thread = threading.Thread(target=lambda: _note_error(errors, model))
        thread.start()
        thread.join()
    assert "another thread is using" in errors[0]


def _note_error(errors: list[str], model: nn.Module) -> None:
    try:
        with route(model, ["a"]):
            pass
    except SurgeryError as error:
        errors.append(str(error))


def test_copies_made_inside_are_of_the_model_outside() -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    activate(model, "a")
    x = torch.randn(2, 8)
    live = model(x)
    with route(model, ["a", "b"]):
        copied = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
    for other in (copied, loaded):
        assert torch.equal(other(x), live)
        expected = alone(model, x, ["b", None])
        with route(other, ["b", None]):
            torch.testing.assert_close(other(x), expected, **CLOSE)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_made_inside_have_nothing_of_the_block(how: str) -> None:
    model: Any = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter=name)
    activate(model, "a")
    outside = duplicate_model(model, how)
    with route(model, ["a", "b"]):
        assert model[0].adapters.b.A.requires_grad
        inside, site = duplicate_model(model, how), duplicate_model(model[0], how)
        assert model[0].adapters.b.A.requires_grad
    deactivate(model)
    bare = duplicate_model(model, how)
    with route(model, ["a", "b"]):  # at sites with the base's class outside the block
        bare_inside = duplicate_model(model, how)
    for duplicate, wanted in ((inside, outside), (bare_inside, bare)):
        assert not unlike(duplicate, wanted)
        activate(duplicate, "b")
        assert all(p.requires_grad for name, p in duplicate.named_parameters() if ".b." in name)
        remove(duplicate)
        assert not duplicate._forward_hooks and not duplicate._forward_pre_hooks
    assert type(site) is type(outside[0]) and not site.adapters.b.A.requires_grad


def duplicate_model(model: Any, how: str) -> Any:
    if how == "deepcopy":
        return copy.deepcopy(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def unlike(actual: nn.Module, wanted: nn.Module) -> list[str]:
    """Like `Snapshot.differences` for two models, regardless of the identity of tensors."""
    before, now = Snapshot(wanted), Snapshot(actual)
    differences = {line.rpartition(" is (")[0] or line for line in before.differences(actual)}
    for name, fact in before.facts.items():
        if name.startswith("parameter ") and fact[1:] == now.facts[name][1:]:
            differences.discard(name)
    return sorted(differences)


def test_two_models_at_once() -> None:
    first, two = two_layers(), two_layers()
    for model in (first, two):
        for name in ("a", "b"):
            apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    x = torch.randn(2, 8)
    expected = alone(first, x, ["a", "b"]), alone(two, x, ["b", None])
    with route(first, ["a", "b"]):
        with route(two, ["b", None]):
            torch.testing.assert_close(first(x), expected[0], **CLOSE)
            torch.testing.assert_close(two(x), expected[1], **CLOSE)
        torch.testing.assert_close(first(x), expected[0], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    model = two_layers().to(dtype)
    for name in ("a", "b"):
        apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter=name)
    x = torch.randn(3, 8, dtype=dtype)
    names: list[str | None] = ["a", "b", None]
    with torch.no_grad(), route(model, names):
        output = model(x)
    assert output.dtype == dtype
    torch.testing.assert_close(output, alone(model, x, names), rtol=2e-2, atol=2e-2)
    wide = model.float()
    with torch.no_grad(), torch.autocast("cpu", dtype):
        with route(wide, names):
            output = wide(x.float())
        torch.testing.assert_close(output, alone(wide, x.float(), names), rtol=2e-2, atol=2e-2)
    with torch.inference_mode(), route(wide, names):
        torch.testing.assert_close(wide(x.float()), alone_inside(wide, x.float(), names), **CLOSE)


def alone_inside(model: nn.Module, x: Tensor, names: list[str | None]) -> Tensor:
    from surgery.routing.thread_state import paused

    boxes: Any = model.get_submodule("0").adapters, model.get_submodule("2").adapters
    first, second = model.get_submodule("0"), model.get_submodule("2")
    rows = []
    with paused():
        for row, name in zip(x, names, strict=True):
            deltas = [0.0 if name is None else 4 * box._modules[name].B @ box._modules[name].A for box in boxes]
            hidden = F.linear(row, first.weight + deltas[0], first.bias).tanh()  # type: ignore[operator, arg-type]
            rows.append(F.linear(hidden, second.weight + deltas[1], second.bias))  # type: ignore[operator, arg-type]
    return torch.stack(rows)


def test_embeddings_norms_and_convolutions() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.conv = nn.Embedding(9, 8), nn.LayerNorm(8), nn.Conv1d(8, 8, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.conv(self.norm(self.embed(ids)).mT)

    model = Model().eval()
    for name in ("a", "b"):
        rules: list[Rule] = [LoraRule(["embed", "conv"], rank=2, init="random")]
        apply_rules(model, [*rules, NormRule("norm")] if name == "a" else rules, adapter=name)
    apply_rules(model, TokensRule("embed", tokens=[1, 2]), adapter="c")
    disturb(model)
    names: list[str | None] = ["a", "c", "b", None]
    for length in (4, 7):
        ids = torch.randint(0, 9, (4, length))
        expected = alone(model, ids, names)
        with route(model, names):
            torch.testing.assert_close(model(ids), expected, **CLOSE)


def test_what_is_wrong_is_told_before_anything_runs() -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule("0", rank=2), adapter=name)
    ran: list[int] = []
    model.get_submodule("0").register_forward_hook(lambda *_: ran.append(1))
    before = Snapshot(model)
    for names, message in ((["a", "c"], "no adapter 'c'"), ([], "a name for each row"), ("a", "a name for each row")):
        with pytest.raises(SurgeryError, match=message):
            route(model, names).__enter__()
    for rows in (1, 3, 4):
        with (
            route(model, ["a", "b"]),
            pytest.raises(SurgeryError, match=f"2 adapters are named, and the call has {rows}"),
        ):
            model(torch.randn(rows, 8))
    assert not ran and not before.differences(model)
    apply_rules(model, LoraRule("2", rank=2, init="pissa"), adapter="c")
    for names in (["a", "b"], ["c", "a"], [None]):
        with pytest.raises(SurgeryError, match="changed the base's weights"):
            route(model, names).__enter__()
    with route(model, ["c", "c"]):
        model(torch.randn(2, 8))


@rule("test-wider")
class WiderRule(Rule):
    """An output twice as wide."""

    def rewrite(self, site: Any) -> Tensor:
        return torch.cat([site.output, site.output], -1)


def test_rows_of_other_sizes_are_told() -> None:
    model = two_layers()
    apply_rules(model, WiderRule("2"), adapter="a")
    with route(model, ["a", None]), pytest.raises(SurgeryError, match="rows of different shapes"):
        model(torch.randn(2, 8))


class Remembers(nn.Linear):
    """A layer whose forward stores its result."""

    def forward(self, x: Tensor) -> Tensor:
        self.last = super().forward(x)
        return self.last


def test_what_a_forward_keeps_is_not_written_to() -> None:
    model = nn.Sequential(Remembers(8, 8)).eval()
    layer: Any = model[0]
    for name in ("a", "b"):
        apply_rules(model, LoraRule("0", rank=2, init="random"), adapter=name)
    x = torch.randn(2, 8)
    with torch.no_grad():
        base = F.linear(x, layer.weight, layer.bias)
        for names in (["a", "b"], ["a", None]):
            with route(model, names):
                assert not torch.allclose(model(x), base, atol=1e-3)
                torch.testing.assert_close(layer.last, base, **CLOSE)


def test_ranks_that_differ_much_make_no_large_bank() -> None:
    model = two_layers()
    names: list[str | None] = []
    for index, rank in enumerate((1, 1, 1, 1, 1, 8)):
        names.append(f"a{index}")
        apply_rules(model, LoraRule("0", rank=rank, init="random"), adapter=f"a{index}")
    from surgery.routing.thread_state import thread_routing

    x = torch.randn(6, 8)
    expected = alone(model, x, names)
    with torch.no_grad(), route(model, names):
        torch.testing.assert_close(model(x), expected, **CLOSE)
        plan: Any = thread_routing.plans[id(model.get_submodule("0"))]  # type: ignore[index]
        assert plan.bank is None


def test_a_forward_is_not_run_for_rows_that_have_their_own() -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, OftRule("0", block_size=4), adapter=name)
        activate(model, [])
    rows: list[int] = []

    def count(self: Any, x: Tensor) -> Tensor:
        rows.append(len(x))
        return F.linear(x, self.weight, self.bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", count)
        with route(model, ["a", "b", "a"]):
            model(torch.randn(3, 8))
    assert rows.count(3) == 1  # of the other layer


PREFIXES = {
    "lengths": (PrefixRule(length=3), PrefixRule(length=5)),
    "gate": (PrefixRule(length=3, gate=True), PrefixRule(length=4)),
    "gates": (PrefixRule(length=3, gate=True), PrefixRule(length=4, gate=True)),
    "projection": (PrefixRule(length=3, projection=8), PrefixRule(length=4)),
    "beside lora": (PrefixRule(length=3), LoraRule(["q_proj", "query", "c_attn", "q"], rank=2, init="random")),
}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", PREFIXES)
@pytest.mark.parametrize("family", ["llama", "bert", "gpt2", "t5"])
@pytest.mark.filterwarnings("ignore:.*targets has")
def test_prefixes(family: str, kind: str, implementation: str) -> None:
    pair: Any = getattr(tiny, family)()
    model, example = pair
    model.eval().set_attn_implementation(implementation)
    before = Snapshot(model)
    for name, rules in zip("ab", PREFIXES[kind], strict=True):
        apply_rules(model, rules, adapter=name, example_inputs=example)
    disturb(model)
    names: list[str | None] = ["a", None, "b", "b"]
    inputs = rows_of(example, len(names))
    if family != "t5":
        mask = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
        mask[1, -2:] = mask[3, -1:] = 0
        inputs["attention_mask"] = mask
    with torch.no_grad():
        with route(model, names):
            mixed = _first(model(**inputs))
        for row, name in enumerate(names):
            row_inputs = {key: v[row : row + 1] if isinstance(v, Tensor) else v for key, v in inputs.items()}
            with using(model, name):
                expected = _first(model(**row_inputs))
            positions = slice(None) if mixed.dim() < 3 or family == "t5" else inputs["attention_mask"][row] == 1
            torch.testing.assert_close(mixed[row][positions], expected[0][positions], rtol=1e-4, atol=1e-5)
    assert not before.differences(remove(model))


def test_prefixes_are_trained_and_generate() -> None:
    model: Any = tiny.llama()[0].eval()
    ids = torch.randint(3, 60, (3, 5))
    for name, length in (("a", 3), ("b", 5)):
        apply_rules(model, PrefixRule(length=length), adapter=name, example_inputs={"input_ids": ids})
    disturb(model)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": 2, "pad_token_id": 0, "eos_token_id": None}
    names: list[str | None] = ["a", None, "b"]
    with route(model, names):
        mixed = model.generate(ids, **options)
        model(ids, labels=ids).loss.backward()
    assert all(p.grad is not None and bool(p.grad.any()) for n, p in model.named_parameters() if "adapters" in n)
    for row, name in enumerate(names):
        with using(model, name):
            assert torch.equal(mixed[row], model.generate(ids[row : row + 1], **options)[0])


def test_prefixes_in_attention_that_is_written_out_are_refused() -> None:
    model, example = tiny.deberta()
    apply_rules(model, PrefixRule(length=3), adapter="a", example_inputs=example)
    for names in (["a", None], ["a"]):
        with pytest.raises(SurgeryError, match=r"PrefixRule \[a\] can't be routed"):
            route(model, names).__enter__()


def check_rows(model: Any, inputs: dict[str, Any], names: list[str | None]) -> None:
    with torch.no_grad():
        with route(model, names):
            mixed = _first(model(**inputs))
        for row, name in enumerate(names):
            row_inputs = {key: v[row : row + 1] if isinstance(v, Tensor) else v for key, v in inputs.items()}
            with using(model, name):
                expected = _first(model(**row_inputs))
            positions: Any = slice(None)
            if mixed.dim() > 2 and "attention_mask" in inputs:
                positions = inputs["attention_mask"][row] == 1
            torch.testing.assert_close(mixed[row][positions], expected[0][positions], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "distilbert"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_prompts(family: str, padding: str) -> None:
    model, example = getattr(tiny, family)()
    model.eval()
    before = Snapshot(model)
    apply_rules(model, PromptRule(length=3), adapter="a")
    apply_rules(model, PromptRule(length=5, encoder="mlp"), adapter="b")
    disturb(model)
    names: list[str | None] = ["a", None, "b", "b"]
    inputs = {"input_ids": rows_of(example, len(names))["input_ids"]}
    if padding != "none":
        mask = torch.ones(inputs["input_ids"].shape, dtype=torch.long)
        mask[1, -2:] = mask[3, -1:] = 0
        inputs["attention_mask"] = mask.flip(-1) if padding == "left" else mask
    if family == "distilbert" and padding != "none":
        inputs["attention_mask"][:, 0] = 1  # its head reads the first token
    if family == "bert" and padding == "left":
        inputs["attention_mask"][:, 0] = 1
    check_rows(model, inputs, names)
    assert not before.differences(remove(model))


def test_prompts_of_equal_length_in_an_encoder_decoder() -> None:
    model, example = tiny.t5()
    model.eval()
    for name in ("a", "b"):
        apply_rules(model, PromptRule(length=3), adapter=name)
    disturb(model)
    inputs = rows_of(example, 3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, -2:] = 0
    with torch.no_grad():
        with route(model, ["a", "b", "a"]):
            mixed = _first(model(**inputs))
        for row, name in enumerate("aba"):
            with using(model, name):
                row_inputs = {key: v[row : row + 1] if isinstance(v, Tensor) else v for key, v in inputs.items()}
                torch.testing.assert_close(mixed[row], _first(model(**row_inputs))[0], rtol=1e-4, atol=1e-5)
        with route(model, ["a", None, "b"]), pytest.raises(SurgeryError, match="with and without virtual tokens"):
            model(**inputs)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("beams", [1, 2])
def test_prompts_generate(family: str, beams: int) -> None:
    model: Any = getattr(tiny, family)()[0].eval()
    for name, length in (("a", 3), ("b", 5)):
        apply_rules(model, PromptRule(length=length), adapter=name)
    ids = torch.randint(3, 60, (3, 5))
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids)
    mask[2, :2] = 0
    names: list[str | None] = ["a", None, "b"]
    with route(model, names):
        mixed = model.generate(ids, attention_mask=mask, **options)
    for row, name in enumerate(names):
        with using(model, name):
            row_output = model.generate(ids[row : row + 1], attention_mask=mask[row : row + 1], **options)
        assert torch.equal(mixed[row], row_output[0])


def test_adaption_prompts_and_their_limits() -> None:
    model, example = tiny.llama()
    model.eval()
    for name, length in (("a", 3), ("b", 5)):
        apply_rules(model, AdaptionRule("self_attn", length=length), adapter=name)
    disturb(model)
    inputs = {"input_ids": rows_of(example, 3)["input_ids"]}
    check_rows(model, inputs, ["a", None, "b"])
    other, example = tiny.gpt2()
    for name in ("a", "b"):
        apply_rules(other, AdaptionRule("attn", length=3, mapped=False), adapter=name)
    with pytest.raises(SurgeryError, match="can't be routed in one batch"):
        route(other, ["a", "b"]).__enter__()


@pytest.mark.filterwarnings("ignore")  # torch.compile's own, of graphs that it breaks
def test_compiled_models_follow() -> None:
    model = two_layers()
    for name in ("a", "b"):
        apply_rules(model, LoraRule(["0", "2"], rank=2, init="random"), adapter=name)
    x = torch.randn(2, 8)
    live = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    pairs: list[list[str | None]] = [["a", "b"], [None, "b"]]
    expected = [alone(model, x, names) for names in pairs]
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), live, **CLOSE)
        for names, rows in zip(pairs * 2, expected * 2, strict=True):
            with route(model, names):
                torch.testing.assert_close(compiled(x), rows, **CLOSE)
        with route(model, ["a", "b"]):
            compiled(x)
            model.get_parameter("0.adapters.a.B").add_(1.0)
            torch.testing.assert_close(compiled(x), model(x), **CLOSE)
        torch.testing.assert_close(compiled(x), model(x), **CLOSE)


class Sequences(nn.Module):
    """A module that takes a sequence without a batch, too."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, x, x) if isinstance(self.inner, nn.MultiheadAttention) else (x,)
        options = {"need_weights": False} if len(inputs) == 3 else {}
        return self.inner(*inputs, **options)[0]


@pytest.mark.parametrize("kind", ["attention", "recurrent"])
def test_rows_of_one_sequence_do_not_have_adapters_of_their_own(kind: str) -> None:
    """An output of a sequence depends on all of its positions: on some of them alone it would be another."""
    inner = nn.MultiheadAttention(8, 2, batch_first=True) if kind == "attention" else nn.GRU(8, 8, batch_first=True)
    rules = {"attention": LoraRule("inner", rank=2), "recurrent": TrainRule("inner")}
    model = Sequences(inner).eval()
    for name in "ab":
        deactivate(apply_rules(model, rules[kind], adapter=name))
    disturb(model)
    x = torch.randn(4, 8)
    with (
        route(model, ["a", "b", None, "a"]),
        pytest.raises(SurgeryError, match="one sequence, without a batch") as error,
    ):
        model(x)
    assert error.value.where == "inner"
    if kind == "attention":
        batch, names = torch.randn(4, 5, 8), ["a", "b", None, "a"]
        with route(model, names):
            routed = model(batch)
        torch.testing.assert_close(routed, alone(model, batch, names), **CLOSE)
