"""Checks of a structural rule on a model of a family: each compares with something that does not use the rule."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from surgery import Rule, SurgeryError, apply_rules, commit, remove
from surgery.rules import DropRule, ReorderRule, RepeatRule, ReplaceRule, ResizeVocabRule
from surgery.state.records import model_state
from surgery.testing import Snapshot
from tests.support.families import FAMILIES
from tests.support.family_runs import rule_for, run

__all__ = ["CHECKS", "OPERATIONS", "Case", "layer_lists", "outcomes"]

# Families one field of whose configuration says the length of several lists.
PARALLEL = {
    "xlm": [f"transformer.{name}" for name in ("attentions", "layer_norm1", "ffns", "layer_norm2")],
    "flaubert": ["attentions", "layer_norm1", "ffns", "layer_norm2"],
    "deformable_detr": ["model.decoder.layers", "class_embed", "bbox_embed"],
}


class DoesNotApply(Exception):
    """The model does not have what the rule changes."""


def layer_lists(name: str, model: nn.Module) -> tuple[list[str], int]:
    """The paths of the list of layers with the most weights, and of those that change with it, and their length."""
    if name in PARALLEL:
        return PARALLEL[name], len(model.get_submodule(PARALLEL[name][0])._modules)
    lists = [
        (sum(tensor.numel() for tensor in module.parameters()), path, len(module))
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 1
    ]
    alike = [entry for entry in lists if len({type(layer) for layer in model.get_submodule(entry[1]).children()}) == 1]
    lists = alike or lists  # hybrid models have layers of two kinds
    if not lists:
        raise DoesNotApply
    _, path, count = max(lists)
    return [path], count


Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Operation:
    """A structural rule for a model.

    Attributes:
        rule: makes the rule for a model of a family.
        weights: the tensors of a model that is built as the rule changes it, from the original ones and those that the
            class makes.
    """

    rule: Callable[[str, nn.Module], Rule]
    weights: Callable[[str, nn.Module, Weights], Weights]


def _on_layers(rule: Callable[[Sequence[str], int], Rule], order: Callable[[int], list[int]]) -> Operation:
    """A rule for lists of layers. `order`: the indices of the old layers in the new order."""

    def weights(name: str, original: nn.Module, expected: Weights) -> Weights:
        paths, count = layer_lists(name, original)
        return {
            renumbered: tensor
            for key, tensor in original.state_dict().items()
            for renumbered in _renumbered(key, paths, order(count))
        }

    return Operation(lambda name, model: rule(*layer_lists(name, model)), weights)


def _renumbered(key: str, paths: Sequence[str], order: Sequence[int]) -> list[str]:
    """The names of an original tensor in the changed model."""
    for path in paths:
        if key.startswith(f"{path}."):
            index, _, rest = key.removeprefix(f"{path}.").partition(".")
            return [f"{path}.{new}.{rest}" for new, old in enumerate(order) if old == int(index)]
    return [key]


def _larger_vocabulary(name: str, model: Any) -> Rule:
    if "input_ids" not in FAMILIES[name].inputs():
        raise DoesNotApply
    try:
        tokens = model.get_input_embeddings().weight.shape[0]
    except NotImplementedError:  # a pair of models
        tokens = model.text_model.get_input_embeddings().weight.shape[0]
    return ResizeVocabRule(tokens=tokens + 8, init="zeros")


def _padded(name: str, original: nn.Module, expected: Weights) -> Weights:
    """The original tensors with rows of zeros behind them."""
    padded = {}
    for key, tensor in original.state_dict().items():
        padded[key] = torch.zeros_like(expected[key])
        padded[key][tuple(slice(0, size) for size in tensor.shape)] = tensor
    return padded


def _equal_norm(name: str, model: nn.Module) -> Rule:
    """A normalisation layer replaced by an equal one."""
    norms = [(path, module) for path, module in model.named_modules() if type(module).__name__.endswith("Norm")]
    if not norms:
        raise DoesNotApply
    path, module = norms[-1]
    return ReplaceRule(path, by=copy.deepcopy(module), trainable=False)


OPERATIONS = {
    "drop": _on_layers(lambda paths, n: DropRule([f"{path}.{n - 1}" for path in paths]), lambda n: [*range(n - 1)]),
    "repeat": _on_layers(lambda paths, n: RepeatRule(paths, times=2), lambda n: [*range(n), *range(n)]),
    "reorder": _on_layers(lambda paths, n: ReorderRule(paths, order=[*range(n)][::-1]), lambda n: [*range(n)][::-1]),
    "vocabulary": Operation(_larger_vocabulary, _padded),
    "replace": Operation(_equal_norm, lambda name, original, expected: dict(original.state_dict())),
}


class Case:
    """A structural rule on a new model of a family."""

    def __init__(self, name: str, operation: str):
        torch.manual_seed(0)
        self.name, self._inputs, self.operation = name, FAMILIES[name].inputs(), OPERATIONS[operation]
        if name == "funnel":  # each block halves the text
            self._inputs = {key: value.repeat(1, 4) for key, value in self._inputs.items()}
        self.original = self.make()
        self.rule = self.operation.rule(name, self.original)

    @property
    def inputs(self) -> dict[str, Any]:
        """A copy of the inputs for each call: BLIP's generate writes into the token ids that it is given."""
        return copy.deepcopy(self._inputs)

    def make(self) -> Any:
        torch.manual_seed(0)
        return FAMILIES[self.name].make().eval()

    @cached_property
    def changed(self) -> Any:
        """The model with the rule."""
        return apply_rules(self.make(), [self.rule])

    @cached_property
    def outputs(self) -> list[Tensor]:
        return run(self.changed, self.inputs)

    @cached_property
    def plain(self) -> Any:
        """A model that is built from the configuration, with the original weights under their new names."""
        model = self.changed
        plain = type(model)(type(model.config).from_dict(model.config.to_dict())).eval()
        expected = plain.state_dict()
        weights = self.operation.weights(self.name, self.original, expected)
        # A layer that is copied from the first has fewer tensors where the first alone has some.
        extra = {name for name in weights if name not in expected and name not in model.state_dict()}
        plain.load_state_dict({name: tensor for name, tensor in weights.items() if name not in extra})
        return plain

    @property
    def unplain(self) -> list[str]:
        """Why no plain class can hold the model."""
        state: Any = model_state(self.changed)
        return [reason for record in state.structure for reason in record.unplain]


# Each check returns None if it holds, "–" if it says nothing about this model, or the reason.


def _is_as_built(case: Case) -> str | None:
    """Outputs are those of a model that is built from the configuration, with the original weights renumbered."""
    if case.unplain:
        return "–"
    return _compared(case.outputs, run(case.plain, case.inputs))


def _generates(case: Case) -> str | None:
    """Generation with a cache gives the tokens of generation without one."""

    def tokens(model: Any, cache: bool) -> Tensor:
        torch.manual_seed(0)
        return model.generate(**case.inputs, max_new_tokens=4, do_sample=False, use_cache=cache, pad_token_id=0)

    try:
        models = [case.original] if case.unplain else [case.original, case.plain]
        if not case.original.can_generate():
            return "–"
        if not all(torch.equal(*(tokens(model, on) for on in (True, False))) for model in models):
            return "–"
    except Exception:  # the family does not generate from these inputs
        return "–"
    return None if torch.equal(*(tokens(case.changed, on) for on in (True, False))) else "other tokens"


def _survives_files(case: Case) -> str | None:
    """After commit, save_pretrained and from_pretrained give the same model without this library."""
    if case.unplain:
        return "–"
    model = commit(apply_rules(case.make(), [case.rule]))
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded, info = type(model).from_pretrained(folder, output_loading_info=True)
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        return f"keys differ: {info}"
    ours, theirs = case.outputs, run(loaded.eval(), case.inputs)
    return _nearly(ours, theirs)


def _nearly(ours: list[Tensor], theirs: list[Tensor]) -> str | None:
    """Compare outputs of two models: weights at other addresses may be summed in another order."""
    close = len(ours) == len(theirs) and all(map(_is_close, ours, theirs))
    return None if close else "other outputs"


def _is_close(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.double(), theirs.double()
    largest = float(theirs.nan_to_num(0, 0, 0).abs().max()) if theirs.numel() else 0.0
    return torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 + 1e-5 * largest, equal_nan=True)


def _comes_back(case: Case) -> str | None:
    """`remove` restores every tensor, attribute, hook and output."""
    model = case.make()
    before, snapshot = run(model, case.inputs), Snapshot(model)
    remove(apply_rules(model, [case.rule]))
    found = snapshot.differences(model)
    return found[0] if found else _compared(run(model, case.inputs), before)


def _keeps_adapters(case: Case) -> str | None:
    """An adapter from before the rule computes as one from after it with the same tensors, and both come off."""
    model, other = case.make(), case.make()
    lora = rule_for(case.name, model)
    apply_rules(model, [lora], adapter="a")
    _draw(model)
    before = run(model, case.inputs)
    apply_rules(model, [case.rule], adapter="structure")
    apply_rules(other, [case.rule], adapter="structure")
    apply_rules(other, [rule_for(case.name, other)], adapter="a")
    # An adapter that came later is on all layers; so was the one that came before.
    other.load_state_dict(model.state_dict())
    if (why := _nearly(run(model, case.inputs), run(other, case.inputs))) is not None:
        return why
    apply_rules(model, [rule_for(case.name, model)], adapter="b")
    remove(model, "b")
    remove(model, "structure")
    return _compared(run(model, case.inputs), before)


def _draw(model: nn.Module) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.normal_(std=0.1)


CHECKS: dict[str, Callable[[Case], str | None]] = {
    "built": _is_as_built,
    "generates": _generates,
    "files": _survives_files,
    "removed": _comes_back,
    "adapters": _keeps_adapters,
}


def outcomes(name: str, operation: str) -> dict[str, str | None] | str:
    """The outcome of each check; the reason why the rule is refused; or "–" if there is nothing to change."""
    try:
        case = Case(name, operation)
        _ = case.changed
    except DoesNotApply:
        return "–"
    except SurgeryError as error:
        problem: Any = getattr(error, "problems", [error])[0]
        return ": ".join(filter(None, (problem.where, problem.why or problem.what)))
    results: dict[str, str | None] = {}
    for check, function in CHECKS.items():
        try:
            results[check] = function(case)
        except Exception as error:
            results[check] = f"{type(error).__name__}: {error}".splitlines()[0]
    return results


def _compared(ours: list[Tensor], theirs: list[Tensor]) -> str | None:
    if len(ours) != len(theirs) or not all(map(torch.equal, ours, theirs)):
        return "other outputs"
    return None
