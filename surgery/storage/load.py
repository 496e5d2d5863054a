"""Loads an adapter from files onto a model, completely or not at all."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.declared_tensors import ParamSpec
from surgery.authoring.live_site import LiveSite
from surgery.authoring.planned_rule import PlannedRule
from surgery.errors import LoadError, RuleError, SurgeryError, SurgeryWarning
from surgery.forward.offloaded_weights import value_at
from surgery.lifecycle.insertion import InitialValue, install_plan
from surgery.model_edits.structure_tensor import StructureTensor
from surgery.patterns.module_walk import RESERVED, tensor_key
from surgery.patterns.wrappers import unwrap
from surgery.peft_format.base_structure import present_structure, records_from, structure_fields
from surgery.planning.plan import Plan
from surgery.planning.planner import make_plan
from surgery.progress import Progress
from surgery.rewritten_model.restructure import structure_undone
from surgery.state.adapter_tensors import tensors_of
from surgery.state.fingerprint import differences
from surgery.state.records import require_state
from surgery.storage.load_errors import completed, mismatch_errors
from surgery.storage.load_report import LoadReport
from surgery.storage.matched_tensors import distrusted_rule_error, locate_structure, locate_tensors
from surgery.storage.model_origin import other_model
from surgery.storage.stored_adapter import Stored, stored_adapter
from surgery.storage.vocabulary import other_vocabulary, resized, sizes_wanted
from surgery.transaction.neutral_context import verb

__all__ = ["load_adapter"]


@verb
def load_adapter(
    model: nn.Module,
    source: str | Path | Stored,
    adapter: str = "default",
    *,
    strict: bool = True,
    same_base: bool = True,
    finite: bool = True,
    example_inputs: Any = None,
    trust: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    component: str | None = None,
    format: str | None = None,
    resize: bool = False,
    ignore_mismatched_sizes: bool = False,
    freeze: bool | None = None,
    progress: Progress = False,
) -> LoadReport:
    """Put a saved adapter on a model: apply its rules, and fill their tensors from the files.

    >>> import tempfile
    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, load_adapter, remove, save_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2, init="random")])
    >>> x = torch.ones(1, 4)
    >>> adapted, folder = model(x), save_adapter(model, tempfile.mkdtemp())
    >>> print(load_adapter(remove(model), folder))
    adapter 'default': 2 tensors loaded
    >>> torch.equal(model(x), adapted)
    True

    Rules are made by their registered names. No code and no path comes from a file, and pickle files are read with
    `weights_only`.

    Args:
        model: the model.
        source: a folder or file in PEFT's format, `save_adapter`'s or that of another program (diffusers, Kohya, MLX
            and others; also `.bin`), the name of a repository on the hub, or the result of `import_adapter`.
        adapter: the name that the adapter gets; default "default".
        strict: default True: anything that does not fit is an error. False: load what fits; the report lists the rest,
            and missing tensors keep their rule's starting values.
        same_base: default True: another base is an error. False: it is a warning.
        finite: default True: NaN and infinity are errors.
        example_inputs: one call of the model, as in `apply_rules`; prefixes need it. Default None.
        trust: accept rules that name code to import, such as ReplaceRule; default False.
        subfolder: subfolder of `source`; default None.
        revision: revision of the repository; default None.
        config: replaces PEFT's `adapter_config.json`; default None.
        component: which adapter to take from a diffusers file with several ("unet"), if the model's paths and sizes do
            not show it; default None.
        format: name of the files' format, if their keys are those of several: "peft", "surgery", "diffusers", "kohya",
            "mlx" and others (`adapter_formats` lists them). Default None: the files tell it.
        resize: resize the model's embeddings first, if the files have another vocabulary, by the model's
            `resize_token_embeddings`. They keep that size when the adapter is removed. Default False.
        ignore_mismatched_sizes: pass over tensors of other sizes with a warning. They keep their rule's starting
            values, and the report's `mismatched` lists them. Default False: they are errors.
        freeze: as in `apply_rules`; default None.
        progress: as in `apply_rules`; default False.

    Returns:
        A report of what was loaded.

    Raises:
        LoadError: lists all that is wrong at once, with the model unchanged: missing, unexpected and misshapen tensors,
            a damaged file, a rule or format of a later version, another base, and every problem of the plan.

    Notes:
        Embeddings of the base in PEFT's files are compared with the model's. Rows that differ become part of the
        adapter, as a BaseRowsRule, and the report's `assumed` lists them. Tensors go to their site's device, in the
        dtype of their rule. On a base on the meta device they are made on the CPU, and stay when
        `load_state_dict(…, assign=True)` fills the base.
    """
    model = unwrap(model)
    stored = stored_adapter(model, source, subfolder, revision, config, component, format)
    report = LoadReport(adapter, stored.rules, metadata=stored.metadata, licence=stored.licence)
    report.assumed, report.format = stored.assumed, stored.format
    problems = [
        *completed(stored.problems, source),
        *([] if trust else map(distrusted_rule_error, (rule for rule in stored.rules if rule.imports))),
    ]
    shared = present_structure(model, stored.rules) if stored.shares_structure else []
    on_model = [record.rule for record in shared]
    known = [rule for rule in stored.rules if (trust or not rule.imports) and rule not in on_model]
    with torch.random.fork_rng(devices=[]):  # random initial values are overwritten
        plan = make_plan(model, known, adapter, example_inputs, freeze) if known else None
    values: list[tuple[PlannedRule, str, Entry]] = []
    structure: list[tuple[StructureTensor, Entry]] = []
    if plan is not None:
        problems += plan.problems
        values = locate_tensors(plan, stored, report, finite, ignore_mismatched_sizes)
        structure = locate_structure(plan.structure, stored, report, finite)
        if problems:
            report.unexpected = []  # they belong to rules that could not be read or matched
        problems += completed(_too_large(plan, values, stored.file), source)
    if (resize or not ignore_mismatched_sizes) and (sizes := sizes_wanted(model, plan, stored)):
        if resize and len(sizes) == 1 and hasattr(model, "resize_token_embeddings"):
            options: dict[str, Any] = {"example_inputs": example_inputs, "config": config, "component": component}
            options["format"] = format
            options |= {"strict": strict, "same_base": same_base, "finite": finite, "trust": trust, "freeze": freeze}
            options |= {"ignore_mismatched_sizes": ignore_mismatched_sizes, "progress": progress}
            with resized(model, *sizes):
                return load_adapter(model, source, adapter, subfolder=subfolder, revision=revision, **options)
        problems.append(other_vocabulary(model, sizes))
    with structure_undone(records_from(model, shared)):
        report.base = differences(model, stored.base, _restored(plan))
    if strict:
        without = "load_adapter(…, strict=False) loads the adapter without this setting, so it computes something else"
        problems += completed(stored.unheld, source, without)
        problems += mismatch_errors(report, source, "load_adapter", same_base)
    if problems or plan is None:
        problems = problems or completed([RuleError("the files hold no rules")], source)
        raise LoadError([*problems, *other_model(model, stored.origin)])
    loose = report.base if strict else [*map(str, stored.unheld), *report.problems()]  # the base: see above
    for note in [*stored.notes, *loose, *_passed_over(report)]:
        warnings.warn(note, SurgeryWarning, stacklevel=3)
    # With an example, the rules' own starting values are used, because planning checks them with the example call.
    initial = _values_of_file(plan, values, stored.file) if example_inputs is None else None
    with torch.random.fork_rng(devices=_gpus(plan)):  # random initial values are overwritten
        try:
            fill = partial(_fill_structure, structure, stored.file)
            install_plan(plan, stacklevel=4, initial=initial, progress=progress, fill_structure=fill)
        except (SurgeryError, Warning):
            raise
        except Exception as error:  # a field may be valid and still fail to initialise
            problem = SurgeryError("its rules can't be applied", why=f"{type(error).__name__}: {error}")
            raise LoadError(completed([problem], source)) from error
    require_state(model).peft_fields[adapter] = {**stored.peft_fields, **structure_fields(model, shared)}
    _fill(plan, values, stored.file)
    report.loaded = [tensor_key(step.path, name) for step, name, _ in values]
    report.loaded += [entry.key for _, entry in structure]
    return report


def _passed_over(report: LoadReport) -> Iterator[str]:
    """Returns a warning for each kind of tensor of another size."""
    for line in report.passed_over():
        yield f"{line}; it is ignored because of ignore_mismatched_sizes=True"


def _restored(plan: Plan | None) -> list[Tensor]:
    """Returns tensors of the base that the adapter restores to their values at its training, or takes out."""
    steps = plan.steps if plan is not None else ()
    removed = [tensor for record in plan.structure for tensor in record.removed] if plan is not None else []
    owners = ((step.rule, step.module._parameters) for step in steps)
    return removed + [
        tensor
        for rule, parameters in owners
        for name, tensor in parameters.items()
        if tensor is not None and rule.restores(name)
    ]


def _gpus(plan: Plan) -> list[int]:
    parameters = (tensor for step in plan.steps for tensor in step.module._parameters.values())
    used = {tensor.device for tensor in parameters if tensor is not None}
    return sorted(device.index or 0 for device in used if device.type == "cuda")


def _too_large(plan: Plan, values: list[tuple[PlannedRule, str, Entry]], file: TensorFile) -> Iterator[SurgeryError]:
    """Limits the size of tensors that are not in the file, which a load that is not strict creates."""
    filled = {(id(step), name) for step, name, _ in values}
    specs = [spec for step in plan.steps for spec in step.specs if (id(step), spec.name) not in filled]
    size = sum(math.prod(spec.shape) for spec in specs)
    if size > (1 << 24) + 4 * sum(map(math.prod, file.shapes.values())):
        why = "so many are not created for a file of this size"
        yield SurgeryError(f"its rules need {size:,} numbers that are not in the file", why=why)


def _values_of_file(plan: Plan, values: list[tuple[PlannedRule, str, Entry]], file: TensorFile) -> InitialValue:
    """Returns a function for the initial values: those of the file, which cost less than random ones.

    It returns None the first time that a spec occurs, so that a rule which can't initialise fails. It also returns None
    at sites with missing tensors, because a rule may compute one tensor from another's initial value.
    """
    entries = {(id(step), name): entry for step, name, entry in values}
    incomplete = {id(step) for step in plan.steps for spec in step.specs if (id(step), spec.name) not in entries}
    initialised: set[int] = set()

    def value_of(step: PlannedRule, spec: ParamSpec) -> Tensor | None:
        if id(spec) not in initialised or id(step) in incomplete:
            initialised.add(id(spec))
            return None
        return _value(file, entries[id(step), spec.name])

    return value_of


def _value(file: TensorFile, entry: Entry) -> Tensor:
    return entry.read(file.read(entry.key))


def _fill(plan: Plan, values: list[tuple[PlannedRule, str, Entry]], file: TensorFile) -> None:
    filled, duplicates = {(id(step), name) for step, name, _ in values}, dict[int, nn.Parameter]()
    with torch.no_grad():
        for step in plan.steps:
            if any(tensor.is_meta for tensor in tensors_of(step.module, plan.adapter).values()):
                unfilled = {spec.name for spec in step.specs if (id(step), spec.name) not in filled}
                _realise(step, plan.adapter, unfilled, duplicates)
        tensors = {id(step): tensors_of(step.module, plan.adapter) for step in plan.steps}
        for step, name, entry in values:
            tensors[id(step)][name].copy_(_value(file, entry))


def _fill_structure(structure: Sequence[tuple[StructureTensor, Entry]], file: TensorFile) -> None:
    with torch.no_grad():
        for tensor, entry in structure:
            if not tensor.whole.is_meta:
                tensor.values().copy_(_value(file, entry))
            elif tuple(tensor.whole.shape) == tensor.shape:
                _replace_meta(tensor, _value(file, entry))
            else:
                what = f"{tensor.key} can't be filled: the base has no values yet, and files have its new rows alone"
                raise SurgeryError(what, fix="load the values of the base first")


def _replace_meta(tensor: StructureTensor, value: Tensor) -> None:
    old, value = tensor.whole, value.to(tensor.dtype)
    if isinstance(old, nn.Parameter):
        tensor.owner._parameters[tensor.name] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        tensor.owner._buffers[tensor.name] = value


def _realise(step: PlannedRule, adapter: str, unfilled: set[str], duplicates: dict[int, nn.Parameter]) -> None:
    """Replaces tensors on the meta device by tensors on the CPU; the base has no values yet.

    `unfilled`: names of tensors that are not in the file. They get their rule's initial values.
    """
    box: Any = step.module._modules[RESERVED]._modules[adapter] if step.specs else None  # type: ignore[union-attr]
    meta = [spec for spec in step.specs if box.tensors()[spec.name].is_meta]
    for spec in meta:
        old = box.tensors()[spec.name]
        new = torch.empty_like(old, device="cpu")
        if spec.name in unfilled:
            spec.fill(new)
        if spec.buffer:
            box._buffers[spec.name] = new
        else:
            duplicates.setdefault(id(old), nn.Parameter(new, requires_grad=old.requires_grad))
            box._parameters[spec.name] = duplicates[id(old)]  # sites may share it
    if meta and unfilled:
        module = step.module
        step.rule.initialise(
            LiveSite(module, step.path, adapter, box.tensors(), lambda name, _: value_at(module, name))
        )
