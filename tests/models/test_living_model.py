"""A rewritten model works as before: generation, checkpoints, precision, copies, compile, export, hooks, errors."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import prune

from surgery import (
    PlanError,
    Rule,
    Site,
    SiteError,
    SurgeryError,
    SurgeryWarning,
    apply_rules,
    base_state_dict,
    merge,
    plan_rules,
    remove,
    rule,
    show,
    summary,
    unmerge,
)
from surgery.rules import LoraRule, NormRule, TrainRule
from surgery.testing import Snapshot, assert_reversible
from tests.support import ROOT

tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")

LORA = LoraRule("all-linear", rank=4, init="random")  # "random": B is not zero, so the adapter changes outputs at once


@rule("test-gain")
class GainRule(Rule):
    """A small custom rule on inputs and outputs only, so it goes on opaque sites such as an LSTM, too."""

    def rewrite(self, site: Site) -> Any:
        gain = site.param("gain", torch.linspace(0.5, 1.5, self.size(site)))
        if isinstance(site.module, nn.LSTM):
            return site.output[0] * gain, site.output[1]
        return site.output * gain

    def size(self, site: Site) -> int:
        return site.module.hidden_size if isinstance(site.module, nn.LSTM) else site.out_features


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 8, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def mlp(dtype: torch.dtype = torch.float32) -> Any:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).to(dtype)


def encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".adapters." in f".{name}"}


def bare(model: Any) -> Any:
    """The model after unmerging, if an adapter was merged."""
    return unmerge(model) if summary(model).merged else model


def logits(model: nn.Module, inputs: Any) -> Tensor:
    output = model(**inputs) if isinstance(inputs, dict) else model(inputs)
    return output if isinstance(output, Tensor) else output["logits"]


# Identity -------------------------------------------------------------------------------------------------------


def test_the_patient_keeps_its_identity() -> None:
    model, _ = tiny.llama()
    kinds = {path: (type(module), type(module).__name__) for path, module in model.named_modules()}
    names, keys = dict(model.named_parameters()), list(model.state_dict())
    assert apply_rules(model, [LORA]) is model
    for path, (kind, name) in kinds.items():
        module = model.get_submodule(path)
        assert isinstance(module, kind) and type(module).__name__ == name
        assert type(module).__module__ == kind.__module__ and type(module).__qualname__ == kind.__qualname__
    now = dict(model.named_parameters())
    assert all(now[name] is parameter for name, parameter in names.items())
    assert list(base_state_dict(model)) == keys
    assert repr(type(model.lm_head)) == repr(nn.Linear)


class Draws(nn.Linear):
    """A traceable forward that draws random numbers in evaluation mode, too."""

    def forward(self, input: Tensor) -> Tensor:
        return F.dropout(F.linear(input, self.weight, self.bias), 0.5, True)


class DrawsItself(nn.Module):
    def __init__(self, lin: nn.Linear) -> None:
        super().__init__()
        self.lin = lin

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x[torch.randperm(len(x))]) + torch.randn(4)


@rule("test-shifts")
class Shifts(Rule):
    identity = True

    def rewrite(self, site: Site) -> Tensor:
        return site.output + 1.0


@pytest.mark.parametrize("make", [lambda: nn.Sequential(Draws(4, 4)), lambda: DrawsItself(nn.Linear(4, 4))])
def test_a_model_that_draws_numbers_is_compared_on_the_same_draws(make: Callable[[], nn.Module]) -> None:
    """An example call changes neither the random state nor the adapter's random initial values."""
    x = torch.randn(8, 4)
    torch.manual_seed(0)
    plain = adapters_of(apply_rules(other := make(), [LoraRule("all-linear", rank=2)]))
    after = torch.get_rng_state()
    torch.manual_seed(0)
    model = make()
    apply_rules(model, [LoraRule("all-linear", rank=2)], example_inputs=x)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(map(torch.equal, adapters_of(model).values(), plain.values()))
    remove(model)
    assert_reversible(model, [LoraRule("all-linear", rank=2)], example_inputs=x)
    with pytest.raises(SurgeryError, match="changed the model's output at initialisation"):
        apply_rules(other, [Shifts(nn.Linear)], adapter="b", example_inputs=x)


# Generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_generate_with_and_without_cache(family: str) -> None:
    model, inputs = tiny.FAMILIES[family]()
    model.eval()
    prompt = {key: value for key, value in inputs.items() if key != "decoder_input_ids"}
    # min_new_tokens prevents an early end, so all 12 tokens are compared.
    settings = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12, "pad_token_id": 0}
    base = model.generate(**prompt, **settings)
    apply_rules(model, [LoraRule("all-linear", rank=4)])
    assert torch.equal(model.generate(**prompt, **settings), base)  # LoRA starts at the identity
    remove(model)
    apply_rules(model, [LoraRule("all-linear", rank=4, alpha=32, init="random")])
    cached = model.generate(**prompt, **settings, use_cache=True)
    assert torch.equal(model.generate(**prompt, **settings, use_cache=False), cached)
    assert not torch.equal(cached, base)
    plain = copy.deepcopy(model)
    merge(plain)
    assert torch.equal(plain.generate(**prompt, **settings), cached)
    remove(model)
    assert torch.equal(model.generate(**prompt, **settings), base)


# Checkpoints ----------------------------------------------------------------------------------------------------


@contextmanager
def no_word_from(name: str) -> Iterator[None]:
    """Fail at any record of WARNING or above from a library's loggers, which do not propagate to pytest's."""
    heard: list[str] = []

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    ear = Ear(logging.WARNING)
    logging.getLogger(name).addHandler(ear)
    try:
        yield
    finally:
        logging.getLogger(name).removeHandler(ear)
    assert not heard, heard


@pytest.mark.parametrize("family", ["llama", "t5", "albert"])
def test_save_pretrained_writes_the_plain_model(family: str, tmp_path: Path) -> None:
    model, inputs = tiny.FAMILIES[family]()
    model.eval()
    plain, base = type(model), copy.deepcopy(model)
    apply_rules(model, [LORA, NormRule()])
    apply_rules(model, [LoraRule("all-linear", rank=2, init="random")], adapter="second")
    with no_word_from("transformers"):
        with pytest.warns(SurgeryWarning, match="leaves out its adapters"):
            model.save_pretrained(tmp_path)
        loaded, report = plain.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert type(loaded) is plain and not adapters_of(loaded)
    for name, tensor in base.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert torch.equal(logits(loaded.eval(), inputs), logits(base, inputs))


def test_save_pretrained_of_an_inner_model_and_of_a_merged_one(tmp_path: Path) -> None:
    model, inputs = tiny.llama()
    model.eval()
    base = copy.deepcopy(model)
    apply_rules(model, [LORA])
    with pytest.warns(SurgeryWarning, match="leaves out its adapters"):
        model.model.save_pretrained(tmp_path / "inner")  # the backbone alone
    inner, report = type(base.model).from_pretrained(tmp_path / "inner", output_loading_info=True)
    assert not any(report.values()), report
    assert all(torch.equal(t, base.model.state_dict()[name]) for name, t in inner.state_dict().items())
    merge(model)
    live = logits(model, inputs)
    model.save_pretrained(tmp_path / "merged")
    merged, report = type(base).from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(logits(merged.eval(), inputs), live)
    remove(unmerge(model)).save_pretrained(tmp_path / "removed")
    assert sorted(p.name for p in (tmp_path / "removed").iterdir()) == sorted(
        p.name for p in (tmp_path / "merged").iterdir()
    )


# Checkpointing of activations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
@pytest.mark.parametrize("family", ["llama", "bert", "t5", "vit", "whisper"])
def test_activation_checkpointing_gives_every_tensor_its_gradient(family: str, reentrant: bool) -> None:
    model, inputs = tiny.FAMILIES[family]()
    for module in model.modules():  # masks of dropout would differ between the runs
        for name in ("p", "dropout"):
            if type(getattr(module, name, None)) is float:
                setattr(module, name, 0.0)
    apply_rules(model.train(), [LORA])
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.config.use_cache = False
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        logits(model, inputs).square().mean().backward()
        gradients.append({name: p.grad for name, p in adapters_of(model).items()})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) >= 24
    for name, gradient in gradients[0].items():
        checkpointed_gradient = gradients[1][name]
        assert gradient is not None and checkpointed_gradient is not None and gradient.any(), name
        torch.testing.assert_close(checkpointed_gradient, gradient, msg=name)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in gradients[0])


def test_a_rewritten_block_is_still_checkpointed() -> None:
    """transformers wraps the forward of each subclass of its blocks: the generated class must be the outermost."""
    model, inputs = tiny.llama()
    apply_rules(model.train(), [LoraRule("q_proj", rank=2)])
    block = type(model.model.layers[0])

    @rule("test-block")
    class BlockRule(Rule):
        def rewrite(self, site: Site) -> Tensor:
            return site.output + site.param("shift", (32,), 0.1)

    apply_rules(model, [BlockRule(block)], adapter="blocks")
    calls = []

    def counted(function: Callable[..., Any], *args: Any) -> Any:
        calls.append(function)
        return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)

    model.activation_checkpointing_enable()
    for layer in model.model.layers:
        layer._gradient_checkpointing_func = counted
    logits(model, {**inputs, "use_cache": False}).square().mean().backward()
    assert len(calls) == len(model.model.layers)
    assert all(p.grad is not None for p in adapters_of(model).values())
    assert type(remove(model).model.layers[0]) is block


# Precision ------------------------------------------------------------------------------------------------------


def by_hand(model: Any, x: Tensor, scale: float) -> Tensor:
    """The paper's formula in the engine's order: the branch in the adapter's dtype, the sum in the base's."""
    for layer in model:
        if not isinstance(layer, nn.Linear):
            x = layer(x)
            continue
        adapter: Any = layer.adapters.default  # type: ignore[union-attr]
        A, B = adapter.A, adapter.B
        y = F.linear(x, layer.weight, layer.bias)
        x = (y + F.linear(F.linear(x.to(A.dtype), A), B) * scale).to(y.dtype)
    return x


@pytest.mark.parametrize("training", [True, False])
def test_autocast(training: bool) -> None:
    model = apply_rules(mlp(), [LoraRule(nn.Linear, rank=2, init="random")]).train(training)
    x = torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = model(x), by_hand(model, x, 4.0)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters_of(model).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_bases_get_float32_adapters(dtype: torch.dtype) -> None:
    model = mlp(dtype)
    base = copy.deepcopy(model)
    apply_rules(model, [LoraRule(nn.Linear, rank=2, init="random")])
    x = torch.randn(5, 8, dtype=dtype)
    assert {p.dtype for p in adapters_of(model).values()} == {torch.float32}
    output = model(x)
    assert output.dtype == dtype and torch.equal(output, by_hand(model, x, 4.0))
    output.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in adapters_of(model).values())
    merge(model)
    # The merged weight is rounded to half precision once, the branch was not.
    slack = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    torch.testing.assert_close(model(x), output, rtol=slack, atol=slack)
    assert torch.equal(remove(unmerge(model))(x), base(x))


@pytest.mark.parametrize("chosen_dtype", [None, "float32", "bfloat16"])
def test_the_dtype_of_adapters_can_be_chosen(chosen_dtype: str | None) -> None:
    model = apply_rules(mlp(torch.bfloat16), [LoraRule(nn.Linear, rank=2, init="random", dtype=chosen_dtype)])
    assert {p.dtype for p in adapters_of(model).values()} == {getattr(torch, chosen_dtype or "float32")}
    x = torch.randn(5, 8, dtype=torch.bfloat16)
    # All bfloat16: the fast form rounds once less than the formula does.
    torch.testing.assert_close(model(x), by_hand(model, x, 4.0), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double], ids=lambda f: f.__name__)
def test_conversion_of_a_rewritten_model(convert: Callable[[nn.Module], Any]) -> None:
    model = mlp()
    plain = convert(copy.deepcopy(model))
    apply_rules(model, [LoraRule(nn.Linear, rank=2, init="random")])
    convert(model)
    x = torch.randn(5, 8).to(plain[0].weight.dtype)
    assert {p.dtype for p in model.parameters()} == {x.dtype}
    torch.testing.assert_close(model(x), by_hand(model, x, 4.0), rtol=2e-2, atol=2e-2)
    remove(model)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in model.state_dict().items())
    assert torch.equal(model(x), plain(x))


# Copies ---------------------------------------------------------------------------------------------------------


def copies() -> dict[str, tuple[nn.Module, Any]]:
    """Rewritten models of every kind of site: traced, opaque, parameters edited, shared, several adapters, merged."""
    ids = torch.randint(0, 9, (2, 5))
    merged = apply_rules(mlp(), [LoraRule(nn.Linear, rank=2, init="random")])
    merge(merged)
    stacked = apply_rules(mlp(torch.bfloat16), [LoraRule("0", rank=2, init="random", dropout=0.1), TrainRule("2")])
    apply_rules(stacked, [LoraRule("0", rank=4, init="pissa", dora=True)], adapter="second")
    llama, inputs = tiny.llama()
    lookup = nn.Sequential(nn.Embedding(9, 8), nn.Conv1d(5, 4, 3, padding=1, padding_mode="circular"))
    return {
        "mlp": (apply_rules(mlp(), [LoraRule(nn.Linear, rank=2, init="random")]), torch.randn(3, 8)),
        "merged": (merged, torch.randn(3, 8)),
        "stacked": (stacked, torch.randn(3, 8, dtype=torch.bfloat16)),
        "attention": (apply_rules(Attends(), [LoraRule("attention", rank=2, init="random")]), torch.randn(2, 5, 8)),
        "encoder": (apply_rules(encoder(), [LoraRule("linear1", rank=2, init="random")]), torch.randn(2, 5, 8)),
        "lookup": (apply_rules(lookup, [LoraRule(["0", "1"], rank=2, init="random")]), ids),
        "llama": (apply_rules(llama, [LORA]), inputs),
    }


def deep(model: nn.Module, tmp_path: Path) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module, tmp_path: Path) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module, tmp_path: Path) -> nn.Module:
    torch.save(model, tmp_path / "model.pt")
    return torch.load(tmp_path / "model.pt", weights_only=False)


@pytest.mark.parametrize("copier", [deep, pickled, saved])
def test_copies_are_whole_and_apart(copier: Callable[[nn.Module, Path], nn.Module], tmp_path: Path) -> None:
    for name, (model, inputs) in copies().items():
        model.eval()
        output = logits(model, inputs)
        other = copier(model, tmp_path)
        assert [type(m) for m in other.modules()] == [type(m) for m in model.modules()], name
        assert torch.equal(logits(other, inputs), output), name
        # The copy is independent: removing its adapters does not change the first model.
        remove(bare(other))
        assert not adapters_of(other) and not any("_surgery" in key for m in other.modules() for key in vars(m)), name
        assert torch.equal(logits(model, inputs), output), name
        remove(bare(model))
        assert torch.equal(logits(other, inputs), logits(model, inputs)), name


def test_pickles_open_in_a_new_process(tmp_path: Path) -> None:
    models = copies()
    for model, _ in models.values():
        model.eval()
    expected = {name: logits(model, inputs).detach() for name, (model, inputs) in models.items()}
    torch.save(models, tmp_path / "models.pt")
    (tmp_path / "models.pkl").write_bytes(pickle.dumps({name: model for name, (model, _) in models.items()}))
    code = """
import pickle, sys, torch
torch.set_num_threads(1)
models = torch.load(sys.argv[1] + "/models.pt", weights_only=False)
unpickled = pickle.load(open(sys.argv[1] + "/models.pkl", "rb"))
from THIS import bare, logits
from surgery import remove
before, after = {}, {}
for name, (model, inputs) in models.items():
    before[name] = logits(model, inputs).detach()
    assert torch.equal(logits(unpickled[name], inputs), before[name]), name
    after[name] = remove(bare(model)).state_dict()
torch.save((before, after), sys.argv[1] + "/outputs.pt")
"""
    path = f"import sys; sys.path[:0] = {[str(ROOT)]!r}\n"
    code = path + code.replace("THIS", __name__)
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = torch.load(tmp_path / "outputs.pt")
    for name, (model, _) in models.items():
        assert torch.equal(before[name], expected[name]), name
        state = remove(bare(model)).state_dict()
        assert list(after[name]) == list(state)
        assert all(torch.equal(tensor, state[key]) for key, tensor in after[name].items()), name


# Compile and export ---------------------------------------------------------------------------------------------


def rewritten_models() -> dict[str, Callable[[], tuple[nn.Module, Tensor]]]:
    lora = [LoraRule(nn.Linear, rank=2, init="random")]
    inside = [LoraRule(["self_attn", "linear1", "linear2"], rank=2, init="random")]
    return {
        "traced": lambda: (apply_rules(mlp(), lora), torch.randn(3, 8)),
        "attention": lambda: (
            apply_rules(Attends(), [LoraRule("attention", rank=2, init="random")]),
            torch.randn(2, 5, 8),
        ),
        "lstm": lambda: (apply_rules(Tagger(), [GainRule("lstm"), *lora]), torch.randn(2, 5, 6)),
        "encoder": lambda: (apply_rules(encoder(), inside), torch.randn(2, 5, 8)),
    }


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("name", rewritten_models())
def test_compile(name: str, training: bool) -> None:
    model, x = rewritten_models()[name]()
    model.train(training)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(allow_rnn=True):  # torch needs this setting for any LSTM, rewritten or not
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        expected, compiled_output = model(x), compiled(x)
    torch.testing.assert_close(compiled_output, expected)  # in eager mode, the branch has a form that rounds once less
    expected.tanh().sum().backward()  # after a LayerNorm, the sum of squares is constant and its gradient is noise
    gradients = {key: p.grad for key, p in adapters_of(model).items()}
    model.zero_grad()
    compiled_output.tanh().sum().backward()
    for key, parameter in adapters_of(model).items():
        torch.testing.assert_close(parameter.grad, gradients[key], msg=key)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
@pytest.mark.parametrize("name", rewritten_models())
def test_export(name: str, strict: bool) -> None:
    model, x = rewritten_models()[name]()
    model.eval()
    with warnings.catch_warnings():
        if name == "lstm":  # torch gives this warning for a plain LSTM, too
            warnings.filterwarnings("ignore", "The tensor attributes .*_flat_weights", UserWarning)
        program = torch.export.export(model, (x,), strict=strict)
    torch.testing.assert_close(program.module()(x), model(x))
    assert set(adapters_of(model)) <= set(program.state_dict)


def test_a_compiled_model_follows_surgery() -> None:
    model = mlp()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    base = compiled(x)
    apply_rules(model, [LoraRule(nn.Linear, rank=2, init="random")])
    live = compiled(x)
    torch.testing.assert_close(live, model(x))
    assert (live - base).abs().max() > 0.01
    merge(model)
    assert torch.equal(compiled(x), model(x))
    remove(unmerge(model))
    assert torch.equal(compiled(x), base)


# torch's fast path of encoder layers ----------------------------------------------------------------------------


@pytest.mark.parametrize("targets", ["linear1", "self_attn", ["linear1", "linear2", "self_attn"], "norm1"])
def test_the_fast_path_of_an_encoder_does_not_bypass(targets: Any) -> None:
    model = encoder().eval()
    before = Snapshot(model)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        base = model(x)
    rules = [TrainRule(targets)] if targets == "norm1" else [LoraRule(targets, rank=2)]
    apply_rules(model, rules, example_inputs=x)
    for parameter in adapters_of(model).values():
        nn.init.normal_(parameter)
    slow = model(x)  # gradients are on: torch takes the plain path by itself
    with torch.no_grad():
        fast = model(x)
    torch.testing.assert_close(fast, slow)
    assert (fast - base).abs().max() > 0.1
    merge(model)
    with torch.no_grad():
        torch.testing.assert_close(model(x), slow, rtol=1e-4, atol=1e-4)  # one more rounding of the weight
    remove(unmerge(model))
    assert before.differences(model) == []
    with torch.no_grad():
        assert torch.equal(model(x), base)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("targets", ["layers.1.linear2", "self_attn"])
def test_nor_does_the_encoders_own_with_a_padded_batch(targets: str) -> None:
    """With a padding mask, the encoder passes a nested tensor to the fast path of its layers."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[0] * 5, [0] * 3 + [1] * 2]).bool()
    with torch.no_grad():
        base = model(x, src_key_padding_mask=padding)
    apply_rules(model, [LoraRule(targets, rank=2, init="random")])
    slow = model(x, src_key_padding_mask=padding)[~padding]
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)[~padding]
        torch.testing.assert_close(fast, slow)
        assert (fast - base[~padding]).abs().max() > 0.1
        assert torch.equal(remove(model)(x, src_key_padding_mask=padding), base)


# accelerate's hooks ---------------------------------------------------------------------------------------------


def orders() -> list[tuple[str, ...]]:
    steps = ("apply", "hook", "unhook", "remove")
    rank = {step: index for index, step in enumerate(steps)}
    valid_orders = [
        order
        for order in itertools.permutations(steps)
        if order.index("apply") < order.index("remove") and order.index("hook") < order.index("unhook")
    ]
    return sorted(valid_orders, key=lambda order: [rank[step] for step in order])


@pytest.mark.parametrize("order", orders(), ids=" ".join)
def test_accelerates_hooks_in_every_order(order: tuple[str, ...], optional: Callable[..., Any]) -> None:
    hooks = optional("accelerate.hooks")

    class PlusOne(hooks.ModelHook):
        def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
            return output + 1

    model, plain = mlp(), mlp()  # `plain` gets the hooks and no adapters
    plain.load_state_dict(model.state_dict())
    x, done = torch.randn(3, 8), set()
    for step in order:
        if step == "apply":
            apply_rules(model, [LoraRule("0", rank=2, init="random")], example_inputs=x)
        elif step == "remove":
            remove(model)
        else:
            for target in (model, plain):
                if step == "hook":
                    hooks.add_hook_to_module(target[0], PlusOne())
                else:
                    hooks.remove_hook_from_module(target[0])
        done ^= {step} if step in ("apply", "hook") else {{"remove": "apply", "unhook": "hook"}[step]}
        y = F.linear(x, plain[0].weight, plain[0].bias)
        if "apply" in done:
            adapter = model[0].adapters.default
            y = y + 4 * (x @ adapter.A.T) @ adapter.B.T
        y = y + 1 if "hook" in done else y
        torch.testing.assert_close(model(x), plain[2](torch.relu(y)))
    assert type(model[0]) is nn.Linear and sorted(vars(model[0])) == sorted(vars(plain[0]))
    assert vars(model[0])["forward"].__func__ is nn.Linear.forward  # as accelerate leaves it on a plain module


def test_a_model_on_the_meta_device_gets_its_weights_later() -> None:
    with torch.device("meta"):
        model = mlp()
    apply_rules(model, [LoraRule(nn.Linear, rank=2, init="random")])
    other = apply_rules(mlp(), [LoraRule(nn.Linear, rank=2, init="random")])
    model.load_state_dict(other.state_dict(), assign=True)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), other(x))


# What a class swap can't be seen by -----------------------------------------------------------------------------


def instance_forward() -> nn.Module:
    model = mlp()
    model[0].forward = lambda x: torch.ones(len(x), 6)
    return model


def scripted() -> nn.Module:
    model = mlp()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        model[0] = torch.jit.script(model[0])
    return model


def parametrized() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.orthogonal(model[0])
    return model


def parametrized_weight_norm() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def hooked_weight_norm() -> nn.Module:
    model = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # older than parametrizations, but models still use it
        nn.utils.weight_norm(model[0])
    return model


def spectral_norm() -> nn.Module:
    model = mlp()
    nn.utils.spectral_norm(model[0])
    return model


def pruned() -> nn.Module:
    model = mlp()
    prune.l1_unstructured(model[0], "weight", amount=0.3)
    return model


@pytest.mark.parametrize(
    "broken, says",
    [
        (hooked_weight_norm, "WeightNorm hook"),
        (spectral_norm, "SpectralNorm hook"),
        (pruned, "L1Unstructured hook"),
        (instance_forward, "a forward was set on the instance"),
        (scripted, "TorchScript"),
        (parametrized, "its weight is parametrized"),
        (parametrized_weight_norm, "its weight is parametrized"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_refused_with_the_reason(broken: Callable[[], nn.Module], says: str) -> None:
    model = broken().eval()  # spectral_norm takes a step at each call in training
    x = torch.randn(3, 8)
    before, output = Snapshot(model), model(x)
    with pytest.raises(PlanError) as caught:
        apply_rules(model, [LoraRule(["0", "2"], rank=2, init="random")])
    problem = next(problem for problem in caught.value.problems if problem.where == "0")
    assert isinstance(problem, SiteError) and says in str(problem) and problem.fix
    assert all("0" == str(problem.where)[0] for problem in caught.value.problems)
    assert before.differences(model) == [] and torch.equal(model(x), output)
    apply_rules(model, [LoraRule("2", rank=2, init="random")])  # the other layer accepts the rule
    assert not torch.equal(model(x), output)
    remove(model)
    assert before.differences(model) == []


def test_a_forward_set_on_the_instance_later_is_not_hidden() -> None:
    """A later assignment can't be prevented, so removing the adapter raises an error that names it."""
    model = apply_rules(mlp(), [LoraRule("0", rank=2)])
    model[0].forward = lambda x: torch.zeros(len(x), 6)
    for change in (remove, merge):
        with pytest.raises(SurgeryError, match="forward was set on the instance"):
            change(model)
    del model[0].forward
    assert type(remove(model)[0]) is nn.Linear


# Errors inside generated code -----------------------------------------------------------------------------------


def test_an_error_in_generated_code_shows_its_line_site_and_rule() -> None:
    model = nn.ModuleDict({"block": mlp()})
    apply_rules(model, [LoraRule("block.0", rank=2, dropout=0.5)], adapter="topics")
    with pytest.raises(RuntimeError) as caught:
        model["block"](torch.randn(3, 7))
    text = "".join(traceback.format_exception(caught.value))
    assert "at the site block.0, a Linear rewritten by LoraRule [topics]" in text
    assert 'File "<surgery ' in text and "Linear + LoraRule [topics]" in text
    line = next(line.strip() for line in text.split("\n") if "linear(" in line and "error" not in line)
    assert line in show(model, "block.0", generated=True) or line in text.partition("Linear + LoraRule")[2]


def test_an_error_in_an_edit_shows_the_rule_on_its_line() -> None:
    @rule("test-clumsy")
    class ClumsyRule(Rule):
        def rewrite(self, site: Site) -> Tensor:
            return site.output @ site.param("wrong", (site.out_features + 1, 2))

    model: Any = apply_rules(mlp(), [ClumsyRule("0")])
    with pytest.raises(RuntimeError) as caught:
        model(torch.randn(3, 8))
    text = "".join(traceback.format_exception(caught.value))
    assert "# ClumsyRule [default]" in text.partition("<surgery ")[2], text
    assert "at the site 0, a Linear rewritten by ClumsyRule [default]" in text
    assert [type(m) for m in remove(model).modules()] == [type(m) for m in mlp().modules()]


def test_generated_lines_are_shown_after_pickling_and_for_merged_stacks() -> None:
    model = apply_rules(mlp(), [LoraRule("0", rank=2)])
    other: Any = pickle.loads(pickle.dumps(model))
    with pytest.raises(RuntimeError) as caught:
        other(torch.randn(3, 7))
    frames = traceback.extract_tb(caught.value.__traceback__)
    generated = [frame for frame in frames if frame.filename.startswith("<surgery ")]
    assert generated and all(frame.line and frame.line in show(other, "0", generated=True) for frame in generated)


def test_plans_are_pure_on_every_living_model() -> None:
    for name, (model, _) in copies().items():
        if name == "merged":
            continue
        before = Snapshot(model)
        plan_rules(model, [GainRule("re:.*", exclude="re:.*")])
        plan_rules(model, [LoraRule("re:.*", rank=2)], adapter="third")
        assert before.differences(model) == [], name
