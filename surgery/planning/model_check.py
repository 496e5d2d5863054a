"""Problems of a model as a whole: what forbids any plan for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from surgery.errors import SurgeryError, abbreviate
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import loads_children
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.adapter_naming import name_problem
from surgery.state.merged_tensors import merged_error
from surgery.state.records import model_state, sites
from surgery.transaction.gradient_flags import lazy_in

__all__ = ["model_problems"]


def _peft_problems(model: nn.Module) -> list[SurgeryError]:
    """A problem if the model has PEFT's own layers, from PEFT or from transformers' `load_adapter`, `add_adapter`."""
    wrapped = any(cls.__module__.startswith("peft.") for cls in type(model).__mro__)
    if not wrapped and not model.__dict__.get("_hf_peft_config_loaded"):
        return []
    return [
        SurgeryError(
            "this is PEFT's PeftModel" if wrapped else "this model has adapters of PEFT",
            why="PEFT replaced layers of the model by its own" if wrapped else "transformers put them there",
            fix="load the model again, and PEFT's checkpoint on it by surgery.load_adapter(model, folder)",
        )
    ]


def model_problems(model: nn.Module, adapter: str, examples: Sequence[Any]) -> list[SurgeryError]:
    """The problems with the model as a whole and with the adapter's name."""
    problems: list[SurgeryError] = _peft_problems(model)
    if examples and (lazy := lazy_in(model)):
        problems.append(
            SurgeryError(
                "the example call would give the model parameters",
                where=abbreviate(lazy),
                why="they have no shape before the first call, and planning touches nothing",
                fix="run one batch through the model first: model(batch)",
            )
        )
    if "_hf_hook" in model.__dict__ and (
        blocks := [path for path, part in base_modules(model) if loads_children(part)]
    ):
        problems.append(
            SurgeryError(
                "accelerate loads the weights of whole blocks",
                where=abbreviate(blocks, "blocks"),
                why="its hook would also look for the tensors of adapters in them, which it does not keep",
                fix="offload without preload_module_classes, or apply rules before offloading",
            )
        )
    state, inner, rewritten_sites = model_state(model), records_in(model, below=True), list(sites(model))
    problems += [problem] if (problem := name_problem(state, adapter)) else []
    if inner:
        problems.append(
            SurgeryError(
                "part of this model has rules of its own",
                where=abbreviate(inner, "parts"),
                why="each model keeps one record of its rules",
                fix="apply to the same module as before, or remove those first",
            )
        )
    elif state is not None or rewritten_sites:
        try:
            rewritten(model)
        except SurgeryError as error:
            problems.append(error)
    for path, _, site in rewritten_sites:
        if site.merged is not None:
            problems.append(merged_error(path, site.merged.adapters))
            break
    return problems
