"""What each rule can take part in, tried on the models of the gallery: the tables on the rules' pages.

`make gallery` writes them. `python -m tests.reports.rule_support` does only this.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import (
    PlanError,
    Rule,
    SurgeryError,
    apply_rules,
    combine,
    deactivate,
    load_adapter,
    merge,
    route,
    rules,
    save_adapter,
    using,
)
from tests.reports.gallery import EXAMPLES, SHOWN
from tests.support import ROOT

FOLDER = ROOT / "docs" / "reference" / "rules"
MARKS = ("<!-- made by make gallery -->\n", "<!-- end of make gallery -->\n")
LABELS = {
    "merged": "`merge`",
    "combined": "`combine`",
    "routed": "`route`",
    "slot": "slots of an exported file",
    "quantised": "quantised Linear",
    "peft": "PEFT's format",
}
HEADS = ("merge", "combine", "route", "slots", "quantised", "PEFT")  # the same, in the table of all rules
INPUTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "Embedding": lambda: (torch.tensor([[1, 2, 7], [3, 7, 2]]),),
    "Text": lambda: (torch.tensor([[1, 2, 7], [3, 7, 2]]),),
    "Attention": lambda: (torch.randn(2, 3, 8),),
    "Mapped": lambda: (torch.randn(2, 3, 8),),
    "Experts": lambda: (torch.randn(2, 8), 1),
}


class Model(nn.Module):
    """A model around a module of the gallery; calls with rows of several adapters go through the model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.m = module
        self.other = nn.Linear(8, 8)

    def forward(self, *inputs: Any) -> Any:
        return self.m(*inputs)


def llama() -> nn.Module:
    """The smallest decoder: PEFT has virtual tokens for models of transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=10, **sizes))


# Rules whose adapters can be compared with fields that the gallery leaves out.
TRIED: dict[str, Rule] = {
    "MultitaskPromptRule": rules.MultitaskPromptRule("m", length=2, tasks=3, task=0),
    "ReplaceRule": rules.ReplaceRule("m", by=nn.LayerNorm, kwargs={"normalized_shape": 8}),
    "InsertRule": rules.InsertRule("m", by="torch.nn.LayerNorm", kwargs={"normalized_shape": 8}),
    "ShiraRule": rules.ShiraRule("m", rank=1, random_seed=0),
}

# Rules that PEFT's format holds on other models, or with other fields, than the gallery shows them with.
IN_PEFT: dict[str, tuple[list[Rule], Callable[[], nn.Module]]] = {
    "BiasRule": ([rules.LoraRule("other", rank=2), rules.BiasRule()], lambda: Model(nn.Linear(8, 8))),
    "TrainRule": ([rules.LoraRule("other", rank=2), rules.TrainRule("m")], lambda: Model(nn.Linear(8, 8))),
    "BaseRowsRule": (
        [rules.LoraRule("other", rank=2), rules.BaseRowsRule("m", tokens=[2, 7])],
        lambda: Model(nn.Embedding(10, 8)),
    ),
    "AdaLoraRule": ([rules.AdaLoraRule("m", rank=2, total_step=10)], lambda: Model(nn.Linear(8, 8))),
    "PrefixRule": ([rules.PrefixRule(length=2)], llama),
    "AdaptionRule": ([rules.AdaptionRule("self_attn", length=2)], llama),
    "PromptRule": ([rules.PromptRule(length=2)], llama),
    "MultitaskPromptRule": ([rules.MultitaskPromptRule(length=2, tasks=3)], llama),
}


@dataclass(frozen=True)
class Support:
    """Whether a rule can be merged, combined and so on: "yes", with a condition, or "no" with the reason."""

    merged: str
    combined: str
    routed: str
    slot: str
    quantised: str
    peft: str


def support_of(name: str) -> Support:
    shown, make = SHOWN[name]
    chosen = TRIED.get(name, shown)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Support(
            merged=attempt(lambda: merge(adapted(chosen, make, "a"))),
            combined=attempt(lambda: combine(adapted(chosen, make, "a", "b"), {"a": 0.5, "b": 0.25}, "c")),
            routed=attempt(lambda: call_routed(adapted(chosen, make, "a", "b"), make)),
            slot=f"yes: kind `{shown.slot_kind}`" if shown.slot_kind else f"no: {shown.why_no_slot}",
            quantised=on_quantised(chosen, make),
            peft=in_pefts_format(chosen, make),
        )


def adapted(chosen: Rule, make: Callable[[], nn.Module], *names: str) -> nn.Module:
    """A model with the rule as one adapter or several, whose tensors differ; the last one is live."""
    model = Model(make()).eval()
    for place, name in enumerate(names):
        apply_rules(
            deactivate(model) if place else model,
            [chosen],
            adapter=name,
            example_inputs=EXAMPLES.get(type(chosen).__name__),
        )
        with torch.no_grad():
            for path, parameter in model.named_parameters():
                if f".adapters.{name}." in path:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def attempt(call: Callable[[], object]) -> str:
    try:
        call()
    except SurgeryError as error:
        return f"no: {reason(error)}"
    return "yes"


def reason(error: SurgeryError) -> str:
    problem = error.problems[0] if isinstance(error, PlanError) else error
    return str(problem.why or problem.what)


def call_routed(model: nn.Module, make: Callable[[], nn.Module]) -> None:
    """A call whose rows have adapters of their own; each row has the numbers of its adapter alone."""
    inputs = INPUTS.get(type(make()).__name__, lambda: (torch.randn(2, 8),))()
    with torch.no_grad():
        alone = []
        for row, name in enumerate(("a", "b")):
            with using(model, name):
                alone.append(model(*inputs)[row])
        with route(model, ["a", "b"]):
            routed = model(*inputs)
    torch.testing.assert_close(routed, torch.stack(alone))


def on_quantised(chosen: Rule, make: Callable[[], nn.Module]) -> str:
    """Whether the rule goes on torchao's Linear of 8 bits, and whether it can be merged there."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    if not isinstance(make(), nn.Linear):
        return "–"
    model = Model(make()).eval()
    quantize_(model, Int8WeightOnlyConfig())
    try:
        apply_rules(model, [chosen])
    except SurgeryError as error:
        return f"no: {reason(error)}"
    merges = attempt(lambda: merge(model, quantised="dequantise"))
    return "yes" if merges == "yes" or not chosen.mergeable else "yes, without merging"


def in_pefts_format(chosen: Rule, make: Callable[[], nn.Module]) -> str:
    """Whether the adapter is written in PEFT's format, and read from it onto another model of the same base."""
    together, build = IN_PEFT.get(type(chosen).__name__, ([chosen], lambda: Model(make())))
    example = EXAMPLES.get(type(chosen).__name__)
    if example is not None and build is llama:
        example = {"input_ids": torch.tensor([[1, 2, 3]])}

    def cross() -> None:
        source, target = build().eval(), build().eval()
        target.load_state_dict(source.state_dict())
        apply_rules(source, together, example_inputs=example)
        with tempfile.TemporaryDirectory() as folder:
            load_adapter(target, save_adapter(source, folder, format="peft"), example_inputs=example)

    answer = attempt(cross)
    return "yes, beside a rule such as LoraRule" if answer == "yes" and len(together) > 1 else answer


def table(support: Support) -> str:
    rows = [f"| {label} | {cell(getattr(support, name))} |" for name, label in LABELS.items()]
    return "\n".join(["| feature | support |", "|---|---|", *rows]) + "\n"


def cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def overview(supports: dict[str, Support]) -> str:
    """All rules in one table: ✓, – or a short condition."""
    lines = [f"| rule | in files | what it does | {' | '.join(HEADS)} |", "|---|---|---" + "|:-:" * len(HEADS) + "|"]
    for name in SHOWN:
        kind: type[Rule] = getattr(rules, name)
        marks = [mark(getattr(supports[name], field.name)) for field in fields(Support)]
        lines.append(f"| [{name}]({kind.name}.md) | `{kind.name}` | {what(kind)} | {' | '.join(marks)} |")
    return "\n".join(lines) + "\n"


def what(kind: type[Rule]) -> str:
    """The line of the rule in the list of public names."""
    names = (ROOT / "docs" / "reference" / "index.md").read_text(encoding="utf-8")
    found = re.search(rf"^\| `{kind.__name__}` \| (.*) \|$", names, re.MULTILINE)
    assert found, kind.__name__
    return found[1]


def mark(text: str) -> str:
    return {"yes": "✓", "no": "–", "–": ""}.get(text.partition(":")[0], "✓ \\*")


def pages() -> Iterator[tuple[Path, str]]:
    """Each page with a table, and its text with the table of today."""
    torch.manual_seed(0)
    supports = {name: support_of(name) for name in SHOWN}
    for name, support in supports.items():
        page = FOLDER / f"{getattr(rules, name).name}.md"
        yield page, replaced(page, table(support))
    yield FOLDER / "index.md", replaced(FOLDER / "index.md", overview(supports))


def replaced(page: Path, text: str) -> str:
    before, begin, rest = page.read_text(encoding="utf-8").partition(MARKS[0])
    if not begin:
        raise RuntimeError(f"{page} has no mark {MARKS[0]!r}")
    return before + begin + text + MARKS[1] + rest.partition(MARKS[1])[2]


def main() -> None:
    for page, text in pages():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
