"""For transformers' Trainer: checkpoints that hold the adapters, so that training resumes from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from surgery import hf
from surgery.state import model_state

__all__ = ["AdapterCheckpoints", "last_checkpoint"]


class AdapterCheckpoints(TrainerCallback):
    """A callback: while a Trainer trains, its checkpoints hold the adapters beside the base.

        trainer = Trainer(model, args, callbacks=[AdapterCheckpoints()], …)
        trainer.train(resume_from_checkpoint=True)

    `save_pretrained` of a rewritten model writes the base alone, and the Trainer saves its checkpoints with it. From
    the start of training to its end this callback has the adapters' tensors written, too, under their names in the
    model; the Trainer's own loading puts them back when it resumes, and the run goes on with the bits of one that
    was never interrupted. After training, `save_pretrained` writes the base alone again. All adapters are written, also
    those that are idle or frozen. A process that was killed may have left half a checkpoint: see `last_checkpoint`.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        found = model_state(model) if model is not None else None
        if model is not None and found is not None:
            hf.restore_ignored(model, found)

    def on_train_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        found = model_state(model) if model is not None else None
        if model is not None and found is not None:
            hf.ignore_on_save(model, found)


def last_checkpoint(folder: str | Path) -> str | None:
    """The last of a Trainer's checkpoints that was written whole, or None.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from surgery.trainer import last_checkpoint
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step, state in ((2, '{"global_step": 2}'), (4, '{"global_s')):
    ...     (folder / f"checkpoint-{step}").mkdir()
    ...     _ = (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    >>> Path(last_checkpoint(folder)).name
    'checkpoint-2'

    For runs that may be killed at any moment: `trainer.train(resume_from_checkpoint=last_checkpoint(folder))`, where
    `resume_from_checkpoint=True` takes the last one there is, whole or not. The Trainer writes its state last, so a
    checkpoint is whole where that can be read.
    """
    found: dict[int, str] = {}
    for place in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", place.name)
        try:
            if number and isinstance(json.loads((place / "trainer_state.json").read_text(encoding="utf-8")), dict):
                found[int(number[1])] = str(place)
        except (OSError, ValueError):
            continue
    return found[max(found)] if found else None
