"""Every verb is all or nothing wherever an error stops it; FAILURES is the number of places tried for each verb."""

from __future__ import annotations

import copy
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from surgery import (
    PlanError,
    SurgeryError,
    SurgeryWarning,
    activate,
    adapter_state_dict,
    adapters,
    apply_rules,
    as_lora,
    combine,
    copy_adapter,
    deactivate,
    export_onnx,
    forget,
    hotswap,
    load_adapter,
    load_adapter_state_dict,
    load_adapters,
    merge,
    merge_to,
    pad_rank,
    remove,
    rename_adapter,
    route,
    save_adapter,
    show,
    summary,
    unmerge,
    using,
)
from surgery.routing.thread_state import thread_routing
from surgery.rules import BottleneckRule, IA3Rule, LoraRule, PrefixRule, TrainRule
from surgery.transaction.undo_log import Journal
from tests.support.failing import Broken, Everything, broken, steps_of

SAMPLE = int(os.environ.get("FAILURES", "12"))
X = torch.randn(3, 4)

pytestmark = pytest.mark.filterwarnings("ignore:training moved the running statistics:surgery.SurgeryWarning")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.up = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.down = nn.Linear(8, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.down(torch.relu(self.norm(self.up(self.embed(ids).mean(1))))))


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])
LORA = LoraRule(["up", "down"], rank=2, init="random")


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def make_adapted() -> nn.Module:
    model = apply_rules(net(), LORA, adapter="a")
    apply_rules(model, [LoraRule("up", rank=2, init="random"), IA3Rule("down")], adapter="b")
    model.train()(IDS)  # moves running statistics
    return activate(model.eval(), "a")


def make_merged() -> nn.Module:
    model = make_adapted()
    merge(model)
    return model


def make_pissa() -> nn.Module:
    """A model with an adapter that changed the base at its start."""
    return apply_rules(make_adapted(), LoraRule(["up", "down"], rank=2, init="pissa"), adapter="p")


def make_with_trained_head() -> nn.Module:
    return apply_rules(net(), LoraRule("head", rank=2, init="random"), adapter="a")


def make_untied() -> nn.Module:
    model = make_with_trained_head()
    merge(model, untie=True)
    return model


def llama() -> nn.Module:
    transformers: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 11}
    config = transformers.LlamaConfig(**sizes, intermediate_size=12, num_key_value_heads=1, tie_word_embeddings=True)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    model.save_pretrained(tempfile.mkdtemp())  # writes the same config entries as its call by merge_to
    return apply_rules(model, LoraRule("q_proj", rank=2, init="random"))


def apply_prefix(model: nn.Module) -> Any:
    return apply_rules(model, PrefixRule(length=2), adapter="p", example_inputs={"input_ids": IDS})


def folder_of(model: nn.Module, *names: str) -> Path:
    folder = Path(tempfile.mkdtemp())
    for name in names:
        with pytest.warns(SurgeryWarning, match="training moved the running statistics of module 'norm'"):
            save_adapter(model, folder / name, name, format="surgery")
    return folder


def run_block(block: Any) -> None:
    with block:
        pass


FOLDER = folder_of(make_adapted(), "a", "b")
TENSORS = adapter_state_dict(make_adapted(), "a")
OTHER = [LoraRule(["up", "down"], rank=2, init="pissa"), TrainRule("head"), BottleneckRule("down", size=2)]
# Each verb: the model for the call, and the call.
VERBS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "apply": (net, lambda m: apply_rules(m, OTHER[::2], adapter="c", example_inputs=(IDS,))),
    "apply-more": (make_adapted, lambda m: apply_rules(m, OTHER[:2], adapter="c")),
    "apply-prefix": (llama, apply_prefix),
    "remove-one": (make_adapted, lambda m: remove(m, "a")),
    "remove-start": (make_pissa, lambda m: remove(m, "p")),
    "remove-all": (make_pissa, remove),
    "remove-transformers": (llama, remove),
    "merge": (make_adapted, merge),
    "merge-copy": (make_adapted, lambda m: merge(m, keep="copy", safe=True)),
    "merge-untie": (make_with_trained_head, lambda m: merge(m, untie=True)),
    "unmerge": (make_merged, unmerge),
    "unmerge-untied": (make_untied, unmerge),
    "activate": (make_adapted, lambda m: activate(m, ["b", "a"], [0.5, -1.0])),
    "deactivate": (make_adapted, deactivate),
    "train": (make_adapted, lambda m: activate(m, "b", train=False)),
    "using": (make_adapted, lambda m: run_block(using(m, "b"))),
    "route": (make_adapted, lambda m: run_block(route(m, ["a", "b"]))),
    "hotswap": (make_adapted, lambda m: hotswap(m, "a", TENSORS)),
    "pad_rank": (make_adapted, lambda m: pad_rank(m, "a", 4)),
    "load": (make_adapted, lambda m: load_adapter(m, FOLDER / "a", "c")),
    "load_adapters": (net, lambda m: load_adapters(m, FOLDER, live=["b"])),
    "load_state": (make_adapted, lambda m: load_adapter_state_dict(m, TENSORS, "a")),
    "combine": (make_adapted, lambda m: combine(m, {"a": 1.0, "b": 0.5}, "c", "linear")),
    "as_lora": (make_adapted, lambda m: as_lora(m, "a", rank=3)),
    "copy": (make_adapted, lambda m: copy_adapter(m, "a", "c")),
    "rename": (make_adapted, lambda m: rename_adapter(m, "a", "c")),
    "forget": (make_merged, forget),
    "forget-untied": (make_untied, forget),
    "merge_to": (llama, lambda m: merge_to(m, tempfile.mkdtemp())),
    "save": (make_adapted, lambda m: save_adapter(m, tempfile.mkdtemp(), "a")),
    "export": (
        make_adapted,
        lambda m: export_onnx(m, f"{tempfile.mkdtemp()}/m.onnx", (IDS,), names="a", dynamic=False),
    ),
}
SLOW = {"export", "merge_to"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in a generator's end
@pytest.mark.parametrize("lines", [False, True], ids=["calls", "lines"])
@pytest.mark.parametrize("name", VERBS)
def test_a_verb_that_is_broken_off_leaves_the_model_as_it_was(name: str, lines: bool) -> None:
    if lines and name == "export" and SAMPLE < 20:
        pytest.skip("it takes long, and exports from a copy of the model")
    build, work = VERBS[name]
    model = build()
    total = steps_of(lambda: work(copy.deepcopy(model)), lines)
    draw = random.Random(f"{name} {lines}")
    count = min(total, SAMPLE // 6 if name in SLOW else SAMPLE)
    steps = sorted(draw.sample(range(1, total + 1), count))
    before, problems = Everything(model), list[str]()
    for step in steps:
        error = (Broken, KeyboardInterrupt, SurgeryError)[step % 3]
        try:
            with broken(step, error, lines):
                work(model)
        except BaseException as raised:
            message = f"{raised} {getattr(raised, '__notes__', '')}"
            differences = before.differences(model)
            if not torch.is_grad_enabled():
                differences.append("gradients stay switched off")
                torch.set_grad_enabled(True)
            if "undoing failed" in message:
                differences.append("undoing failed")
        else:  # the code handled the error as one of its own, or this run has fewer steps than the first
            message, differences = "it went through", []
            model = build()
            before = Everything(model)
        if differences:
            problems.append(f"step {step}: {message[:300]}: {differences[:4]}")
            model = build()
            before = Everything(model)
    assert not problems, f"{len(problems)} of {len(steps)} steps\n" + "\n".join(problems[:12])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # raised in a generator's end
@pytest.mark.parametrize("block", [lambda m: using(m, "b"), lambda m: route(m, ["a", "b"])], ids=["using", "route"])
def test_a_block_that_is_broken_off_at_any_line_of_its_end_is_left(block: Callable[[Any], Any]) -> None:
    model = make_adapted()
    with broken(-1, lines=True) as count:
        with block(model):
            begun = count[0]
    before, problems = Everything(model), list[str]()
    for step in range(begun + 1, count[0] + 1):
        message = "it went through"
        try:
            with broken(step, KeyboardInterrupt, lines=True), block(model):
                pass
        except KeyboardInterrupt as raised:
            message = str(raised)
        differences = before.differences(model)
        try:
            activate(model, "a")
        except SurgeryError as error:
            differences.append(str(error))
        if differences or thread_routing.routings or thread_routing.plans:
            problems.append(f"step {step}: {message}: {differences[:4]}")
            model = make_adapted()
            before = Everything(model)
    assert begun < count[0] and not problems, "\n".join(problems)


def test_undoing_goes_on_through_failures_and_tells_them() -> None:
    undone: list[str] = []

    def fails(why: str) -> None:
        raise ValueError(why)

    with pytest.raises(RuntimeError, match="the first") as caught, Journal() as journal:
        journal.undo(undone.append, "one")
        journal.undo(fails, "on purpose")
        with Journal() as inner:
            inner.undo(undone.append, "two")
        journal.undo(fails, "again")
        raise RuntimeError("the first")
    assert undone == ["two", "one"]
    assert caught.value.__notes__ == [f"undoing failed: ValueError: {why}" for why in ("again", "on purpose")]


def test_a_key_pressed_while_undoing_counts_when_all_is_undone() -> None:
    undone: list[str] = []

    def pressed() -> None:
        if not undone:
            undone.append("tried")
            raise KeyboardInterrupt
        undone.append("tried again")

    with pytest.raises(KeyboardInterrupt), Journal() as journal:
        journal.undo(undone.append, "the rest")
        journal.undo(pressed)
        raise RuntimeError
    assert undone == ["tried", "tried again", "the rest"]


# Lazy modules -------------------------------------------------------------------------------------------------


def lazy() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(3), nn.LazyBatchNorm1d())


def test_parameters_without_shapes_do_not_matter_outside_of_the_targets(tmp_path: Path) -> None:
    model = lazy()
    before = Everything(model)
    apply_rules(model, LoraRule("0", rank=2, init="random"), adapter="a")
    assert not any(p.requires_grad for name, p in model.named_parameters() if ".adapters." not in name)
    save_adapter(model, tmp_path, "a")
    load_adapter(model, tmp_path, "b")
    copy_adapter(model, "a", "c")
    for verb in (deactivate, activate, merge, unmerge):
        verb(model)
    assert summary(model).rows and adapters(model) and show(model[0])
    remove(model)
    assert not before.differences(model)
    apply_rules(model, LoraRule("0", rank=2, init="random"))
    x = torch.randn(5, 4)
    expected = model[0].weight.clone()
    model(x)  # gives the parameters shapes while an adapter is on the model
    assert not model[1].weight.requires_grad and type(model[1]) is nn.Linear
    assert torch.equal(model[0].weight, expected)
    remove(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_at_a_target_they_are_refused_while_planning_with_the_remedy() -> None:
    for rule in (LoraRule(["0", "1"], rank=2), TrainRule("1"), LoraRule(nn.LazyLinear, rank=2)):
        model = lazy()
        before = Everything(model)
        with pytest.raises(PlanError, match=r"model\(batch\)") as caught:
            apply_rules(model, rule)
        assert "weight, bias has no shape before its first call" in str(caught.value)
        assert not before.differences(model)
    with pytest.raises(PlanError, match=r"model\(batch\)"):  # an example would give the parameters shapes
        apply_rules(model, LoraRule("0", rank=2), example_inputs=torch.ones(2, 4))
    assert not before.differences(model)
    model(torch.randn(5, 4))
    apply_rules(model, LoraRule(["0", "1"], rank=2))
