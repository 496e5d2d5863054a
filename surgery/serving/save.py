"""The public `save_adapter`: an adapter in a format, or in the form that a program takes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from surgery.adapter_files.process_group import writing
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.progress import Progress
from surgery.serving.evaluation import evaluate
from surgery.serving.known import profile_named
from surgery.serving.source import ModelSource
from surgery.serving.write import write_target
from surgery.storage import save as storage_save
from surgery.storage.save import json_data
from surgery.transaction.neutral_context import neutrally

__all__ = ["save_adapter"]


def save_adapter(
    model: nn.Module,
    folder: str | Path,
    adapter: str | Sequence[str] | Mapping[str, float] = "default",
    *,
    format: str = "auto",
    target: str | None = None,
    rank: int | None = None,
    tolerance: float | None = None,
    metadata: Mapping[str, Any] | None = None,
    licence: str | None = None,
    config: Mapping[str, Any] | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
    component: str | None = None,
    progress: Progress = False,
) -> Path:
    """Write an adapter into a folder: its tensors, and the rules that made it. The base is not written.

    >>> import tempfile
    >>> from torch import nn
    >>> from surgery import apply_rules, load_adapter, save_adapter
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(4, 4)), [LoraRule("0", rank=2)])
    >>> folder = save_adapter(model, tempfile.mkdtemp())
    >>> sorted(file.name for file in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']

    Args:
        model: a model with the adapter.
        folder: the folder; it is created if it is absent, and its other files stay. A format of one file may have the
            name of a file instead, such as `lora.safetensors`.
        adapter: the adapter's name; with a target, also several names, or a mapping to weights, for their weighted sum.
            Default "default".
        format: "peft": the files that PEFT reads. "surgery": `adapter.safetensors` and `rules.json`, for any rules.
            "auto" (default): "peft" if it holds the adapter exactly, otherwise "surgery". Other names are formats of
            other programs ("diffusers", "kohya", "mlx", …), which `adapter_formats` lists.
        target: a program that is to open the files ("vllm", "llama.cpp", …), which `target_profiles` lists. The adapter
            is changed to what the program takes; `check_target` tells how. Default None.
        rank: with a target: the highest rank of a conversion to LoRA, as in `as_lora`; default None: as many as needed.
        tolerance: with a target: the share of each ‖ΔW‖ that a conversion to LoRA may lose; default None: only rounding
            errors.
        metadata: JSON data that `load_adapter`'s report returns; default None.
        licence: name of a licence, which `load_adapter`'s report returns; default None.
        config: fields of PEFT's configuration that no rule has, such as `{"task_type": "SEQ_CLS"}`; default None:
            those of the file that the adapter was loaded from. The format "surgery" keeps the task, the base's name
            and the revision, for a later save in PEFT's format.
        state_dict: the model's state dict, gathered elsewhere (accelerate's `get_state_dict`); default None.
        save_embedding_layers: whether PEFT's format contains the base's embeddings, too. "auto" (default): if
            "embed_tokens" or "lm_head" is a target, or the vocabulary differs from the base of that name.
        component: the component of a pipeline that the model is ("text_encoder_2"), for formats that write it; default
            None: the model's class tells it.
        progress: as in `apply_rules`; a step is a tensor. Default False.

    Returns:
        The folder's path.

    Raises:
        SurgeryError: the format can't hold the adapter, or the target does not take it; a rule holds something that is
            not data, or its class lacks `@rule`; a state dict lacks a tensor or is sharded; or other processes have
            other parts of the model (a pipeline's stages).

    Warns:
        SurgeryWarning: running statistics of the base moved, and no rule of the adapter keeps them. Or `config` is
            given, and "auto" writes "surgery".

    Notes:
        A merged adapter is saved as it was trained. If the process is killed, the folder holds either the previous
        adapter or this one, whole. If processes share a sharded model, all of them call this function, and the first
        one writes. Or one process calls it alone, with `state_dict`.
    """
    if target is None:
        if rank is not None or tolerance is not None:
            fix = "give target=, or convert it on the model: as_lora(model, adapter, rank=…, tolerance=…)"
            raise SurgeryError("rank and tolerance belong to a target", fix=fix)
        if not isinstance(adapter, str):
            fix = "give target=, or save_adapter for each of them; as_lora makes one LoRA of several"
            raise SurgeryError("a format holds one adapter", fix=fix)
        return storage_save.save_adapter(
            model, folder, adapter, format=format, metadata=metadata, licence=licence, config=config,
            state_dict=state_dict, save_embedding_layers=save_embedding_layers, component=component, progress=progress,
        )  # fmt: skip
    return _save_for(
        model, Path(folder), adapter, format, target, rank, tolerance, metadata, licence, config, state_dict,
        component, progress,
    )  # fmt: skip


@neutrally()
def _save_for(
    model: nn.Module,
    folder: Path,
    adapter: str | Sequence[str] | Mapping[str, float],
    format: str,
    target: str,
    rank: int | None,
    tolerance: float | None,
    metadata: Mapping[str, Any] | None,
    licence: str | None,
    config: Mapping[str, Any] | None,
    state_dict: Mapping[str, Tensor] | None,
    component: str | None,
    progress: Progress,
) -> Path:
    profile = profile_named(target)
    if format not in ("auto", profile.format):
        raise SurgeryError(
            f"{profile.title} reads the format {profile.format!r}, not {format!r}", fix="leave out format="
        )
    source = ModelSource(
        model, adapter, rank, tolerance, component=component, config=config, state_dict=state_dict, progress=progress
    )
    result = evaluate(profile, source)
    labels = {"licence": licence, "metadata": json_data(metadata)}
    with writing(folder, result.keys()) if state_dict is None else nullcontext(True) as writes:
        if writes:
            write_target(result, source, folder, labels, progress)
    for note in result.notes:
        warnings.warn(note, SurgeryWarning, stacklevel=4)
    return folder
