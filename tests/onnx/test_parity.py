"""The comparison fails for changed files and exchanged adapters, and refuses models with random outputs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from surgery import (
    SurgeryError,
    adapter_state_dict,
    adapters,
    apply_rules,
    deactivate,
    export_onnx,
    load_adapter,
    load_adapter_state_dict,
    verify_onnx,
)
from surgery.errors import ParityError
from surgery.onnx import OnnxRunner, convert_peft, export_adapter
from surgery.onnx.checking.parity import difference
from surgery.rules import LoraRule, TrainRule
from tests.support import tiny
from tests.support.onnx_checks import TOLERANCE, adapted, assert_near, by_hand, expected, session
from tests.support.onnx_plain import Drawing, Line, Net
from tests.support.sampling import LAYERS

onnx: Any = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, torch.Tensor, Path]:
    torch.manual_seed(0)
    model, x = adapted(Net(), ["a", "conv", "b"], 2, 4), torch.randn(2, 5, 8)
    path = tmp_path_factory.mktemp("whole") / "m.onnx"
    export_onnx(model, path, x, adapters="slots")
    return model, x, path


def change_file(path: Path, folder: Path, change: Any) -> Path:
    """A copy of a file with its graph changed."""
    loaded = onnx.load(str(path))
    change(loaded.graph)
    onnx.save(loaded, str(folder / "m.onnx"))
    return folder / "m.onnx"


def initializer(graph: Any, name: str) -> Any:
    return next(candidate for candidate in graph.initializer if candidate.name == name)


def set_array(tensor: Any, array: np.ndarray) -> None:
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))


@pytest.mark.parametrize("name", ["a.weight", "conv.weight", "b.bias"])
def test_one_bit_of_a_weight(name: str, exported: Any, tmp_path: Path) -> None:
    model, x, path = exported

    def change(graph: Any) -> None:
        array = onnx.numpy_helper.to_array(initializer(graph, name)).copy()
        array.view(np.uint32).flat[0] ^= 1
        set_array(initializer(graph, name), array)

    with pytest.raises(ParityError, match="other weights than the model") as caught:
        verify_onnx(change_file(path, tmp_path, change), model, x)
    assert caught.value.where == name


def test_a_weight_under_another_name_changes_outputs(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported

    def change(graph: Any) -> None:
        array = onnx.numpy_helper.to_array(initializer(graph, "b.bias")) + np.float32(0.01)
        initializer(graph, "b.bias").name = "hidden"
        set_array(initializer(graph, "hidden"), array)
        for node in graph.node:
            node.input[:] = ["hidden" if name == "b.bias" else name for name in node.input]

    with pytest.raises(ParityError, match="does not compute what the model does") as caught:
        verify_onnx(change_file(path, tmp_path, change), model, x)
    worst = caught.value.report.worst
    assert worst.output == "output" and worst.difference > 100 * worst.tolerance
    assert {comparison.adapter for comparison in caught.value.report.compared if not comparison.ok} == {
        "base",
        "a",
        "b",
    }


def test_an_operation_that_was_exchanged(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported

    def change(graph: Any) -> None:
        next(node for node in graph.node if node.op_type == "Relu").op_type = "Tanh"

    with pytest.raises(ParityError, match="does not compute"):
        verify_onnx(change_file(path, tmp_path, change), model, x)


def test_a_slot_that_was_renamed(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported

    def change(graph: Any) -> None:
        for value in (*graph.input, *graph.initializer):
            value.name = value.name.replace("a.adapters.slot.A", "a.lora_A")
        for node in graph.node:
            node.input[:] = ["a.lora_A" if name == "a.adapters.slot.A" else name for name in node.input]

    with pytest.raises(ParityError, match="lacks slots that its manifest names") as caught:
        verify_onnx(change_file(path, tmp_path, change), model, x)
    assert caught.value.why == "a.adapters.slot.A"


def test_a_slot_that_became_a_constant(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported

    def change(graph: Any) -> None:
        remaining = [value for value in graph.input if value.name != "b.adapters.slot.B"]
        del graph.input[:]
        graph.input.extend(remaining)

    with pytest.raises(ParityError, match="lacks slots"):
        verify_onnx(change_file(path, tmp_path, change), model, x)


def test_default_that_is_no_base(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported

    def change(graph: Any) -> None:
        for key, array in (("A", np.ones((1, 8), np.float32)), ("B", np.ones((16, 1), np.float32))):
            set_array(initializer(graph, f"a.adapters.slot.{key}"), array)

    with pytest.raises(ParityError, match="adapter base"):
        verify_onnx(change_file(path, tmp_path, change), model, x)


def test_adapters_that_were_exchanged(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported
    files = {name: export_adapter(model, name, path, tmp_path / f"{name}.onnx_adapter") for name in ("a", "b")}
    assert verify_onnx(path, model, x, files).ok
    with pytest.raises(ParityError, match="adapter [ab]"):
        verify_onnx(path, model, x, {"a": files["b"], "b": files["a"]})
    constant = tmp_path / "m.onnx"
    export_onnx(model, constant, x, adapters="constant", names="a")
    with pytest.raises(ParityError, match="does not compute"):
        verify_onnx(constant, model, x, "b")


def test_a_file_of_another_model(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported
    torch.manual_seed(1)
    with pytest.raises(ParityError, match="other weights"):
        verify_onnx(path, adapted(Net(), ["a", "conv", "b"], 2), x)


def test_how_much_each_adapter_moves_is_told(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(2, 5, 8)
    apply_rules(model, [LoraRule("a", rank=2)], adapter="fresh")
    apply_rules(model, [LoraRule("a", rank=2, init="random")], adapter="trained")
    report = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots").parity
    assert report is not None and report.moved["fresh"] == 0 and report.moved["trained"] > 0.01
    assert [notice for notice in report.notices if notice.startswith("fresh moves the outputs by 0.0e+00")]
    assert not any("trained" in notice for notice in report.notices) and "shows nothing about this adapter" in str(
        report
    )


@pytest.mark.parametrize("order", [("red", "blue"), ("blue", "red")])
@pytest.mark.parametrize("how", ["slots", "merged", "constant"])
def test_an_adapter_that_changed_the_base_at_its_start(how: Any, order: tuple[str, str], tmp_path: Path) -> None:
    """PiSSA can't be idle: other adapters are compared, merged and exported on the original base."""
    base, x = nn.Sequential(nn.Linear(8, 6)).eval(), torch.randn(4, 8)
    model, alone = copy.deepcopy(base), {name: copy.deepcopy(base) for name in order}
    for name in order:
        rule = LoraRule("0", rank=3, init="pissa" if name == "red" else "random")
        apply_rules(alone[name], rule, adapter=name)
        apply_rules(model, rule, adapter=name)
        tensors = {key: tensor * 1.5 for key, tensor in adapter_state_dict(alone[name], name).items()}
        load_adapter_state_dict(alone[name], tensors, name)
        load_adapter_state_dict(model, tensors, name)
    for name in order:
        report = export_onnx(model, tmp_path / "m.onnx", x, adapters=how, names=None if how == "slots" else name)
        runner, fed = OnnxRunner(report.path), None
        if how == "slots":
            assert {comparison.adapter for comparison in report.parity.compared} == {"base", *order}  # type: ignore[union-attr]
            assert_near([runner.run({"input": x.numpy()})["output"]], expected(base, x))
            runner.load(name, export_adapter(model, name, report.path, tmp_path / "a.onnx_adapter"))
            fed = name
        assert_near([runner.run({"input": x.numpy()}, fed)["output"]], expected(alone[name], x))


def test_another_number_of_outputs_is_an_error_at_the_edges_too(tmp_path: Path) -> None:
    """The file has one output; the model returns a second one if its inputs are all zeros."""

    class More(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x + 1,) if bool(x.any()) else (x + 1, x)

    class One(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return (x + 1,)

    x = torch.randn(3, 4)
    path = export_onnx(One(), tmp_path / "m.onnx", x).path
    with pytest.raises(ParityError, match="the file has 1 outputs, and the model 2") as caught:
        verify_onnx(path, More(), x)
    assert caught.value.where is not None and "zeros" in caught.value.where


def test_outputs_that_are_drawn_are_not_compared(tmp_path: Path) -> None:
    report = export_onnx(Drawing(), tmp_path / "m.onnx", torch.randn(2, 4)).parity
    assert report is not None and {comparison.output for comparison in report.compared} == {"output_0"}
    assert report.notices == ["output_1: the model draws it at random"]

    class Dice(Line):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(x) + torch.randn_like(x)

    with pytest.raises(ParityError, match="draws random numbers in evaluation mode"):
        export_onnx(Dice(), tmp_path / "dice.onnx", torch.randn(2, 4))
    assert not (tmp_path / "dice.onnx").exists()


def test_differences_are_of_the_largest_number() -> None:
    t, inf, nan = torch.tensor, float("inf"), float("nan")
    assert difference(t([1000.0, 0.0]), np.array([1000.0, 1.0])) == 1e-3
    assert difference(t([0.5, 0.0]), np.array([0.5, 0.25])) == 0.25
    assert difference(t([nan, inf, -inf, 1.0]), np.array([nan, inf, -inf, 1.0])) == 0
    assert difference(t([nan, 1.0]), np.array([1.0, nan])) == inf
    assert difference(t([inf, 1.0]), np.array([-inf, 1.0])) == inf
    assert difference(t([1.0]), np.array([inf])) == inf
    assert difference(t([1.0]), np.array([[1.0]])) == inf
    assert difference(t([], dtype=torch.float32), np.zeros(0)) == 0
    assert difference(t([True]), np.array([False])) == 1


# The three failures of another tool's extracted adapters ------------------------------------------------------------


def peft_model() -> tuple[Any, nn.Module]:
    """PEFT's LoRA whose sites have ranks and alphas of their own, on a module of known weights."""
    peft: Any = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    config = peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=["0", "2", "4"], rank_pattern={"2": 7, "4": 1},
        alpha_pattern={"0": 3, "4": 11}, init_lora_weights=False,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(base, config).eval(), base


def test_ranks_and_alphas_of_each_site_and_names_that_are_the_files(tmp_path: Path) -> None:
    theirs, _ = peft_model()
    x = torch.randn(3, 8)
    wanted = expected(theirs.get_base_model(), x)  # PEFT's own forward
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.save_pretrained(tmp_path / "peft")
    own = theirs.unload().eval()
    base = expected(own, x)
    load_adapter(own, tmp_path / "peft", adapter="theirs")
    apply_rules(own, [LoraRule(["0", "4"], rank=2, init="random")], adapter="ours")
    path = tmp_path / "m.onnx"
    report = export_onnx(own, path, x, adapters="slots")

    # No input is fed twice.
    names = [value.name for value in onnx.load(str(path)).graph.input]
    assert len(names) == len(set(names)) == 7

    # The names in a converted checkpoint are those in the file: onnxruntime's own loader takes it.
    import onnxruntime

    file = convert_peft(tmp_path / "peft", path, tmp_path / "theirs.onnx_adapter")
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(tmp_path / "theirs.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    run = session(path)
    feed = {"input": x.numpy()}
    assert_near(run.run(None, feed, options), wanted)
    assert_near(run.run(None, feed), base)
    assert report.parity is not None and report.parity.moved["theirs"] > 1e3 * TOLERANCE

    # Sites of ranks 4, 7 and 1 after sites of rank 2, and back, in one session.
    runner = OnnxRunner(path)
    runner.load("theirs", tmp_path / "theirs.onnx_adapter")
    runner.load("ours", by_hand(own, "ours"))
    first = runner.run(feed, adapter="ours")["output"]
    assert_near([runner.run(feed, adapter="theirs")["output"]], wanted)
    assert np.array_equal(runner.run(feed, adapter="ours")["output"], first)
    assert file is not None


def test_a_file_that_is_no_export_is_told(tmp_path: Path) -> None:
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "m.onnx"))
    with pytest.raises(SurgeryError, match="no manifest"):
        verify_onnx(tmp_path / "m.onnx", Line(), torch.randn(2, 4))


# What it is called with ---------------------------------------------------------------------------------------------


def test_a_file_with_a_cache_is_compared_by_the_example_of_its_export(tmp_path: Path) -> None:
    model, example = tiny.llama(LAYERS)
    adapted(model, ["q_proj"], 2)
    example = {"input_ids": example["input_ids"], "attention_mask": torch.ones_like(example["input_ids"])}
    example["position_ids"] = torch.arange(example["input_ids"].shape[1]).expand_as(example["input_ids"]).contiguous()
    report = export_onnx(model, tmp_path / "m.onnx", example, adapters="slots", cache=True)
    assert report.parity is not None and [comparison.adapter for comparison in report.parity.decoded] == ["base", "a"]
    file = export_adapter(model, "a", report.path, tmp_path / "a.onnx_adapter")
    verified = verify_onnx(report.path, model, example, {"a": file})
    assert [comparison.adapter for comparison in verified.decoded] == ["base", "a"] and len(verified.compared) == len(
        report.parity.compared
    )
    with pytest.raises(SurgeryError, match="(?s)not those of the file.*it takes|the file takes"):
        verify_onnx(report.path, model, {"input_ids": example["input_ids"]})
    with pytest.raises(SurgeryError, match="(?s)'b' can't be compared.*load_adapter"):
        verify_onnx(report.path, model, example, {"b": file})


def test_a_text_of_one_length_is_not_decoded(tmp_path: Path) -> None:
    model, example = tiny.llama(LAYERS)
    report = export_onnx(model, tmp_path / "m.onnx", example, cache=True, dynamic=False)
    assert report.parity is not None and not report.parity.decoded
    assert "base: not decoded, since the text's length is fixed" in report.parity.notices


def test_weights_that_were_left_behind(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(2, 64)
    (tmp_path / "moved").mkdir()
    path = export_onnx(model, tmp_path / "m.onnx", x, external_data=True).path.rename(tmp_path / "moved/m.onnx")
    with pytest.raises(SurgeryError, match="(?s)weights are missing.*m.onnx.data"):
        verify_onnx(path, model, x)
    with pytest.raises(SurgeryError, match="(?s)can't open m.onnx.*beside it"):
        OnnxRunner(path)


def test_defaults_that_were_left_behind(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).eval(), torch.randn(2, 4)
    for name, rule in (("a", TrainRule("0")), ("b", LoraRule("1", rank=2, init="random"))):
        apply_rules(model, rule, adapter=name)
        deactivate(model)
    path = export_onnx(model, tmp_path / "m.onnx", x, adapters="slots", slots_as="inputs").path
    (tmp_path / "m.onnx.defaults.onnx_adapter").unlink()
    report = verify_onnx(path, model, x)
    assert {result.adapter for result in report.compared} == {"a"}
    start = "b can't be compared: the file of defaults lacks 0.adapters.slot."
    assert any(notice.startswith(start) for notice in report.notices)


def test_an_adapter_of_another_name(exported: Any, tmp_path: Path) -> None:
    model, x, path = exported
    names = list(adapters(model))[:2]
    file = export_adapter(model, names[1], path, tmp_path / "other.onnx_adapter")
    with pytest.raises(ParityError, match="check that the adapter's file was made from"):
        verify_onnx(path, model, x, {names[0]: file})
