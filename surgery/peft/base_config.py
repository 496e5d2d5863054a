"""What every configuration of PEFT's has, for `surgery.peft`: data, read from a folder and written to one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar

from surgery.adapter_files.entry import PEFT
from surgery.adapter_files.hub_download import download
from surgery.errors import RuleError, SurgeryError, SurgeryWarning, near_misses

__all__ = [
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftType",
    "PromptEncoderReparameterizationType",
    "PromptTuningInit",
    "TaskType",
]


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
    """How a prompt for several tasks starts. Starts from files of trained prompts are not supported."""

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


@dataclass(kw_only=True)
class PeftConfig:
    """The fields that all configurations have. `from_pretrained` reads the configuration in a folder or repository.

    >>> from surgery.peft import LoraConfig
    >>> LoraConfig(r=16, target_modules=["query", "value"], task_type="SEQ_CLS").lora_alpha
    8

    Raises:
        SurgeryError: PEFT does not have the task type.
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

    def __post_init__(self) -> None:
        if self.method is not None:
            self.peft_type = PeftType(self.method)
        if self.task_type is not None:
            try:
                self.task_type = TaskType(self.task_type)
            except ValueError:
                why = near_misses(str(self.task_type), TaskType) or f"they are {', '.join(TaskType)}"
                raise RuleError(f"there is no task type {self.task_type!r}", why=why) from None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain data, as in `adapter_config.json`."""
        return {name: _plain(value) for name, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PeftConfig:
        """Return the configuration of the method that the data names; warn of unknown fields."""
        kind = str(getattr(data.get("peft_type"), "value", data.get("peft_type")))
        if kind not in cls.kinds:
            raise RuleError(f"there is no configuration of {kind[:60]!r}", why=near_misses(kind[:60], cls.kinds))
        kind_of_config = cls.kinds[kind]
        names = {field.name for field in fields(kind_of_config)}
        left = sorted(name for name in data if name not in names and data[name] not in (None, False, "", [], {}))
        if left := [name for name in left if name != "runtime_config"]:
            warnings.warn(f"{kind_of_config.__name__} has no field {', '.join(left)}", SurgeryWarning, stacklevel=2)
        return kind_of_config(**{name: value for name, value in data.items() if name in names})

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str | None = None, **options: Any) -> PeftConfig:
        """Return the configuration in a folder or a repository of the hub (with `revision`)."""
        from surgery.adapter_files.plain_json import read_json

        place = Path(source) / (subfolder or "")
        if not Path(source).exists():
            place = download(str(source), subfolder, options.get("revision"))
        if not (place / PEFT[1]).is_file():
            raise SurgeryError(f"there is no {PEFT[1]} in {place}")
        data = read_json(place / PEFT[1])
        if not isinstance(data, dict):
            raise SurgeryError("the adapter's configuration is not a mapping", where=str(place / PEFT[1]))
        return cls.from_dict(data)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> None:
        """Write the configuration into a folder, without tensors."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True)
        (Path(save_directory) / PEFT[1]).write_text(text, encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return value.value if isinstance(value, Enum) else list(value) if isinstance(value, tuple) else value
