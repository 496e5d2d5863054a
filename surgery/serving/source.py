"""The adapter that is to be checked: on a model, or in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.adapter_files.entry import OLD, PEFT, SURGERY
from surgery.adapter_files.plain_json import read_json
from surgery.adapter_files.tensor_files import TensorFile
from surgery.adapter_files.tensor_headers import read_header
from surgery.authoring.structure_rule import StructureRule
from surgery.errors import PlanError, SurgeryError, abbreviate
from surgery.lifecycle.remove import remove
from surgery.lora_conversion.as_lora import adapter_weights, as_lora
from surgery.lora_conversion.site_conversion import ConvertedSite, convert_sites
from surgery.lora_conversion.truncated_svd import RankChoice
from surgery.peft_format.adapter_config import kept_fields
from surgery.peft_format.writing import to_peft
from surgery.progress import Progress
from surgery.rewritten_model.verb_root import rewritten
from surgery.serving.checkpoint_names import CheckpointNames
from surgery.serving.described import DescribedAdapter, from_peft_files
from surgery.state.adapter_tensors import tensors_of
from surgery.state.fingerprint import fingerprint
from surgery.state.records import ModelState
from surgery.storage.formats.base_facts import base_facts, component_of, facts_of_model
from surgery.storage.formats.contents import BaseFacts, Change, Contents
from surgery.storage.formats.conversion import read_file_contents
from surgery.storage.formats.file_tensor import FileTensor
from surgery.storage.formats.files import open_file
from surgery.storage.formats.place import adapter_file
from surgery.storage.formats.saving import check_modules

__all__ = ["NEEDS_MODEL", "AdapterSource", "FilesSource", "ModelSource"]


NEEDS_MODEL = "load_adapter(model, folder), and give the model: it tells what the rules change. The command: --base"


class AdapterSource:
    """An adapter; `plain`: as it is, `converted`: as one plain LoRA. Each is None if that is not possible."""

    facts: BaseFacts
    component: str = ""
    rank: int | None = None
    problems: Sequence[SurgeryError] = ()  # why there is neither

    @property
    def plain(self) -> DescribedAdapter | None:
        raise NotImplementedError

    @property
    def converted(self) -> DescribedAdapter | None:
        raise NotImplementedError

    def fingerprint(self) -> Any:
        """What identifies the base; None if that is not known."""
        return None

    def checkpoint_name(self, path: str) -> str | None:
        """The name that a module has in checkpoints, if it is another one."""
        return None

    def check_modules(self, changes: Mapping[str, Change]) -> None:
        """Raises `SurgeryError` where tensors are not a change of a module's own weight."""

    def outputs(self) -> tuple[float, ...]:
        """The share of the outputs' change that the conversion loses, for each example."""
        return ()

    def outputs_of(self, path: str) -> int | None:
        """The number of outputs of a module; None if that is not known, or there is no such module."""
        return None


class ModelSource(AdapterSource):
    """An adapter, or a weighted sum of adapters, on a model."""

    def __init__(
        self,
        model: nn.Module,
        adapter: str | Sequence[str] | Mapping[str, float],
        rank: int | None = None,
        tolerance: float | None = None,
        example_inputs: Any = None,
        component: str | None = None,
        config: Mapping[str, Any] | None = None,
        state_dict: Mapping[str, Tensor] | None = None,
        progress: Progress = False,
        converts: bool = True,
    ):
        self.converts = converts
        self.model, self.state = rewritten(model)
        self.weights = adapter_weights(self.state, adapter)
        self.rank, self.tolerance, self.examples, self.progress = rank, tolerance, example_inputs, progress
        self.choice = RankChoice(rank, tolerance)
        self.config, self.state_dict = config, state_dict
        self.facts = facts_of_model(self.model)
        self.component = component or component_of(self.facts.kind)
        self.problems = _structure_problems(self.state, self.weights)

    @cached_property
    def plain(self) -> DescribedAdapter | None:
        if self.problems or list(self.weights.values()) != [1.0]:
            return None
        (name,) = self.weights
        try:
            fields, tensors = to_peft(self.model, name, False, self.state_dict, self.config, False)
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            dtypes = {key: tensor.dtype for key, tensor in tensors.items()}
            described = from_peft_files(fields, TensorFile(shapes, dtypes, {}, tensors.__getitem__), self.facts)
        except SurgeryError:
            return None
        return described if all(_is_module(self.model, path) for path in described.contents.changes[""]) else None

    @cached_property
    def converted(self) -> DescribedAdapter | None:
        self.problems = self.problems or self._unmergeable()
        if self.problems or not self.converts:
            return None
        try:
            sites = convert_sites(self.model, self.state, self.weights, self.choice, self.progress)
        except PlanError as error:
            self.problems = error.problems
            return None
        except SurgeryError as error:
            self.problems = [error]
            return None
        return self._described(sites)

    def _unmergeable(self) -> list[SurgeryError]:
        """The rules that no LoRA can stand for."""
        rules = [rule for name in self.weights for rule in self.state.adapters[name] if not rule.mergeable]
        what = "can't be converted to LoRA"
        fix = "put it into an adapter of its own; export_onnx writes a model with any rules"
        return [SurgeryError(f"{rule.label} {what}", why=rule.why_not_merged, fix=fix) for rule in rules]

    def _described(self, sites: Sequence[ConvertedSite]) -> DescribedAdapter:
        changes: dict[str, Change] = {}
        described = DescribedAdapter(Contents({"": changes}))
        for site in sites:
            for applied in site.change.kept:
                whole = described.whole.setdefault(site.path, {})
                own = tensors_of(site.module, applied.adapter)
                whole.update({name: FileTensor.of(own[name].detach()) for name in applied.tensors})
            if site.rule is None:
                continue
            if unknown := site.tensors.keys() - {"A", "B", "B_bias"}:
                why = f"the LoRA there has the tensors {', '.join(sorted(unknown))}, of parts of the module"
                described.problems.append(SurgeryError("a part of a module is changed", where=site.path, why=why))
                continue
            tensors = {name: FileTensor.of(tensor.detach()) for name, tensor in site.tensors.items()}
            embedding = isinstance(site.module, nn.Embedding)
            changes[site.path] = Change("lora", tensors, 1.0, tensors["A"].shape[0], embedding)
            labels = ", ".join(dict.fromkeys(applied.rule.label for applied in site.replaced))
            described.converted[site.path] = (
                labels,
                changes[site.path].rank,
                max(part.error for part in site.factors.values()),
            )
        names = list(self.weights)
        kept = {**self.state.peft_fields.get(names[0], {}), **(self.config or {})} if len(names) == 1 else {}
        own = {"base_model_name_or_path": self.facts.config.get("_name_or_path")}
        fields = kept_fields({**own, **kept})
        for theirs, ours in (("base_model_name_or_path", "base"), ("task_type", "task")):
            if theirs in fields:
                described.contents.settings[ours] = fields[theirs]
        return described

    @cached_property
    def _checkpoint_names(self) -> CheckpointNames:
        return CheckpointNames(self.model)

    def checkpoint_name(self, path: str) -> str | None:
        return self._checkpoint_names.other_name(path)

    def check_modules(self, changes: Mapping[str, Change]) -> None:
        check_modules(changes, self.model, self.facts.paths or ())

    def fingerprint(self) -> Any:
        return fingerprint(self.model)

    def outputs(self) -> tuple[float, ...]:
        if self.examples is None:
            return ()
        into = next(
            name for n in range(len(self.state.adapters) + 1) if (name := f"served_{n}") not in self.state.adapters
        )
        options = {"rank": self.rank, "tolerance": self.tolerance, "example_inputs": self.examples}
        report = as_lora(self.model, self.weights, into, **options)  # type: ignore[arg-type]
        remove(self.model, into)
        return report.outputs

    def outputs_of(self, path: str) -> int | None:
        return _outputs_of(self.model, path)


class FilesSource(AdapterSource):
    """An adapter in a folder or a file."""

    def __init__(self, place: Path, base: Any = None, component: str | None = None):
        self.place, self.base = place, base
        self.facts = facts = base_facts(base)
        if not facts.kind and isinstance(names := facts.config.get("architectures"), list) and names:
            self.facts = replace(facts, kind=str(names[0]))
        self.component = component or component_of(self.facts.kind)
        if not place.exists():
            raise SurgeryError(f"{place} does not exist", fix="name a folder or a file, or give the model")

    @cached_property
    def plain(self) -> DescribedAdapter | None:
        try:
            return self._read()
        except SurgeryError as error:
            error.fix = error.fix or NEEDS_MODEL
            self.problems = [error]
            return None

    @property
    def converted(self) -> DescribedAdapter | None:
        return None

    def outputs_of(self, path: str) -> int | None:
        if isinstance(self.base, nn.Module):
            return _outputs_of(self.base, path)
        shape = self._shapes.get(f"{path}.weight")
        return shape[0] if shape else None

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the base's tensors, where it is a folder."""
        if not isinstance(self.base, (str, Path)):
            return {}
        headers = [read_header(file) for file in sorted(Path(self.base).glob("*.safetensors"))]
        return {key: tensor.shape for header in headers for key, tensor in header.tensors.items()}

    def _read(self) -> DescribedAdapter:
        path = adapter_file(self.place)
        if path is not None and path.name in (PEFT[0], OLD) and (path.parent / PEFT[1]).is_file():
            fields = read_json(path.parent / PEFT[1])
            if not isinstance(fields, dict):
                raise SurgeryError(f"{PEFT[1]} is not a mapping", where=str(self.place))
            return from_peft_files(fields, open_file(path), self.facts)
        if path is not None and path.name == SURGERY[0]:
            raise SurgeryError("the files hold rules, which only a model can turn into changes of weights")
        return DescribedAdapter(read_file_contents(self.place, None, self.facts)[1])


def _structure_problems(state: ModelState, names: Mapping[str, float]) -> list[SurgeryError]:
    rules = [rule.label for name in names for rule in state.adapters[name] if isinstance(rule, StructureRule)]
    if not rules:
        return []
    why = "no program changes the structure of a model by an adapter"
    return [SurgeryError(f"{abbreviate(rules, 'rules')} changes the structure of the model", why=why)]


def _outputs_of(model: nn.Module, path: str) -> int | None:
    if not _is_module(model, path):
        return None
    module = model.get_submodule(path)
    weight = getattr(module, "weight", None)
    size = getattr(module, "out_features", None)
    return size if isinstance(size, int) else None if weight is None else len(weight)


def _is_module(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True
