"""The façade: a model with adapters under PEFT's names for what is done with them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from surgery.checkpoint import load_adapter
from surgery.engine import apply_rules, remove
from surgery.errors import SurgeryError, SurgeryWarning
from surgery.for_good import forget
from surgery.merging import merge, unmerge
from surgery.peft.config import PeftConfig
from surgery.peft.defaults import with_defaults
from surgery.peft.facade import LoadResult, example_of, half_precision, numbers_in
from surgery.peft.fresh import refill, rules_for
from surgery.peft.live import Adapted
from surgery.peft.saving import push, save
from surgery.peft_writing import written
from surgery.state import model_state

__all__ = [
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


class PeftModel(Adapted):
    """A model with adapters under PEFT's names.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, PeftModel, get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    >>> model.print_trainable_parameters()
    trainable params: 32 || all params: 122 || trainable%: 26.2295
    >>> isinstance(model, PeftModel), isinstance(model, nn.Sequential), model.get_base_model() is base
    (True, True, True)

    Whatever it has not itself it hands on to the model: calls, attributes, methods, what is set on it. It passes for an
    instance of the model's class, so the Trainer, accelerate and pipelines take it for the model. `state_dict()` and
    `named_parameters()` have the model's own names, with those of the adapters' tensors
    (`<site>.adapters.<adapter>.A`), and not PEFT's; the files that `save_pretrained` writes are PEFT's.

    Raises `SurgeryError` for what is not there and for a configuration that can't be held exactly, with the model as it
    was. Options of PEFT's that change where tensors are made, and not what is computed, are taken and passed over.
    """

    __slots__ = ()

    def __init__(
        self, model: nn.Module, peft_config: Any, adapter_name: str = "default", *, example_inputs: Any = None,
        autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False,
    ):  # fmt: skip
        self._begin(model)
        self.add_adapter(
            adapter_name, peft_config, example_inputs=example_inputs, autocast_adapter_dtype=autocast_adapter_dtype
        )
        self._enter([adapter_name])

    # What there is ------------------------------------------------------------------------------------------------

    def get_base_model(self) -> Any:
        """The model itself: the object that was given."""
        return self._base

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """How many numbers are trained, and how many there are."""
        sizes = [(numbers_in(p), p.requires_grad) for p in self._base.parameters()]
        return sum(size for size, flag in sizes if flag), sum(size for size, _ in sizes)

    def print_trainable_parameters(self) -> None:
        few, most = self.get_nb_trainable_parameters()
        print(f"trainable params: {few:,d} || all params: {most:,d} || trainable%: {100 * few / max(most, 1):.4f}")

    # Coming and going ---------------------------------------------------------------------------------------------

    def add_adapter(
        self, adapter_name: str, peft_config: Any, low_cpu_mem_usage: bool = False, autocast_adapter_dtype: bool = True,
        *, example_inputs: Any = None,
    ) -> None:  # fmt: skip
        """A new adapter by a configuration. It is not active, as in PEFT, unless it is the only one."""
        if not autocast_adapter_dtype and half_precision(self._base):
            warnings.warn("adapters are kept in float32 beside half precision", SurgeryWarning, stacklevel=2)
        config = self._prepared(peft_config)
        data = with_defaults(config.to_dict(), self._base)
        rules = rules_for(self._base, data)
        example = example_of(self._base, config) if example_inputs is None else example_inputs
        with self._joining(adapter_name, config):
            apply_rules(self._base, rules, adapter=adapter_name, example_inputs=example)

    def load_adapter(
        self, model_id: str | Path, adapter_name: str, is_trainable: bool = False, torch_device: Any = None,
        autocast_adapter_dtype: bool = True, ephemeral_gpu_offload: bool = False, low_cpu_mem_usage: bool = False,
        key_mapping: Any = None, *, example_inputs: Any = None, subfolder: str | None = None,
        revision: str | None = None, **options: Any,
    ) -> LoadResult:  # fmt: skip
        """An adapter from a folder or a repository; into an adapter that is there, its tensors alone.

        What does not fit is a `LoadError`, the model as it was; another base is a warning.
        """
        if key_mapping:
            raise SurgeryError("key_mapping is not supported", fix="rename the file's tensors before they are loaded")
        state = model_state(self._base)
        if state is not None and adapter_name in state.adapters:
            result = LoadResult(*refill(self._base, adapter_name, model_id, subfolder, revision))
        else:
            config = PeftConfig.from_pretrained(model_id, subfolder, revision=revision)
            config.inference_mode = not is_trainable
            example = example_of(self._base, config) if example_inputs is None else example_inputs
            with self._joining(adapter_name, config):
                load_adapter(
                    self._base, model_id, adapter_name, same_base=False, example_inputs=example, subfolder=subfolder,
                    revision=revision,
                )  # fmt: skip
            result = LoadResult([], [])
        if not is_trainable:
            self._base.eval()
        return result

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out. Where it was the active one, the first of the others is active."""
        names = self.active_adapters
        remove(self._base, adapter_name)
        self._dropped(adapter_name)
        state, left = model_state(self._base), [name for name in names if name != adapter_name]
        if state is not None and not left and names:
            left = list(state.adapters)[:1]
            warnings.warn(f"{adapter_name} was active; now {left[0]} is", SurgeryWarning, stacklevel=2)
        if self._off is not None:
            self._off = tuple(left) if state is not None else None
        elif state is not None:
            self._enter(left)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
        svd_rank: int | None = None, svd_clamp: Any = None, svd_full_matrices: bool = True, svd_driver: Any = None,
        density: float | None = None, majority_sign_method: str = "total",
    ) -> None:  # fmt: skip
        """A new adapter that combines others: `surgery.combine`. It is not active."""
        if len(adapters) != len(weights):
            raise SurgeryError(f"there are {len(weights)} weights for {len(adapters)} adapters", fix="give one each")
        combine: Any = import_module("surgery").combine
        before, given = self.active_adapters, dict(zip(adapters, weights, strict=True))
        combine(
            self._base, given, into=adapter_name, method=combination_type, rank=svd_rank, density=density,
            majority_sign=majority_sign_method, clamp=svd_clamp,
        )  # fmt: skip
        self._joined(adapter_name, PeftConfig.from_dict(written(self._base, adapter_name)[0]))
        self._enter([] if self._off is not None else before)

    # Merging ------------------------------------------------------------------------------------------------------

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Fold adapters (the active ones) into the weights; `unmerge_adapter` takes them out to the bit."""
        merge(self._base, adapter_names or self.active_adapters, safe=safe_merge, untie=True)

    def unmerge_adapter(self) -> None:
        unmerge(self._base)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> Any:
        """The plain model with adapters (the active ones) in its weights, for good; all others are gone, too."""
        if not self._merged():
            self.merge_adapter(adapter_names, safe_merge)
        try:
            forget(self._base)
        except SurgeryError:
            unmerge(self._base)
            raise
        return self.unload()

    def unload(self) -> Any:
        """The base as it was before the first adapter: bits, classes and `requires_grad` flags."""
        if model_state(self._base) is not None:
            unmerge(self._base)
            remove(self._base)
        self._configs.clear()
        self._off = None
        return self._base

    # Files --------------------------------------------------------------------------------------------------------

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, selected_adapters: list[str] | None = None,
        save_embedding_layers: Any = "auto", is_main_process: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        """PEFT's folder: the adapter "default" in it, each other in a subfolder of its name.

        In a folder `checkpoint-<number>`, which a Trainer makes, a `model.safetensors` stands beside them, with all
        tensors but the frozen ones of the base: transformers resumes from that.
        """
        if not safe_serialization:
            warnings.warn("pickle files are not written: safetensors it is", SurgeryWarning, stacklevel=2)
        save(self, save_directory, selected_adapters, is_main_process, options.get("state_dict"))

    def push_to_hub(
        self, repo_id: str, commit_message: str | None = None, private: bool | None = None, token: Any = None,
        revision: str | None = None, **options: Any,
    ) -> str:  # fmt: skip
        """Push what `save_pretrained` writes, with a model card; gives the commit's address."""
        return push(self, repo_id, private=private, token=token, revision=revision, message=commit_message)

    @classmethod
    def from_pretrained(
        cls, model: nn.Module, model_id: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        config: Any = None, *, example_inputs: Any = None, **options: Any,
    ) -> PeftModel:  # fmt: skip
        """A model with an adapter from a folder or a repository. `config` stands in for the one that is there."""
        kind = config if config is not None else PeftConfig.from_pretrained(model_id, **placed(options))
        made = object.__new__(class_for(kind.task_type) if cls is PeftModel else cls)
        made._begin(model)
        if config is not None:
            given = copy.copy(config)
            given.inference_mode = not is_trainable
            made.add_adapter(adapter_name, given, example_inputs=example_inputs)
        try:
            made.load_adapter(model_id, adapter_name, is_trainable, example_inputs=example_inputs, **options)
        except SurgeryError:
            if config is not None:
                made.delete_adapter(adapter_name)
            raise
        made._enter([adapter_name])
        return made

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's own; of a checkpoint of adapters, frozen tensors of the base are not missing."""
        result = self._base.load_state_dict(state_dict, strict, assign)
        flags = {name: parameter.requires_grad for name, parameter in self._base.named_parameters()}
        if any(".adapters." in key for key in state_dict):
            result.missing_keys[:] = [key for key in result.missing_keys if flags.get(key, True)]
        return result


class PeftModelForSequenceClassification(PeftModel):
    """A `PeftModel` whose head, `classifier` or `score`, is trained, too."""

    __slots__ = ()
    _task = "SEQ_CLS"


class PeftModelForTokenClassification(PeftModel):
    """A `PeftModel` whose head, `classifier` or `score`, is trained, too."""

    __slots__ = ()
    _task = "TOKEN_CLS"


class PeftModelForQuestionAnswering(PeftModel):
    """A `PeftModel` whose head, `qa_outputs`, is trained, too."""

    __slots__ = ()
    _task = "QUESTION_ANS"


class PeftModelForCausalLM(PeftModel):
    """A `PeftModel` of a causal language model."""

    __slots__ = ()
    _task = "CAUSAL_LM"


class PeftModelForSeq2SeqLM(PeftModel):
    """A `PeftModel` of an encoder-decoder."""

    __slots__ = ()
    _task = "SEQ_2_SEQ_LM"


class PeftModelForFeatureExtraction(PeftModel):
    """A `PeftModel` of a model without a head."""

    __slots__ = ()
    _task = "FEATURE_EXTRACTION"


_CLASSES = {str(kind._task): kind for kind in PeftModel.__subclasses__()}


def class_for(task: Any) -> type[PeftModel]:
    return _CLASSES.get(str(task), PeftModel)


def placed(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in ("subfolder", "revision")}
