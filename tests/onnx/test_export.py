"""onnxruntime runs exported plain modules; their outputs, the options of the export, and the untouched live model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery import SurgeryError, deactivate, export_onnx, merge, remove, using
from surgery.testing import Snapshot
from tests.support.onnx_checks import (
    adapted,
    assert_near,
    assert_slots,
    assert_weights,
    by_hand,
    expected,
    feeds,
    operations,
    read_initializers,
    session,
)
from tests.support.onnx_plain import PLAIN, Line, Named, Net, Text, Tied
from tests.support.sampling import LAYERS

onnx: Any = pytest.importorskip("onnx")


def net(*ranks: int) -> tuple[nn.Module, torch.Tensor]:
    return adapted(Net(), ["a", "conv", "b"], *(ranks or (2,))), torch.randn(2, 5, 8)


TEXT = {"0": "batch", "1": "sequence"}
NAMES: dict[str, dict[str, Any]] = {  # of inputs, outputs and sizes
    "nested": {
        "inputs": ["x", "others.p", "others.q.0", "others.q.1"],
        "outputs": ["y", "more.0", "more.1.0", "more.1.1", "pair"],
    },
    "starred": {
        "inputs": ["input_0", "input_1"], "outputs": ["output_0", "output_1"],
        "free": {"input_0": TEXT, "input_1": {"0": "input_1_batch"}},
    },
    "dataclass": {"outputs": ["y", "total"]},
    "mask": {"free": {"ids": TEXT, "mask": TEXT}},
    "one token": {"free": {"ids": TEXT}},  # the example has one row and one position
}  # fmt: skip


@pytest.mark.parametrize("name", PLAIN)
def test_modules_of_any_calling_convention(name: str, tmp_path: Path) -> None:
    model, example, targets = PLAIN[name]()
    adapted(model, targets, 2, 4)
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots")
    assert before.differences(model) == []
    assert report.parity is not None and report.parity.ok and report.parity.weights >= 2
    for key, wanted in NAMES.get(name, {}).items():
        assert report.manifest[key] == wanted
    assert_slots(report.path, report.manifest)
    assert_weights(model, report.path)
    inputs = report.manifest["inputs"]
    for optimised in (True, False):
        run = session(report.path, optimised)
        for adapter in ("a", "b"):
            with using(model, adapter), _as_trained():
                wanted = expected(model, example)
            actual = run.run(None, {**feeds(model, example, inputs), **by_hand(model, adapter)})
            assert_near(actual, wanted)
        with using(model, []), _as_trained():
            assert_near(run.run(None, feeds(model, example, inputs)), expected(model, example))


def _as_trained() -> Any:
    """Parameters that ask for gradients keep nn.TransformerEncoder from a kernel that writes zeros at padding."""
    from surgery.onnx.calls.shared_copy import traced_path

    return traced_path()


def test_a_file_serves_other_sizes_than_its_example(tmp_path: Path) -> None:
    model = adapted(Text(), ["a"], 2)
    export_onnx(model, tmp_path / "m.onnx", {"ids": torch.tensor([[1]])}, adapters="slots")
    run = session(tmp_path / "m.onnx")
    for shape in ((1, 1), (1, 7), (6, 2)):
        ids = torch.randint(0, 10, shape)
        assert_near(run.run(None, {"ids": ids.numpy(), **by_hand(model, "a")}), expected(model, {"ids": ids}))


def test_sizes_that_came_out_fixed_are_told(tmp_path: Path) -> None:
    class Five(Line):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x).reshape(-1, 20)

    report = export_onnx(Five(), tmp_path / "m.onnx", torch.randn(1, 5, 4))
    assert report.manifest["free"] in ({"x": {"0": "batch"}}, {"x": {"0": "batch", "1": "sequence"}})
    report = export_onnx(nn.Linear(4, 4), tmp_path / "m.onnx", torch.randn(4))
    assert report.notices == ["input is fixed at 4 along axis 0 (batch): the model allows no other"]

    class One(Line):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] != 1:
                raise ValueError("one row")
            return self.a(x)

    report = export_onnx(One(), tmp_path / "m.onnx", torch.randn(1, 4))
    assert report.notices == ["x is fixed at 1 along axis 0 (batch); give an example with more"]


def test_sizes_that_the_caller_names(tmp_path: Path) -> None:
    model, x = Named(), torch.randn(3, 6, 4)
    report = export_onnx(model, tmp_path / "m.onnx", x, dynamic=False)
    assert report.manifest["free"] == {}
    report = export_onnx(Named(), tmp_path / "m.onnx", x, dynamic={"x": {1: "rows"}})
    assert report.manifest["free"] == {"x": {"1": "rows"}}
    with pytest.raises(SurgeryError, match="dynamic names 'y', which is not an input"):
        export_onnx(model, tmp_path / "m.onnx", x, dynamic={"y": {0: "rows"}})


# Merged and constant ------------------------------------------------------------------------------------------------


def test_merged_is_the_bases_own_graph_and_the_live_model_is_untouched(tmp_path: Path) -> None:
    model, x = net(2)
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "merged.onnx", x)
    assert before.differences(model) == []
    wanted = expected(model, x)
    assert_near(session(report.path).run(None, {"x": x.numpy()}), wanted)
    base = remove(model)
    export_onnx(base, tmp_path / "base.onnx", x)
    assert operations(tmp_path / "merged.onnx") == operations(tmp_path / "base.onnx")
    assert read_initializers(tmp_path / "merged.onnx").keys() == read_initializers(tmp_path / "base.onnx").keys()
    moved = [value - other for value, other in zip(wanted, expected(base, x), strict=True)]
    assert max(float(change.abs().max()) for change in moved) > 0.1


def test_a_model_that_is_merged_stays_so(tmp_path: Path) -> None:
    model, x = adapted(nn.Sequential(nn.Linear(8, 4)), ["0"], 2, 4), torch.randn(2, 8)
    merge(model, "a")
    wanted = expected(model, x)
    before = Snapshot(model)
    for adapters in ("merged", "constant", "slots"):
        report = export_onnx(model, tmp_path / f"{adapters}.onnx", x, adapters=adapters)
        assert report.parity is not None and report.parity.ok
        assert before.differences(model) == []
    assert_near(session(tmp_path / "merged.onnx").run(None, {"input": x.numpy()}), wanted)


def test_constants_are_initialisers_under_their_own_names(tmp_path: Path) -> None:
    model, x = net(2, 4)
    before = Snapshot(model)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="constant", names="b")
    assert before.differences(model) == []
    arrays = read_initializers(report.path)
    own = {name: parameter for name, parameter in model.named_parameters() if ".adapters.b." in name}
    assert len(own) == 6
    for name, tensor in own.items():
        assert np.array_equal(arrays[name], tensor.detach().numpy())
    assert not any(".adapters.a." in name for name in arrays)
    assert [value.name for value in onnx.load(str(report.path)).graph.input] == ["x"]
    with using(model, "b"):
        assert_near(session(report.path).run(None, {"x": x.numpy()}), expected(model, x))


# Slots --------------------------------------------------------------------------------------------------------------


def test_slots_as_required_inputs(tmp_path: Path) -> None:
    model, x = net(2)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", slots_as="inputs")
    run = session(report.path)
    names = {slot["name"] for slot in report.manifest["slots"]}
    assert {node.name for node in run.get_inputs()} == {"x", *names} and not run.get_overridable_initializers()
    assert_near(run.run(None, {"x": x.numpy(), **by_hand(model, "a")}), expected(model, x))
    with pytest.raises(Exception, match="Required inputs"):
        run.run(None, {"x": x.numpy()})


def test_empty_slots_of_one_zero(tmp_path: Path) -> None:
    model, x = net(2)
    with pytest.raises(SurgeryError, match="multiple of its groups"):
        export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", empty="zeros1")
    model = adapted(Net(), ["a", "b"], 2)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", empty="zeros1")
    arrays = read_initializers(report.path)
    assert arrays["a.adapters.slot.A"].shape == (1, 8) and arrays["a.adapters.slot.B"].shape == (16, 1)
    run = session(report.path)
    assert_near(run.run(None, {"x": x.numpy(), **by_hand(model, "a")}), expected(model, x))
    deactivate(model)
    assert_near(run.run(None, {"x": x.numpy()}), expected(model, x))


def test_nodes_say_which_rule_put_them_in_and_where(tmp_path: Path) -> None:
    model, x = net(2)
    export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    graph = onnx.load(str(tmp_path / "m.onnx")).graph
    slots = {value.name for value in graph.input} - {"x"}
    for node in graph.node:
        metadata = {prop.key: prop.value for prop in node.metadata_props}
        if slots & set(node.input):
            site = next(name for name in node.input if name in slots).partition(".adapters.")[0]
            assert metadata["surgery.site"] == site and metadata["surgery.rule"]
            assert site in metadata["pkg.torch.onnx.name_scopes"]
        assert not any("stack_trace" in key for key in metadata)
    assert str(Path.cwd()) not in str(graph)


def test_a_slot_is_no_word_that_names_an_adapter(tmp_path: Path) -> None:
    model, x = net(2)
    with pytest.raises(SurgeryError, match="not a Python identifier"):
        export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", slot="a.b")
    with pytest.raises(SurgeryError, match="no rules to make slots of"):
        export_onnx(Line(), tmp_path / "m.onnx", torch.randn(2, 4), adapters="slots")


# Versions and number types ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [18, 25])
def test_versions_of_the_operator_set(opset: int, tmp_path: Path) -> None:
    model, x = net(2)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", opset=opset)
    versions = {entry.domain: entry.version for entry in onnx.load(str(report.path)).opset_import}
    assert versions[""] == opset == report.manifest["opset"]


@pytest.mark.parametrize("opset", [16, 17, 26, "20"])
def test_versions_that_are_refused(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="(?s)opset=.* can't be written.*18 to 25"):
        export_onnx(Line(), tmp_path / "m.onnx", torch.randn(2, 4), opset=opset)


def test_half_precision(tmp_path: Path) -> None:
    model, x = net(2)
    model, x = model.half(), x.half()
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    slots = {name: array.astype(np.float32) for name, array in by_hand(model, "a").items()}
    assert {slot["dtype"] for slot in report.manifest["slots"]} == {"float32"}  # as adapters of such a base are
    actual = session(report.path).run(None, {"x": x.numpy(), **slots})
    assert_near(actual, expected(model, x), tolerance=5e-3)


def test_bfloat16_needs_another_machine(tmp_path: Path) -> None:
    model, x = net(2)
    model, x = model.bfloat16(), x.bfloat16()
    with pytest.raises(SurgeryError, match="(?s)can't run this file here.*bfloat16") as caught:
        export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    assert "verify=False" in str(caught.value) and not list(tmp_path.iterdir())
    export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", verify=False)
    types = {
        initializer.name: initializer.data_type for initializer in onnx.load(str(tmp_path / "m.onnx")).graph.initializer
    }
    assert types["a.weight"] == onnx.TensorProto.BFLOAT16


# Whole or not at all ------------------------------------------------------------------------------------------------


def test_weights_beside_the_graph(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(8, 300), nn.Linear(300, 2)), torch.randn(2, 8)
    for external in (True, 100):
        report = export_onnx(model, tmp_path / "m.onnx", x, external_data=external)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data", "m.onnx.manifest.json"]
        assert report.nbytes == sum((tmp_path / name).stat().st_size for name in ("m.onnx", "m.onnx.data"))
        assert_near(session(report.path).run(None, {"input": x.numpy()}), expected(model, x))
    for external in (False, 10**9, None):
        export_onnx(model, tmp_path / "m.onnx", x, external_data=external, verify=False)
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.onnx", "m.onnx.manifest.json"]


class Branches(Line):
    """It can't be exported, because its branch depends on values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if x.sum() > 0 else -self.a(x)


@pytest.mark.parametrize("adapters", ["merged", "constant", "slots"])
def test_a_model_that_cant_be_exported_is_untouched(adapters: Any, tmp_path: Path, capfd: Any) -> None:
    model = adapted(Branches(), ["a"], 2)
    layer = model.get_submodule("a").train()
    layer.register_forward_hook(lambda *_: None)
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="can't be exported"):
        export_onnx(model, tmp_path / "m.onnx", torch.randn(2, 4), adapters=adapters)
    assert before.differences(model) == [] and not list(tmp_path.iterdir())
    assert "aten" not in capfd.readouterr().err  # the graph so far, which torch.export prints


@pytest.mark.parametrize("adapters", ["merged", "constant", "slots"])
def test_a_disk_that_fails_leaves_all_as_it_was(adapters: Any, tmp_path: Path, monkeypatch: Any) -> None:
    import onnx_ir as ir

    model, x = net(2)
    (tmp_path / "m.onnx").write_text("older")
    before = Snapshot(model)

    def full(model: Any, path: str, **how: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", full)
    with pytest.raises(SurgeryError, match="can't be written(.|\n)*No space left"):
        export_onnx(model, tmp_path / "m.onnx", x, adapters=adapters)
    assert before.differences(model) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"] and (tmp_path / "m.onnx").read_text() == "older"


def test_a_comparison_that_fails_leaves_the_older_file(tmp_path: Path) -> None:
    model, x = net(2)
    (tmp_path / "m.onnx").write_text("older")
    before = Snapshot(model)
    with pytest.raises(SurgeryError, match="does not compute what the model does"):
        export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", atol=1e-12)
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.onnx"] and (tmp_path / "m.onnx").read_text() == "older"
    assert before.differences(model) == []


def test_a_model_that_trains_is_exported_as_it_evaluates(tmp_path: Path) -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), ["0"], 2).train()
    before, x = Snapshot(model), torch.randn(2, 4)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    assert before.differences(model) == []
    assert ("", "Dropout") not in operations(report.path)


def test_settings_that_are_wrong_are_told(tmp_path: Path) -> None:
    model, x = net(2)
    for how, words in (
        ({"adapters": "all"}, "is not one of 'merged', 'constant', 'slots'"),
        ({"optimize_for": "cuda"}, "optimize_for='cuda' is not one of"),
        ({"optimize_for": "ort", "optimize": False}, "needs optimize=True"),
        ({"names": "c"}, "'c'"),
    ):
        with pytest.raises(SurgeryError, match=words):
            export_onnx(model, tmp_path / "m.onnx", x, **how)  # type: ignore[arg-type]
    with pytest.raises(SurgeryError, match="is a folder"):
        export_onnx(model, tmp_path, x)

    class Graded(Line):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.a(x) - labels

    with pytest.raises(SurgeryError, match="has labels"):
        export_onnx(Graded(), tmp_path / "m.onnx", {"x": torch.ones(2, 4), "labels": torch.ones(2, 4)})


def test_tied_weights_are_in_the_file_once(tmp_path: Path) -> None:
    model = adapted(Tied(), ["a"], 2)
    export_onnx(model, tmp_path / "m.onnx", torch.randint(0, 10, (2, 5)), adapters="slots")
    arrays = read_initializers(tmp_path / "m.onnx")
    assert [name for name, array in arrays.items() if array.shape in ((10, 8), (8, 10))] in (
        ["words.weight"], ["head.weight"],
    )  # fmt: skip


def test_the_manifest_stands_in_the_file_and_beside_it(tmp_path: Path) -> None:
    model, x = net(2)
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots")
    metadata = {prop.key: prop.value for prop in onnx.load(str(report.path)).metadata_props}
    assert json.loads(metadata["surgery.manifest"]) == report.manifest
    assert json.loads((tmp_path / "m.onnx.manifest.json").read_text()) == report.manifest


def test_a_cache_that_has_lost_what_left_its_window(tmp_path: Path) -> None:
    """A file's cache has the whole text; the live model's, with a window of four, the last three positions."""
    from tests.support.families import FAMILIES

    model, example = FAMILIES["mistral"].make().eval(), FAMILIES["mistral"].inputs()
    ids = example["input_ids"]
    with torch.no_grad():
        past = model(input_ids=ids[:, :5]).past_key_values
    inputs = {"input_ids": ids[:, 5:], "attention_mask": torch.ones_like(ids), "past_key_values": past}
    with pytest.raises(SurgeryError, match="(?s)keeps only a window.*last 3 of 5 positions.*cache=True"):
        export_onnx(model, tmp_path / "m.onnx", inputs)
    assert type(past.layers[0]).__name__ == "DynamicSlidingWindowLayer" and not list(tmp_path.iterdir())


class Placed(nn.Module):
    """Looks up positions in a square weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.a = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.a(self.table[ids])


def test_a_weight_that_is_indexed_keeps_its_name_and_layout(tmp_path: Path) -> None:
    """Indexing is exported with a Transpose that changes nothing; a square weight has the same shape transposed."""
    model = adapted(Placed(), ["a"], 2)
    report = export_onnx(model, tmp_path / "m.onnx", torch.randint(8, (3, 5)), adapters="slots")
    assert_weights(model, report.path)
    assert report.parity is not None and report.parity.weights == 3


def test_a_text_without_a_mask_has_none_in_the_graph(tmp_path: Path) -> None:
    """transformers omits the mask of full attention, too; some of its models do not accept one."""
    from tests.support import tiny

    model, example = tiny.bert(LAYERS)
    adapted(model.eval(), "query", 2)
    export_onnx(model, tmp_path / "none.onnx", {"input_ids": example["input_ids"]}, adapters="slots")
    export_onnx(model, tmp_path / "one.onnx", {**example, "attention_mask": torch.ones_like(example["input_ids"])})
    where = ("", "Where")
    assert where not in operations(tmp_path / "none.onnx") and where in operations(tmp_path / "one.onnx")
