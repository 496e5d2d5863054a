"""PEFT's functions that convert an adapter of another method to LoRA, done by `surgery.as_lora`."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

import surgery
from surgery.adapter_files.entry import PEFT
from surgery.complex_numbers import is_number
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.lora_conversion.convertible_rules import changes_weights
from surgery.lora_conversion.lora_rule import lora_rule
from surgery.patterns.wrappers import unwrap
from surgery.peft.delegation import inside
from surgery.peft.errors import as_builtin, pefts_errors
from surgery.peft.facade import get_peft_model_state_dict
from surgery.peft.method_configs import LoraConfig
from surgery.peft_format.key_history import PREFIX
from surgery.progress import Progress
from surgery.state.adapter_tensors import tensors_of
from surgery.state.records import Sites, model_state, sites
from surgery.transaction.undo_log import Trial

__all__ = ["convert_to_lora", "save_as_lora"]


def convert_to_lora(
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """Convert an adapter of another method to LoRA: a configuration, and tensors under PEFT's keys.

    >>> from torch import nn
    >>> from surgery.peft import LoHaConfig, convert_to_lora, get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 8))
    >>> model = get_peft_model(base, LoHaConfig(r=2, target_modules=["0"], init_weights=False))
    >>> config, tensors = convert_to_lora(model, rank=4)
    >>> config.r, {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    (4, {'base_model.model.0.lora_A.weight': (4, 8), 'base_model.model.0.lora_B.weight': (8, 4)})

    Args:
        model: a façade, or a model with the adapter. It is not changed.
        rank: the rank at every module; or a float above 0 and up to 1: the share of the sum of squares of the singular
            values that is kept, with the lowest rank that keeps it.
        adapter_name: the adapter; default "default".
        progressbar: whether tqdm draws a bar. Default False.
        compile_kwargs: ignored; nothing is compiled.

    Returns:
        The configuration, with the scale 1, and the tensors in the adapter's dtype.

    Raises:
        SurgeryError: no rule of the adapter changes weights (also a TypeError), or the rank is wrong (also a
            ValueError).

    Notes:
        Methods that PEFT does not convert, such as IA3, OFT and those on convolutions, are converted, too. MiSS has
        known factors, and keeps its own rank, as in PEFT.
    """
    _check_rank(rank)
    base = inside(model)
    root, config = unwrap(base), getattr(model, "_configs", {}).get(adapter_name)
    state = model_state(root)
    with pefts_errors():
        known = state is not None and changes_weights(state, adapter_name)
    if state is None or not known:
        what = "Could not detect any layer that supports LoRA conversion."
        fix = "get_peft_model(model, config) with a method that changes weights"
        raise as_builtin(SurgeryError(what, fix=fix), TypeError)
    if config is not None and str(config.method) == "LORA":
        text = "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that."
        warnings.warn(text, SurgeryWarning, stacklevel=2)
    bias = getattr(config, "bias", getattr(config, "lora_bias", "none"))
    if bias not in ("none", False):
        what = f"The adapter's config sets bias={bias}, this is not supported right now."
        raise as_builtin(SurgeryError(what, fix="surgery.as_lora(model) converts the changes of biases, too"))
    converted = [item for item in sites(root) if tensors_of(item[1], adapter_name)]
    _check_sides(converted, rank)
    exact = config is not None and str(config.method) == "MISS" and config.init_weights != "bat"
    choice: dict[str, Any] = {"rank": rank} if isinstance(rank, int) else {"tolerance": math.sqrt(1 - rank)}
    with Trial(), _progress(progressbar) as progress:
        name = next(
            word for number in range(len(state.adapters) + 1) if (word := f"lora_{number}") not in state.standing
        )
        try:
            surgery.as_lora(root, adapter_name, into=name, progress=progress, **({} if exact else choice))
        except SurgeryError as error:
            kinds = ", ".join(dict.fromkeys(rule.label for rule in surgery.rules_of(root, adapter_name)))
            what = f"Some module types on this model do not support LoRA conversion: {kinds}."
            raise as_builtin(SurgeryError(what, why=str(error)), TypeError) from error
        tensors = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    dtypes = {path: _dtype(tensors_of(module, adapter_name)) for path, module, _ in converted}
    lora, ranks = _new_config(config, rank), dict[str, int]()
    for key, tensor in tensors.items():
        path, is_lora, part = key.removeprefix(PREFIX).partition(".lora_")
        if is_lora and path in dtypes:
            tensors[key] = tensor.to(dtypes[path]).contiguous()
            if part.startswith(("A", "embedding_A")):
                ranks[path] = tensor.shape[0]
    for path, own in ranks.items():
        if own != rank or isinstance(lora.target_modules, str):
            lora.rank_pattern[path] = lora.alpha_pattern[path] = own  # type: ignore[index]
        else:
            lora.target_modules.add(path)
    return lora, tensors


def save_as_lora(
    path: str | Path,
    model: Any,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Convert an adapter of another method to LoRA, and write it as a folder of PEFT. See `convert_to_lora`.

    Args:
        path: the folder; created if it does not exist.
        model: a façade, or a model with the adapter.
        rank: as for `convert_to_lora`.
        adapter_name: default "default".
        progressbar: default False.
        compile_kwargs: ignored.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / PEFT[0])
    config.save_pretrained(folder)


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float) and not 0 < rank <= 1:
        what = f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
        raise as_builtin(SurgeryError(what, fix="a share, such as 0.99, or a whole number of at least 1"))
    if isinstance(rank, bool) or not isinstance(rank, (int, float)) or rank <= 0:
        what = f"Passing a rank of {rank} doesn't make sense, please pass a valid value."
        raise as_builtin(SurgeryError(what, fix="a share, such as 0.99, or a whole number of at least 1"))


def _check_sides(converted: Sites, rank: int | float) -> None:
    """Raise an error if a weight has fewer directions than the rank."""
    for path, module, _ in converted:
        for shape, _ in lora_rule()[1].weights_at(module).values():
            side = min(shape[0], math.prod(shape[1:]))
            if isinstance(rank, int) and rank > side:
                what = f"The chosen rank {rank} is larger than the weight shape ({side}), please choose a lower rank."
                raise as_builtin(SurgeryError(what, where=path))


def _new_config(old: Any, rank: int | float) -> LoraConfig:
    """A LoRA of the scale 1 on the targets of another configuration."""
    number = rank if isinstance(rank, int) else 1  # ranks by module are in `rank_pattern`
    names = ("target_modules", "base_model_name_or_path", "layers_pattern", "layers_to_transform", "modules_to_save")
    fields = {name: copy.copy(value) for name in names if (value := getattr(old, name, None)) is not None}
    targets = fields.pop("target_modules", None)
    config = LoraConfig(r=number, lora_alpha=number, target_modules=targets if targets is not None else [], **fields)
    config.rank_pattern, config.alpha_pattern = {}, {}
    return config


def _dtype(tensors: Mapping[str, Tensor]) -> Any:
    return next((tensor.dtype for tensor in tensors.values() if is_number(tensor)), None)


@contextmanager
def _progress(bar: bool) -> Iterator[Progress]:
    """The progress of a conversion, as PEFT draws it."""
    if not bar:
        yield False
        return
    from tqdm import tqdm

    with tqdm(desc="Converting to LoRA") as drawn:

        def show(what: str, done: int, total: int) -> None:
            drawn.total = total
            drawn.update(done - drawn.n)

        yield show
