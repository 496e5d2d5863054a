"""For transformers' Trainer: checkpoints that hold the adapters, so that training resumes from them."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from surgery.adapter_files.entry import PEFT, SURGERY, names_in
from surgery.arithmetic.sharded_tensors import is_flattened
from surgery.errors import SurgeryWarning
from surgery.patterns.module_walk import base_modules
from surgery.state.records import ModelState, model_state
from surgery.storage.checkpoint_folder import save_folder, save_trained, write_adapters
from surgery.transformers_hooks import hooks
from surgery.transformers_hooks.save_pretrained import left_out

__all__ = ["AdapterCheckpoints", "last_checkpoint", "save_trained"]


class AdapterCheckpoints(TrainerCallback):
    """A callback: a Trainer saves the model's adapters, and not its base.

        trainer = Trainer(model, args, callbacks=[AdapterCheckpoints()], …)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model("topics")                     # load_adapter(model, "topics")

    Each checkpoint, what `trainer.save_model` and `push_to_hub` write, and from then on what the model's own
    `save_pretrained` writes, is a folder that `load_adapter` opens, and PEFT where its format holds the adapter. One
    adapter alone, or the one called "default", stands in the folder itself, others in subfolders of their names
    (`load_adapters` opens all).

    A checkpoint has a `model.safetensors`, too, with all tensors that training may change: those of all adapters, also
    idle and frozen ones, and what trains of the base. The Trainer's own loading puts them back when it resumes, or
    takes the best model at the end, and a resumed run has the bits of one that was never interrupted. No checkpoint
    holds the frozen base: make the model as before, with the same rules, and resume. A merged model is written whole,
    as transformers does. `remove(model)` ends all of this.

    Give the callback to the Trainer's constructor. A process that was killed may have left half a checkpoint: see
    `last_checkpoint`. A SurgeryWarning tells of tensors that train and belong to no adapter: the checkpoints have them,
    what is saved at the end does not.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        for root, record in _rewritten(model):
            hooks.save_adapters_alone(root, record, write_adapters)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self.on_init_end(args, state, control, model)

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """What has no `save_pretrained` that asks us is saved by the Trainer as a whole state dict."""
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for root, _ in _rewritten(model):
            if root is model and hasattr(model, "save_pretrained"):
                continue
            if not (state.is_world_process_zero and place.is_dir() and (names := left_out(root))):
                continue
            if any(hasattr(tensor, "full_tensor") or is_flattened(tensor) for tensor in root.parameters()):
                fix = "gather its state dict on all processes, then save_adapter(…, state_dict=…)"
                warnings.warn(f"{place} has no adapter's folder: the model is sharded; {fix}", SurgeryWarning, 2)
            else:
                save_folder(root, place, names, root.state_dict(), trained=root is model)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The Trainer pushes its output folder, and copies into it what it knows of the last checkpoint: not ours."""
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and place.is_dir():
            for folder in (place, *(inner for inner in place.iterdir() if inner.is_dir() and names_in(inner))):
                into = Path(args.output_dir) / folder.relative_to(place)
                into.mkdir(exist_ok=True)
                for name in (*PEFT, *SURGERY):
                    if (folder / name).is_file():
                        shutil.copy(folder / name, into / name)


def _rewritten(model: nn.Module | None) -> Iterator[tuple[nn.Module, ModelState]]:
    """The rewritten models in what the Trainer trains, most often that itself."""
    for _, module in base_modules(model) if model is not None else ():
        found = model_state(module)
        if found is not None:
            yield module, found


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
