"""For transformers' Trainer: checkpoints that hold the adapters, so that training resumes from them."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from surgery import hf
from surgery.state import model_state

__all__ = ["AdapterCheckpoints"]


class AdapterCheckpoints(TrainerCallback):
    """A callback: while a Trainer trains, its checkpoints hold the adapters beside the base.

        trainer = Trainer(model, args, callbacks=[AdapterCheckpoints()], …)
        trainer.train(resume_from_checkpoint=True)

    `save_pretrained` of a rewritten model writes the base alone, and the Trainer saves its checkpoints with it. From
    the start of training to its end this callback has the adapters' tensors written, too, under their names in the
    model; the Trainer's own loading puts them back when it resumes, and the run goes on with the bits of one that
    was never interrupted. After training, `save_pretrained` writes the base alone again.
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
