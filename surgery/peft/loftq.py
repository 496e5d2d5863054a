"""PEFT's LoftQ on a quantised base: A and B start as what quantising lost of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.authoring.hook_call import HookCall
from surgery.authoring.live_site import LiveSite
from surgery.authoring.rule import Rule
from surgery.errors import SiteError, SurgeryError
from surgery.forward.offloaded_weights import value_at
from surgery.packed.packed_weight import packed_weight_of
from surgery.patterns.wrappers import unwrap
from surgery.peft.delegation import inside
from surgery.peft.errors import as_builtin, pefts_errors
from surgery.rewritten_model.verb_root import rewritten
from surgery.state.adapter_naming import adapter_names
from surgery.state.adapter_tensors import tensors_of
from surgery.state.in_use import check_free
from surgery.state.merged_tensors import check_adapter_unmerged
from surgery.state.records import Applied, sites
from surgery.transaction.undo_log import Journal

__all__ = ["replace_lora_weights_loftq"]


def replace_lora_weights_loftq(
    peft_model: Any,
    model_path: str | Path | None = None,
    adapter_name: str = "default",
    callback: Callable[[Any, str], bool] | None = None,
) -> None:
    """Give the LoRAs on quantised weights the values of LoftQ: the best approximation of what quantising lost.

        model = AutoModelForCausalLM.from_pretrained("models/llama", quantization_config=config)
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
        replace_lora_weights_loftq(model, "models/llama")

    The weights from before are read one at a time from their files. The codes stay, so the adapter's files are those of
    any LoRA.

    Args:
        peft_model: a façade, or a model with the adapter.
        model_path: the folder of the weights before they were quantised, or a safetensors file in it. None: the folder
            or the repository that the model's configuration names, as it lies on this disk.
        adapter_name: default "default".
        callback: called with the model and the module's path after each module. If it returns False, the module gets
            its tensors from before again. Default None.

    Raises:
        SurgeryError: no LoRA of the adapter is on a quantised weight (also a ValueError), a weight is not in the files,
            or the adapter is merged. After an error, also one of the callback, the adapter is as before.

    Notes:
        The approximation is s · B A, with the adapter's scale s. PEFT leaves the scale out, so its start is LoftQ's for
        s = 1 alone. Every layout of quantised weights is taken, and not only bitsandbytes' 4-bit one.
    """
    base = inside(peft_model)
    with pefts_errors():
        root, state = rewritten(base)
        check_free(root)
        (name,) = adapter_names(state, adapter_name)
        at, found = state.rules_at((name,)), list[tuple[str, nn.Module, Applied]]()
        for path, module, _ in sites(root):
            packed = packed_weight_of(module)
            found += [(path, module, each) for each in at.get(id(module), ()) if packed and each.rule.name == "lora"]
        if not found:
            fix = "quantise the base as it is loaded, and get_peft_model(model, LoraConfig(…))"
            raise SurgeryError("No bnb LoRA module found on the model", why="no LoRA is on a packed weight", fix=fix)
        check_adapter_unmerged(root, name)
        folder = _folder(root, model_path)
        rules = [(path, module, _start_of(each.rule, folder, module, path)) for path, module, each in found]
        with Journal() as journal:
            for path, module, rule in rules:
                tensors = tensors_of(module, name)
                before = {key: tensor.detach().clone() for key, tensor in tensors.items()}
                journal.undo(_copy, tensors, before)
                live = LiveSite(module, path, name, tensors, lambda key, _, module=module: value_at(module, key))
                with torch.no_grad(), HookCall(rule, "initialise", path):
                    rule.initialise(live)
                if callback is not None and not callback(peft_model, path):
                    _copy(tensors, before)


def _start_of(rule: Rule, folder: Path, module: nn.Module, path: str) -> Rule:
    """The rule of a site with LoftQ's start. Raises `SurgeryError` if it can't start so."""
    start = Rule.from_dict({**rule.to_dict(), "init": "loftq", "loftq_base": str(folder), "loftq_steps": 1})
    if why := start.check(module, path):
        raise SiteError("LoftQ's values can't be computed", where=path, why=why, fix="model_path names the folder")
    return start


def _copy(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.detach().copy_(values[name])


def _folder(root: nn.Module, model_path: str | Path | None) -> Path:
    if model_path is not None:
        path = Path(model_path)
        return path.parent if path.suffix == ".safetensors" else path
    name = getattr(getattr(unwrap(root), "config", None), "_name_or_path", None)
    if not name:
        what = "The provided model does not appear to be a transformers model or is a local model. In this case, "
        raise SurgeryError(f"{what}you must pass the model_path argument that points to the safetensors file.")
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except Exception as error:
        what = "The model.safetensors file must be present on disk, but it could not be found."
        raise as_builtin(SurgeryError(what, why=str(error), fix="model_path=folder")) from error
