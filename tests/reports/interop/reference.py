"""One case on the live torch model: trained adapters, their files for a program, and the answers to compare with."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import Rule, SurgeryError, apply_rules, as_lora, check_target, deactivate, save_adapter, using
from tests.reports.interop.adapter_case import NONE, AdapterCase, Step
from tests.reports.interop.bases import base_model, write_base
from tests.reports.interop.engines import Engine

__all__ = ["NEW_TOKENS", "Exported", "LiveCase", "prompts"]

NEW_TOKENS = 8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def prompts() -> list[list[int]]:
    """Four prompts of different lengths; two have the trained tokens of the case "trained tokens"."""
    return [[1, 5, 17, 33], [1, 40, 9, 77, 120, 60, 5], [1, 200, 100], [1, 31, 32, 33, 34, 35, 36, 37, 38]]


@dataclass
class Exported:
    """An adapter's files for one program, or the reason why there are none."""

    files: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: str = ""


class LiveCase:
    """The base with the case's trained adapters."""

    def __init__(self, case: AdapterCase):
        self.case = case
        self.model: Any = base_model(case.base)
        self.vocabulary = int(self.model.config.vocab_size)
        for number, (name, rules) in enumerate(case.adapters.items()):
            deactivate(self.model) if number else None
            torch.manual_seed(number + 1)
            apply_rules(self.model, [Rule.from_dict(rule) for rule in rules], adapter=name)
            self._train(number)
        self._round()

    @staticmethod
    def prompts() -> list[list[int]]:
        return prompts()

    @staticmethod
    def write_base(name: str, folder: Path, format: str) -> Path:
        """The folder or file that programs open."""
        return write_base(name, folder, format)

    def _train(self, number: int) -> None:
        """A few steps of Adam, which move each number by about the rate: no tensor stays at its start."""
        trained = [p for p in self.model.parameters() if p.requires_grad]
        small = self.case.base != "smollm2"
        optimiser = torch.optim.Adam(trained, lr=0.05 if small else 0.01)
        ids = torch.randint(3, self.vocabulary, (4, 12), generator=torch.Generator().manual_seed(number))
        with torch.random.fork_rng():
            torch.manual_seed(number)
            for _ in range(4):
                optimiser.zero_grad()
                self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                optimiser.step()
        self.model.zero_grad()
        self.model.eval()

    def _round(self) -> None:
        dtype = DTYPES[self.case.dtype]
        with torch.no_grad():
            for parameter in (p for name, p in self.model.named_parameters() if ".adapters." in name):
                parameter.data = parameter.data.to(dtype).float()

    @torch.no_grad()
    def answers(self, steps: list[Step]) -> list[dict[str, Any]]:
        found: dict[tuple[str, ...], list[tuple[list[int], list[float]]]] = {}

        def alone(active: tuple[str, ...]) -> list[tuple[list[int], list[float]]]:
            if active not in found:
                with using(self.model, list(active)):
                    found[active] = [self._generate(prompt) for prompt in prompts()]
            return found[active]

        answers = []
        for step in steps:
            if step.rows:
                outputs = [alone((name,) if name else ())[row] for row, name in enumerate(step.rows)]
            else:
                outputs = alone(step.active)
            answers.append({"tokens": [o[0] for o in outputs], "values": [o[1] for o in outputs]})
        return answers

    def _generate(self, prompt: list[int]) -> tuple[list[int], list[float]]:
        ids, values = list(prompt), []
        for _ in range(NEW_TOKENS):
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            values = values or logits.log_softmax(-1).tolist()
            ids.append(int(logits.argmax()))
        return ids[len(prompt) :], values

    def exported(self, engine: Engine, folder: Path) -> Exported:
        """Write the adapters for a program. If they are refused, nothing may have been written."""
        result = Exported(steps=list(self.case.steps))
        try:
            if any(len(step.active) > 1 for step in result.steps) and not engine.several:
                self._add_sums(result, engine, folder)
            for name in self.case.adapters:
                self._save(self.model, name, engine, folder / name, result)
        except SurgeryError as error:
            result.refused = _reason(error)
            if not result.files and any(path.is_file() for path in folder.rglob("*")):
                raise AssertionError("files were written before the refusal") from error
        return result

    def _add_sums(self, result: Exported, engine: Engine, folder: Path) -> None:
        """For programs with one adapter at a time: the sum of several as one LoRA."""
        for number, step in enumerate(result.steps):
            if len(step.active) > 1:
                name = "_".join(step.active)
                as_lora(self.model, list(step.active), into=name)
                result.steps[number] = Step((name,))
                self._save(self.model, name, engine, folder / name, result)
                result.notes.append("the sum as one LoRA")

    def _save(self, model: nn.Module, name: str, engine: Engine, folder: Path, result: Exported) -> None:
        with _noted(result.notes), torch.no_grad():
            words: dict[str, Any] = words_of(engine)
            if self.case.dtype != "float32":
                words["state_dict"] = _half_precision(model, name, DTYPES[self.case.dtype])
            save_adapter(model, folder, name, **words)
        result.files[name] = str(folder)
        if engine.target:
            result.notes += _lowered(model, name, engine)

    def reasons_to_doubt(self, answers: list[dict[str, Any]]) -> str:
        """Why the case proves nothing: an adapter whose tokens are the base's."""
        (base,) = self.answers([NONE])
        for step, answer in zip(self.case.steps, answers, strict=True):
            if step != NONE and answer["tokens"] == base["tokens"]:
                return f"{'+'.join(step.active)} does not change the tokens"
        return ""


def words_of(engine: Engine) -> dict[str, Any]:
    """Arguments of `save_adapter`."""
    return {"target": engine.target} if engine.target else {"format": engine.format}


def _half_precision(model: nn.Module, name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    tensors = model.state_dict()
    return {key: tensors[key].to(dtype) for key in tensors if f".adapters.{name}." in key}


def _reason(error: SurgeryError) -> str:
    """Why, in one line; "PEFT's format can't hold …" has it in its first line."""
    words = error.why if isinstance(error.why, str) and "does not take" in str(error.what) else error.what
    return str(words).splitlines()[0]


def _lowered(model: nn.Module, name: str, engine: Engine) -> list[str]:
    """What the adapter became for the program, in words."""
    report = check_target(model, engine.target, name)
    ranks = [site.rank for site in report.sites if "becomes a LoRA" in site.how]
    words = [f"as a LoRA of rank {max(ranks)}"] if ranks else []
    return words + ["scales folded"] * (not ranks and any(site.state == "lowered" for site in report.sites))


@contextmanager
def _noted(notes: list[str]) -> Iterator[None]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    notes += [str(warning.message).splitlines()[0] for warning in caught]
