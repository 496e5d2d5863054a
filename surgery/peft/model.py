"""The façade: a model with adapters under PEFT's names."""

from __future__ import annotations

import tempfile
import warnings
from collections import namedtuple
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

import surgery
from surgery.errors import RuleError, SurgeryError, SurgeryWarning, near_misses
from surgery.lifecycle.switching import set_trained
from surgery.merging.merge import ensure_unmerged
from surgery.merging.merge_settings import Quantised
from surgery.merging.site_merge import NotFiniteError
from surgery.patterns.wrappers import unwrap
from surgery.peft.add_idle import new_adapters_idle
from surgery.peft.base_config import PeftConfig
from surgery.peft.checkpoints import load_checkpoint, subfolder_of
from surgery.peft.configuration import check_targets, completed
from surgery.peft.defaults import with_defaults
from surgery.peft.delegation import facade, inside, whole
from surgery.peft.errors import as_builtin, pefts_errors, size_errors
from surgery.peft.merging import merge_alone, unmerge
from surgery.peft.model_card import write_card
from surgery.peft.notices import (
    check_fields,
    check_merge,
    check_together,
    fields_for_rules,
    warn_of_changed_base,
    warn_of_fields,
)
from surgery.peft.properties import FacadeProperties
from surgery.peft.saving import save_folder
from surgery.peft.starts import load_start
from surgery.peft.tensor_options import keep_base_dtype, move_to_meta, require_idle_gradients
from surgery.peft.training import add_to_loss, allocation_of
from surgery.peft_format.base_structure import restructured, without_present
from surgery.peft_format.methods import method_of, rules_by
from surgery.peft_format.writing import to_peft
from surgery.rewritten_model.verb_root import rewritten, root_of
from surgery.state.adapter_naming import adapter_names as named
from surgery.state.in_use import check_free
from surgery.state.records import merged_adapters, model_state
from surgery.storage.hub_upload import upload
from surgery.storage.load_report import LoadReport
from surgery.tracing.example_call import dummy
from surgery.transaction.undo_log import Journal

__all__ = ["LoadResult", "PeftMixedModel", "PeftModel"]

Names = str | Sequence[str]
LoadResult = namedtuple("LoadResult", ["missing_keys", "unexpected_keys"])


class PeftModel(FacadeProperties):
    """A model with adapters under PEFT's names.

    >>> from torch import nn
    >>> from surgery.peft import LoraConfig, PeftModel, get_peft_model
    >>> base = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"]))
    >>> model.print_trainable_parameters()
    trainable params: 32 || all params: 122 || trainable%: 26.2295
    >>> isinstance(model, PeftModel), isinstance(model, nn.Sequential), model.get_base_model() is base
    (True, True, True)

    The façade passes every attribute that it does not have on to the model, and reports the model's class as its own.
    So the Trainer, accelerate and pipelines accept it as the model. `state_dict()` and `named_parameters()` have the
    model's own names, and `<site>.adapters.<adapter>.A` for the adapters' tensors. The files of `save_pretrained` have
    PEFT's keys.

    Args:
        model: the model.
        peft_config: a configuration of this module or of PEFT.
        adapter_name: default "default".
        options: PEFT's. `autocast_adapter_dtype` (default True): tensors in float32 beside half precision; False: in
            the dtype of their module. `low_cpu_mem_usage` (default False): True makes tensors on the device meta.

    Raises:
        SurgeryError: an adapter is unknown, or a configuration can't be held exactly; the model is unchanged.
    """

    __slots__ = ()
    _task: str | None = None
    _peft_class = "PeftModel"

    def __new__(cls, model: nn.Module, peft_config: Any, *args: Any, **options: Any) -> PeftModel:
        task = getattr(peft_config, "task_type", None)
        kinds = [kind for kind in PeftModel.__subclasses__() if cls is PeftModel and task and kind._task == task]
        return facade((*kinds, cls)[0], model, getattr(model, "_configs", {}))

    def __init__(self, model: nn.Module, peft_config: Any, adapter_name: str = "default", **options: Any):
        self.add_adapter(adapter_name, peft_config, **options)
        surgery.activate(self._base, adapter_name, train=not self._configs[adapter_name].inference_mode)

    def __getattr__(self, name: str) -> Any:
        if name == "update_and_allocate":
            allocate = allocation_of(self, self.active_adapters)
            if allocate is None:
                raise AttributeError("update_and_allocate is a method of models with a trained AdaLoRA adapter")
            return allocate
        return super().__getattr__(name)

    def _call_context(self, keywords: dict[str, Any]) -> AbstractContextManager[Any]:
        names = {str(self._configs[name].method) for name in self.active_adapters if name in self._configs}
        methods = [method for method in map(method_of, sorted(names)) if method.has_call_context]
        if not methods:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(pefts_errors())
        for method in methods:
            stack.enter_context(method.call_context(keywords))
        return stack

    def _completed(self, output: Any) -> Any:
        return add_to_loss(self, self.active_adapters, output) if hasattr(output, "loss") else output

    def _check_known(self, names: Names, what: str) -> None:
        """Raises an error that begins with `what`, where an adapter is unknown."""
        for name in [names] if isinstance(names, str) else names:
            if name not in self._configs:
                why = near_misses(str(name), self._configs) or f"the model's adapters: {', '.join(self._configs)}"
                raise as_builtin(SurgeryError(what.format(name), why=why))

    def _check_names(self, names: Names) -> None:
        self._check_known(names, "Adapter {} not found.")

    @whole
    def set_adapter(self, adapter_name: Names, inference_mode: bool = False) -> None:
        """Make only these adapters live, and trainable unless `inference_mode`."""
        self._check_names(adapter_name)
        check_together(self._base, [adapter_name] if isinstance(adapter_name, str) else adapter_name)
        self._unmerge_first("Adapter cannot be set when the model is merged. Unmerging the model first.")
        self._enter(adapter_name, self._disabled, train=not inference_mode)
        for name in set(self._configs).difference(self.active_adapters):
            require_idle_gradients(self._base, name, False)

    @whole
    def set_requires_grad(self, adapter_names: Names, requires_grad: bool = True) -> None:
        check_free(root_of(self._base))
        root, state = rewritten(self._base)
        names = named(state, adapter_names)
        set_trained(root, names, requires_grad)
        for name in set(names).difference(surgery.active(self._base)):
            require_idle_gradients(self._base, name, requires_grad)

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Return a context in which the model computes the base's bits."""
        self._unmerge_first("The adapter is disabled while the model is merged. Unmerging the model first.")
        return surgery.using(self._base, None) if self.active_adapters else nullcontext()

    @whole
    def disable_adapter_layers(self) -> None:
        """Compute the base's bits until `enable_adapter_layers`."""
        self._unmerge_first("The adapter is disabled while the model is merged. Unmerging the model first.")
        if self.active_adapters:
            surgery.deactivate(self._base)

    @whole
    def enable_adapter_layers(self) -> None:
        if self._disabled:
            surgery.activate(self._base)

    def _enter(self, names: Names, disabled: bool, train: bool | None = None) -> None:
        surgery.activate(self._base, names, train=train)
        if disabled:
            surgery.deactivate(self._base)

    @whole
    def add_adapter(self, adapter_name: str, peft_config: Any, **options: Any) -> None:
        """Add an adapter by a configuration. It is active only if it is the only one, as in PEFT.

        `options`: `example_inputs`, as in `apply_rules`; models of transformers do not need it.
        """
        if adapter_name in self._configs:
            fix = "choose another name, or delete_adapter first; a cell that runs again begins with model.unload()"
            raise as_builtin(SurgeryError(f"Adapter with name '{adapter_name}' already exists.", fix=fix))
        self._check_kind(peft_config)
        config = with_defaults(peft_config, self._base, self._task)
        with restructured(self._base, config.to_dict()):
            check_targets(config, self._base)
            check_fields(config, self._base)
            rules = rules_by(self._base, fields_for_rules(config, self._base))
            warn_of_fields(config, self._base)
        rules = without_present(self._base, rules)
        with new_adapters_idle(self._base):
            example = self._example(config, options)
            surgery.apply_rules(self._base, rules, adapter=adapter_name, example_inputs=example, freeze=True)
        load_start(self._base, config, adapter_name)
        self._place(adapter_name, options)
        if options.get("low_cpu_mem_usage"):
            move_to_meta(self._base, adapter_name)
        self._configs[adapter_name] = completed(peft_config, config)

    def _check_kind(self, config: Any) -> None:
        """Raises an error where adapters of this method can't be in a façade of this class."""

    def _place(self, adapter_name: str, options: dict[str, Any]) -> None:
        """Follow PEFT's option for the dtype of an adapter's tensors."""
        if not options.get("autocast_adapter_dtype", True):
            keep_base_dtype(self._base, adapter_name)

    @whole
    def load_adapter(self, model_id: Any, adapter_name: str, is_trainable: bool = False, **options: Any) -> LoadResult:
        """Load an adapter from a folder or a repository; into an existing adapter, by `surgery.hotswap`.

        A Trainer's checkpoint of these adapters brings back all that it holds of the active ones, to the bit, and the
        base's trained tensors and buffers with them.

        `options`: `subfolder`, `revision`, `example_inputs`, a `config` that replaces the one beside the tensors, and
        `ignore_mismatched_sizes` as in `surgery.load_adapter`.
        What does not fit is a `LoadError`, with the model unchanged; another base is a warning.
        """
        if options.get("key_mapping"):
            raise SurgeryError("key_mapping is not supported", fix="rename the file's tensors before they are loaded")
        arguments: dict[str, Any] = {name: options.get(name) for name in ("subfolder", "revision")}
        arguments["same_base"] = False
        if adapter_name in self._configs and not options and load_checkpoint(self, model_id, adapter_name):
            report = LoadReport(adapter_name)
        elif adapter_name in self._configs:
            arguments["subfolder"] = options.get("subfolder") or subfolder_of(model_id, adapter_name)
            report = surgery.hotswap(self._base, adapter_name, model_id, **arguments)
        else:
            settings = options.get("config") and with_defaults(options["config"], self._base, self._task)
            config = settings or PeftConfig.from_pretrained(model_id, **options)
            self._check_kind(config)
            config.inference_mode = not is_trainable
            arguments |= {"config": settings and settings.to_dict(), "example_inputs": self._example(config, options)}
            arguments |= {name: bool(options.get(name)) for name in ("resize", "ignore_mismatched_sizes")}
            arguments["freeze"] = True  # PEFT freezes the base with any adapter
            warn_of_changed_base([*self._configs.values(), config])
            with new_adapters_idle(self._base):
                with size_errors():
                    report = surgery.load_adapter(self._base, model_id, adapter_name, **arguments)
            self._place(adapter_name, options)
            self._configs[adapter_name] = completed(options["config"], config) if settings else config
            if is_trainable and adapter_name not in self.active_adapters:
                require_idle_gradients(self._base, adapter_name, True)
        if not is_trainable:
            self._base.eval()
        passed_over = [line.partition(" ")[0] for line in report.mismatched]
        return LoadResult([*report.missing, *passed_over], report.unexpected)

    @classmethod
    def from_pretrained(
        cls, model: Any, model_id: Any, adapter_name: str = "default", is_trainable: bool = False, **options: Any
    ) -> PeftModel:
        """Return a model with an adapter from a folder or a repository; `options` as for `load_adapter`."""
        with pefts_errors():
            config = options.get("config") or PeftConfig.from_pretrained(model_id, **options)
            new = cls.__new__(cls, model, config)
            new.load_adapter(model_id, adapter_name, is_trainable, **options)
            surgery.activate(new._base, adapter_name, train=is_trainable)
            return new

    @whole
    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If it was the active one, the first of the others becomes active."""
        self._check_known(adapter_name, "Adapter {} does not exist")
        self._check_unmerged([adapter_name])
        alone, disabled = self.active_adapters == [adapter_name], self._disabled
        surgery.remove(self._base, adapter_name)
        self._configs.pop(adapter_name, None)
        state = model_state(unwrap(self._base))
        if alone and state is not None:
            first = next(iter(state.adapters))
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {first}.",
                SurgeryWarning,
                stacklevel=3,
            )
            self._enter(first, disabled)

    def _check_unmerged(self, names: Sequence[str]) -> None:
        merged = sorted({*names} & {*merged_adapters(unwrap(self._base))})
        if merged:
            what = f"Cannot delete adapter(s) {merged} while they are merged. Please unmerge them first."
            raise as_builtin(SurgeryError(what, fix="model.unmerge_adapter()"))

    @whole
    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd",
        svd_rank: int | None = None, svd_clamp: Any = None, svd_full_matrices: bool = True, svd_driver: Any = None,
        density: float | None = None, majority_sign_method: str = "total",
    ) -> None:  # fmt: skip
        """Add an adapter that combines others, by `surgery.combine`. It is not active."""
        self._check_known(adapters, "Adapter {} does not exist")
        if len(adapters) != len(weights):
            raise SurgeryError(f"there are {len(weights)} weights for {len(adapters)} adapters", fix="give one each")
        chosen = [self._configs[name] for name in adapters if name in self._configs]
        if chosen and all(config.method == "IA3" for config in chosen):
            combination_type = "linear"  # the one way of PEFT's IA3, which takes no such argument
        if density is not None and not combination_type.startswith(("ties", "dare", "magnitude_prune")):
            text = f"combination_type={combination_type!r} does not use density={density}: it is passed over"
            warnings.warn(text, SurgeryWarning, stacklevel=3)
            density = None
        if combination_type == "svd" and svd_rank is None:
            svd_rank = max(map(_largest_rank, chosen), default=0) or None
        how: dict[str, Any] = {"method": combination_type, "rank": svd_rank, "density": density, "clamp": svd_clamp}
        how["majority_sign"] = majority_sign_method
        weight_of = dict(zip(adapters, weights, strict=True))
        surgery.combine(self._base, weight_of, into=adapter_name, **how)
        self._configs[adapter_name] = PeftConfig.from_dict(to_peft(self._base, adapter_name)[0])

    def _example(self, config: Any, options: Mapping[str, Any]) -> Any:
        example = options.get("example_inputs")
        needed = config.method in ("PREFIX_TUNING", "ADAPTION_PROMPT")
        return dummy(self._base) if example is None and needed else example

    @whole
    def merge_adapter(
        self,
        adapter_names: list[str] | None = None,
        safe_merge: bool = False,
        *,
        quantised: Quantised = "dequantise",
        limit: float | None = 0.10,
    ) -> None:
        """Fold adapters (default: the active ones) into the weights; `unmerge_adapter` restores the weights' bits.

        As in PEFT, active adapters that are not merged take no part in a call until `unmerge_adapter`.

        Quantised modules become plain Linears until then, with a warning. PEFT rounds the sum to codes instead and
        loses small changes. `quantised` and `limit`: as for `surgery.merge`.
        """
        if isinstance(adapter_names, str):
            what = f"adapter_names should be a list of strings, got {adapter_names!r}."
            raise as_builtin(SurgeryError(what), TypeError)
        names, merged = list(adapter_names or self.active_adapters), merged_adapters(unwrap(self._base))
        self._check_known(names, "Adapter {} does not exist")
        new = [name for name in names if name not in merged]
        if merged and not new:
            warnings.warn("All adapters are already merged, nothing to do.", SurgeryWarning, stacklevel=3)
            return
        check_merge(self._base, [*merged, *new])
        if merged:
            more = f"Already following adapters were merged {','.join(merged)}."
            warnings.warn(f"{more} You are now additionally merging {','.join(new)}.", SurgeryWarning, stacklevel=3)
            unmerge(self._base)
        try:
            merge_alone(self._base, [*merged, *new], safe_merge, quantised, limit)
        except NotFiniteError as error:
            what = f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken"
            raise as_builtin(NotFiniteError(what, where=error.where, why=error.why, fix=error.fix)) from None

    @whole
    def unmerge_adapter(self) -> None:
        if not merged_adapters(unwrap(self._base)):
            warnings.warn("Already unmerged. Nothing to do.", SurgeryWarning, stacklevel=3)
            return
        unmerge(self._base)

    @whole
    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Any = None,
        *,
        quantised: Quantised = "dequantise",
        limit: float | None = 0.10,
    ) -> Any:
        """Return the plain model with adapters (default: the active ones) in its weights; all others are removed.

        Quantised modules with an adapter are plain Linears afterwards. `quantised`, `limit`: as for `surgery.merge`.
        """
        base, was_tied = self._base, self._says_tied()
        with Journal():
            if not merged_adapters(unwrap(self._base)):
                self.merge_adapter(adapter_names, safe_merge, quantised=quantised, limit=limit)
            structural = [record.adapter for record in rewritten(self._base)[1].structure]
            if structural:  # layers that were repeated stay so, as in PEFT
                surgery.commit(self._base, [*dict.fromkeys([*merged_adapters(unwrap(self._base)), *structural])])
            else:
                surgery.forget(self._base)
            self.unload()
        if was_tied and _has_own_head(base):  # else the weights would be tied when the model is saved and loaded
            base.config.tie_word_embeddings = False
            text = "Setting `tie_word_embeddings=False` in the model's config: the merged weights are no longer tied."
            warnings.warn(text, SurgeryWarning, stacklevel=3)
        return base

    def _says_tied(self) -> bool:
        return bool(getattr(getattr(self._base, "config", None), "tie_word_embeddings", False))

    @whole
    def unload(self) -> Any:
        """Return the base as it was before the first adapter: bits, classes and `requires_grad` flags."""
        if model_state(unwrap(self._base)) is not None:
            surgery.remove(ensure_unmerged(self._base))
        self._configs.clear()
        return self._base

    def _unmerge_first(self, warning: str) -> None:
        if merged_adapters(unwrap(self._base)):
            warnings.warn(warning, SurgeryWarning, stacklevel=4)
            unmerge(self._base)

    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, selected_adapters: Any = None, **options: Any
    ) -> None:
        """Write PEFT's folder: the adapter "default" in it, and each other adapter in a subfolder of its name.

        A model card, `README.md`, is written or completed. A folder `checkpoint-<number>`, which a Trainer makes, also
        gets a `model.safetensors` with all tensors except the base's frozen ones: transformers resumes from it.
        """
        with pefts_errors():
            save_folder(self, Path(save_directory), safe_serialization, selected_adapters, **options)

    def create_or_update_model_card(self, output_dir: str | Path) -> None:
        """Write `README.md` into a folder, or complete the metadata of the one that is there."""
        write_card(self, Path(output_dir))

    def push_to_hub(self, repo_id: str, commit_message: str = "Upload of adapters", **options: Any) -> str:
        """Upload the files of `save_pretrained` with a model card; returns the commit's address."""
        with pefts_errors(), tempfile.TemporaryDirectory() as place:
            self.save_pretrained(place)
            (Path(place) / "README.md").unlink()
            card = write_card(self, Path(place), repo_id)
            where = {name: options[name] for name in ("private", "token", "revision") if name in options}
            return upload(place, repo_id, card, commit_message, **where)

    def prepare_model_for_gradient_checkpointing(self, model: Any) -> None:
        """Make the input of a model require gradients, so that checkpointing reaches the adapters."""
        model = inside(model)
        if getattr(model, "is_quantized", False):
            return
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        elif hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().register_forward_hook(_require_gradients)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The model's own `load_state_dict`; a checkpoint of adapters may lack the base's frozen tensors.

        Other values for a merged adapter's tensors are a SurgeryError, which is also a RuntimeError.
        """
        with pefts_errors(RuntimeError):
            result = self._base.load_state_dict(state_dict, strict, assign)
        if any(".adapters." in key for key in state_dict):
            frozen = {name for name, parameter in self._base.named_parameters() if not parameter.requires_grad}
            result.missing_keys[:] = [key for key in result.missing_keys if key not in frozen]
        return result


def _has_own_head(model: Any) -> bool:
    """Whether a model's output embeddings have other memory than its input embeddings."""
    try:
        embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    except (AttributeError, NotImplementedError):  # a model that does not tell them
        return False
    weights = [getattr(embedding, "weight", None) for embedding in embeddings]
    first, second = weights
    return first is not None and second is not None and first.data_ptr() != second.data_ptr()


def _require_gradients(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


class PeftMixedModel(PeftModel):
    """A `PeftModel` whose adapters are of several methods, as those of any `PeftModel` here may be."""

    __slots__ = ()
    _peft_class = "PeftMixedModel"

    def _check_kind(self, config: Any) -> None:
        if config.is_prompt_learning or config.is_adaption_prompt:
            method = getattr(config.peft_type, "value", config.peft_type)
            what = f"The provided `peft_type` '{method}' is not compatible with the `PeftMixedModel`."
            fix = "get_peft_model without mixed=True takes adapters of several methods, prompts and prefixes among them"
            raise as_builtin(RuleError(what, fix=fix))

    def _check_names(self, names: Names) -> None:
        unknown = sorted({*([names] if isinstance(names, str) else names)} - self._configs.keys())
        if unknown:
            what = f"Adapter(s) {unknown} not found, available adapters: {sorted(self._configs)}"
            raise as_builtin(SurgeryError(what, why=near_misses(unknown[0], self._configs)))

    @whole
    def delete_adapter(self, adapter_name: Names) -> None:
        """Remove one or several adapters."""
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        self._check_names(names)
        self._check_unmerged(names)
        for name in names:
            super().delete_adapter(name)

    def get_layer_status(self) -> Any:
        raise self._without("get_layer_status")

    def get_model_status(self) -> Any:
        raise self._without("get_model_status")

    def _without(self, name: str) -> SurgeryError:
        fix = f"{name}(model.get_base_model()), or surgery.summary(model)"
        return as_builtin(SurgeryError(f"{name} is not supported for {type(self).__name__}.", fix=fix), TypeError)


class _Tuner(PeftModel):
    __slots__ = ()
    _peft_class = None

    @property
    def model(self) -> Any:
        return self._base


PeftModel._tuner = _Tuner


def _largest_rank(config: Any) -> int:
    """PEFT's default for the rank of a combination: the largest that a configuration has anywhere."""
    return max([getattr(config, "r", 0) or 0, *(getattr(config, "rank_pattern", None) or {}).values()])
