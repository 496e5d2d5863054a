"""`extract_lora`: the change of a model that was trained in full, as an adapter of plain LoRA."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from surgery.authoring.rule import Rule
from surgery.errors import MergeError, PlanError, SurgeryError, abbreviate
from surgery.forward.parameter_view import tensor_at
from surgery.lifecycle.apply import apply_rules
from surgery.lora_conversion.lora_rule import lora_rule
from surgery.lora_conversion.lora_tensors import LoraTensors, lora_tensors, lost_too_much
from surgery.lora_conversion.path_targets import modules_of, targeted_rules
from surgery.lora_conversion.report import LoraReport, LoraSite
from surgery.lora_conversion.truncated_svd import RankChoice
from surgery.lora_conversion.weight_sources import WeightSource, open_source
from surgery.patterns.targets import Targets
from surgery.progress import Progress, each_step
from surgery.state.adapter_tensors import box_of
from surgery.storage.save import save_adapter
from surgery.transaction.neutral_context import neutrally

__all__ = ["extract_lora"]

Others = Literal["train", "refuse", "leave out"]


@neutrally()
def extract_lora(
    base: str | Path | nn.Module,
    tuned: str | Path | nn.Module,
    folder: str | Path,
    *,
    rank: int | None = None,
    tolerance: float | None = None,
    only: Targets | None = None,
    others: Others = "train",
    dtype: torch.dtype | None = None,
    format: Literal["auto", "peft", "surgery"] = "auto",
    metadata: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    progress: Progress = False,
) -> LoraReport:
    """Write the difference between a base and its fine-tune as an adapter: LoRA of the largest singular values.

    >>> import copy, tempfile
    >>> import torch
    >>> from torch import nn
    >>> from surgery import extract_lora, load_adapter
    >>> _ = torch.manual_seed(0)
    >>> base = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    >>> tuned = copy.deepcopy(base)
    >>> with torch.no_grad():
    ...     _ = tuned[0].weight.add_(torch.randn(16, 2) @ torch.randn(2, 16))
    >>> folder = tempfile.mkdtemp()
    >>> print(extract_lora(base, tuned, folder))
    LoRA at 1 weights, rank 2; only rounding is lost
    >>> _ = load_adapter(base, folder)
    >>> torch.allclose(base(torch.ones(1, 16)), tuned(torch.ones(1, 16)), atol=1e-4)
    True

    The weights are read one pair at a time, so folders larger than memory work. Neither model is changed.

    Args:
        base: the base: a folder with a transformers checkpoint, or a model without adapters.
        tuned: the fine-tune of the base, likewise.
        folder: the folder of the adapter; it is created if it is absent.
        rank: the rank at every site. With a tolerance: the highest rank. None (default): as many as needed.
        tolerance: the share of each site's change ‖ΔW‖ that may be lost; the ranks are as low as it allows. None
            (default): without `rank`, only singular values are left out that the rounding of the weights explains.
        only: targets; only their modules get a LoRA. Default None: every module that LoRA can go on, except
            embeddings.
        others: what happens with other tensors that changed: norms, embeddings, whatever LoRA can't hold or `only` does
            not name. "train" (default): the adapter holds them in full, as TrainRule (PEFT's modules_to_save).
            "refuse": an error lists them. "leave out": the adapter does not have them, and the report lists them.
        dtype: the dtype of the LoRA's tensors. Default None: float32, or float64 for a base in float64.
        format: as in `save_adapter`.
        metadata: as in `save_adapter`.
        config: as in `save_adapter`.
        progress: as in `apply_rules`; a step is a tensor. Default False.

    Returns:
        A `LoraReport`: rank and error of each weight, and what the adapter holds in full or leaves out.

    Raises:
        PlanError: one problem for each tensor that only one model has or whose shapes differ, and for each site that
            needs a higher rank than `rank` to keep the tolerance.
        SurgeryError: a folder without a checkpoint, a model with adapters, equal weights, a wrong value of an argument,
            or changed tensors with others="refuse". Nothing is written.

    Notes:
        A changed bias beside a changed weight becomes LoRA's bias (`lora_bias`). Names in files are mapped to those of
        the model as transformers does.
    """
    choice = RankChoice(rank, tolerance)
    if others not in ("train", "refuse", "leave out"):
        raise SurgeryError(f"others={others!r} is not known", fix='"train", "refuse" or "leave out"')
    if dtype is not None and not (isinstance(dtype, torch.dtype) and _is_number(dtype) and dtype.itemsize > 1):
        fix = "torch.float32, torch.bfloat16 or torch.float16; or None"
        raise SurgeryError(f"dtype={dtype!r} is not a dtype of a LoRA", fix=fix)
    before, after = open_source(base, "base"), open_source(tuned, "tuned")
    groups = _tensor_groups(before, after)
    chosen = None if only is None else modules_of(before.model, lora_rule()[0].replace(targets=only))
    changes = _compare(before, after, groups, chosen, choice, dtype, others == "leave out", progress)
    if not changes.lora and not changes.others:
        raise SurgeryError("the models have equal weights", where=f"{before.label} and {after.label}")
    if changes.others and others == "refuse":
        names = [name for group in changes.others for name in group]
        raise SurgeryError(
            f"{len(names)} tensors changed that the LoRA does not hold",
            where=abbreviate(names, "tensors"),
            why="LoRA does not go there" if only is None else "LoRA does not go there, or `only` does not name them",
            fix='others="train" holds them in full; others="leave out" drops their changes',
        )
    held = changes.others if others == "train" else []
    if not changes.lora and not held:
        why = "only tensors changed that LoRA does not hold"
        raise SurgeryError("the adapter would be empty", why=why, fix='others="train" holds them in full')
    _put_on(before.model, after, changes.lora, held)
    save_adapter(before.model, folder, format=format, metadata=metadata, config=config)
    rows = [
        LoraSite(path, name, part.rank, part.norm, part.error)
        for path, lora in changes.lora.items()
        for name, part in lora.factors.items()
    ]
    norm, lost = math.hypot(*[row.norm for row in rows]), math.hypot(*[row.norm * row.error for row in rows])
    names = tuple(name for group in changes.others for name in group)
    error = lost / norm if norm else 0.0
    return LoraReport((), tuple(rows), error, names if held else (), () if held else names)


@dataclass
class _Changes:
    """The LoRA of each module by path, and the names of the other tensors that changed; tied names are one group."""

    lora: dict[str, LoraTensors] = field(default_factory=dict)
    others: list[tuple[str, ...]] = field(default_factory=list)


def _tensor_groups(before: WeightSource, after: WeightSource) -> list[tuple[str, ...]]:
    """The names of the tensors, each tensor once with all its names. `PlanError` if the models do not fit."""
    old, new = before.names(), after.names()
    problems = [
        SurgeryError(f"only {source.label} has the tensor", where=name, fix="name the base that was fine-tuned")
        for source, own, other in ((before, old, new), (after, new, old))
        for name in own
        if name not in other
    ]
    by_tensor: dict[int, list[str]] = {}
    for name, tensor in old.items():
        by_tensor.setdefault(id(tensor), []).append(name)
        if name in new and new[name].shape != tensor.shape:
            problems.append(
                SurgeryError(
                    f"the tensor is {tuple(tensor.shape)} in the base and {tuple(new[name].shape)} in the fine-tune",
                    where=name,
                    fix="give the base the same sizes first, such as by resize_token_embeddings",
                )
            )
        if name in new and _is_number(new[name].dtype) != _is_number(tensor.dtype):
            what = f"the tensor is {tensor.dtype} in the base and {new[name].dtype} in the fine-tune"
            fix = "name the models as they were before one of them was quantised"
            problems.append(SurgeryError(what, where=name, fix=fix))
    for names in by_tensor.values():
        if len({id(new[name]) for name in names if name in new}) > 1:
            problems.append(
                SurgeryError(
                    "the base shares a tensor that the fine-tune does not",
                    where=" and ".join(names),
                    why="each of them has its own values now",
                    fix="untie the base first: config.tie_word_embeddings = False",
                )
            )
    if problems:
        raise PlanError(problems)
    return [tuple(names) for names in by_tensor.values()]


def _compare(
    before: WeightSource,
    after: WeightSource,
    groups: Sequence[tuple[str, ...]],
    chosen: set[int] | None,
    choice: RankChoice,
    dtype: torch.dtype | None,
    dropped: bool,
    progress: Progress,
) -> _Changes:
    """The changes of each module, of which one is in memory at a time. `dropped`: LoRA alone is needed."""
    result, problems = _Changes(), list[SurgeryError]()
    _, possible = lora_rule()
    by_module: dict[str, list[tuple[str, ...]]] = {}
    for names in groups:
        by_module.setdefault(_owner(before.model, names[0])[0], []).append(names)
    with torch.no_grad(), each_step(list(by_module.items()), progress, "compare") as modules:
        for path, own in modules:
            module = before.model.get_submodule(path)
            fits = possible.weights_at(module) if not isinstance(module, nn.Embedding) else {}
            fits = fits if chosen is None or id(module) in chosen else {}
            fits = {name: fit for name, fit in fits.items() if _is_number(tensor_at(module, name).dtype)}
            changed = {names: delta for names in own if (delta := _delta(before, after, names[0])) is not None}
            inner = {_owner(before.model, names[0])[1]: names for names in changed}
            single = all(len(names) == 1 for names in changed)
            if not any(name in fits for name in inner) or not single or any(n not in {*fits, "bias"} for n in inner):
                result.others += changed
                problems += [] if dropped else _not_finite(changed)
                continue
            deltas = {name: changed[names] for name, names in inner.items() if name in fits}
            bias = changed[inner["bias"]] if "bias" in inner else None
            noise = max(_rounding_noise(after.read(inner[name][0])) for name in deltas)
            try:
                result.lora[path] = lora_tensors(path, module, deltas, bias, replace(choice, noise=noise), dtype)
            except SurgeryError as problem:
                problems.append(problem)
            else:
                problems += lost_too_much(path, result.lora[path].factors, choice)
    if problems:
        raise PlanError(problems)
    return result


def _delta(before: WeightSource, after: WeightSource, name: str) -> Tensor | None:
    """The change of a tensor in a dtype that holds it; None if there is none."""
    old, new = before.read(name), after.read(name)
    if not (old.is_floating_point() or old.is_complex()):
        return None if torch.equal(old, new) else new
    wide = torch.promote_types(_wide(old.dtype), _wide(new.dtype))
    delta = new.to(old.device, wide) - old.to(wide)
    return delta if bool(delta.any()) else None


def _is_number(dtype: torch.dtype) -> bool:
    """Whether a change of tensors of a dtype is a difference."""
    return dtype.is_floating_point or dtype.is_complex


def _wide(dtype: torch.dtype) -> torch.dtype:
    """A dtype that holds numbers and differences of another one; torch promotes no float8."""
    return torch.promote_types(dtype, torch.float32) if dtype.itemsize > 1 else torch.float32


def _not_finite(changed: Mapping[tuple[str, ...], Tensor]) -> Iterator[SurgeryError]:
    """Yields a problem for each change that has NaN or infinity in it."""
    for names, delta in changed.items():
        if not bool(delta.isfinite().all()):
            why = "the change of this tensor has NaN or infinity in it"
            fix = 'mend the fine-tune, or others="leave out" drops such changes'
            yield MergeError("the change is not finite", where=names[0], why=why, fix=fix)


def _rounding_noise(weight: Tensor) -> float:
    """The largest singular value that the rounding of a weight to its dtype may give its change, roughly."""
    if not weight.numel():
        return 0.0
    rows, columns = len(weight), weight.numel() // len(weight)
    wide = weight.detach().to(_wide(weight.dtype))
    typical = float(wide.norm()) / math.sqrt(weight.numel())
    return torch.finfo(weight.dtype).eps / 2 * typical * (math.sqrt(rows) + math.sqrt(columns))


def _put_on(
    model: nn.Module, after: WeightSource, lora: Mapping[str, LoraTensors], held: Sequence[tuple[str, ...]]
) -> None:
    """Put the adapter on the structure of the base, whose weights do not change."""
    rules = list(targeted_rules(model, {path: part.rule for path, part in lora.items()}))
    owners = dict.fromkeys(_owner(model, name)[0] for names in held for name in names)
    if held:
        full = Rule.from_dict({"rule": "train", "tied": any(len(names) > 1 for names in held)})
        rules += targeted_rules(model, dict.fromkeys(owners, full))
    apply_rules(model, rules)
    for path in (*lora, *owners):
        box = box_of(model.get_submodule(path), "default")
        assert box is not None
        names = {name.replace(".", "_"): name for name in model.get_submodule(path).state_dict(keep_vars=True)}
        for name, tensor in box.tensors().items():
            key = f"{path}.{names[name]}".strip(".") if path in owners else ""
            value = after.read(key) if key else lora[path].tensors[name]
            if not tensor.is_meta:
                tensor.detach().copy_(value)
            elif name in box._parameters:  # the files hold parts, of which transformers makes this weight
                box._parameters[name] = nn.Parameter(value.to(tensor.dtype), requires_grad=tensor.requires_grad)
            else:
                box._buffers[name] = value


def _owner(model: nn.Module, name: str) -> tuple[str, str]:
    """The path of the module that uses a tensor, and the tensor's name there: an attention uses that of `out_proj`."""
    path, _, last = name.rpartition(".")
    above, _, child = path.rpartition(".")
    if child == "out_proj" and isinstance(model.get_submodule(above), nn.MultiheadAttention):
        return above, f"out_proj.{last}"
    return path, last
