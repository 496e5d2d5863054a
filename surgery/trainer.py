"""For transformers' Trainer: checkpoints that hold the adapters, so that training resumes from them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from surgery import hf
from surgery.state import is_adapter_key, model_state, whole

__all__ = ["AdapterCheckpoints", "last_checkpoint", "save_trained"]


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


def save_trained(model: nn.Module, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write `model.safetensors` with all that training changes: a model's tensors but the frozen ones of its base.

    >>> import tempfile
    >>> from safetensors.torch import load_file
    >>> from torch import nn
    >>> from rules import LoraRule
    >>> from surgery import apply_rules
    >>> from surgery.trainer import save_trained
    >>> folder = tempfile.mkdtemp()
    >>> save_trained(apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2)), folder)
    >>> sorted(load_file(f"{folder}/model.safetensors"))
    ['0.adapters.default.A', '0.adapters.default.B']

    For checkpoints without the base: `load_state_dict(…, strict=False)` puts it back. `state_dict`: the model's, where
    it was gathered from elsewhere.
    """
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    held = model.state_dict() if state_dict is None else state_dict
    kept = {name: t for name, t in held.items() if name not in frozen or is_adapter_key(model, name)}
    tensors = {name: whole(tensor.detach()).cpu().contiguous().clone() for name, tensor in kept.items()}
    save_file(tensors, Path(folder) / "model.safetensors", metadata={"format": "pt"})


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
