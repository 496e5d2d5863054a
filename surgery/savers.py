"""What `model.save_pretrained` does while the model carries adapters: it never leaves them out without a word.

transformers' own writes the base alone (`surgery.hf` lists what it leaves out). A `Saver` stands before it, as an
attribute of the model: it warns of the adapters that are not in the files, or, for `AdapterCheckpoints`, writes them
instead of the base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.errors import SurgeryError, SurgeryWarning
from surgery.match import RESERVED, base_modules, every_path, is_adapters
from surgery.state import base_parameters, first_process, model_state, sites, tensors_of, whole
from surgery.wrapped import inner_of, plain_name

__all__ = [
    "Saver",
    "adapter_keys",
    "forgive_missing",
    "give_back",
    "left_out",
    "plain_saving",
    "save_folder",
    "save_trained",
    "take_over",
]

_NAME, _MARK = "save_pretrained", "trained tensors"


class Saver:
    """`save_pretrained` of a model (or of a part of one) while it carries adapters. Copies take it along."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.before = module.__dict__.get(_NAME)  # of another library that set its own

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.before if self.before is not None else getattr(type(self.module), _NAME).__get__(self.module)

    def __call__(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("is_main_process", "state_dict", "push_to_hub"), args, strict=False)) | kwargs
        left = left_out(self.module)
        state = model_state(self.module)
        if left and state is not None and state.saves_adapters:
            return _save_adapters(self.module, Path(save_directory), left, given)
        if left and given.get("is_main_process", True):
            names = ", ".join(repr(name) for name in left)
            lists = hasattr(type(self.module), "_keys_to_ignore_on_save")
            what = "leaves out its adapters" if lists else "writes its adapters where from_pretrained passes them over"
            warnings.warn(
                f"save_pretrained {what}: a model loaded from {save_directory} lacks what {names} learned. "
                "save_adapter(model, folder, adapter) writes an adapter, merge_to(model, folder) a plain model that "
                "holds it; a Trainer with callbacks=[AdapterCheckpoints()] saves adapters; remove(model) first for the "
                "base alone",
                SurgeryWarning,
                stacklevel=2,
            )
        held = given.get("state_dict")
        if held is None and any(inner_of(inner) is not None for inner in self.module.modules()):
            held = self.module.state_dict()  # with names that are in no list
        if held is not None:  # transformers would take the adapters' tensors out of the caller's own dict
            return self.__wrapped__(save_directory, **{**given, "state_dict": _without_adapters(self.module, held)})
        return self.__wrapped__(save_directory, *args, **kwargs)


def take_over(module: nn.Module) -> None:
    """Put a `Saver` before a module's `save_pretrained`."""
    if not isinstance(module.__dict__.get(_NAME), Saver):
        module.__dict__[_NAME] = Saver(module)


def give_back(module: nn.Module) -> None:
    """A module's `save_pretrained` as it was. What another library has put over the `Saver` meanwhile stays."""
    held = module.__dict__.get(_NAME)
    if isinstance(held, Saver):
        del module.__dict__[_NAME]
        if held.before is not None:
            module.__dict__[_NAME] = held.before


def plain_saving(model: Any) -> Callable[..., Any] | None:
    """The model's own `save_pretrained`, which says nothing of adapters; None where it has none."""
    held = getattr(model, _NAME, None)
    return held.__wrapped__ if isinstance(held, Saver) else held


def adapter_keys(module: nn.Module, adapters: Collection[str] | None = None) -> Iterator[str]:
    """The names of adapters' tensors in a module's state dict: of all adapters, or of these."""
    for path, inner in every_path(module):
        held = inner._modules[RESERVED] if RESERVED in inner._modules else None
        if held is not None and is_adapters(held):
            for adapter in held._modules if adapters is None else [name for name in adapters if name in held._modules]:
                for name in tensors_of(inner, adapter):
                    yield ".".join(filter(None, (path, RESERVED, adapter, name)))


def left_out(module: nn.Module) -> list[str]:
    """The adapters on a module that its base's weights do not hold."""
    found: dict[str, None] = {}
    for _, _, site in sites(module):
        merged = site.merged.adapters if site.merged is not None else ()
        found |= dict.fromkeys(one.adapter for one in site.applied if one.adapter not in merged)
    return list(found)


def _without_adapters(module: nn.Module, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    gone = {plain_name(name) for name in adapter_keys(module)}
    return {key: tensor for key, tensor in state_dict.items() if plain_name(key) not in gone}


# Adapters in the place of the base ----------------------------------------------------------------------------


def _save_adapters(model: nn.Module, folder: Path, names: list[str], given: Mapping[str, Any]) -> None:
    """The adapters as `save_folder` writes them, with the arguments of `save_pretrained`."""
    tensors, main = given.get("state_dict"), given.get("is_main_process", True)
    if tensors is not None and not tensors:
        warnings.warn(
            f"no adapter is written to {folder}: the state dict that was given is empty (ZeRO 3 without "
            "stage3_gather_16bit_weights_on_model_save); gather the weights, then save_adapter(…, state_dict=…)",
            SurgeryWarning,
            stacklevel=3,
        )
        return
    held = model.state_dict() if tensors is None else tensors
    alone = tensors is not None or not any(hasattr(t, "full_tensor") for t in held.values())
    if not main and alone:
        return
    checkpoint = re.fullmatch(r"checkpoint-\d+", folder.resolve().name) is not None  # as a Trainer calls them
    save_folder(model, folder, names, held if alone else None, trained=checkpoint)
    if main:
        rest = [] if checkpoint else [name for name, parameter in base_parameters(model) if parameter.requires_grad]
        _tell(folder, rest + _not_of(model, tensors or ()))
    if given.get("push_to_hub") and main:
        from surgery.hub_upload import card_of, upload

        repo = str(given.get("repo_id") or folder.name)
        options = {key: given[key] for key in ("private", "token", "revision") if key in given}
        upload(folder, repo, card_of(model, names[0], repo, peft=True), given.get("commit_message") or "Adapters",
               **options)  # fmt: skip


def save_folder(
    model: nn.Module, folder: Path, names: list[str], state_dict: Mapping[str, Tensor] | None, *, trained: bool
) -> None:
    """Adapters into a folder: one alone, or "default", into the folder itself; others into subfolders of their names.

    `trained`: beside them a `model.safetensors`, from which a Trainer resumes. Without a state dict all processes take
    part, and the first writes.
    """
    from surgery.checkpoint import save_adapter

    for name in names:
        place = folder if name == "default" or len(names) == 1 else folder / name
        save_adapter(model, place, name, state_dict=state_dict)
    if trained:
        save_trained(model, folder, state_dict)
    elif _is_marked(folder / "model.safetensors"):  # a checkpoint's, which the Trainer copied here to push it
        (folder / "model.safetensors").unlink(missing_ok=True)


def _is_marked(file: Path) -> bool:
    from surgery.files import open_tensors

    try:
        return file.is_file() and open_tensors(file).metadata.get("surgery") == _MARK
    except SurgeryError:
        return False


def _not_of(model: nn.Module, keys: Iterable[str]) -> list[str]:
    """The keys of a state dict whose tensors no module of the model has. Its own state dict is not asked for: that may
    be a collective, and this process alone."""
    inside = {plain_name(path) for path, _ in base_modules(model)} | {plain_name(key) for key in adapter_keys(model)}
    inside |= {plain_name(name) for name, _ in base_parameters(model)}  # of quantised ones: weight.absmax
    plain = ((key, plain_name(key)) for key in keys)
    return [key for key, name in plain if name not in inside and name.rpartition(".")[0] not in inside]


def _tell(folder: Path, rest: list[str]) -> None:
    """Warn of tensors that train, or came with a state dict, and are no adapter's: nothing of the base is written."""
    if rest:
        listed = ", ".join(rest[:3]) + (", …" if len(rest) > 3 else "")
        warnings.warn(
            f"{len(rest)} trained tensors are not in {folder}, since no adapter has them: {listed}. A TrainRule makes "
            "them an adapter's; base_state_dict(model) holds the base's",
            SurgeryWarning,
            stacklevel=4,
        )


# What training changes ----------------------------------------------------------------------------------------


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

    For checkpoints without the base: `load_state_dict(…, strict=False)` puts it back. Weights that an adapter changed
    at its start (PiSSA) are written, too. `state_dict`: the model's, where it was gathered from elsewhere.
    """
    from safetensors.torch import save

    held = model.state_dict() if state_dict is None else state_dict
    kept = kept_names(model)
    chosen = {key: t for key, t in held.items() if plain_name(key) in kept or plain_name(key).endswith("_extra_state")}
    tensors = {key: whole(t.detach()).cpu().contiguous().clone() for key, t in chosen.items() if isinstance(t, Tensor)}
    if state_dict is not None or first_process():
        written = save(tensors, metadata={"format": "pt", "surgery": _MARK})
        (Path(folder) / "model.safetensors").write_bytes(written)  # which others may read: save_file's are 0600


def kept_names(model: nn.Module) -> set[str]:
    """The names, without wrappers' segments, of all tensors that training may change."""
    return {plain_name(name) for name in _kept(model)}


def _kept(model: nn.Module) -> Iterator[str]:
    yield from adapter_keys(model)
    yield from (name for name, parameter in base_parameters(model) if parameter.requires_grad)
    for path, module in base_modules(model):
        yield from (f"{path}.{name}" if path else name for name in module._buffers)
    for path, _, site in sites(model):
        for applied in site.applied:
            yield from (f"{path}.{name}" if path else name for name, _ in applied.changed)


def forgive_missing(model: nn.Module, incompatible: Any) -> None:
    """A hook of `load_state_dict`: a checkpoint of what is trained does not miss the base, where all of that is absent.

    Tensors of adapters, and others that train, are missed as before.
    """
    missing = {plain_name(name) for name in incompatible.missing_keys}
    kept = kept_names(model)
    frozen = {plain_name(name) for name, _ in base_parameters(model)} - kept
    if frozen and frozen <= missing:
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if plain_name(name) in kept]
