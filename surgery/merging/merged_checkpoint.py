"""The merged model as an ordinary checkpoint, which needs nothing of this package."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import SurgeryError, abbreviate
from surgery.merging.merge import merge, unmerged
from surgery.model_record.verb_root import records_in, rewritten
from surgery.state.tied_weights import why_not_said
from surgery.transaction.neutral_context import verb
from surgery.transformers_hooks.save_pretrained import plain_saving

__all__ = ["merge_to"]

TOKENIZERS = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model",
              "*preprocessor_config.json", "chat_template*", "sentencepiece*")  # fmt: skip


@verb
def merge_to(
    model: nn.Module,
    folder: str | Path,
    adapter: str | Sequence[str] | None = None,
    *,
    untie: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Write the model with an adapter (or several, or all) folded in, as a plain checkpoint of transformers.

        merge_to(model, "merged")
        AutoModelForCausalLM.from_pretrained("merged")      # without this package

    For models with `save_pretrained`; config and generation config go along, and `tokenizer` (or a processor), by
    default the files of the folder that the model was loaded from. The model is merged for the time of writing and
    unmerged after it, whatever happens: to the bit what it was. `untie=True` is `merge`'s, for a head that shares the
    embedding's weight; the checkpoint then says that they are not tied. Files of these names in the folder are
    replaced one by one when all are written.

    Raises `SurgeryError` for a model without `save_pretrained` and whatever `merge` refuses, and writes nothing then.
    """
    model, _ = rewritten(model)
    if inner := records_in(model, below=True):
        raise SurgeryError(
            "part of this model has rules of its own",
            where=abbreviate(inner, "parts"),
            why="a plain checkpoint would be without them",
            fix="merge and forget those first",
        )
    save = plain_saving(model)
    if save is None:
        raise SurgeryError(
            f"{type(model).__name__} has no save_pretrained",
            why="merge_to writes checkpoints of transformers",
            fix="merge(model), then save base_state_dict(model) in your own way",
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=".surgery-", dir=folder))
    try:
        _merge(model, adapter, untie)
        if why := why_not_said(model):
            raise SurgeryError("the checkpoint of this model can't hold untied weights", why=why, fix=_UNTIED)
        save(place)
        if tokenizer is not None:
            tokenizer.save_pretrained(place)
        else:
            _copy_tokenizer(model, place)
        for file in sorted(place.iterdir()):
            os.replace(file, folder / file.name)
        unmerged(model)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return folder


_UNTIED = "merge(model, untie=True) and go on with this model; or leave the tied modules out of the rule's targets"


def _merge(model: nn.Module, adapter: str | Sequence[str] | None, untie: bool) -> None:
    try:
        merge(model, adapter, untie=untie)
    except SurgeryError as error:
        for problem in (error, *getattr(error, "problems", ())):
            problem.fix = problem.fix and problem.fix.replace("merge(model, untie=True)", "merge_to(…, untie=True)")
        raise


def _copy_tokenizer(model: Any, place: Path) -> None:
    source = Path(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if str(source) not in ("", ".") and source.is_dir():
        for pattern in TOKENIZERS:
            for file in source.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, place / file.name)
