"""Brings an adapter into the form that a program takes, and tells what the program makes of each module."""

from __future__ import annotations

from dataclasses import dataclass, field

from surgery.errors import SurgeryError
from surgery.serving.described import DescribedAdapter
from surgery.serving.facts import base_problems, change_problem, needs_conversion, whole_problem
from surgery.serving.lowering import Steps, fill_groups, fold_scales, pad_ranks, set_dtypes
from surgery.serving.profile import TargetProfile
from surgery.serving.report import TargetSite
from surgery.serving.source import AdapterSource
from surgery.storage.formats import rows as _rows  # registers the formats
from surgery.storage.formats.contents import Change, Contents
from surgery.storage.formats.saving import by_component
from surgery.storage.formats.table import AdapterFormat, format_named
from surgery.storage.formats.writing import FileContents, file_contents

__all__ = ["Evaluation", "evaluate"]

_ROWS = _rows
_FROM = 1e-6  # a smaller share is rounding


@dataclass
class Evaluation:
    """Sites, problems, and the files' contents, which are None if there are problems."""

    profile: TargetProfile
    sites: list[TargetSite] = field(default_factory=list)
    problems: list[SurgeryError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: FileContents | None = None
    converted: bool = False
    unconverted: bool = False
    mergeable: bool = True
    rank: int = 0

    def keys(self) -> list[str]:
        """The keys of the tensors that are to be written."""
        return list(self.files.tensors) if self.files is not None else []


def evaluate(profile: TargetProfile, source: AdapterSource) -> Evaluation:
    """Lowers an adapter for a program. Nothing is written, and the model is not changed."""
    result = Evaluation(profile)
    described = _chosen(profile, source, result)
    result.problems += base_problems(profile, source.facts)
    if described is None:
        result.problems += source.problems
        result.mergeable = not source.problems
        result.sites += [
            TargetSite(problem.where, "refused", problem.what) for problem in source.problems if problem.where
        ]
        return result
    result.problems += described.problems
    steps = Steps()
    for path, (labels, rank, error) in described.converted.items() if result.converted else ():
        exact = error <= _FROM
        text = f"{labels} becomes a LoRA of rank {rank}{'' if exact else ', an approximation'}"
        steps.add(path, text, 0.0 if exact else error)
    changes = _only_changes(described, result)
    if described.rslora and not profile.rslora and profile.format == "peft":
        for path in changes:
            steps.add(path, "the scale of rsLoRA is written as alpha")
    result.problems += fill_groups(profile, changes, source.facts.paths, source.outputs_of, steps)
    refused = {path: why for path, change in changes.items() if (why := _problem(profile, path, change, source))}
    if not refused:
        pad_ranks(profile, changes, steps)
        result.problems += fold_scales(profile, changes, steps)
        set_dtypes(profile, changes, steps)
    _add_sites(result, changes, refused, steps)
    _add_whole(result, described)
    if described.contents.settings.get("invocation") and not profile.invocation:
        why = f"{profile.title} would make it act on all tokens"
        result.problems.append(SurgeryError("the LoRA acts only after its invocation tokens", why=why))
    result.rank = max((change.rank for change in changes.values()), default=0)
    if not result.problems:
        _build_files(result, described, changes, source)
    return result


def _problem(profile: TargetProfile, path: str, change: Change, source: AdapterSource) -> str | None:
    """Why the program does not take the change of a module."""
    if why := change_problem(profile, path, change, source.facts):
        return why
    if profile.format == "peft" and (name := source.checkpoint_name(path)):
        return f"{profile.title} finds modules by their names in checkpoints, which is {name} here"
    return None


def _chosen(profile: TargetProfile, source: AdapterSource, result: Evaluation) -> DescribedAdapter | None:
    """The adapter as it is, or as a plain LoRA."""
    plain = source.plain
    if plain is not None and not needs_conversion(profile, plain, source.rank):
        return plain.copied()
    converted = source.converted
    if converted is not None:
        result.converted = True
        return converted.copied()
    result.unconverted = not source.problems
    if plain is not None and not source.problems:  # files, which nothing can convert
        if plain.start:
            why = f"its start ({plain.start}) changed the weights of the base, which {profile.title} does not do"
            fix = "load it onto the model, and give the model"
            result.problems.append(SurgeryError("the adapter is not for the base's own weights", why=why, fix=fix))
        return plain.copied()
    return None


def _only_changes(described: DescribedAdapter, result: Evaluation) -> dict[str, Change]:
    """The changes of the only component."""
    components = [component for component, changes in described.contents.changes.items() if changes]
    if len(components) > 1:
        return {path: change for _, path, change in described.contents.each()}
    return described.contents.changes[components[0]] if components else {}


def _add_sites(result: Evaluation, changes: dict[str, Change], refused: dict[str, str], steps: Steps) -> None:
    for path, change in changes.items():
        if path in refused:
            result.sites.append(TargetSite(path, "refused", refused[path], change.rank))
            result.problems.append(SurgeryError("a change can't be written", where=path, why=refused[path]))
        elif path in steps.done:
            how = "; ".join(steps.done[path])
            result.sites.append(TargetSite(path, "lowered", how, change.rank, steps.errors.get(path, 0.0)))
        else:
            result.sites.append(TargetSite(path, "taken", "as it is", change.rank))


def _add_whole(result: Evaluation, described: DescribedAdapter) -> None:
    for path, tensors in described.whole.items():
        if why := whole_problem(result.profile, path, tensors):
            result.sites.append(TargetSite(path, "refused", why))
            result.problems.append(SurgeryError("the adapter holds tensors in full", where=path, why=why))
        else:
            result.sites.append(TargetSite(path, "taken", "in full"))


def _build_files(
    result: Evaluation, described: DescribedAdapter, changes: dict[str, Change], source: AdapterSource
) -> None:
    adapter_format = format_named(result.profile.format)
    contents: Contents = described.contents
    try:
        source.check_modules(changes)
        if list(contents.changes) == [""]:
            of_pipeline = any(prefix.component for prefix in adapter_format.prefixes)
            parts = by_component(changes, source.component, source.facts) if of_pipeline else {"": changes}
            contents.changes = parts
        files = file_contents(adapter_format, contents, source.facts)
    except SurgeryError as error:
        result.problems.append(error)
        return
    _add_whole_tensors(files, described, adapter_format)
    result.files = files
    result.notes += files.notes


def _add_whole_tensors(files: FileContents, described: DescribedAdapter, adapter_format: AdapterFormat) -> None:
    """PEFT's `modules_to_save`."""
    if not described.whole:
        return
    assert files.settings is not None
    start = adapter_format.prefixes[0].text
    for path, tensors in described.whole.items():
        files.tensors |= {f"{start}{path}.{name}": tensor for name, tensor in tensors.items()}
    files.settings["modules_to_save"] = [path.rpartition(".")[-1] for path in described.whole]
