"""A callback for transformers' Trainer: checkpoints contain the adapters, and training resumes from them."""

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

from surgery.adapter_files.entry import MODEL, PEFT, SURGERY, names_in
from surgery.errors import SurgeryWarning
from surgery.patterns.module_walk import base_modules
from surgery.rewritten_model import transformers_hooks
from surgery.rewritten_model.save_pretrained import adapters_to_write
from surgery.sharded_tensors import is_flattened
from surgery.state.records import ModelState, model_state
from surgery.storage.checkpoint_folder import save_folder, save_trained, write_adapters

__all__ = ["AdapterCheckpoints", "last_checkpoint", "save_trained"]


class AdapterCheckpoints(TrainerCallback):
    """Makes a transformers Trainer save the model's adapters instead of the whole model.

        trainer = Trainer(model, args, callbacks=[AdapterCheckpoints()], …)
        trainer.train(resume_from_checkpoint=True)
        trainer.save_model("topics")                     # load_adapter(model, "topics")

    Pass the callback to the Trainer's constructor. It works until `remove(model)`.

    Each checkpoint is a folder that `load_adapter` opens; PEFT opens it, too, where its format can store the adapter.
    The same is true of what `trainer.save_model`, `push_to_hub` and the model's own `save_pretrained` write. A single
    adapter, or the adapter named "default", is stored in the folder itself. Other adapters are stored in subfolders of
    their names (`load_adapters` opens all). Structural rules are written, too. If an adapter with tensors changed the
    structure before another one, the folder has one surgery instead, which `load_surgery` opens.

    A checkpoint also has a `model.safetensors` with all tensors that training may change: the tensors of all adapters,
    idle and frozen adapters included, and the trainable tensors of the base. The Trainer loads this file when it
    resumes or takes the best model at the end. A resumed run gives the same bits as an uninterrupted run.

    Note:
        A checkpoint does not contain the frozen base. Build the model as before, apply the same rules, and resume.
        A merged model is saved whole, as transformers does. A killed process may leave an incomplete checkpoint: see
        `last_checkpoint`.

    Warns:
        SurgeryWarning: Tensors train that do not belong to an adapter. The checkpoints contain them; the files saved
            at the end do not.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        for root, record in _rewritten(model):
            transformers_hooks.save_adapters_alone(root, record, write_adapters)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        self.on_init_end(args, state, control, model)

    def on_save(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any) -> None:
        """Write the adapters of models without `save_pretrained`: the Trainer writes only their state dict."""
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for root, _ in _rewritten(model):
            if root is model and hasattr(model, "save_pretrained"):
                continue
            if not (state.is_world_process_zero and place.is_dir() and (names := adapters_to_write(root))):
                continue
            if any(hasattr(tensor, "full_tensor") or is_flattened(tensor) for tensor in root.parameters()):
                fix = "gather its state dict on all processes, then save_adapter(…, state_dict=…)"
                warnings.warn(f"{place} has no adapter's folder: the model is sharded; {fix}", SurgeryWarning, 2)
            else:
                save_folder(root, place, names, root.state_dict(), trained=root is model)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Copy the last checkpoint's adapter files to the output folder, which the Trainer pushes without them."""
        place = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and place.is_dir():
            for folder in (place, *(inner for inner in place.iterdir() if inner.is_dir() and names_in(inner))):
                into = Path(args.output_dir) / folder.relative_to(place)
                into.mkdir(exist_ok=True)
                for name in (*PEFT, *SURGERY, *MODEL):
                    if (folder / name).is_file():
                        shutil.copy(folder / name, into / name)


def _rewritten(model: nn.Module | None) -> Iterator[tuple[nn.Module, ModelState]]:
    """Yields each rewritten model in the Trainer's model, usually the model itself, with its record."""
    for _, module in base_modules(model) if model is not None else ():
        record = model_state(module)
        if record is not None:
            yield module, record


def last_checkpoint(folder: str | Path) -> str | None:
    """Find the last complete checkpoint of a Trainer.

    >>> import tempfile
    >>> from pathlib import Path
    >>> from surgery.trainer import last_checkpoint
    >>> folder = Path(tempfile.mkdtemp())
    >>> for step, state in ((2, '{"global_step": 2}'), (4, '{"global_s')):
    ...     (folder / f"checkpoint-{step}").mkdir()
    ...     _ = (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    >>> Path(last_checkpoint(folder)).name
    'checkpoint-2'

    For runs that may be killed at any moment: `trainer.train(resume_from_checkpoint=last_checkpoint(folder))`. With
    `resume_from_checkpoint=True` the Trainer takes the last checkpoint even if it is incomplete.

    Args:
        folder: The Trainer's output folder.

    Returns:
        The path of the checkpoint with the highest step, or None if no checkpoint is complete.

    Note:
        The Trainer writes `trainer_state.json` last, so a checkpoint is complete if this file can be read.
    """
    complete: dict[int, str] = {}
    for place in Path(folder).glob("checkpoint-*"):
        number = re.fullmatch(r"checkpoint-(\d+)", place.name)
        try:
            if number and isinstance(json.loads((place / "trainer_state.json").read_text(encoding="utf-8")), dict):
                complete[int(number[1])] = str(place)
        except (OSError, ValueError):
            continue
    return complete[max(complete)] if complete else None
