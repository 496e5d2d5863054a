"""PEFT's functions for hot-swapping, done by `surgery.hotswap` and `surgery.pad_rank`."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import surgery
from surgery.errors import LoadError, SurgeryError, SurgeryWarning
from surgery.patterns.wrappers import unwrap
from surgery.peft.base_config import PeftConfig
from surgery.peft.delegation import inside
from surgery.peft.errors import as_builtin, pefts_errors
from surgery.rewritten_model.verb_root import records_in, rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.state.records import merged_adapters
from surgery.transaction.undo_log import Journal

__all__ = ["hotswap_adapter", "prepare_model_for_compiled_hotswap"]


_NOT_ITS = re.compile(r"(?:one tensor is|\d+ tensors are) not of this adapter: (.*)")


def hotswap_adapter(
    model: Any, model_name_or_path: str | Path, adapter_name: str, torch_device: Any = None, **options: Any
) -> None:
    """Put the LoRA of a folder or a repository into the tensors of an adapter, which keeps its name.

    >>> import tempfile
    >>> import torch
    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_peft_model, hotswap_adapter
    >>> config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    >>> folder, x = tempfile.mkdtemp(), torch.randn(2, 8)
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    >>> model.save_pretrained(folder)
    >>> before = model(x)
    >>> _ = nn.init.normal_(model.get_base_model()[0].adapters.default.B)
    >>> hotswap_adapter(model, folder, adapter_name="default")
    >>> torch.equal(model(x), before)
    True

    Args:
        model: a façade, or a model with the adapter, or its compiled form.
        model_name_or_path: a folder or a repository.
        adapter_name: the adapter whose tensors change.
        torch_device: ignored: tensors go where the adapter's are.
        options: `subfolder`, `revision`.

    Raises:
        SurgeryError: the adapters are not both LoRA, or the adapter is unknown or merged (also a ValueError), or the
            new one is on modules where the old one is not (also a RuntimeError). The model is unchanged.

    Notes:
        A larger rank makes new Parameters, except in a compiled model: `prepare_model_for_compiled_hotswap` first.
    """
    place: dict[str, Any] = {name: options.get(name) for name in ("subfolder", "revision")}
    compiled, base = _is_compiled(model), inside(getattr(model, "_orig_mod", model))
    with pefts_errors():
        config = PeftConfig.from_pretrained(model_name_or_path, **place)
        (name,) = adapter_names(rewritten(base)[1], adapter_name)
        old = getattr(getattr(model, "_orig_mod", model), "_configs", {}).get(name)
        kinds = [str(each.method) for each in (old or config, config)]
        if kinds[0] != kinds[1]:
            raise SurgeryError(f"Incompatible PEFT types found: {kinds[0]} and {kinds[1]}")
        if kinds[1] != "LORA":
            what = f"Hotswapping only supports LORA but {kinds[1]} was passed."
            raise SurgeryError(what, fix="surgery.hotswap(model, adapter, folder) takes every method")
        if name in merged_adapters(unwrap(base)):
            what = f"Cannot hot-swap adapter '{name}' because it is currently merged into the base weights. "
            raise SurgeryError(f"{what}Please unmerge the adapter first", fix="model.unmerge_adapter()")
        with Journal():
            wanted, ranks = max(_ranks([config])), _ranks(surgery.rules_of(base, name))
            if wanted > min(ranks, default=wanted) and not compiled:
                surgery.pad_rank(base, name, max(wanted, *ranks))
            try:
                surgery.hotswap(base, name, model_name_or_path, same_base=False, **place)
            except LoadError as error:
                raise as_builtin(_unsuccessful(name, model_name_or_path, error), RuntimeError) from None


def _unsuccessful(adapter: str, source: str | Path, error: LoadError) -> LoadError:
    """PEFT's sentence before the problems; it names the keys that the adapter does not have."""
    what = "Hot swapping the adapter did not succeed"
    found = (_NOT_ITS.fullmatch(problem.what) for problem in error.problems)
    keys = [key for match in found if match for key in match[1].split(", ")]
    if keys:  # PEFT puts the adapter's name into them
        named = ", ".join(re.sub(r"(lora_\w+)(?=\.|$)", rf"\1.{adapter}", key) for key in keys)
        what = f"{what}, unexpected keys found: {named}"
    return LoadError([SurgeryError(what, where=str(source)), *error.problems])


def prepare_model_for_compiled_hotswap(
    model: Any, *, target_rank: int | None = None, config: Any = None, check_compiled: str = "error"
) -> None:
    """Give all adapters room for a rank, so that a compiled model takes any LoRA up to it.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, get_peft_model, prepare_model_for_compiled_hotswap
    >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))
    >>> prepare_model_for_compiled_hotswap(model, target_rank=6)
    >>> tuple(model.get_base_model()[0].adapters.default.A.shape)
    (6, 8)

    Args:
        model: a façade, or a model with adapters, before it is compiled.
        target_rank: the largest rank that will come; default None: the ranks stay. Scales need no preparation.
        config: a LoraConfig, or adapter → LoraConfig: their ranks become `target_rank`; default None.
        check_compiled: "error" (default), "warn" or "ignore", for a model that is compiled already.

    Raises:
        SurgeryError: the model is compiled or does not have a LoRA, or a LoRA has a larger rank. It is also a
            ValueError. The model is unchanged.
    """
    with pefts_errors():
        if _is_compiled(model):
            _check_compiled(check_compiled)
        base = inside(getattr(model, "_orig_mod", model))
        names = list(rewritten(base)[1].adapters) if records_in(unwrap(base)) else []
        ranked = [name for name in names if _ranks(surgery.rules_of(base, name))]
        if not ranked:
            what = "No adapter layers found on the model, make sure call `prepare_model_for_compiled_hotswap` after "
            raise SurgeryError(f"{what}loading the first adapter and before loading the second adapter.")
        if target_rank is None:
            return
        for name in ranked:
            largest = max(_ranks(surgery.rules_of(base, name)))
            if largest > target_rank:
                what = f"Trying to pad the adapter to the target rank {target_rank}, but the original rank is larger "
                raise SurgeryError(f"{what}({largest}). This is not possible.", where=name)
        with Journal():
            for name in ranked:
                surgery.pad_rank(base, name, target_rank)
    for each in config.values() if isinstance(config, Mapping) else [config] if config is not None else []:
        each.r = target_rank
        for key in each.rank_pattern or {}:
            each.rank_pattern[key] = target_rank


def _is_compiled(model: Any) -> bool:
    return hasattr(model, "_orig_mod") or bool(getattr(inside(model), "_compiled_call_impl", None))


def _check_compiled(answer: str) -> None:
    if answer == "error":
        raise SurgeryError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if answer == "warn":
        text = "prepare_model_for_compiled_hotswap was called with a model that is already compiled. This will likely "
        text += "result in re-compilation, hurting performance. Call the function before compiling the model."
        warnings.warn(text, SurgeryWarning, stacklevel=3)
    elif answer != "ignore":
        what = f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{answer}' instead."
        raise SurgeryError(what)


def _ranks(parts: Iterable[object]) -> list[int]:
    """The ranks that rules have room for, or that configurations name."""
    ranks: list[int] = []
    for part in parts:
        rank = getattr(part, "max_rank", None) or getattr(part, "rank", None) or getattr(part, "r", None)
        if isinstance(rank, int):
            ranks += [rank, *(getattr(part, "rank_pattern", None) or {}).values()]
    return ranks
