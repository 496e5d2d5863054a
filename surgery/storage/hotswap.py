"""Copies new weights into an adapter's tensors: no class, shape or address changes, so nothing compiles again.

The new values are computed and checked without touching the model (`hotswap_plan.py`); then they are copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from surgery.adapter_files.entry import Entry
from surgery.adapter_files.tensor_files import TensorFile
from surgery.authoring.rule import Rule
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import LoadError, RuleError, SurgeryError, SurgeryWarning
from surgery.patterns.module_walk import tensor_key
from surgery.peft_format.base_structure import present_structure, records_from
from surgery.rewritten_model.restructure import structure_undone
from surgery.rewritten_model.state_dict import rules_of
from surgery.rewritten_model.verb_root import rewritten
from surgery.sharded_tensors import copy_into
from surgery.state.fingerprint import differences
from surgery.state.in_use import check_free
from surgery.state.restructuring import structure_keys
from surgery.storage.hotswap_plan import adapter_sites, plan_incoming_rules
from surgery.storage.hotswap_values import NewValues, detached_copy
from surgery.storage.load_errors import completed, mismatch_errors
from surgery.storage.load_report import LoadReport
from surgery.storage.matched_tensors import distrusted_rule_error, locate_structure, locate_tensors
from surgery.storage.model_origin import other_model
from surgery.storage.save import structure_since
from surgery.storage.stored_adapter import Stored, stored_adapter
from surgery.storage.vocabulary import other_vocabulary, sizes_wanted
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Journal

__all__ = ["SwapReport", "hotswap"]

M = TypeVar("M", bound=nn.Module)


@dataclass
class SwapReport(LoadReport):
    """The result of a hot-swap: a LoadReport whose `rules` are the new adapter's; the model keeps its own rules.

    Attributes:
        idle: sites of the adapter for which the new one has no tensors; they have no effect now.
        notes: what was rounded or not transferred, each with its number of sites.
    """

    idle: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"adapter {self.adapter!r}: {len(self.loaded)} tensors swapped in"]
        if self.idle:
            lines.append(f"  nothing came for {_places(len(self.idle))}: {', '.join(self.idle[:6])}")
        lines += [f"  {note} ({_places(count)})" for note, count in self.notes.items()]
        return "\n".join([*lines, *(f"  {text}" for text in [*self.problems(), *self.assumed])])


@verb
def hotswap(
    model: nn.Module,
    adapter: str,
    source: str | Path | Stored | Mapping[str, Tensor],
    *,
    rules: Sequence[Rule] | Rule | None = None,
    strict: bool = True,
    same_base: bool = True,
    finite: bool = True,
    trust: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
    config: Mapping[str, Any] | None = None,
    component: str | None = None,
) -> SwapReport:
    """Put another adapter's weights into the tensors of one that is on the model; compiled code stays valid.

    >>> import tempfile
    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, hotswap, load_adapter, pad_rank, remove, save_adapter
    >>> from surgery.rules import LoraRule
    >>> model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(2, 8)
    >>> mail = apply_rules(model, LoraRule("0", rank=2, alpha=8, init="random"))
    >>> folder, wanted = save_adapter(mail, tempfile.mkdtemp()), mail(x)
    >>> _ = apply_rules(remove(model), LoraRule("0", rank=4, alpha=4), adapter="a")
    >>> compiled = torch.compile(pad_rank(model, "a", 16), backend="eager")
    >>> before, tensor = compiled(x), model[0].adapters.a.B
    >>> print(hotswap(model, "a", folder))
    adapter 'a': 2 tensors swapped in
    >>> torch.allclose(compiled(x), wanted, atol=1e-6), model[0].adapters.a.B is tensor
    (True, True)

    The new adapter may be on fewer sites: at the others the adapter has no effect. Its rules must be of the kinds on
    the model. If they make other code, the rule converts the tensors so that the running code computes the same
    (`Rule.swapped`). LoRA does so for any rank that has room (`pad_rank`) and for any scale, whether by alpha, rslora
    or patterns. The scale is folded into B. That is exact if the two scales are a power of two apart; otherwise each
    number of B is rounded once more, and `notes` says so. `rules_of` stays the same, and the tensors hold the function,
    so `save_adapter` saves the new adapter.

    Args:
        model: the model, or its compiled form.
        adapter: name of the adapter whose tensors change.
        source: as in `load_adapter`, in either format; or tensors as `adapter_state_dict` returns them.
        rules: with tensors as `source`, the rules that they belong to; default None: the adapter's own.
        strict: as in `load_adapter`; default True.
        same_base: as in `load_adapter`; default True.
        finite: as in `load_adapter`; default True.
        trust: as in `load_adapter`; default False.
        subfolder: as in `load_adapter`; default None.
        revision: as in `load_adapter`; default None.
        config: as in `load_adapter`; default None.
        component: as in `load_adapter`; default None.

    Returns:
        A report of what was swapped in.

    Raises:
        LoadError: lists all that does not fit at once, with every tensor unchanged. Embeddings are not resized: files
            of another vocabulary do not fit.
        SurgeryError: the adapter is unknown or merged, or changed the base's weights at its start (PiSSA).

    Notes:
        Tensors keep their identity, dtype, device and `requires_grad`. Optimizers go on, with the moments of the
        previous values. A call that runs at the same time sees some sites with new weights: swap between calls.
        Exported programs, and graphs compiled with frozen weights, are snapshots.

    Source: PEFT's `hotswap_adapter`, for LoRA.
    """
    model, state = rewritten(model)
    check_free(model)
    live = adapter_sites(model, state, adapter)
    stored = _stored(model, source, adapter, rules, subfolder, revision, config, component)
    report = SwapReport(adapter, stored.rules, metadata=stored.metadata, licence=stored.licence)
    problems = [
        *stored.problems,
        *([] if trust else map(distrusted_rule_error, (rule for rule in stored.rules if rule.imports))),
    ]
    shared = present_structure(model, stored.rules) if stored.shares_structure else []
    shared = [record for record in shared if record.adapter != adapter]
    structural = [rule for rule in stored.rules if isinstance(rule, StructureRule)]
    structural = [rule for rule in structural if rule not in [record.rule for record in shared]]
    present = [rule.in_files() for rule in state.adapters[adapter] if isinstance(rule, StructureRule)]
    problems += [_other_structure(adapter, structural, present)] if structural and structural != present else []
    incoming = [rule for rule in stored.rules if (trust or not rule.imports) and not isinstance(rule, StructureRule)]
    plan, doubtful = plan_incoming_rules(model, incoming, adapter, live)
    values = locate_tensors(plan, stored, report, finite)
    records = [record for record in state.structure if record.adapter == adapter] if structural else []
    made = locate_structure(records, stored, report, finite) if structural == present else []
    own = {key for key, _ in structure_keys(records)}
    report.unexpected = [key for key in report.unexpected if key not in own]
    problems += [*plan.problems, *(doubtful if strict and report.unexpected else ())]
    new_values = NewValues(plan, live, values, stored.file, finite)
    pairs = [] if problems else [*new_values.tensors(), *((t.values(), _value(stored, entry)) for t, entry in made)]
    if sizes := sizes_wanted(model, plan, stored):
        problems.append(other_vocabulary(model, sizes))
    if problems:
        report.unexpected = []  # of rules that could not be read or matched_sites
    with structure_undone(structure_since(state, adapter) if structural else records_from(model, shared)):
        report.base = differences(model, stored.base)  # files with a structure are for a model without it
    problems += new_values.problems
    if strict:
        without = "hotswap(…, strict=False) takes the adapter without this setting, so it computes something else"
        problems += completed(stored.unheld, source, without)
        problems += mismatch_errors(report, source, "hotswap", same_base)
    if problems or not stored.rules:
        problems = problems or completed([RuleError("the files hold no rules")], source)
        raise LoadError([*problems, *other_model(model, stored.origin)])
    loose = report.base if strict else [*map(str, stored.unheld), *report.problems()]
    for note in [*stored.notes, *loose]:
        warnings.warn(note, SurgeryWarning, stacklevel=3)
    with Journal() as journal:
        for tensor, new in pairs:
            journal.undo(copy_into, tensor, detached_copy(tensor))
            copy_into(tensor, new)
    report.loaded = [tensor_key(step.path, name) for step, name, _ in values] + [entry.key for _, entry in made]
    report.idle, report.notes, report.assumed = new_values.idle, new_values.notes, stored.assumed
    return report


def _value(stored: Stored, entry: Entry) -> Tensor:
    return entry.read(stored.file.read(entry.key))


def _other_structure(adapter: str, structural: Sequence[Rule], present: Sequence[Rule]) -> SurgeryError:
    texts = [", ".join(rule.label for rule in rules) or "none" for rules in (structural, present)]
    return SurgeryError(
        "a hot-swap can't change the structure of the model",
        why=f"the structural rules of the file ({texts[0]}) are not those of {adapter!r} ({texts[1]})",
        fix=f"remove(model, {adapter!r}), and load_adapter the new one",
    )


def _stored(
    model: nn.Module,
    source: str | Path | Stored | Mapping[str, Tensor],
    adapter: str,
    rules: Sequence[Rule] | Rule | None,
    subfolder: str | None,
    revision: str | None,
    config: Mapping[str, Any] | None,
    component: str | None,
) -> Stored:
    if not isinstance(source, Mapping):
        if rules is not None:
            raise SurgeryError("files contain their own rules", fix="hotswap(model, adapter, tensors, rules=…)")
        return stored_adapter(model, source, subfolder, revision, config, component)
    of_files = {"subfolder": subfolder, "revision": revision, "config": config, "component": component}
    if arguments := [f"{name}=" for name, value in of_files.items() if value is not None]:
        raise SurgeryError(
            f"tensors have no {', '.join(arguments)}", why="these arguments select files", fix="leave them out"
        )
    wrong = [str(key) for key, tensor in source.items() if not isinstance(key, str) or not isinstance(tensor, Tensor)]
    if wrong:
        what = "an adapter is tensors by name"
        raise LoadError([SurgeryError(what, where=", ".join(wrong[:6]), fix="adapter_state_dict(model, name)")])
    tensors = {key: tensor.detach() for key, tensor in source.items()}
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    file = TensorFile(shapes, {key: tensor.dtype for key, tensor in tensors.items()}, {}, tensors.__getitem__)
    chosen_rules = rules_of(model, adapter) if rules is None else [rules] if isinstance(rules, Rule) else list(rules)
    return Stored(chosen_rules, file, lambda plan, step, name: Entry(tensor_key(step.path, name)))


def _places(count: int) -> str:
    return "one site" if count == 1 else f"{count} sites"
