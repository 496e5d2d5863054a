"""`merge_to`: writes the merged model for transformers, llama.cpp or MLX; it loads without this package."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.arithmetic.rounding import RoundingMode
from surgery.errors import SurgeryError, abbreviate
from surgery.merging.merge import merge
from surgery.merging.merge_settings import Quantised
from surgery.merging.packed_merge import dequantise_all
from surgery.merging.quantisation_marks import take_off_one_way_conversions
from surgery.model_edits.shared_copies import separate_copies
from surgery.patterns.module_walk import base_modules
from surgery.patterns.offload_hooks import is_offloaded
from surgery.patterns.wrappers import unwrap
from surgery.progress import Progress, steps
from surgery.rewritten_model.save_pretrained import plain_saving
from surgery.rewritten_model.verb_root import records_in, rewritten, rewritten_if_any
from surgery.state.tied_weights import why_not_said
from surgery.storage.model_files.formats import ModelFormat, check_model_format, write_model
from surgery.storage.quantised_loading import write_as_ordinary
from surgery.transaction.created_folder import created_folder
from surgery.transaction.neutral_context import verb
from surgery.transaction.undo_log import Trial

__all__ = ["merge_to"]

TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
              "*preprocessor_config.json", "chat_template*", "sentencepiece*")  # fmt: skip


@verb
def merge_to(
    model: nn.Module,
    folder: str | Path,
    adapter: str | Sequence[str] | None = None,
    *,
    format: ModelFormat = "transformers",
    untie: bool = False,
    tokenizer: Any = None,
    rounding: RoundingMode = "nearest",
    generator: torch.Generator | None = None,
    quantised: Quantised = "refuse",
    dtype: torch.dtype | None = None,
    limit: float | None = 0.10,
    example_inputs: Any = None,
    progress: Progress = False,
) -> Path:
    """Write the model with adapters merged, as a plain checkpoint of transformers, or for llama.cpp or MLX.

        merge_to(model, "merged")
        AutoModelForCausalLM.from_pretrained("merged")      # without this package

        merge_to(model, "merged.gguf", format="gguf")       # llama.cpp
        merge_to(model, "merged", format="mlx")             # mlx_lm.load("merged")

    The model is merged while writing and unmerged afterwards, also after an error: its bits do not change. A model that
    was merged before stays merged. Config and generation config are written, too. Existing files in the folder are
    replaced one by one after all are written.

    The structure is written as it is: without layers that a DropRule took out, with those that a RepeatRule made, and a
    configuration that says so. Copies that share weights are written with weights of their own.

    The other formats are made from a checkpoint of transformers that is written first, beside the result, and removed
    in the end. Its tensors are converted one at a time.

    Args:
        model: a model with `save_pretrained`. It may have no rules: then it is written as it is.
        folder: the folder to write to; created if it does not exist. With `format="gguf"`: the file.
        adapter: a name or several names, as for `merge`. None: all live adapters.
        format: "transformers"; "gguf", one file for llama.cpp; "mlx", a folder for mlx-lm.
        untie: as for `merge`, for a head that shares the embedding's weight. The checkpoint says that they are not
            tied.
        tokenizer: a tokenizer or processor to save. None: copies the files of the folder that the model comes from.
            False: none; a GGUF file then has no vocabulary.
        rounding: as for `merge`.
        generator: as for `merge`.
        quantised: as for `merge`. "dequantise" writes an unquantised checkpoint: also the modules without an adapter
            are dequantised. "requantise" writes a checkpoint in the model's own quantisation.
        dtype: the dtype of dequantised weights. None: that of the model's other parameters. With `format="gguf"` or
            "mlx", also the dtype of all matrices in the files: float32, float16 or bfloat16. None: the model's own.
        limit: as for `merge`.
        example_inputs: as for `merge`.
        progress: as for `merge`; writing is a step of its own.

    Returns:
        The folder, or the file.

    Raises:
        SurgeryError: the model does not have `save_pretrained`; `merge` fails; the class of the model can't hold its
            structure; or the format can't hold the model. No file is written.
    """
    found = rewritten_if_any(model) if adapter is None else rewritten(model)
    model, state = found or (unwrap(model), None)
    if inner := records_in(model, below=True):
        raise SurgeryError(
            "part of this model has rules of its own",
            where=abbreviate(inner, "parts"),
            why="a plain checkpoint does not contain them",
            fix="merge and forget those first",
        )
    save = plain_saving(model)
    if save is None:
        raise SurgeryError(
            f"{type(model).__name__} has no save_pretrained",
            why="merge_to writes checkpoints of transformers",
            fix="merge(model), then save base_state_dict(model) in your own way",
        )
    if not hasattr(model, "hf_device_map") and (away := [path for path, m in base_modules(model) if is_offloaded(m)]):
        raise SurgeryError(
            "save_pretrained can't write this model",
            where=abbreviate(away, "modules"),
            why="accelerate offloads its weights, and transformers does not know where",
            fix="merge_files(base_folder, adapter, folder) merges in the files",
        )
    structure = state.structure if state is not None else []
    if reasons := [reason for record in structure for reason in record.unplain]:
        raise SurgeryError(
            "no plain checkpoint can hold this model", why=abbreviate(list(dict.fromkeys(reasons))), fix=_SURGERY
        )
    target = Path(folder)
    check_model_format(format, model, target, None if quantised == "refuse" else quantised, dtype)
    above = target if format != "gguf" else target.parent
    with created_folder(above), _temporary(above) as place, Trial() as trial:
        if quantised != "dequantise":
            write_as_ordinary(model, trial)
        separate_copies(model, [pair for record in structure for pair in record.copies], trial)
        options = {"rounding": rounding, "generator": generator, "quantised": quantised, "limit": limit}
        if format == "transformers" or quantised == "dequantise":  # otherwise it is that of the files alone
            options["dtype"] = dtype
        if state is not None:
            _merge(model, adapter, progress, untie=untie, example_inputs=example_inputs, **options)
        if quantised == "dequantise":
            dequantise_all(model, dtype, trial)
            write_as_ordinary(model, trial)
        if why := why_not_said(model):
            raise SurgeryError("the checkpoint of this model can't hold untied weights", why=why, fix=_UNTIED)
        take_off_one_way_conversions(model, None, trial)
        checkpoint = place / "checkpoint" / target.stem  # programs take the model's name from its folder
        with steps(progress, "write", 1) as step:
            save(checkpoint)
            if tokenizer is None:
                _copy_tokenizer(model, checkpoint)
            elif tokenizer is not False:
                tokenizer.save_pretrained(checkpoint)
            step()
        written = write_model(format, checkpoint, place, target.name, dtype, progress)
        for file in sorted(written.iterdir()) if written.is_dir() else [written]:
            os.replace(file, above / file.name)
    return target


@contextlib.contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A folder in this folder for the block alone."""
    place = Path(tempfile.mkdtemp(prefix=".surgery-", dir=folder))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


_SURGERY = "save_surgery(model, folder) writes rules and tensors, which load_surgery(base, folder) reads"
_UNTIED = "merge(model, untie=True) and keep this model; or exclude the tied modules from the rule's targets"


def _merge(model: nn.Module, adapter: str | Sequence[str] | None, progress: Progress, **options: Any) -> None:
    try:
        merge(model, adapter, progress=progress, **options)
    except SurgeryError as error:
        for problem in (error, *getattr(error, "problems", ())):
            problem.fix = problem.fix and problem.fix.replace("merge(model, untie=True)", "merge_to(…, untie=True)")
            if problem.fix == "keep it unmerged":
                problem.fix = _SURGERY
        raise


def _copy_tokenizer(model: Any, place: Path) -> None:
    source = Path(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if str(source) not in ("", ".") and source.is_dir():
        for pattern in TOKENIZERS:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, place / file.name)
