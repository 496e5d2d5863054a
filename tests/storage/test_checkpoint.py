"""Saves and loads every rule; errors list all problems at once and leave the model unchanged."""

from __future__ import annotations

import copy
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from surgery import (
    LoadError,
    PlanError,
    Rule,
    RuleError,
    SurgeryError,
    SurgeryWarning,
    adapter_state_dict,
    apply_rules,
    load_adapter,
    load_adapters,
    merge,
    merge_to,
    remove,
    rules_of,
    save_adapter,
    unmerge,
)
from surgery.rules import (
    AdaLoraRule,
    BiasRule,
    BoftRule,
    BottleneckRule,
    C3aRule,
    ExpertLoraRule,
    FourierRule,
    HraRule,
    IA3Rule,
    LohaRule,
    LokrRule,
    LoraRule,
    MissRule,
    NormRule,
    OftRule,
    RandLoraRule,
    ReftRule,
    ReplaceRule,
    RoadRule,
    ShiraRule,
    SteerRule,
    TokensRule,
    TrainRule,
    VeraRule,
)
from surgery.testing import Snapshot
from tests.support import ROOT


def model_of(seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)).to(**kwargs)


X = torch.tensor([[1, 2, 3]])


def train(model: nn.Module) -> None:
    """Changes every tensor of an adapter, as training would."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)


def build_trained(*rules: Rule, seed: int = 0, **kwargs: Any) -> Any:
    model = apply_rules(model_of(seed, **kwargs), [*rules])
    train(model)
    return model


KINDS: list[tuple[Any, dict[str, Any]]] = [
    (LoraRule, {"rank": 2, "dora": True}), (IA3Rule, {}), (VeraRule, {"rank": 4}), (LohaRule, {"rank": 2}),
    (LokrRule, {"rank": 1}), (OftRule, {"block_size": 4}), (BoftRule, {}), (HraRule, {"rank": 2}),
    (RoadRule, {"group_size": 4}), (MissRule, {"rank": 2}), (BottleneckRule, {"size": 3}), (ReftRule, {"rank": 2}),
    (SteerRule, {"direction": [0.5] * 16}), (AdaLoraRule, {"rank": 3}), (FourierRule, {"n_frequency": 9}),
    (ShiraRule, {"rank": 1}), (C3aRule, {"block_size": 4}), (RandLoraRule, {"rank": 2}), (TrainRule, {}),
    (BiasRule, {}),
]  # fmt: skip
LINEAR: dict[str, Rule] = {kind.__name__: kind("1", **fields) for kind, fields in KINDS}
EVERY: dict[str, list[Rule]] = {
    **{name: [rule] for name, rule in LINEAR.items()},
    "NormRule": [NormRule()],
    "TokensRule": [TokensRule("0", tokens=[7, 2])],
    "a stack": [LoraRule("1", rank=2), IA3Rule("1"), OftRule("3", block_size=4), TokensRule("0", tokens=[1])],
    "biases": [LoraRule("1", rank=2, bias="all")],
    "patterns": [LoraRule([nn.Linear], rank=2, rank_pattern={"3": 1}, alpha_pattern={"1": 3})],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", EVERY)
def test_every_rule_there_and_back(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    before = build_trained(*EVERY[name], dtype=dtype)
    folder = save_adapter(before, tmp_path / "a", format="surgery")
    assert sorted(file.name for file in folder.iterdir()) == ["adapter.safetensors", "rules.json"]
    model = model_of(dtype=dtype)
    plain = Snapshot(model)
    report = load_adapter(model, folder)
    assert report and rules_of(model) == rules_of(before)
    loaded, expected = adapter_state_dict(model), adapter_state_dict(before)
    assert loaded.keys() == expected.keys() == set(report.loaded)
    assert all(torch.equal(loaded[key], expected[key]) and loaded[key].dtype == expected[key].dtype for key in loaded)
    assert torch.equal(model(X), before(X))
    remove(model)
    assert not plain.differences(model)


def test_pefts_format_where_it_holds_the_adapter_and_else_the_own(tmp_path: Path) -> None:
    save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path / "peft")
    save_adapter(build_trained(ReftRule("1", rank=2)), tmp_path / "own")
    assert (tmp_path / "peft/adapter_config.json").exists() and (tmp_path / "own/rules.json").exists()
    with pytest.raises(SurgeryError, match='ReftRule[\\s\\S]*format="surgery"'):
        save_adapter(build_trained(ReftRule("1", rank=2)), tmp_path / "none", format="peft")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    "rules, why",
    [
        ([LoraRule("1", rank=2), OftRule("3", block_size=4)], "2 methods"),
        ([TrainRule("1")], "needs a method beside"),
        ([LoraRule("1", rank=2, init="pissa_niter_4")], "init='pissa_niter_4'"),
        ([LoraRule("1", rank=2), BiasRule("3")], "BiasRule"),
        ([LoraRule("1", rank=2), LoraRule("3", rank=2, dora=True)], "differ"),
        ([VeraRule("1", rank=2), VeraRule("3", rank=2)], "2 VeraRules"),
        ([LoraRule("1", rank=2, dtype="bfloat16")], "dtype='bfloat16'"),
        ([VeraRule(["1", "3"], rank=2)], "projections of their own"),
    ],
    ids=str,
)
def test_what_pefts_format_can_not_hold(rules: list[Rule], why: str, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=why):
        save_adapter(build_trained(*rules), tmp_path / "a", format="peft")
    save_adapter(build_trained(*rules), tmp_path / "a")
    assert (tmp_path / "a/rules.json").exists()


def test_several_lora_rules_are_one_of_pefts(tmp_path: Path) -> None:
    before = build_trained(LoraRule("1", rank=2, alpha=3), LoraRule("3", rank=4, alpha=5))
    load_adapter(model := model_of(), save_adapter(before, tmp_path / "a", format="peft"))
    assert torch.equal(model(X), before(X))
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["rank_pattern"] == {"1": 2, "3": 4} and config["alpha_pattern"] == {"1": 3, "3": 5}


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_beside_lora_at_one_module(bias: Any, tmp_path: Path) -> None:
    """In PEFT's format, too, each rule writes its own tensors of a site that they share, and no other's."""
    before = build_trained(LoraRule("1", rank=2, bias=bias))
    load_adapter(model := model_of(), save_adapter(before, tmp_path / "a", format="peft"))
    assert torch.equal(model(X), before(X))


def test_metadata_and_licence(tmp_path: Path) -> None:
    metadata = {"accuracy": 0.97, "by": ["me"]}
    for format in ("peft", "surgery"):
        folder = save_adapter(
            build_trained(LoraRule("1")), tmp_path / format, format=format, metadata=metadata, licence="apache-2.0"
        )
        report = load_adapter(model_of(), folder)
        assert report.metadata == metadata and report.licence == "apache-2.0"
    with pytest.raises(SurgeryError, match="metadata can't be written"):
        save_adapter(build_trained(LoraRule("1")), tmp_path / "a", metadata={"x": torch.ones(1)})


def test_what_pefts_configuration_says_beside_the_rules(tmp_path: Path) -> None:
    model = apply_rules(nn.Sequential(nn.Linear(4, 4)), LoraRule("0", rank=2, alpha=2, init="random"))
    gathered = {key: tensor * 2 for key, tensor in model.state_dict().items()}
    save_adapter(model, tmp_path, config={"task_type": "SEQ_CLS", "r": 7}, state_dict=gathered)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["task_type"], config["r"], config["auto_mapping"]) == ("SEQ_CLS", 2, None)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    doubled = model.get_parameter("0.adapters.default.A") * 2
    assert torch.equal(tensors["base_model.model.0.lora_A.weight"], doubled)
    read = remove(copy.deepcopy(model))
    load_adapter(read, tmp_path, config={**config, "lora_alpha": 6})
    assert rules_of(read)[0].alpha == 6  # type: ignore[attr-defined]
    assert torch.equal(read.get_parameter("0.adapters.default.A"), doubled)
    save_adapter(model, tmp_path, format="surgery", state_dict=gathered)
    assert torch.equal(safetensors.torch.load_file(tmp_path / "adapter.safetensors")["0.adapters.A"], doubled)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["auto_mapping"] == {"base_model_class": "Sequential", "parent_library": "torch.nn.modules.container"}


def test_a_merged_adapter_is_saved_as_it_was_trained(tmp_path: Path) -> None:
    before = build_trained(LoraRule("1", rank=2))
    expected = before(X)
    merge(before)
    load_adapter(model := model_of(), save_adapter(before, tmp_path / "a"))
    assert torch.equal(model(X), expected)
    unmerge(before)
    assert torch.equal(before(X), expected)


def test_other_files_in_the_folder_stay(tmp_path: Path) -> None:
    (tmp_path / "optimizer.pt").write_bytes(b"mine")
    save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path)
    save_adapter(build_trained(ReftRule("1", rank=2)), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"optimizer.pt", "adapter.safetensors", "rules.json"}
    save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {
        "optimizer.pt", "adapter_model.safetensors", "adapter_config.json",
    }  # fmt: skip


def test_what_a_save_that_was_killed_leaves_is_read_whole(tmp_path: Path) -> None:
    """Builds each state between the renames by hand: a reader gets the old pair or the new one."""
    old, new = build_trained(LoraRule("1", rank=2, alpha=4)), build_trained(LoraRule("1", rank=2, alpha=9), seed=0)
    names = ("adapter_model.safetensors", "adapter_config.json")
    contents = {}
    for version, model in (("old", old), ("new", new)):
        folder = save_adapter(model, tmp_path / version)
        contents[version] = [(folder / name).read_bytes() for name in names]
    away = f".surgery-previous-{names[1]}"
    moments: dict[str, tuple[dict[str, bytes], nn.Module]] = {
        "written under other names": (
            {names[0]: contents["old"][0], names[1]: contents["old"][1], f".surgery-1-{names[0]}": b"half"}, old,
        ),
        "old settings put away": ({names[0]: contents["old"][0], away: contents["old"][1]}, old),
        "new tensors": ({names[0]: contents["new"][0], away: contents["old"][1]}, new),
        "new settings": ({names[0]: contents["new"][0], names[1]: contents["new"][1], away: contents["old"][1]}, new),
    }  # fmt: skip
    for name, (files, expected) in moments.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        load_adapter(model := model_of(), folder)
        assert torch.equal(model(X), expected(X)), name
        save_adapter(old, folder)  # and the next save deletes leftovers
        assert sorted(file.name for file in folder.iterdir()) == sorted(names), name


# Everything that is wrong, at once ----------------------------------------------------------------------------


def spoilt(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Change the tensors of a saved adapter."""
    (path,) = folder.glob("*.safetensors")
    with safetensors.safe_open(str(path), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
    change(tensors)
    safetensors.torch.save_file(tensors, str(path), metadata)


def check_refused(folder: Path, match: str, model: Any = None, **options: Any) -> LoadError:
    model = model_of() if model is None else model
    before = Snapshot(model)
    with pytest.raises(LoadError, match=match) as caught:
        load_adapter(model, folder, **options)
    assert not before.differences(model)
    return caught.value


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule(["1", "3"], rank=2)), tmp_path, format="surgery")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["1.adapters.A"]
        tensors["3.adapters.B"] = torch.zeros(5, 2)
        tensors["3.adapters.A"][0, 0] = torch.nan
        tensors["elsewhere"] = torch.zeros(1)

    spoilt(folder, change)
    error = check_refused(folder, "one tensor is missing: 1.adapters.A")
    message = str(error)
    assert len(error.problems) == 4 and "4 problems, the model is untouched" in message
    assert "one tensor is not of this adapter: elsewhere" in message
    assert re.search(r"3.adapters.B is \(5, 2\), which does not give the \(4, 2\)", message)
    assert "3.adapters.A holds NaN or infinity" in message
    check_refused(folder, "3 problems", finite=False)


def test_another_base(tmp_path: Path) -> None:
    for format in ("peft", "surgery"):
        folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path / format, format=format)
        check_refused(folder, r"made on another base\n  where: .*\n  why:   . of . weights differ", model_of(seed=1))
        for dtype in (torch.bfloat16, torch.float16, torch.float64):
            assert load_adapter(model_of(dtype=dtype), folder)  # the same in another precision


def test_another_base_can_be_allowed(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path)
    model = model_of(seed=1)
    with pytest.warns(SurgeryWarning, match="made on another base"):
        report = load_adapter(model, folder, same_base=False)
    assert report.base and report.loaded == ["1.adapters.A", "1.adapters.B"]
    other = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 9))
    with pytest.raises(LoadError, match="does not give"):
        load_adapter(other, folder, same_base=False)


def test_a_new_head_is_no_other_base(tmp_path: Path) -> None:
    """The base's own head was chance where the adapter was trained, and is another chance where it is loaded."""
    before = build_trained(LoraRule("1", rank=2), TrainRule("3"))
    folder = save_adapter(before, tmp_path)
    model = model_of()
    nn.init.normal_(model[3].weight)
    assert load_adapter(model, folder)
    assert torch.equal(model(X), before(X))


def test_a_rule_or_a_format_from_the_future(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2), ReftRule("3", rank=1)), tmp_path)
    settings = json.loads((folder / "rules.json").read_text())
    for change, match in (
        (lambda d: d["rules"][0].update(version=99), "version 99 is newer"),
        (lambda d: d["rules"][0].update(rule="loraa"), "'loraa' is not the name of a rule"),
        (lambda d: d["rules"][0].update(rank="many"), "rank='many'"),
        (lambda d: d["rules"][0].update(extra=1), "no field 'extra'"),
        (lambda d: d.update(version=2), "version 2 of the format"),
        (lambda d: d.update(rules=[]), "list no rules"),
        (lambda d: d.update(rules=3), "list no rules"),
        (lambda d: d["rules"].__setitem__(1, 3), "is not a rule"),
    ):
        changed = copy.deepcopy(settings)
        change(changed)
        (folder / "rules.json").write_text(json.dumps(changed))
        check_refused(folder, match)
    two = copy.deepcopy(settings)
    two["rules"][0]["version"] = two["rules"][1]["version"] = 99
    (folder / "rules.json").write_text(json.dumps(two))
    assert len(check_refused(folder, "2 problems").problems) == 2


def test_damaged_files(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    for content, match in (
        (whole[:-4], "ends at byte 192 of the data, and the file has 188"),
        (whole[:100], "a header of"),
        (b"", "a header of 0 bytes in a file of 0"),
        ((2**62).to_bytes(8, "little") + whole[8:], "a header of 4611686018427387904 bytes"),
        (whole[:8] + b"x" + whole[9:], "is not JSON"),
        (whole[:8] + b"[" * length + whole[8 + length :], "is not JSON"),
        (whole.replace(b'"F32"', b'"F16"', 1), "is damaged"),
        (whole.replace(b'"shape":[2,8]', b'"shape":[9,9]', 1), "is damaged"),
    ):
        path.write_bytes(content)
        check_refused(folder, match)
    path.write_bytes(whole)
    config = folder / "adapter_config.json"
    for text, match in (
        ("{", "is not JSON"),
        ("[]", "not a mapping"),
        ('{"r": NaN}', "is not JSON"),
        ("{}", "PEFT's 'None'"),
    ):
        config.write_text(text)
        check_refused(folder, match)
    config.write_bytes(b" " * (9 << 20))
    check_refused(folder, "adapter_config.json is too large")
    check_refused(tmp_path / "nowhere/at/all", "is not a folder, a file or a repository")
    (tmp_path / "empty").mkdir()
    check_refused(tmp_path / "empty", "no adapter in this folder")


def test_what_the_plan_objects_to(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path)
    model = build_trained(LoraRule("1", rank=2))
    check_refused(folder, "there is an adapter 'default' already", model)
    check_refused(folder, "'a.b' can't name an adapter", adapter="a.b")
    check_refused(folder, "matches nothing", nn.Sequential(nn.Linear(2, 2)))
    merge(model)
    check_refused(folder, "the model is merged", model, adapter="b")


def test_what_fits_is_loaded_where_it_need_not_be_strict(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule(["1", "3"], rank=2)), tmp_path, format="surgery")
    saved_tensors = {}

    def change(tensors: dict[str, Tensor]) -> None:
        saved_tensors.update(tensors)
        del tensors["1.adapters.A"]
        tensors["3.adapters.B"] = torch.zeros(5, 2)
        tensors["elsewhere"] = torch.zeros(1)

    spoilt(folder, change)
    model = model_of(seed=1)
    with pytest.warns(SurgeryWarning) as caught:
        report = load_adapter(model, folder, strict=False)
    assert len(caught) == 4 and not report
    assert report.missing == ["1.adapters.A"] and report.unexpected == ["elsewhere"] and len(report.misfits) == 1
    assert report.loaded == ["1.adapters.B", "3.adapters.A"] and "another base" in str(report)
    assert torch.equal(model[3].adapters.default.A, saved_tensors["3.adapters.A"])
    assert not model[3].adapters.default.B.any()  # as it starts


def test_fields_of_tomorrow_are_passed_over_where_it_need_not_be_strict(tmp_path: Path) -> None:
    folder = save_adapter(before := build_trained(LoraRule("1", rank=2)), tmp_path)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "a_field_of_tomorrow": 3}))
    check_refused(folder, "a_field_of_tomorrow='3' can't be held")
    with pytest.warns(SurgeryWarning, match="a_field_of_tomorrow"):
        load_adapter(model := model_of(), folder, strict=False)
    assert torch.equal(model(X), before(X))


def test_lora_on_modules_and_on_experts_is_one_of_pefts(tmp_path: Path) -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.up, self.lin = nn.Parameter(torch.randn(3, 8, 8)), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.lin(torch.tanh(nn.functional.linear(x, self.up[1])))

    def build_stack(**fields: Any) -> Any:
        inner = nn.ModuleDict({"body": Stack()})
        rules = [LoraRule("lin", rank=2), ExpertLoraRule("body", rank=2, **fields)]
        train(apply_rules(inner, rules))
        return inner

    before, x = build_stack(rank_pattern={"up": 3}), torch.randn(2, 8)
    load_adapter(model := nn.ModuleDict({"body": Stack()}), save_adapter(before, tmp_path / "a", format="peft"))
    assert torch.equal(model["body"](x), before["body"](x))
    with pytest.raises(SurgeryError, match="differ in lora_alpha"):
        save_adapter(build_stack(alpha=3), tmp_path / "b", format="peft")


def test_an_error_while_filling_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path)
    model = model_of()
    before = Snapshot(model)
    monkeypatch.setattr("surgery.storage.load.tensors_of", lambda *_: {})
    with pytest.raises(KeyError):
        load_adapter(model, folder)
    assert not before.differences(model)


def test_loading_does_not_touch_the_random_numbers(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path)
    state = torch.get_rng_state()
    load_adapter(model := build_trained(HraRule("3", rank=2)), folder, "b")
    torch.manual_seed(0)
    assert model and state is not None
    before = torch.get_rng_state()
    load_adapter(model, folder, "c")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_one_number_that_is_none_is_found(dtype: torch.dtype, tmp_path: Path) -> None:
    """Tensors of one dtype, which are checked all at once, or of several dtypes."""
    for mixed in (False, True):
        folder = save_adapter(build_trained(LoraRule(["1", "3"], rank=2)), tmp_path / str(mixed), format="surgery")

        def change(tensors: dict[str, Tensor], mixed: bool = mixed) -> None:
            tensors.update({key: tensor.to(dtype) for key, tensor in tensors.items() if not mixed or key[0] == "3"})
            tensors["3.adapters.B"][-1, -1] = -torch.inf

        spoilt(folder, change)
        assert len(check_refused(folder, "3.adapters.B holds NaN or infinity").problems) == 1
        assert load_adapter(model := model_of(), folder, finite=False) and model[3].adapters.default.B[-1, -1].isinf()


def test_tensors_stand_anywhere_in_a_file(tmp_path: Path) -> None:
    """One of an odd number of bytes is before one of eight-byte numbers: no view of the file is aligned for it."""
    folder = save_adapter(build_trained(LoraRule(["1", "3"], rank=1)), tmp_path, format="surgery")
    (path,) = folder.glob("*.safetensors")
    with safetensors.safe_open(str(path), "pt") as file:
        metadata, tensors = file.metadata(), {key: file.get_tensor(key).clone() for key in file.keys()}
    odd, values = b"\1\2\3", {key: tensor.double() for key, tensor in tensors.items()}
    header: dict[str, Any] = {"__metadata__": metadata, "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}
    data = odd
    for key, tensor in values.items():
        where = [len(data), len(data) + tensor.numel() * 8]
        header[key] = {"dtype": "F64", "shape": list(tensor.shape), "data_offsets": where}
        data += tensor.numpy().tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.warns(SurgeryWarning, match="not of this adapter: odd"):
        load_adapter(model := model_of(), folder, strict=False)
    for key, tensor in adapter_state_dict(model).items():
        assert torch.equal(tensor, tensors[key]), key


def test_what_a_file_lacks_starts_from_what_its_rule_starts_with(tmp_path: Path) -> None:
    """DoRA's initial magnitude is computed from the initial A and B, not from the file's."""
    folder = save_adapter(build_trained(LoraRule(["1", "3"], rank=2, dora=True)), tmp_path, format="surgery")

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["3.adapters.magnitude"]

    spoilt(folder, change)
    with pytest.warns(SurgeryWarning, match=r"missing: 3\.adapters\.magnitude"):
        load_adapter(model := model_of(), folder, strict=False)
    assert torch.equal(model[3].adapters.default.magnitude, torch.linalg.vector_norm(model_of()[3].weight, dim=1))
    assert model[3].adapters.default.B.any()


def test_a_value_that_is_no_start_is_refused(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(VeraRule("1", rank=2)), tmp_path, format="peft")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "d_initial": 1e308}))
    check_refused(folder, "its rules can't be applied")


def test_names_in_a_file_are_no_paths(tmp_path: Path) -> None:
    folder = save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path / "a", format="surgery")

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["../../escaped"] = tensors.pop("1.adapters.A")
        tensors["/etc/passwd"] = torch.zeros(1)

    spoilt(folder, change)
    check_refused(
        folder, "2 tensors are not of this adapter: ../../escaped, /etc/passwd|2 tensors are not of this adapter"
    )
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


# Several, elsewhere -------------------------------------------------------------------------------------------


def test_a_folder_of_many(tmp_path: Path) -> None:
    expected = {}
    for i, name in enumerate(("news", "mail", "code")):
        before = build_trained(LoraRule("1", rank=2 + i))
        expected[name] = before(X)
        save_adapter(before, tmp_path / name, format="peft" if i else "surgery")
    (tmp_path / "notes").mkdir()
    model = model_of()
    plain = Snapshot(model)
    assert list(load_adapters(model, tmp_path)) == ["code", "mail", "news"]
    remove(model, ["code", "mail"])
    assert torch.equal(model(X), expected["news"])
    remove(model)
    (tmp_path / "mail/adapter_config.json").write_text("{")
    (tmp_path / "code/adapter_config.json").write_text("{")
    with pytest.raises(LoadError) as caught:
        load_adapters(model, tmp_path)
    assert len(caught.value.problems) == 2 and not plain.differences(model)
    with pytest.raises(LoadError, match="holds no adapters"):
        load_adapters(model, tmp_path / "notes")


ON_META: list[Rule] = [
    LoraRule("1", rank=2, dora=True),
    FourierRule("1", n_frequency=9),
    OftRule("1", block_size=4),
    TokensRule("0", tokens=[3]),
]


@pytest.mark.parametrize("rule", ON_META, ids=lambda rule: rule.name)
@pytest.mark.parametrize("format", ["peft", "surgery"])
def test_a_base_on_the_meta_device(rule: Rule, format: Any, tmp_path: Path) -> None:
    if rule.name == "tokens" and format == "peft":
        pytest.skip("PEFT needs a method beside tokens")
    before = build_trained(rule)
    folder = save_adapter(before, tmp_path, format=format)
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))
    load_adapter(model, folder)
    assert all(not tensor.is_meta for tensor in adapter_state_dict(model).values())
    model.load_state_dict(model_of().state_dict(), strict=False, assign=True)
    assert torch.equal(model(X), before(X))


def test_a_start_that_changed_the_base_is_made_again(tmp_path: Path) -> None:
    for format in ("peft", "surgery"):
        before = build_trained(LoraRule("1", rank=2, init="pissa"))
        load_adapter(model := model_of(), save_adapter(before, tmp_path / format, format=format))
        assert torch.allclose(model(X), before(X), atol=1e-6)


class Bomb:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('it ran')",)


def test_pickles_are_read_as_tensors_alone_and_never_written(tmp_path: Path) -> None:
    before = build_trained(LoraRule("1", rank=2))
    folder = save_adapter(before, tmp_path / "a")
    path = folder / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(str(path))
    path.unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    load_adapter(model := model_of(), folder)
    assert torch.equal(model(X), before(X))
    for content, match in (
        (Bomb(), "can't be read as tensors"),
        ({"a": Bomb()}, "can't be read as tensors"),
        ([1], "other things than tensors"),
        ({"a": torch.eye(3).to_sparse()}, "other things than tensors"),
    ):
        torch.save(content, folder / "adapter_model.bin")
        check_refused(folder, match)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(tensors["base_model.model.1.lora_A.weight"].tolist()))
    check_refused(folder, "before 1.6")
    save_adapter(before, folder)
    assert not list(folder.glob("*.bin"))


# Other people's files -----------------------------------------------------------------------------------------


def as_peft(model: Any) -> dict[str, Tensor]:
    return {f"{key.replace('.adapters.', '.lora_')}.weight": t for key, t in adapter_state_dict(model).items()}


def write_checkpoint(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None, name: str = "adapter_model"
) -> Path:
    folder.mkdir(exist_ok=True)
    safetensors.torch.save_file({k: t.contiguous() for k, t in tensors.items()}, str(folder / f"{name}.safetensors"))
    if config is not None:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_old_configurations_and_keys_without_a_prefix(tmp_path: Path) -> None:
    before = build_trained(LoraRule(["1", "3"], rank=2, alpha=6))
    tensors = as_peft(before)
    config = {  # as PEFT 0.5.0 wrote it
        "auto_mapping": None, "base_model_name_or_path": "x", "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "layers_pattern": None, "layers_to_transform": None,
        "lora_alpha": 6, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA", "r": 2, "revision": None,
        "target_modules": ["1", "3"], "task_type": "CAUSAL_LM",
    }  # fmt: skip
    least = {"peft_type": "LORA", "target_modules": ["1", "3"], "r": 2, "lora_alpha": 6}
    for i, (prefix, settings) in enumerate(
        (("base_model.model.", config), ("base_model.model.", least), ("", config), ("transformer.", least))
    ):
        folder = write_checkpoint(
            tmp_path / str(i), {prefix + key: tensor for key, tensor in tensors.items()}, settings
        )
        load_adapter(model := model_of(), folder)
        assert torch.equal(model(X), before(X)), prefix
    folder = write_checkpoint(
        tmp_path / "none", {f"base_model.model.{k}": t for k, t in tensors.items()}, {**least, "target_modules": None}
    )
    load_adapter(model := model_of(), folder)
    assert torch.equal(model(X), before(X))


def test_diffusers_files(tmp_path: Path) -> None:
    class Unet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.to_q, self.to_out = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8)])

        def forward(self, x: Tensor) -> Tensor:
            return self.to_out[0](self.to_q(x))

    before = apply_rules(Unet(), [LoraRule(["to_q", "to_out.0"], rank=2, alpha=2)])
    train(before)
    checkpoint, x = as_peft(before), torch.randn(3, 8)
    today = {f"unet.{key}": tensor for key, tensor in checkpoint.items()}
    old = {
        re.sub(
            r"to_out\.0\.lora_([AB])", r"processor.to_out_lora_\1", re.sub(r"to_q\.lora_", "processor.to_q_lora_", k)
        ): t
        for k, t in checkpoint.items()
    }
    old = {k.replace("_lora_A.", "_lora.down.").replace("_lora_B.", "_lora.up."): t for k, t in old.items()}
    for i, tensors in enumerate((today, checkpoint, old)):
        folder = write_checkpoint(tmp_path / str(i), tensors, None, "pytorch_lora_weights")
        load_adapter(model := Unet(), folder)
        assert torch.equal(model(x), before(x)), i
        load_adapter(model := Unet(), folder / "pytorch_lora_weights.safetensors")
        assert torch.equal(model(x), before(x)), i


LORA = {"peft_type": "LORA", "target_modules": ["1"], "r": 2}


@pytest.mark.parametrize(
    "config, match",
    [
        ({**LORA, "use_qalora": True}, "use_qalora"),
        ({**LORA, "arrow_config": {"x": 1}}, "arrow_config"),
        ({**LORA, "layer_replication": [[0, 1]]}, "layer_replication"),
        ({**LORA, "use_bdlora": {"x": 1}}, "use_bdlora"),
        ({**LORA, "megatron_config": {"x": 1}}, "megatron_config"),
        ({**LORA, "init_lora_weights": "corda"}, "init_lora_weights='corda'"),
        ({**LORA, "a_field_of_tomorrow": 3}, "a_field_of_tomorrow"),
        ({**LORA, "r": "two"}, "rank='two'"),
        ({**LORA, "lora_alpha": [1]}, "alpha"),
        ({**LORA, "target_modules": 5}, "target_modules|can't be read"),
        ({**LORA, "target_modules": "("}, "can't be read|regular expression"),
        ({**LORA, "rank_pattern": [1]}, "can't be read"),
        ({**LORA, "modules_to_save": 1}, "can't be read|modules_to_save"),
        ({**LORA, "trainable_token_indices": "x"}, "can't be read"),
        ({**LORA, "peft_type": "POLY"}, "'POLY' is not among"),
        ({**LORA, "peft_type": ["LORA"]}, "is not among"),
        ({"peft_type": "OFT", "target_modules": ["1"], "oft_block_size": 4}, "PEFT before 0.16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_can_not_be_held_is_refused_by_its_name(config: dict[str, Any], match: str, tmp_path: Path) -> None:
    tensors = {
        "base_model.model.1.lora_A.weight": torch.zeros(2, 8),
        "base_model.model.1.lora_B.weight": torch.zeros(16, 2),
    }
    check_refused(write_checkpoint(tmp_path / "a", tensors, config), match)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_pefts_layers_is_refused(tmp_path: Path) -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    peft: Any = pytest.importorskip("peft")
    folder = save_adapter(apply_rules(tiny.bert()[0], [LoraRule("query", rank=2)]), tmp_path)
    theirs = tiny.bert()[0]
    theirs.add_adapter(peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(LoadError, match="has adapters of PEFT"):
        load_adapter(theirs, folder)
    with pytest.raises(PlanError, match="this is PEFT's PeftModel"):
        apply_rules(peft.get_peft_model(tiny.bert()[0], peft.LoraConfig(target_modules=["query"])), [LoraRule("query")])


def test_code_is_not_taken_from_a_file(tmp_path: Path) -> None:
    before = apply_rules(model_of(), [ReplaceRule("2", by="torch.nn.RMSNorm", kwargs={"normalized_shape": 16})])
    folder = save_adapter(before, tmp_path)
    check_refused(folder, "a ReplaceRule is not taken from a file")
    assert load_adapter(model := model_of(), folder, trust=True)
    assert torch.equal(model(X), before(X))


# Merged checkpoints -------------------------------------------------------------------------------------------


def test_a_merged_checkpoint_needs_nothing_of_this_package(tmp_path: Path) -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    transformers: Any = pytest.importorskip("transformers")
    base, inputs = tiny.llama()
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "base/tokenizer.json").write_text("{}")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    apply_rules(model, [LoraRule("all-linear", rank=2, init="random")])
    before = Snapshot(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        merge_to(model, tmp_path / "merged")
        assert not before.differences(model)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(again(**inputs).logits, expected, atol=1e-6)
    assert type(again.model.layers[0].self_attn.q_proj) is nn.Linear
    assert (tmp_path / "merged/tokenizer.json").exists() and not list((tmp_path / "merged").glob(".surgery*"))


def test_a_merged_checkpoint_of_a_tied_head(tmp_path: Path) -> None:
    tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")
    transformers: Any = pytest.importorskip("transformers")
    model, inputs = tiny.gpt2()
    apply_rules(model.eval(), [LoraRule("lm_head", rank=2, init="random")])
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="untie"):
        merge_to(model, tmp_path / "none")
    with torch.no_grad():
        expected = model(**inputs).logits
        merge_to(model, tmp_path / "merged", untie=True)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(again(**inputs).logits, expected, atol=1e-5)
    assert not before.differences(model)


def test_a_model_that_can_not_save_itself(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="has no save_pretrained"):
        merge_to(build_trained(LoraRule("1", rank=2)), tmp_path / "a")
    with pytest.raises(SurgeryError, match="no rules were applied"):
        save_adapter(model_of(), tmp_path / "a")
    with pytest.raises(SurgeryError, match="there is no format 'pickle'"):
        save_adapter(build_trained(LoraRule("1", rank=2)), tmp_path / "a", format="pickle")  # type: ignore[arg-type]
    with pytest.raises(RuleError, match="can't be written"):
        from surgery import Pattern

        save_adapter(build_trained(LoraRule(Pattern.where(lambda m: isinstance(m, nn.Linear)), rank=2)), tmp_path / "a",
                     format="surgery")  # fmt: skip
    assert not (tmp_path / "a").exists()


def test_importing_the_package_brings_no_formats() -> None:
    late = ("safetensors", "huggingface_hub", "rules")
    code = f"import sys, surgery; sys.exit(any(name in sys.modules for name in {late}))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
