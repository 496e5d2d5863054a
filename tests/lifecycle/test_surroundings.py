"""Every verb and every rule give the same bits under any torch mode and any global default.

With SURROUNDINGS=1, each verb runs for each rule. `make test` runs a sample in which each verb and each rule occurs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from surgery import (
    Rule,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapter_state_dict,
    apply_rules,
    as_lora,
    combine,
    copy_adapter,
    deactivate,
    export_onnx,
    forget,
    hotswap,
    load_adapter,
    load_adapters,
    merge,
    pad_rank,
    plan_rules,
    remove,
    rename_adapter,
    route,
    rule,
    save_adapter,
    unmerge,
    using,
)
from surgery.rules import (
    AdaLoraRule,
    AdaptionRule,
    BiasRule,
    BoftRule,
    BottleneckRule,
    C3aRule,
    CaptureRule,
    FourierRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    MissRule,
    MultitaskPromptRule,
    NormRule,
    OftRule,
    PrefixRule,
    PromptRule,
    RandLoraRule,
    ReftRule,
    RoadRule,
    ShiraRule,
    SteerRule,
    TokensRule,
    TrainRule,
    VeraRule,
)

transformers: Any = pytest.importorskip("transformers")

WHOLE = bool(os.environ.get("SURROUNDINGS"))
IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@rule("test-plain-numbers")
class PlainNumbers(Rule):
    """A user's rule that creates tensors with torch's defaults."""

    def rewrite(self, site: Any) -> Tensor:
        return site.output * site.param("gate", torch.ones(site.out_features)) + site.param("shift", (1,), 0.25)

    def initialise(self, site: Any) -> None:
        site.params["gate"].copy_(torch.linspace(0.1, 1, len(site.params["gate"])) / 3)


LINEAR = ["q_proj", "v_proj"]
RULES: dict[str, Rule] = {
    "lora": LoraRule(LINEAR, rank=2, init="random"),
    "dora": LoraRule(LINEAR, rank=2, dora=True, init="random"),
    "pissa": LoraRule(LINEAR, rank=2, init="pissa"),
    "olora": LoraRule(LINEAR, rank=2, init="olora"),
    "orthogonal": LoraRule(LINEAR, rank=2, init="orthogonal"),
    "gaussian": LoraRule([*LINEAR, "embed_tokens"], rank=2, init="gaussian"),
    "adalora": AdaLoraRule(LINEAR, rank=2),
    "adaption": AdaptionRule("self_attn", length=2),
    "bias": BiasRule(),
    "boft": BoftRule(LINEAR, block_size=2),
    "bottleneck": BottleneckRule("mlp", size=2, features=8),
    "c3a": C3aRule(LINEAR, block_size=2),
    "capture": CaptureRule("mlp", tag="x"),
    "fourier": FourierRule(LINEAR, n_frequency=4, random_loc_seed=3),
    "hra": HraRule(LINEAR, rank=2),
    "ia3": IA3Rule(LINEAR),
    "loha": LohaRule(LINEAR, rank=2),
    "lokr": LokrRule(LINEAR, rank=2),
    "miss": MissRule(LINEAR, rank=2),
    "norm": NormRule(),
    "oft": OftRule(LINEAR, block_size=2),
    "plain": PlainNumbers(LINEAR),
    "prefix": PrefixRule(length=2),
    "prefix-mlp": PrefixRule(length=2, projection=4),
    "prompt": PromptRule(length=2),
    "multitask": MultitaskPromptRule(length=2, tasks=2, task=0),
    "randlora": RandLoraRule(LINEAR, rank=2),
    "reft": ReftRule("layers.0", rank=2, features=8),
    "road": RoadRule(LINEAR, group_size=2),
    "shira": ShiraRule(LINEAR, rank=1, random_seed=3),
    "steer": SteerRule("layers.0", direction=tuple(float(i) / 3 for i in range(8)), trainable=True),
    "tokens": TokensRule("embed_tokens", tokens=[1, 2]),
    "train": TrainRule("lm_head"),
    "vera": VeraRule(LINEAR, rank=2),
}


def model_of() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, intermediate_size=12, num_key_value_heads=2, attention_bias=True)
    return transformers.LlamaForCausalLM(config).eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device() -> Any:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def everything() -> Any:
    with ExitStack() as stack:
        for around in (deterministic(), default_dtype(torch.bfloat16), torch.device("meta"), torch.inference_mode()):
            stack.enter_context(around)
        stack.enter_context(torch.autocast("cpu", torch.float16))
        yield


AROUND: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
    "bf16": lambda: torch.autocast("cpu", torch.bfloat16),
    "fp16": lambda: torch.autocast("cpu", torch.float16),
    "cuda autocast": lambda: torch.autocast("cuda", torch.float16) if torch.cuda.is_available() else nullcontext(),
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "default device": default_device,
    "deterministic": deterministic,
    "everything": everything,
}


def bits(model: nn.Module) -> dict[str, Any]:
    """The result of verbs: tensors with their dtypes and flags, and whether they can train."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: (t.detach().clone(), t.dtype, t.device, t.requires_grad, t.is_inference()) for name, t in tensors.items()
    }


def alike(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    differences = [f"{name} is only in one" for name in first.keys() ^ second.keys()]
    for name in first.keys() & second.keys():
        if first[name][1:] != second[name][1:]:
            differences.append(f"{name}: {first[name][1:]} {second[name][1:]}")
        elif not torch.equal(first[name][0], second[name][0]):
            differences.append(f"{name} has other bits")
    return differences


def life(chosen: Rule, around: Callable[[], AbstractContextManager[Any]], whole: bool = True) -> list[Any]:
    """Runs the verbs on an adapter, each inside a context, and notes the state after each verb."""
    model, folder = model_of(), tempfile.mkdtemp()
    example = {"input_ids": IDS}
    states: list[Any] = []

    def step(work: Callable[[], Any]) -> None:
        torch.manual_seed(1)
        with around():
            try:
                work()
            except (SurgeryError, SurgeryWarning) as error:  # warnings are errors here
                states.append(str(error))
        states.append(bits(model))

    step(lambda: states.append(str(plan_rules(model, chosen, adapter="a", example_inputs=example))))
    step(lambda: apply_rules(model, chosen, adapter="a", example_inputs=example))
    with torch.no_grad():
        for index, tensor in enumerate(adapter_state_dict(model, "a").values()):
            if tensor.is_floating_point():
                tensor.add_(torch.linspace(-0.1, 0.1, tensor.numel()).view(tensor.shape) * (1 + index % 3))
    step(lambda: merge(model, "a"))
    step(lambda: unmerge(model))
    if not whole:
        return states
    step(lambda: merge(model, "a", keep="copy", safe=True))
    step(lambda: unmerge(model))
    step(lambda: copy_adapter(model, "a", "b"))
    step(lambda: combine(model, {"a": 0.5, "b": 0.25}, "c", "linear"))
    step(lambda: combine(model, {"a": 0.5, "b": 0.25}, "d", "svd", rank=2))
    step(lambda: as_lora(model, {"a": 0.5, "b": 0.25}, "f", rank=2))
    step(lambda: save_adapter(model, f"{folder}/a", "a"))
    step(lambda: load_adapter(model, f"{folder}/a", "e", example_inputs=example))
    step(lambda: hotswap(model, "a", f"{folder}/a"))
    step(lambda: pad_rank(model, "a", 4))
    step(lambda: activate(model, "a"))
    step(lambda: deactivate(model))
    step(lambda: rename_adapter(model, "a", "z"))
    step(lambda: load_adapters(model, folder, live=["z"], example_inputs=example))
    step(lambda: merge(model, "z"))
    step(lambda: forget(model))
    step(lambda: remove(model))
    return states


def check(chosen: Rule, *arounds: str, whole: bool = True) -> list[Any]:
    expected = life(chosen, nullcontext, whole)
    for around in arounds:
        states = life(chosen, AROUND[around], whole)
        for index, (wanted, state) in enumerate(zip(expected, states, strict=True)):
            wrong = (
                alike(wanted, state) if isinstance(wanted, dict) else [] if wanted == state else [f"{wanted}\n{state}"]
            )
            assert not wrong, (around, index, wrong[:3])
    return expected


@pytest.mark.parametrize("name", RULES)
def test_every_rule_gives_the_same_bits_whatever_is_around(name: str) -> None:
    expected = check(RULES[name], "everything", whole=WHOLE)
    assert name == "capture" or any(".adapters.a." in key for key in expected[2])


@pytest.mark.parametrize("around", [around for around in AROUND if around != "everything"])
def test_every_surrounding_by_itself(around: str) -> None:
    check(RULES["plain"], around, whole=WHOLE)
    check(RULES["prefix"], around, whole=WHOLE)


@pytest.mark.parametrize("name", ["lora", "train"])
def test_every_verb_gives_the_same_bits_whatever_is_around(name: str) -> None:
    check(RULES[name], "everything")


def test_what_is_around_is_there_again_after_a_verb_and_for_the_users_model() -> None:
    seen: list[Any] = []

    def now() -> Any:
        return torch.get_default_dtype(), torch.is_autocast_enabled("cpu"), torch.zeros(1).device.type

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            seen.append(now())
            return self.inner(x)

    model, x = Looks(), torch.ones(2, 4)
    with everything():
        before = now()
        assert before == (torch.bfloat16, True, "meta")
        apply_rules(model, LoraRule("inner", rank=2), example_inputs=x)
        with pytest.raises(SurgeryError):
            remove(model, "nobody")
        assert now() == before and set(seen) == {before}
        assert torch.is_inference_mode_enabled() and torch.are_deterministic_algorithms_enabled()


def test_adapters_made_in_inference_mode_train(tmp_path: Any) -> None:
    with torch.inference_mode():
        model = model_of()  # the model's tensors are inference tensors
        flags = {name: p.requires_grad for name, p in model.named_parameters()}
        save_adapter(apply_rules(model, RULES["lora"], adapter="a"), tmp_path / "a", "a")
        load_adapter(model, tmp_path / "a", "b")
    apply_rules(model, RULES["lora"], adapter="c")
    copy_adapter(model, "c", "d")
    activate(model, ["a", "b", "c", "d"])
    for name, parameter in model.named_parameters():
        assert ".adapters." in name or parameter.is_inference()
        assert ".adapters." not in name or (parameter.requires_grad and not parameter.is_inference())
    remove(model)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    model = apply_rules(model_of(), RULES["lora"])
    with torch.inference_mode():
        hotswap(model, "default", tmp_path / "a")
        merge(model)
        unmerge(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".adapters." in name)


def test_transforms_and_fake_tensors_are_refused_by_name() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SurgeryError, match=r"transform of torch\.func"):
        torch.func.vmap(lambda x: apply_rules(model, LoraRule("0", rank=2))(x))(torch.ones(3, 4))
    with FakeTensorMode(), pytest.raises(SurgeryError, match="FakeTensorMode"):
        apply_rules(model, LoraRule("0", rank=2))
    with FakeTensorMode():
        fake = nn.Sequential(nn.Linear(4, 4))
        apply_rules(fake, LoraRule("0", rank=2))
        assert fake(torch.ones(2, 4)).shape == (2, 4)
    assert type(model[0]) is nn.Linear


def test_an_exported_file_is_the_same_whatever_is_around(tmp_path: Any) -> None:
    pytest.importorskip("onnxruntime")
    model, x = nn.Sequential(nn.Linear(4, 4)).eval(), torch.ones(2, 4)
    apply_rules(model, LoraRule("0", rank=2, init="random"))
    export_onnx(model, tmp_path / "one.onnx", x)
    with torch.autocast("cpu", torch.bfloat16), default_dtype(torch.float64), torch.inference_mode():
        export_onnx(model, tmp_path / "two.onnx", x)
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_blocks_are_entered_and_left_neutrally() -> None:
    model = model_of()
    for name in "ab":
        apply_rules(model, RULES["lora"], adapter=name)
    before = bits(activate(model, "a"))
    for block in (using(model, "b"), route(model, ["a", "b"])):
        with torch.inference_mode(), block, torch.inference_mode(False):
            model(input_ids=IDS, labels=IDS).loss.backward()
    assert not alike(before, bits(model))
