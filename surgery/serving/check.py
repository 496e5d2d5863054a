"""`check_target`: whether a program takes an adapter, and how."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import SurgeryError, group_problems
from surgery.progress import Progress
from surgery.serving.evaluation import Evaluation, evaluate
from surgery.serving.known import profile_named, target_profiles
from surgery.serving.report import TargetReport
from surgery.serving.source import NEEDS_MODEL, AdapterSource, FilesSource, ModelSource
from surgery.transaction.neutral_context import neutrally

__all__ = ["check_target", "refusal", "report_of"]


@neutrally()
def check_target(
    source: nn.Module | str | Path,
    target: str,
    adapter: str | Sequence[str] | Mapping[str, float] = "default",
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    example_inputs: Any = None,
    base: nn.Module | str | Path | Mapping[str, Any] | None = None,
    component: str | None = None,
    progress: Progress = False,
) -> TargetReport:
    """Tell whether a program takes an adapter, and what is done to it for that. Nothing is written or changed.

    >>> from torch import nn
    >>> from surgery import apply_rules, check_target
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2, alpha=3)])
    >>> print(check_target(model, "openvino"))
    OpenVINO GenAI 2026.4.1 takes the adapter
             modules  how                                           lost
    lowered        0  1.5 of the scale is multiplied into B, exact
    note: OpenVINO GenAI ignores the file's alpha; its own alpha, 1 by default, is the strength.
    start: AdapterConfig(Adapter("FOLDER/openvino_lora.safetensors"), alpha=1.0)

    Args:
        source: a model with the adapter, or a folder or file of an adapter.
        target: the program; `target_profiles` lists them.
        adapter: the adapter's name on the model; several names, or a mapping to weights, for their weighted sum.
            Default "default".
        rank: the highest rank of a conversion to LoRA, as in `as_lora`; default None: as many as needed.
        tolerance: the share of each ‖ΔW‖ that a conversion to LoRA may lose; default None: only rounding errors.
        example_inputs: an example or a list of examples. The report then says how much of the adapter's effect on the
            outputs a conversion loses. Default None.
        base: for files: the model, its folder, or its configuration. Default None.
        component: the component of a pipeline that the model is ("text_encoder_2"); default None: its class tells it.
        progress: as in `apply_rules`; a step is a site. Default False.

    Returns:
        A `TargetReport`, which is true if the program takes the adapter.

    Raises:
        SurgeryError: an unknown target or adapter, or the files can't be opened.
    """
    profile = profile_named(target)
    opened: AdapterSource
    if isinstance(source, nn.Module):
        opened = ModelSource(source, adapter, rank, tolerance, example_inputs, component, progress=progress)
    else:
        opened = FilesSource(Path(source), base, component)
    return report_of(evaluate(profile, opened), opened)


def report_of(result: Evaluation, source: AdapterSource, others: bool = True) -> TargetReport:
    """The report of an evaluation. `others`: name the programs that take the adapter if this one does not."""
    profile, taken = result.profile, result.files is not None
    asked = {} if taken or not others else target_profiles()
    fitting = [
        name for name, other in asked.items() if other is not profile and evaluate(other, source).files is not None
    ]
    lossy = any(site.error for site in result.sites)
    outputs = source.outputs() if taken and result.converted and lossy else ()
    return TargetReport(
        profile.name,
        f"{profile.title} {profile.version}",
        profile.format,
        taken,
        tuple(result.sites),
        tuple(group_problems(result.problems)),
        tuple(_remedies(result)),
        tuple(fitting),
        tuple(_notes(result, source)),
        outputs,
        profile.command.replace("{rank}", str(_rank_value(result))),
    )


def _rank_value(result: Evaluation) -> int:
    """The value of the program's option for the largest rank."""
    return min((value for value in result.profile.rank_choices if value >= result.rank), default=result.rank)


def _remedies(result: Evaluation) -> list[str]:
    if result.files is not None:
        return []
    remedies = list(dict.fromkeys(problem.fix for problem in result.problems if problem.fix))
    if result.unconverted:
        remedies.append(NEEDS_MODEL)
    largest = result.profile.largest_rank
    if largest is not None and result.rank > largest:
        remedies.append(f"rank={largest} or tolerance=… convert it to a LoRA that is an approximation")
    merge = "merge_to(model, folder) writes a plain model, with the adapter in its weights"
    return [*remedies, merge] if result.mergeable else remedies


def _notes(result: Evaluation, source: AdapterSource) -> list[str]:
    profile, notes = result.profile, [*result.notes]
    if profile.default_rank is not None and result.files is not None and result.rank > profile.default_rank:
        notes.append(f"without {profile.rank_option}, the largest rank is {profile.default_rank}")
    if (profile.classes or profile.model_types) and not source.facts.kind and not source.facts.config:
        notes.append("the base is not known, so its class is not checked: base= gives it")
    return [*notes, *profile.notes]


def refusal(result: Evaluation, report: TargetReport) -> SurgeryError:
    """The error of `save_adapter` where a program does not take an adapter."""
    where = ", ".join(dict.fromkeys(problem.where for problem in result.problems if problem.where))
    fix = "; or ".join([*report.remedies, *([f"these take it: {', '.join(report.others)}"] if report.others else [])])
    why = "; ".join(dict.fromkeys(problem.why or problem.what for problem in result.problems))
    return SurgeryError(f"{report.title} does not take the adapter", where=where or None, why=why, fix=fix)
