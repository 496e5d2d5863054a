"""What every configuration of PEFT's has, for `surgery.peft`: data, read from a folder and written to one."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar

from surgery.adapter_files.entry import PEFT
from surgery.adapter_files.hub_download import download
from surgery.errors import RuleError, SurgeryError, SurgeryWarning, near_misses
from surgery.peft.errors import as_builtin, invalid
from surgery.transaction.created_folder import created_folder

__all__ = [
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftType",
    "PromptEncoderReparameterizationType",
    "PromptTuningInit",
    "TaskType",
]


FORMAT_VERSION = "0.21.2"  # of PEFT: whose configurations and files these are


class TaskType(StrEnum):
    """What a model is for. PEFT trains the head of the task, too."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PromptTuningInit(StrEnum):
    """How a prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


class MultitaskPromptTuningInit(StrEnum):
    """How a prompt for several tasks starts: from a text, at random, or from the file of a trained one."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


class PromptEncoderReparameterizationType(StrEnum):
    """The encoder of P-tuning."""

    MLP = "MLP"
    LSTM = "LSTM"


class PeftType(StrEnum):
    """The methods that have a configuration in this module."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    VERA = "VERA"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    BOFT = "BOFT"
    HRA = "HRA"
    ROAD = "ROAD"
    RANDLORA = "RANDLORA"
    FOURIERFT = "FOURIERFT"
    SHIRA = "SHIRA"
    C3A = "C3A"
    LN_TUNING = "LN_TUNING"
    MISS = "MISS"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"


@dataclass(kw_only=True)
class PeftConfig:
    """The fields that all configurations have. `from_pretrained` reads the configuration in a folder or repository.

    >>> from surgery.peft import LoraConfig
    >>> LoraConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS").lora_alpha
    8

    Where PEFT is imported, a configuration passes for PEFT's own: `isinstance(config, peft.LoraConfig)` holds.

    Raises:
        SurgeryError: PEFT refuses the fields. It is also a ValueError.
        TypeError: the method does not have a field.
    """

    task_type: TaskType | str | None = None
    peft_type: str | None = None
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    method: ClassVar[str | None] = None
    is_prompt_learning: ClassVar[bool] = False
    is_adaption_prompt: ClassVar[bool] = False
    kinds: ClassVar[dict[str, type[PeftConfig]]] = {}

    def __init_subclass__(cls) -> None:
        if "method" in cls.__dict__:
            PeftConfig.kinds[str(cls.method)] = cls

    @property
    def __class__(self) -> Any:  # what isinstance asks after type()
        return _with_peft(type(self), "peft" in sys.modules)

    def __reduce_ex__(self, protocol: Any) -> Any:  # copies and pickles need the true class
        return _restore, (own_class(type(self)), dict(self.__dict__))

    def __post_init__(self) -> None:
        if self.method is not None:
            self.peft_type = PeftType(self.method)
        if self.peft_version is None:
            self.peft_version = FORMAT_VERSION
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                what = f"Invalid task type: '{self.task_type}'. Must be one of the following task types: "
                why = near_misses(str(self.task_type), [task.value for task in TaskType])
                raise invalid(f"{what}{', '.join(TaskType)}.", why=why) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, as in `adapter_config.json`."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PeftConfig:
        """Return the configuration of the method that the data names; warn of unknown fields."""
        return cls.from_peft_type(**data)

    @classmethod
    def from_peft_type(cls, **fields_of_config: Any) -> PeftConfig:
        """Return the configuration with these fields, of the method `peft_type`; warn of unknown fields.

        Raises:
            SurgeryError: there is no configuration of the method. It is also a KeyError.
            TypeError: this class has no such field, and no `peft_type` is given.
        """
        kind_of_config = cls
        if "peft_type" in fields_of_config:
            name = str(getattr(fields_of_config["peft_type"], "value", fields_of_config["peft_type"]))
            if name not in cls.kinds:
                why = near_misses(name[:60], cls.kinds)
                raise as_builtin(RuleError(f"there is no configuration of {name[:60]!r}", why=why), KeyError)
            kind_of_config = cls.kinds[name]
        names = {field.name for field in fields(kind_of_config)}
        unknown = sorted(set(fields_of_config) - names - {"runtime_config"})
        if unknown and "peft_type" not in fields_of_config:
            raise TypeError(
                f"The {cls.__name__} config that is trying to be loaded is missing required keys: {{'peft_type'}}."
            )
        if unknown:
            warnings.warn(
                f"Unexpected keyword arguments {unknown} for class {kind_of_config.__name__}, these are ignored. "
                "The configuration may be of a later version of PEFT.",
                SurgeryWarning,
                stacklevel=3,
            )
        return kind_of_config(**{name: value for name, value in fields_of_config.items() if name in names})

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **options: Any
    ) -> PeftConfig:
        """Return the configuration in a folder or a repository of the hub (with `revision`)."""
        source = pretrained_model_name_or_path
        place = Path(source) / (subfolder or "")
        if not Path(source).exists():
            place = download(str(source), subfolder, options.get("revision"))
        if not (place / PEFT[1]).is_file():
            raise invalid(f"Can't find '{PEFT[1]}' at '{place}'")
        own = {field.name for field in fields(cls)}
        data = {name: value for name, value in options.items() if name in own and name != "revision"}
        return cls.from_peft_type(**{**data, **cls.from_json_file(place / PEFT[1])})

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **options: Any) -> dict[str, Any]:
        """Return the fields in a file as plain data."""
        from surgery.adapter_files.plain_json import read_json

        data = read_json(Path(path_json_file))
        if not isinstance(data, dict):
            raise as_builtin(SurgeryError("the adapter's configuration is not a mapping", where=str(path_json_file)))
        if "runtime_config" in data:
            message = "The configuration file contains a `runtime_config` key. This is ignored."
            warnings.warn(message, SurgeryWarning, stacklevel=2)
            del data["runtime_config"]
        return data

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the configuration into a folder, without tensors."""
        if Path(save_directory).is_file():
            what = f"Provided path ({save_directory}) should be a directory, not a file"
            raise as_builtin(SurgeryError(what), AssertionError)
        data = self.to_dict()
        if options.get("auto_mapping_dict") is not None:
            data["auto_mapping"] = options["auto_mapping_dict"]
        text = json.dumps(data, indent=2, sort_keys=True)
        with created_folder(save_directory) as folder:
            (folder / PEFT[1]).write_text(text, encoding="utf-8")


def own_class(kind: type[PeftConfig]) -> type[PeftConfig]:
    """The class of this package, for one that also is PEFT's."""
    return kind.__dict__.get("_facade_class", kind)


@functools.cache
def _with_peft(kind: type[PeftConfig], imported: bool) -> type[PeftConfig]:
    """The class, and where PEFT is imported one that is also PEFT's class of the same name.

    The fields get the metadata of PEFT's: PEFT's layers read there which fields choose a variant.
    """
    if not imported or own_class(kind) is not kind:
        return kind
    theirs = getattr(sys.modules["peft"], kind.__name__, None)
    if not isinstance(theirs, type):
        return kind
    metadata = {field.name: field.metadata for field in fields(theirs)}
    for field in fields(kind):
        field.metadata = metadata.get(field.name, field.metadata)
    names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind, theirs), {**names, "_facade_class": kind})


def _restore(kind: type[PeftConfig], state: dict[str, Any]) -> PeftConfig:
    config = object.__new__(kind)
    config.__dict__.update(state)
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value
