"""Façades by the model's task, and classes that load the base, too."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.peft.base_config import PeftConfig
from surgery.peft.errors import as_builtin
from surgery.peft.model import PeftModel

__all__ = [
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
]


_LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")  # those that a file may name, as in PEFT


class AutoPeftModel:
    """Loads a base and its adapter from one name: the adapter's configuration names the base.

    model = AutoPeftModelForCausalLM.from_pretrained("me/topics")

    A configuration without a task type names the base's class. `AutoPeftModel` itself is for such configurations.
    """

    _target: str | None = None
    _kind: type[PeftModel] = PeftModel

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        adapter_name: str = "default",
        is_trainable: bool = False,
        import_allowlist: list[str] | None = None,
        **options: Any,
    ) -> PeftModel:
        """`options` of the adapter as for `PeftModel.from_pretrained`; all others are transformers'.

        `import_allowlist`: the libraries from which the base's class may be imported. Default: those that PEFT trusts.
        Embeddings are resized to the tokenizer beside the adapter, if it has more tokens than they have rows.
        """
        own = {name: options.pop(name, None) for name in ("config", "subfolder", "revision", "example_inputs")}
        config = own["config"] or PeftConfig.from_pretrained(source, **own)
        auto = cls._base_class(config, _LIBRARIES if import_allowlist is None else import_allowlist)
        if not config.base_model_name_or_path:
            fix = "load the base yourself, and PeftModel.from_pretrained(base, …)"
            raise as_builtin(SurgeryError("the adapter's configuration does not tell its base", fix=fix))
        base = auto.from_pretrained(config.base_model_name_or_path, revision=config.revision, **options)
        _fit_to_tokenizer(base, source, own["revision"], bool(options.get("trust_remote_code")))
        return cls._kind.from_pretrained(base, source, adapter_name, is_trainable, **own)

    @classmethod
    def _base_class(cls, config: PeftConfig, libraries: Sequence[str]) -> Any:
        """The class that loads the base: transformers' for the task, or the one that the configuration names."""
        task, mapping = config.task_type, config.auto_mapping
        if task is not None and cls._target is None:
            what = f"Cannot use `{cls.__name__}` with a task type, please use a specific class for your task type."
            raise as_builtin(SurgeryError(what, fix=f"AutoPeftModelForCausalLM, … for task_type={str(task)!r}"))
        if task is not None and cls._kind._task != task:
            wanted = next(kind.__name__ for kind in PeftModel.__subclasses__() if kind._task == task)
            what = f"Expected target PEFT class: {wanted}, but you have asked for: {cls._kind.__name__}"
            raise as_builtin(SurgeryError(what, fix=f"Auto{wanted}.from_pretrained"))
        if task is None and mapping is not None:
            library = str(mapping["parent_library"])
            if not any(library == name or library.startswith(f"{name}.") for name in libraries):
                what = f"The auto mapping wants to import '{library}' which is not in the import allowlist."
                fix = f"if importing it is safe: from_pretrained(…, import_allowlist=[{library!r}])"
                raise as_builtin(SurgeryError(what, fix=fix))
            return getattr(import_module(library), str(mapping["base_model_class"]))
        if cls._target is None:
            what = "Cannot infer the auto class from the config: it has neither a task type nor an `auto_mapping`."
            fix = "load the base yourself, and PeftModel.from_pretrained(base, …); or AutoPeftModelForCausalLM, …"
            raise as_builtin(SurgeryError(what, fix=fix))
        return getattr(import_module("transformers"), cls._target)


def _fit_to_tokenizer(base: Any, source: str | Path, revision: str | None, trusted: bool) -> None:
    """Add rows to the embeddings for the tokens that the tokenizer beside the adapter has beyond them."""
    if not hasattr(base, "get_input_embeddings"):
        return
    transformers = import_module("transformers")
    options = {"revision": revision, "trust_remote_code": trusted}
    try:
        transformers.utils.cached_file(str(source), "tokenizer_config.json", revision=revision)
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), **options)
    except OSError:  # the folder or the repository has none, or the hub can't be asked; PEFT passes over it, too
        return
    if len(tokenizer) > len(base.get_input_embeddings().weight):
        base.resize_token_embeddings(len(tokenizer))


def _kind(name: str, task: str, what: str) -> type[PeftModel]:
    names = {"__slots__": (), "_task": task, "_peft_class": name, "__doc__": f"A `PeftModel` {what}."}
    return type(name, (PeftModel,), names)


def _auto(kind: type[PeftModel], target: str) -> type[AutoPeftModel]:
    attributes = {"_target": target, "_kind": kind, "__doc__": f"With transformers' `{target}`."}
    return type(f"Auto{kind.__name__}", (AutoPeftModel,), attributes)


_HEAD = "whose head, `classifier` or `score`, is trained, too"
PeftModelForCausalLM = _kind("PeftModelForCausalLM", "CAUSAL_LM", "of a causal language model")
PeftModelForFeatureExtraction = _kind("PeftModelForFeatureExtraction", "FEATURE_EXTRACTION", "of one without a head")
PeftModelForQuestionAnswering = _kind("PeftModelForQuestionAnswering", "QUESTION_ANS", "whose `qa_outputs` is trained")
PeftModelForSeq2SeqLM = _kind("PeftModelForSeq2SeqLM", "SEQ_2_SEQ_LM", "of an encoder-decoder")
PeftModelForSequenceClassification = _kind("PeftModelForSequenceClassification", "SEQ_CLS", _HEAD)
PeftModelForTokenClassification = _kind("PeftModelForTokenClassification", "TOKEN_CLS", _HEAD)

AutoPeftModelForCausalLM = _auto(PeftModelForCausalLM, "AutoModelForCausalLM")
AutoPeftModelForFeatureExtraction = _auto(PeftModelForFeatureExtraction, "AutoModel")
AutoPeftModelForQuestionAnswering = _auto(PeftModelForQuestionAnswering, "AutoModelForQuestionAnswering")
AutoPeftModelForSeq2SeqLM = _auto(PeftModelForSeq2SeqLM, "AutoModelForSeq2SeqLM")
AutoPeftModelForSequenceClassification = _auto(PeftModelForSequenceClassification, "AutoModelForSequenceClassification")
AutoPeftModelForTokenClassification = _auto(PeftModelForTokenClassification, "AutoModelForTokenClassification")
