"""Adapters in onnxruntime's format: other programs read them, damage is found, PEFT's checkpoints are converted."""

from __future__ import annotations

import copy
import json
import random as chance
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from surgery import LoadError, SurgeryError
from tests.support import ROOT
from tests.support.peft_slots import check_peft, export_slots, onnx, peft_of, peft_on, quietly

onnxruntime = pytest.importorskip("onnxruntime")

from surgery.onnx import Manifest, OnnxRunner, convert_peft, read_adapter, write_adapter  # noqa: E402
from surgery.onnx.conversion import converters  # noqa: E402
from surgery.onnx.conversion.conversion_state import Conversion  # noqa: E402
from surgery.onnx.runtime.metadata import metadata_of  # noqa: E402
from tests.support import slotted  # noqa: E402
from tests.support.sampling import LAYERS, onnx_cases  # noqa: E402
from tests.support.slotted import Build, slot  # noqa: E402

X = slotted.random(50, 5, 4)


# Files ------------------------------------------------------------------------------------------------------------


def same(arrays: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return arrays.keys() == other.keys() and all(
        arrays[name].dtype == other[name].dtype and arrays[name].tobytes() == other[name].tobytes()
        and arrays[name].shape == other[name].shape for name in arrays
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [(2, 3), (1, 7), (0, 2), (4, None)])
def test_onnxruntime_itself_loads_what_was_written(tmp_path: Path, ranks: Any) -> None:
    file = slotted.net(tmp_path / "net.onnx")
    tensors = slotted.adapter(60, *ranks)
    path = write_adapter(tmp_path / "a.onnx_adapter", tensors, Manifest.read(file))
    assert same(read_adapter(path, Manifest.read(file)), tensors)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    loaded, run = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(path))
    run.add_active_adapter(loaded)
    (y,) = session.run(["y"], {"x": X}, run)
    np.testing.assert_allclose(y, slotted.net_in_numpy(X, tensors), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_kept_to_the_bit(tmp_path: Path, dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    build = Build()
    build.site("a", "lora", {"A": ([None, 3], dtype), "B": ([2, None], dtype)})
    file = slotted.identities(tmp_path / "f.onnx", build)
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    tensors = {
        slot("a", "A"): slotted.random(1, 2, 3).astype(kind),
        slot("a", "B"): slotted.random(2, 2, 2).astype(kind),
    }
    path = write_adapter(tmp_path / "a.onnx_adapter", tensors, Manifest.read(file))
    assert same(read_adapter(path, Manifest.read(file)), tensors)
    runner = OnnxRunner(file)
    runner.load("a", path)
    outputs = runner.run({"x": np.zeros(1, np.float32)}, "a")
    assert all(outputs[f"out:{name}"].tobytes() == tensor.tobytes() for name, tensor in tensors.items())


def test_all_that_does_not_fit_is_listed_and_nothing_is_written(tmp_path: Path) -> None:
    manifest = Manifest.read(slotted.net(tmp_path / "net.onnx"))
    path = tmp_path / "a.onnx_adapter"
    path.write_bytes(b"before")
    wrong = {
        slot("frist", "A"): np.ones((2, 4), np.float32), slot("first", "A"): np.ones((2, 4), np.float32),
        slot("second", "A"): np.ones((2, 5), np.float32), slot("second", "B"): np.ones((3, 2), np.float64),
    }  # fmt: skip
    with pytest.raises(LoadError) as caught:
        write_adapter(path, wrong, manifest)
    message = str(caught.value)
    assert len(caught.value.problems) == 4 and "a.onnx_adapter can't be written: 4 problems" in message
    assert "did you mean 'first.adapters.slot.A'" in message and "it has A, and lacks B" in message
    assert "it is (2, 5), and the slot (any, 6)" in message and "it is float64, and the slot float32" in message
    assert path.read_bytes() == b"before" and [entry.name for entry in tmp_path.iterdir()] == ["net.onnx", path.name]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update({slot("first", "B"): np.ones((6, 3), np.float32)}), "different ranks"),
        (lambda t: t[slot("first", "A")].__setitem__((0, 0), np.nan), "not finite"),
        (lambda t: t[slot("second", "B")].__setitem__((0, 0), np.inf), "not finite"),
        (lambda t: t.update({slot("first", "A"): np.ones(4, np.float32)}), "another shape"),
        (lambda t: t.update({slot("first", "A"): [[1.0]]}), "not a numpy array"),
        (lambda t: t.clear(), "no tensors"),
    ],
)
def test_one_thing_that_does_not_fit(tmp_path: Path, change: Any, message: str) -> None:
    manifest, tensors = Manifest.read(slotted.net(tmp_path / "net.onnx")), slotted.adapter(60)
    change(tensors)
    with pytest.raises(LoadError, match=message):
        write_adapter(tmp_path / "a.onnx_adapter", tensors, manifest)


def test_adapters_of_another_base_and_of_other_slots_are_refused(tmp_path: Path) -> None:
    file = slotted.net(tmp_path / "net.onnx")
    path = write_adapter(tmp_path / "a.onnx_adapter", slotted.adapter(60), Manifest.read(file))
    data = Manifest.read(file).to_dict()
    data["base"]["numbers"]["w"]["values"][1] += 0.5
    with pytest.raises(LoadError, match="made for another base"):
        read_adapter(path, Manifest.of(data))
    more = Manifest.read(slotted.net(tmp_path / "more.onnx", b_bias=True))
    with pytest.raises(LoadError, match="made for another base, or for a file with other slots") as caught:
        OnnxRunner(tmp_path / "more.onnx").load("a", path)
    assert "it has A, B, and lacks B_bias" in str(caught.value)
    assert more.check(slotted.adapter(60))


def test_a_file_of_another_program_is_refused(tmp_path: Path) -> None:
    manifest = Manifest.read(slotted.net(tmp_path / "net.onnx"))
    adapter_file = onnxruntime.AdapterFormat()
    adapter_file.set_parameters(
        {n: onnxruntime.OrtValue.ortvalue_from_numpy(t) for n, t in slotted.adapter(60).items()}
    )
    adapter_file.export_adapter(str(tmp_path / "theirs.onnx_adapter"))
    with pytest.raises(LoadError, match="other programs write no checksum"):
        read_adapter(tmp_path / "theirs.onnx_adapter", manifest)
    with pytest.raises(LoadError, match="No such file"):
        read_adapter(tmp_path / "none.onnx_adapter", manifest)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, path = Manifest.read(slotted.net(tmp_path / "net.onnx")), tmp_path / "a.onnx_adapter"
    write_adapter(path, slotted.adapter(60), manifest)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(SurgeryError, match="no space left"):
            write_adapter(path, slotted.adapter(70), manifest)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 2
    with pytest.raises(SurgeryError, match="can't be written"):
        write_adapter(tmp_path / "no" / "a.onnx_adapter", slotted.adapter(70), manifest)


DAMAGE = """
import random, struct, sys
from pathlib import Path
from surgery import LoadError
from surgery.onnx import Manifest, OnnxRunner, read_adapter

folder, count = Path(sys.argv[1]), int(sys.argv[2])
runner = OnnxRunner(folder / "net.onnx")
good = (folder / "a.onnx_adapter").read_bytes()
expected = {name: tensor.tobytes() for name, tensor in read_adapter(folder / "a.onnx_adapter", runner.manifest).items()}
numbers = [0, 1, 3, 8, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, len(good), 1 << 16]
refused = 0
for seed in range(count):
    draw, data = random.Random(seed), bytearray(good)
    for _ in range(draw.choice([1, 1, 1, 3])):
        kind = draw.random()
        if kind < 0.4:
            data[draw.randrange(len(data))] = draw.randrange(256)
        elif kind < 0.8:
            struct.pack_into("<I", data, draw.randrange(len(data) - 3), draw.choice(numbers))
        elif kind < 0.9:
            del data[draw.randrange(4, len(data)):]
            data += bytes(4)
        else:
            start = draw.randrange(len(data) - 8)
            data[start:start] = data[start : start + draw.randrange(64)]
    (folder / "damaged").write_bytes(data)
    try:
        runner.load(f"d{seed}", folder / "damaged")
    except LoadError:
        refused += 1
        assert not runner.adapters
        continue
    found = read_adapter(folder / "damaged", runner.manifest)
    assert {name: tensor.tobytes() for name, tensor in found.items()} == expected, seed
    runner.unload(f"d{seed}")
print(refused)
"""


def test_damaged_files_are_refused_or_whole_and_never_crash(tmp_path: Path) -> None:
    file = slotted.net(tmp_path / "net.onnx")
    write_adapter(tmp_path / "a.onnx_adapter", slotted.adapter(60), Manifest.read(file))
    words = [sys.executable, "-c", DAMAGE, str(tmp_path), "600"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 500


# Manifests --------------------------------------------------------------------------------------------------------


def test_a_manifest_is_the_same_from_the_file_a_session_and_a_sidecar(tmp_path: Path) -> None:
    file = slotted.decoder(tmp_path / "net.onnx")
    manifest = Manifest.read(file)
    session = onnxruntime.InferenceSession(slotted.decoder(tmp_path / "again.onnx", required=True))
    (tmp_path / "net.onnx.manifest.json").write_text(manifest.to_json())
    assert manifest == Manifest.read(tmp_path / "net.onnx.manifest.json") == Manifest.of(manifest.to_dict())
    assert Manifest.read(session).slots_as == "inputs" and Manifest.read(session).slots == manifest.slots
    assert [declared.dim for declared in manifest.slots[:2]] == ["query.rank"] * 2 and manifest.slots[0].shape == (
        None,
        slotted.SIZE,
    )
    assert metadata_of(file).keys() == {"surgery.manifest"}


def test_what_is_no_manifest(tmp_path: Path) -> None:
    build = Build()
    file = slotted.identities(tmp_path / "f.onnx", build)
    model = onnx.load(file)
    del model.metadata_props[:]
    onnx.save(model, file)
    with pytest.raises(SurgeryError, match="export_onnx did not write it"):
        Manifest.read(file)
    with pytest.raises(SurgeryError, match="export_onnx did not write it"):
        OnnxRunner(file)
    (tmp_path / "text.onnx").write_text("no model")
    for path, message in ((tmp_path / "text.onnx", "not an ONNX file"), (tmp_path / "none.onnx", "can't be read")):
        with pytest.raises(SurgeryError, match=message):
            Manifest.read(path)
    data = Manifest.read(slotted.net(tmp_path / "net.onnx")).to_dict()
    with pytest.raises(SurgeryError, match="later release"):
        Manifest.of({**data, "version": 2})
    for text, message in (("{", "not JSON"), ("[]", "its format"), ('{"format": 1}', "its format")):
        with pytest.raises(SurgeryError, match=message):
            Manifest.from_json(text)
    with pytest.raises(SurgeryError, match="it lacks slots, opset"):
        Manifest.of({name: value for name, value in data.items() if name not in ("slots", "opset")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(adapters="some"), "adapters='some' is not one of"),
        (lambda d: d.update(slots={}), "slots is"),
        (lambda d: d["slots"][0].update(shape=[None, -1]), "has the shape"),
        (lambda d: d["slots"][0].update(free=[1]), "has the free axes"),
        (lambda d: d["slots"][0].update(dtype="complex"), "dtype='complex'"),
        (lambda d: d["slots"][0].update(default="ones"), "by default"),
        (lambda d: d["slots"][0].update(site=3), "slot 0 is"),
        (lambda d: d["slots"].append(dict(d["slots"][0])), "the same name"),
        (lambda d: d["sites"].pop(), "is at no site"),
        (lambda d: d["sites"][0]["slots"].append("x"), "which is not a slot of this site"),
        (lambda d: d.update(inputs=[1]), "inputs are"),
        (lambda d: d.update(cache=[{"past": "x"}]), "the cache has"),
    ],
)
def test_a_damaged_manifest_tells_what_is_wrong(tmp_path: Path, change: Any, message: str) -> None:
    data = json.loads(Manifest.read(slotted.net(tmp_path / "net.onnx")).to_json())
    change(data)
    with pytest.raises(SurgeryError, match=message):
        Manifest.of(data)


def test_nothing_in_a_manifest_or_a_file_is_believed(tmp_path: Path) -> None:
    """Random values and bytes give a SurgeryError or a valid manifest."""
    data = json.loads(Manifest.read(slotted.decoder(tmp_path / "net.onnx")).to_json())
    draw = chance.Random(0)
    values: list[Any] = [None, [], {}, "", "x", 0, -1, 1e300, True, [None], [{}], {"a": []}]
    for _ in range(500):
        broken = copy.deepcopy(data)
        place: Any = broken
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = draw.choice(keys)
            if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.3:
                place[key] = draw.choice(values)
                break
            place = place[key]
        try:
            Manifest.of(broken).check({slot("query", "A"): np.ones((2, 8), np.float32)})
        except SurgeryError:
            pass
    good = (tmp_path / "net.onnx").read_bytes()
    for _ in range(500):
        raw = bytearray(good)
        raw[draw.randrange(len(raw))] = draw.randrange(256)
        (tmp_path / "broken.onnx").write_bytes(raw[: draw.choice([len(raw), draw.randrange(len(raw))])])
        try:
            Manifest.read(tmp_path / "broken.onnx")
        except SurgeryError:
            pass


# PEFT's checkpoints -----------------------------------------------------------------------------------------------


class Net(nn.Module):
    """The same net as slotted.net, in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        for module, weight, bias in ((self.first, slotted.W1, slotted.B1), (self.second, slotted.W2, slotted.B2)):
            module.load_state_dict({"weight": torch.from_numpy(weight.copy()), "bias": torch.from_numpy(bias.copy())})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).relu())


def lora(**fields: Any) -> Any:
    peft = peft_of()
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 7, "target_modules": ["first", "second"], **fields})


LORAS = {
    "plain": {},
    "patterns": {"rank_pattern": {"first": 2}, "alpha_pattern": {"^second": 3.5}},
    "rslora": {"use_rslora": True, "rank_pattern": {"fir.*": 3}},
    "lora_bias": {"lora_bias": True},
    "dora": {"use_dora": True, "rank_pattern": {"second": 1}},
    "one target": {"target_modules": "sec.*"},
    "excluded": {"exclude_modules": ["first"]},
    "eva": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("fields", LORAS.values(), ids=LORAS)
def test_a_converted_lora_computes_what_peft_does(tmp_path: Path, fields: dict[str, Any]) -> None:
    wide = {"gain": "use_dora" in fields, "b_bias": "lora_bias" in fields}
    build = Build()
    x = build.input("x", "float32", ["batch", 4])
    y = build.node("Relu", build.linear(x, "first", slotted.W1, slotted.B1, slots=True, **wide))
    # DoRA's gain is not on the bias of the module, and this is
    y = build.linear(y, "second", slotted.W2, slotted.B2, slots=True, **wide)
    build.output(y, "y", "float32", ["batch", 3])
    file = build.save(tmp_path / "net.onnx")
    peft_model = peft_on(Net(), lora(**fields), tmp_path / "peft")
    runner = OnnxRunner(file)
    runner.load("a", convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"))
    expected = peft_model(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(runner.run({"x": X}, "a")["y"], expected, atol=2e-5, rtol=1e-5)
    np.testing.assert_allclose(runner.run({"x": X})["y"], slotted.net_in_numpy(X), atol=1e-5)


def test_the_bases_own_weight_in_a_checkpoint_must_be_the_files(tmp_path: Path) -> None:
    """PEFT saves the base's embeddings with an adapter that targets them."""
    from safetensors.torch import load_file, save_file

    file = slotted.net(tmp_path / "net.onnx")
    peft_model = peft_on(net := Net(), lora(), tmp_path / "peft")
    tensors, path = (
        load_file(str(tmp_path / "peft/adapter_model.safetensors")),
        tmp_path / "peft/adapter_model.safetensors",
    )
    key, weight = "base_model.model.first.base_layer.weight", net.first.weight.detach().clone()
    save_file({**tensors, key: weight.half()}, str(path))
    runner = OnnxRunner(file)
    runner.load("a", convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"))
    expected = peft_model(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(runner.run({"x": X}, "a")["y"], expected, atol=2e-5, rtol=1e-5)
    save_file({**tensors, key: weight + 1}, str(path))
    with pytest.raises(SurgeryError, match="other embeddings than the exported base"):
        convert_peft(tmp_path / "peft", file, tmp_path / "b.onnx_adapter")


def test_slots_for_more_than_the_adapter_has_stay_neutral(tmp_path: Path) -> None:
    file = slotted.net(tmp_path / "net.onnx", gain=True, b_bias=True)
    peft_model = peft_on(Net(), lora(), tmp_path / "peft")
    runner = OnnxRunner(file)
    runner.load("a", convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"))
    expected = peft_model(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(runner.run({"x": X}, "a")["y"], expected, atol=2e-5, rtol=1e-5)


def test_dora_finds_weights_that_stand_transposed(tmp_path: Path) -> None:
    square = nn.Sequential(linear := nn.Linear(5, 5, bias=False))
    weight = linear.weight.detach().numpy().copy()
    build = Build(turned={"0.weight"})
    build.output(
        build.linear(build.input("x", "float32", ["b", 5]), "0", weight, slots=True, gain=True),
        "y",
        "float32",
        ["b", 5],
    )
    file = build.save(tmp_path / "net.onnx")
    peft_model = peft_on(square, lora(target_modules=["0"], use_dora=True), tmp_path / "peft")
    runner, x = OnnxRunner(file), slotted.random(3, 2, 5)
    runner.load("a", convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"))
    expected = peft_model(torch.from_numpy(x)).detach().numpy()
    np.testing.assert_allclose(runner.run({"x": x}, "a")["y"], expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spelling", ["today's", "with an adapter's name", "without a prefix"])
def test_checkpoints_in_half_precision_and_under_other_keys(tmp_path: Path, dtype: Any, spelling: str) -> None:
    peft_model = peft_on(Net(), lora(), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}
    changed = {
        "today's": lambda key: key,
        "with an adapter's name": lambda key: key.replace(".weight", ".default.weight"),
        "without a prefix": lambda key: key.removeprefix("base_model.model."),
    }[spelling]
    save_file({changed(key): tensor for key, tensor in tensors.items()}, path)
    for name, parameter in peft_model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype).float()
    onnx_file = slotted.net(tmp_path / "net.onnx")
    runner = OnnxRunner(onnx_file)
    runner.load("a", convert_peft(tmp_path / "peft", onnx_file, tmp_path / "a.onnx_adapter"))
    expected = peft_model(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(runner.run({"x": X}, "a")["y"], expected, atol=2e-5, rtol=1e-5)


class Further(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(11, 8), nn.Conv2d(4, 6, 3)
        self.attn, self.head, self.norm = nn.MultiheadAttention(8, 2), nn.Linear(8, 3), nn.BatchNorm1d(3)

    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        text = self.table(ids)
        text = text + self.attn(text, text, text, need_weights=False)[0]
        return self.norm(self.head(text).mean(1)), self.conv(image)


def test_embeddings_convolutions_attention_and_trained_modules(tmp_path: Path) -> None:
    model = Further().eval()
    plain = copy.deepcopy(model)
    fields = {"target_modules": ["table", "conv", "attn"], "modules_to_save": ["head", "norm"], "lora_alpha": 6}
    peft_model = peft_on(model, lora(**fields), tmp_path / "peft")
    build = Build()
    build.site("table", "lora", {"A": [None, 11], "B": [8, None]}, "Embedding")
    build.site("conv", "lora", {"A": [None, 4, 3, 3], "B": [6, None, 1, 1]}, "Conv2d")
    parts = {"A": [None, 8], "B": [24, None], "out_A": [None, 8], "out_B": [8, None]}
    build.site("attn", "lora", parts, "MultiheadAttention")
    build.site("head", "train", {"weight": slotted.random(1, 3, 8), "bias": slotted.random(2, 3)})
    norm = {name: np.ones(3, np.float32) for name in ("weight", "bias", "running_mean", "running_var")}
    build.site("norm", "train", norm, "BatchNorm1d")
    file = slotted.identities(tmp_path / "f.onnx", build)
    arrays = read_adapter(convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"), Manifest.read(file))
    tensors = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    with torch.no_grad():  # the base with the changes in its weights is PEFT's model
        plain.table.weight += (tensors[slot("table", "B")] @ tensors[slot("table", "A")]).T
        A, B = tensors[slot("conv", "A")], tensors[slot("conv", "B")]
        plain.conv.weight += (B.flatten(1) @ A.flatten(1)).view(6, 4, 3, 3)
        plain.attn.get_parameter("in_proj_weight").add_(tensors[slot("attn", "B")] @ tensors[slot("attn", "A")])
        plain.attn.out_proj.weight += tensors[slot("attn", "out_B")] @ tensors[slot("attn", "out_A")]
    for path in ("head", "norm"):
        own = {name: tensors[slot(path, name)] for name in ("weight", "bias")}
        own |= {name: tensors[slot(path, name)] for name in ("running_mean", "running_var") if path == "norm"}
        plain.get_submodule(path).load_state_dict(own, strict=False)
    inputs = torch.arange(10).view(2, 5), torch.from_numpy(slotted.random(3, 1, 4, 6, 6))
    for actual, other in zip(plain(*inputs), peft_model(*inputs), strict=True):
        torch.testing.assert_close(actual, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rank", [4, 3], ids=["groups in the slot", "none in the slot"])
def test_convolutions_with_groups(tmp_path: Path, rank: int) -> None:
    model = nn.ModuleDict({"conv": nn.Conv2d(4, 6, 3, groups=2)})
    weight = model["conv"].weight.detach().numpy().copy()  # type: ignore[operator]
    peft_model = peft_on(model, lora(target_modules=["conv"]), tmp_path / "peft")
    build = Build()
    B, words = ([6, None, 1, 1], {"B": "rank_of_a_group"} if rank == 4 else {})
    shapes = {"A": [None, 2, 3, 3], "B": B}
    build.site("conv", "lora", shapes, "Conv2d", by={"rule": "low-rank-slot", "rank": rank}, words=words)
    file = slotted.identities(tmp_path / "f.onnx", build)
    with pytest.raises(LoadError, match="reads channels of other groups"):
        convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter")
    layer = peft_model.base_model.model["conv"]
    A = layer.lora_A["default"].weight.data
    A[:2, 2:], A[2:, :2] = 0, 0  # each half of the rank reads its own group of channels
    with quietly():
        peft_model.save_pretrained(str(tmp_path / "peft"))
    arrays = read_adapter(convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"), Manifest.read(file))
    down, up = arrays[slot("conv", "A")].reshape(4, -1), arrays[slot("conv", "B")].reshape(6, -1)
    assert up.shape == ((6, 2) if rank == 4 else (6, 4))
    blocks = [up[:3] @ down[:2], up[3:] @ down[2:]] if rank == 4 else [up @ down]
    merged = torch.from_numpy(weight + np.concatenate(blocks).reshape(weight.shape))
    x = torch.from_numpy(slotted.random(1, 2, 4, 5, 5))
    expected = nn.functional.conv2d(x, merged, layer.base_layer.bias, groups=2)
    torch.testing.assert_close(layer(x), expected, atol=1e-4, rtol=1e-4)


def test_dora_on_embeddings_and_convolutions(tmp_path: Path) -> None:
    model = nn.ModuleDict({"table": nn.Embedding(11, 8), "conv": nn.Conv2d(4, 6, 3)})
    weights = {path: module.weight.detach().numpy().copy() for path, module in model.items()}  # type: ignore[operator]
    peft_model = peft_on(model, lora(target_modules=["table", "conv"], use_dora=True), tmp_path / "peft")
    build = Build()
    build.site("table", "lora", {"A": [None, 11], "B": [8, None], "gain": ([8], "float32", "ones")}, "Embedding")
    shapes = {"A": [None, 4, 3, 3], "B": [6, None, 1, 1], "gain": ([6], "float32", "ones")}
    build.site("conv", "lora", shapes, "Conv2d")
    for path, weight in weights.items():
        build.weight(f"{path}.weight", weight)
    file = slotted.identities(tmp_path / "f.onnx", build)
    arrays = read_adapter(convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"), Manifest.read(file))
    for path in weights:
        A, B, gain = (arrays[slot(path, name)] for name in ("A", "B", "gain"))
        if path == "table":
            merged = (weights[path] + (B @ A).T) * gain
        else:
            delta = B.reshape(6, -1) @ A.reshape(len(A), -1)
            merged = (weights[path] + delta.reshape(weights[path].shape)) * gain.reshape(-1, 1, 1, 1)
        layer = peft_model.base_model.model[path]
        layer.merge()
        np.testing.assert_allclose(layer.base_layer.weight.detach().numpy(), merged, atol=1e-5)


def test_ia3_scales_what_the_slots_scale(tmp_path: Path) -> None:
    peft = peft_of()
    config = peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"])
    peft_model = peft_on(Net(), config, tmp_path / "peft")

    def saved(fed: str) -> Path:
        build = Build()
        rule = {"rule": "ia3", "feedforward": [fed]}
        sizes = {"first": 6, "second": 3} | {fed: {"first": 4, "second": 6}[fed]}
        named = {
            path: build.site(path, "ia3", {"scale": ([n], "float32", "ones")}, by=rule) for path, n in sizes.items()
        }
        y = build.linear(build.input("x", "float32", ["b", 4]), "first", slotted.W1, slotted.B1)
        if fed == "second":
            y = build.node("Relu", build.node("Mul", y, named["first"]["scale"]))
            y = build.linear(build.node("Mul", y, named["second"]["scale"]), "second", slotted.W2, slotted.B2)
        build.output(y, "y", "float32", ["b", "n"])
        return build.save(tmp_path / f"{fed}.onnx")

    runner = OnnxRunner(saved("second"))
    runner.load("a", convert_peft(tmp_path / "peft", runner.path, tmp_path / "a.onnx_adapter"))
    expected = peft_model(torch.from_numpy(X)).detach().numpy()
    np.testing.assert_allclose(runner.run({"x": X}, "a")["y"], expected, atol=1e-5)
    with pytest.raises(LoadError) as caught:
        convert_peft(tmp_path / "peft", saved("first"), tmp_path / "b.onnx_adapter")
    assert "scales the module's output, and the slot its input" in str(caught.value)
    assert not (tmp_path / "b.onnx_adapter").exists()


@pytest.mark.parametrize("turn", ["halves", "neighbours", "none", "unknown"])
def test_prefixes_are_cut_up_and_turned_back(tmp_path: Path, turn: str) -> None:
    peft = peft_of()
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbours
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as halves

    sizes: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=16))
    peft_model = peft_on(model, peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tmp_path / "peft")
    frequencies = [1.0, 0.01]
    build = Build()
    rotation: dict[str, Any] = {"turn": None if turn == "none" else {"frequencies": frequencies, "pairs": turn}}
    for i in range(2):
        shapes = {"key": [2, None, 4], "value": [2, None, 4]}
        build.site(f"layers.{i}", "prefix", shapes, **(rotation if turn != "unknown" else {}))
    file = slotted.identities(tmp_path / "f.onnx", build)
    if turn == "unknown":
        with pytest.raises(LoadError, match="has no shift or rotation that does the same"):
            convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter")
        return
    arrays = read_adapter(convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"), Manifest.read(file))
    with quietly():
        cache = peft_model.get_prompt(batch_size=1)
    angles = 3 * torch.tensor(frequencies)
    angles = torch.cat([angles, angles]) if turn == "halves" else angles.repeat_interleave(2)
    rotate: Any = {"halves": halves, "neighbours": neighbours}.get(turn)
    for i, layer in enumerate(cache.layers):
        keys, values = (torch.from_numpy(arrays[slot(f"layers.{i}", name)].copy()) for name in ("key", "value"))
        if rotate is not None:  # rotated forward by three positions they are PEFT's again
            cos, sin = angles.cos().expand(1, 3, 4), angles.sin().expand(1, 3, 4)
            keys = rotate(keys[None], keys[None], cos, sin)[1][0]
        torch.testing.assert_close(keys, layer.keys[0].detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(values, layer.values[0].detach())


def test_all_that_the_file_has_no_place_for_is_listed(tmp_path: Path) -> None:
    class Wider(Net):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(3, 3)

    fields = {"target_modules": ["first", "third"], "modules_to_save": ["second"], "use_dora": True}
    peft_on(Wider(), lora(**fields), tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"alora_invocation_tokens": [1], "init_lora_weights": "pissa", "r": 5}))
    file = slotted.net(tmp_path / "net.onnx")
    with pytest.raises(LoadError) as caught:
        convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter")
    message = str(caught.value)
    assert "peft can't be converted: " in message and not (tmp_path / "a.onnx_adapter").exists()
    for text in ("alora_invocation_tokens", "'pissa'", "4, and not 5", "no lora slot for a module", "second.weight"):
        assert text in message, message
    path.write_text(json.dumps(config))
    with pytest.raises(LoadError, match="no place for gain") as caught:
        convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter")
    assert "where: first" in str(caught.value).replace("  ", " ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"), "is a pickle"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"12345678" * 4), "damaged"),
        (lambda f: (f / "adapter_config.json").unlink(), "can't be read"),
        (lambda f: (f / "adapter_config.json").write_text("[]"), "not a PEFT configuration"),
        (lambda f: change_checkpoint(f, peft_type="BOFT"), "'BOFT' can't be converted"),
        (lambda f: change_checkpoint(f, lora_alpha="x"), "lora_alpha='x' is not a number"),
        (lambda f: change_checkpoint(f, alpha_pattern={"(": 3}), "can't be read"),
        (lambda f: change_checkpoint(f, rank_pattern=[1]), "not a mapping"),
        (lambda f: change_checkpoint(f, use_rslora="yes"), "neither true nor false"),
        (lambda f: change_checkpoint(f, without="first.lora_B"), "a part of a LoRA"),
        (lambda f: change_checkpoint(f, without="second."), "no tensors for a target"),
    ],
)
def test_a_checkpoint_that_is_damaged_or_of_another_kind(tmp_path: Path, change: Any, message: str) -> None:
    peft_on(Net(), lora(), tmp_path / "peft")
    change(tmp_path / "peft")
    file = slotted.net(tmp_path / "net.onnx")
    with pytest.raises(LoadError, match=message):
        convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter")
    assert not (tmp_path / "a.onnx_adapter").exists()


def test_a_converter_for_another_method_is_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converters, "_converters", dict(converters._converters))

    @converters.converter("NEGATED_LORA")
    def convert_negated(conversion: Conversion) -> None:
        for key in [key for key in conversion.remaining_tensors if "lora_B" in key]:
            conversion.remaining_tensors[key] = -conversion.remaining_tensors[key]
        converters.converter_for("LORA")(conversion)

    peft_on(Net(), lora(), tmp_path / "peft")
    file = slotted.net(tmp_path / "net.onnx")
    manifest = Manifest.read(file)
    positive = read_adapter(convert_peft(tmp_path / "peft", file, tmp_path / "a.onnx_adapter"), manifest)
    change_checkpoint(tmp_path / "peft", peft_type="NEGATED_LORA")
    negative = read_adapter(convert_peft(tmp_path / "peft", file, tmp_path / "b.onnx_adapter"), manifest)
    for name, array in positive.items():
        assert np.array_equal(negative[name], -array if name.endswith(".B") else array)
    with pytest.raises(SurgeryError, match="'LORA' already has the converter .*convert_lora"):
        converters.converter("LORA")(convert_negated)
    change_checkpoint(tmp_path / "peft", peft_type="LORRA")
    with pytest.raises(LoadError, match="IA3, LORA, NEGATED_LORA, PREFIX_TUNING, PROMPT_TUNING, P_TUNING; .*LORA"):
        convert_peft(tmp_path / "peft", file, tmp_path / "c.onnx_adapter")


def change_checkpoint(folder: Path, without: str = "\n", **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys() if without not in key}
    save_file(tensors, folder / "adapter_model.safetensors")


# With files of export_onnx ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rank", [4, 3], ids=["groups divide it", "they don't"])
def test_convolutions_with_groups_of_an_exported_model(tmp_path: Path, rank: int) -> None:
    from surgery import apply_rules
    from surgery.onnx import export_adapter
    from surgery.rules import LoraRule

    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, groups=2)), torch.randn(2, 4, 6, 6)
    file = export_slots(model, [LoraRule("0", rank=rank)], {"input": x}, tmp_path)
    adapted = apply_rules(model.eval(), [LoraRule("0", rank=2 * rank, init="random")])
    runner = OnnxRunner(file)
    runner.load("a", export_adapter(adapted, "default", file, tmp_path / "a.onnx_adapter"))
    actual = runner.run({"input": x.numpy()}, "a")["output"]
    np.testing.assert_allclose(actual, adapted(x).detach().numpy(), atol=1e-4, rtol=1e-4)


def tiny_gpt2(layers: int = 2) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    sizes: dict[str, Any] = {
        "vocab_size": 30,
        "n_embd": 16,
        "n_layer": layers,
        "n_head": 2,
        "n_positions": 32,
        "pad_token_id": 0,
    }
    model = GPT2ForSequenceClassification(GPT2Config(**sizes, use_cache=False, initializer_range=0.3)).eval()
    ids = torch.randint(1, 30, (3, 7))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore")
def test_dora_heads_and_tokens_for_an_exported_gpt2(tmp_path: Path) -> None:
    """Conv1Ds, whose weights are transposed, and weights that the exporter transposes."""
    from surgery.rules import LoraRule, TokensRule, TrainRule

    model, inputs = tiny_gpt2()
    targets = {"target_modules": ["c_attn", "c_proj", "c_fc"], "rank_pattern": {"h.1.*c_proj": 2}}
    further = {"modules_to_save": ["score"], "trainable_token_indices": {"wte": [7, 3, 11]}, "task_type": "SEQ_CLS"}
    peft_model = peft_on(copy.deepcopy(model), lora(**targets, **further, use_dora=True), tmp_path / "peft")
    rules = [
        LoraRule(["c_attn", "c_proj", "c_fc"], rank=3, dora=True),
        TrainRule("score"),
        TokensRule("wte", tokens=[1]),
    ]
    check_peft(peft_model, export_slots(model, rules, inputs, tmp_path), inputs, tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_peft_adapters_of_rows_alone_are_refused(tmp_path: Path) -> None:
    from surgery.rules import TokensRule

    model, inputs = tiny_gpt2(LAYERS)
    config = peft_of().TrainableTokensConfig(target_modules=["wte"], token_indices=[3, 1])
    peft_on(copy.deepcopy(model), config, tmp_path / "peft")
    file = export_slots(model, [TokensRule("wte", tokens=[1, 3])], inputs, tmp_path)
    with pytest.raises(LoadError, match="(?s)'TRAINABLE_TOKENS' can't be converted.*LORA"):
        convert_peft(tmp_path / "peft", file, tmp_path / "rows.adapter")
    assert not (tmp_path / "rows.adapter").exists()


@pytest.mark.filterwarnings("ignore")
def test_trained_biases_for_slots_of_whole_modules(tmp_path: Path) -> None:
    """Modules without a weight in the checkpoint keep the base's, which is in the file."""
    from surgery.rules import LoraRule, TrainRule

    model, inputs = tiny_gpt2(LAYERS)
    peft_model = peft_on(copy.deepcopy(model), lora(target_modules=["c_fc"], bias="lora_only"), tmp_path / "peft")
    rules = {"one": LoraRule("c_fc", rank=3), "other": TrainRule("c_fc")}
    file = export_slots(model, rules, inputs, tmp_path)
    assert {slot.tensor for slot in Manifest.read(file).slots} == {"A", "B", "weight", "bias"}
    check_peft(peft_model, file, inputs, tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", onnx_cases(["gpt2", "llama", "gpt_neox", "cohere"], "gpt_neox"))
def test_prefixes_for_exported_decoders(tmp_path: Path, family: str) -> None:
    """Positions that are learned, rotary, rotary in a part of each head, and rotary in neighbouring pairs."""
    import transformers

    from surgery.rules import PrefixRule

    peft = peft_of()
    layers = 2 if family == "llama" else LAYERS
    sizes: dict[str, Any] = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2, "use_cache": False}
    kinds = {"gpt2": "GPT2", "llama": "Llama", "gpt_neox": "GPTNeoX", "cohere": "Cohere"}
    config = getattr(transformers, f"{kinds[family]}Config")(**sizes)
    model = getattr(transformers, f"{kinds[family]}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}")(config)
    ids = torch.randint(1, 30, (3, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    config = peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    rules = [PrefixRule(length=2, shift="wpe" if family == "gpt2" else None)]
    file = export_slots(model.eval(), rules, inputs, tmp_path)
    with torch.no_grad():
        peft_model = peft_on(model, config, tmp_path / "peft")
    check_peft(peft_model, file, inputs, tmp_path)
