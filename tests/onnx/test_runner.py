"""Exported files run without torch: adapters at each call, several threads, generation; beside numpy's arithmetic."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgery import LoadError, SurgeryError
from tests.support import ROOT

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from surgery.onnx import Manifest, OnnxRunner, export_onnx, write_adapter  # noqa: E402
from surgery.onnx.runtime.sampling import probabilities  # noqa: E402
from tests.support import slotted  # noqa: E402
from tests.support.sampling import LAYERS, onnx_cases  # noqa: E402
from tests.support.slotted import Build, slot  # noqa: E402

X = slotted.random(50, 5, 4)
TEXTS = np.array([[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]])


def near(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=1e-4)


# Adapters at each call --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("empty", ["rank0", "zeros1"])
@pytest.mark.parametrize("required", [False, True], ids=["overridable", "inputs"])
def test_adapters_of_several_ranks_one_after_the_other(tmp_path: Path, required: bool, empty: str) -> None:
    runner = OnnxRunner(slotted.net(tmp_path / "net.onnx", required, empty, gain=True, b_bias=True))
    ones, zeros = np.ones(6, np.float32), np.zeros(6, np.float32)
    adapters: dict[str | None, Any] = {None: {}, "a": slotted.adapter(60), "b": slotted.adapter(70, 5, 1)}
    adapters |= {"first": slotted.adapter(80, 4, None), "second": slotted.adapter(90, None, 2)}
    for name, tensors in adapters.items():
        if name is not None:
            further = {slot("first", "gain"): ones, slot("first", "B_bias"): zeros} if name != "second" else {}
            runner.load(name, {**tensors, **further})
    assert runner.adapters == ("a", "b", "first", "second")
    for name in (None, "a", "b", "a", None, "first", "second", None):
        near(runner.run({"x": X}, name)["y"], slotted.net_in_numpy(X, adapters[name]))
    near(
        runner.run({"x": X}, ["first", "second"])["y"], slotted.net_in_numpy(X, adapters["first"] | adapters["second"])
    )
    runner.unload("b")
    assert runner.adapters == ("a", "first", "second")


def test_two_adapters_on_one_site_and_names_that_are_unknown(tmp_path: Path) -> None:
    runner = OnnxRunner(slotted.net(tmp_path / "net.onnx"))
    runner.load("red", slotted.adapter(60))
    runner.load("green", slotted.adapter(70, None, 2))
    with pytest.raises(SurgeryError, match="'red' and 'green' can't be used together") as caught:
        runner.run({"x": X}, ["red", "green"])
    assert "where: second" in str(caught.value).replace("  ", " ") and "surgery.combine" in str(caught.value)
    with pytest.raises(SurgeryError, match="named twice"):
        runner.run({"x": X}, ["red", "red"])
    with pytest.raises(SurgeryError, match="did you mean 'green'"):
        runner.run({"x": X}, "greem")
    with pytest.raises(SurgeryError, match="loaded: red, green"):
        runner.unload("blue")
    with pytest.raises(SurgeryError, match="loaded already"):
        runner.load("red", slotted.adapter(80))
    runner.load("red", slotted.adapter(80), replace=True)
    near(runner.run({"x": X}, "red")["y"], slotted.net_in_numpy(X, slotted.adapter(80)))
    with pytest.raises(LoadError, match="can't be loaded: 2 problems"):
        runner.load("blue", {"nothing": np.ones(1)} | slotted.adapter(60, 2, None) | {slot("first", "B"): np.ones(3)})
    with pytest.raises(SurgeryError, match="is a text"):
        runner.load("", slotted.adapter(60))
    assert runner.adapters == ("red", "green")


def test_what_is_loaded_is_a_copy(tmp_path: Path) -> None:
    runner, tensors = OnnxRunner(slotted.net(tmp_path / "net.onnx")), slotted.adapter(60)
    runner.load("a", tensors)
    for tensor in tensors.values():
        tensor[:] = np.nan
    near(runner.run({"x": X}, "a")["y"], slotted.net_in_numpy(X, slotted.adapter(60)))


def test_slots_that_hold_the_bases_own_numbers(tmp_path: Path) -> None:
    """A trained bias: without an adapter the file's, which stays an optional input even where slots are required."""
    for required in (False, True):
        build = Build(required)
        y = build.linear(build.input("x", "float32", ["batch", 4]), "first", slotted.W1, slots=True)
        named = build.site("first", "train", {"bias": slotted.B1})
        build.output(build.node("Add", y, named["bias"]), "y", "float32", ["batch", 6])
        runner = OnnxRunner(build.save(tmp_path / "net.onnx"))
        runner.load("a", {slot("first", "bias"): slotted.B1 + 1})
        near(runner.run({"x": X})["y"], X @ slotted.W1.T + slotted.B1)
        near(runner.run({"x": X}, "a")["y"], X @ slotted.W1.T + slotted.B1 + 1)


def test_slots_of_bfloat16(tmp_path: Path) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for required in (False, True):
        build = Build(required)
        x = build.input("x", "float32", ["batch", 4])
        named = build.site("first", "lora", {"A": ([None, 4], "bfloat16"), "B": ([3, None], "bfloat16")})
        wide = [build.node("Cast", name, to=onnx.TensorProto.FLOAT) for name in named.values()]
        down = build.node("MatMul", x, build.node("Transpose", wide[0], perm=[1, 0]))
        build.output(
            build.node("MatMul", down, build.node("Transpose", wide[1], perm=[1, 0])), "y", "float32", ["b", 3]
        )
        runner = OnnxRunner(build.save(tmp_path / "net.onnx"))
        A, B = (slotted.random(seed, *shape).astype(ml_dtypes.bfloat16) for seed, shape in ((1, (2, 4)), (2, (3, 2))))
        runner.load("a", {slot("first", "A"): A, slot("first", "B"): B})
        near(runner.run({"x": X}, "a")["y"], X @ (B.astype(np.float32) @ A.astype(np.float32)).T)
        assert not runner.run({"x": X})["y"].any()


# Inputs and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "x is missing.*it takes x float32.batch, 4."),
        ({"X": X, "x": X}, "there is no input 'X'"),
        ({"x": X.astype(np.float64)}, "x is float64, and float32 is wanted"),
        ({"x": X[0]}, r"x has the shape \(4,\), and \(batch, 4\) is wanted"),
        ({"x": X[:, :3]}, r"x has the shape \(5, 3\)"),
        ({"x": [["a"]]}, "x is str"),
        (X, "inputs are given by name"),
        ({"x": X, slot("first", "A"): X}, "there is no input 'first.adapters.slot.A'"),
    ],
)
def test_inputs_that_do_not_fit_are_told_before_onnxruntime_sees_them(
    tmp_path: Path, inputs: Any, message: str
) -> None:
    runner = OnnxRunner(slotted.net(tmp_path / "net.onnx"))
    with pytest.raises(SurgeryError, match="(?s)" + message):
        runner.run(inputs)


def test_sizes_of_one_name_are_the_same(tmp_path: Path) -> None:
    build = Build()
    names = [build.input(name, "float32", ["batch", 2]) for name in ("a", "b")]
    build.output(build.node("Add", *names), "y", "float32", ["batch", 2])
    runner = OnnxRunner(build.save(tmp_path / "f.onnx"))
    with pytest.raises(SurgeryError, match="batch is 3 in a and 1 in b"):
        runner.run({"a": np.ones((3, 2), np.float32), "b": np.ones((1, 2), np.float32)})
    assert runner.run({"a": [[1, 2]], "b": [[3.0, 4.0]]})["y"].tolist() == [[4.0, 6.0]]  # lists get the input's dtype
    tensors = {name: torch.ones(1, 2) for name in "ab"}
    assert runner.run(tensors)["y"].tolist() == [[2.0, 2.0]]


def test_outputs_and_settings(tmp_path: Path) -> None:
    file = slotted.decoder(tmp_path / "net.onnx")
    runner = OnnxRunner(file, threads=1, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": TEXTS, "attention_mask": np.ones_like(TEXTS), "position_ids": np.tile(np.arange(5), (2, 1))}
    feeds |= {f"past_key_values.0.{name}": np.zeros((2, 1, 0, slotted.SIZE), np.float32) for name in ("key", "value")}
    assert runner.run(feeds).keys() == {"logits", "present.0.key", "present.0.value"}
    assert str(runner).splitlines()[2:] == [
        "  outputs   present.0.key, present.0.value, logits",
        "  adapters  none",
    ]
    outputs = runner.run(feeds, outputs=["logits"])
    assert outputs.keys() == {"logits"}
    near(outputs["logits"][1], slotted.decoder_in_numpy(TEXTS[1]))
    with pytest.raises(SurgeryError, match="did you mean 'logits'"):
        runner.run(feeds, outputs=["logit"])
    with pytest.raises(SurgeryError, match="no provider 'CPUExecution'"):
        OnnxRunner(file, providers=["CPUExecution"])
    with pytest.raises(SurgeryError, match="threads=0"):
        OnnxRunner(file, threads=0)
    with pytest.raises(SurgeryError, match="there is no file"):
        OnnxRunner(tmp_path / "none.onnx")
    (tmp_path / "damaged.onnx").write_bytes(file.read_bytes()[:500])
    with pytest.raises(SurgeryError, match="onnxruntime can't open damaged.onnx"):
        OnnxRunner(tmp_path / "damaged.onnx")


def test_slots_that_a_program_made_constants_are_missed(tmp_path: Path) -> None:
    model = onnx.load(slotted.net(tmp_path / "net.onnx"))
    remaining = [value for value in model.graph.input if "adapters" not in value.name]
    del model.graph.input[:]
    model.graph.input.extend(remaining)
    onnx.save(model, tmp_path / "fused.onnx")
    with pytest.raises(SurgeryError, match="has lost its slots"):
        OnnxRunner(tmp_path / "fused.onnx")


def test_files_without_slots_take_no_adapters(tmp_path: Path) -> None:
    build = Build()
    x = build.input("x", "float32", ["batch", 4])
    build.output(build.linear(x, "first", slotted.W1, slotted.B1), "y", "float32", ["batch", 6])
    runner = OnnxRunner(build.save(tmp_path / "f.onnx"))
    near(runner.run({"x": X})["y"], X @ slotted.W1.T + slotted.B1)
    with pytest.raises(LoadError, match='exported with adapters="merged"'):
        runner.load("a", slotted.adapter(60))


# Bindings and threads ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("required", [False, True], ids=["overridable", "inputs"])
def test_a_binding_has_the_adapter_and_keeps_it(tmp_path: Path, required: bool) -> None:
    runner, tensors = OnnxRunner(slotted.net(tmp_path / "net.onnx", required)), slotted.adapter(60)
    runner.load("a", tensors)
    for name, expected in (("a", tensors), (None, {})):
        binding = runner.bind(name)
        if name:
            runner.unload(name)
        binding.bind_cpu_input("x", X)
        binding.bind_output("y")
        runner.session.run_with_iobinding(binding)
        near(binding.get_outputs()[0].numpy(), slotted.net_in_numpy(X, expected))


def test_onnxruntimes_own_activation_does_not_reach_bindings(tmp_path: Path) -> None:
    """Adapters are fed as inputs because onnxruntime ignores this silently."""
    file, tensors = slotted.net(tmp_path / "net.onnx"), slotted.adapter(60)
    path = write_adapter(tmp_path / "a.onnx_adapter", tensors, Manifest.read(file))
    session, loaded, options = OnnxRunner(file).session, onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(path))
    options.add_active_adapter(loaded)
    binding = session.io_binding()
    binding.bind_cpu_input("x", X)
    binding.bind_output("y")
    session.run_with_iobinding(binding, options)
    near(binding.get_outputs()[0].numpy(), slotted.net_in_numpy(X))


def test_threads_with_adapters_of_their_own_while_others_come_and_go(tmp_path: Path) -> None:
    runner = OnnxRunner(slotted.net(tmp_path / "net.onnx"), threads=1)
    adapters: dict[str | None, Any] = {None: {}, **{f"a{i}": slotted.adapter(100 + i, i + 1, 4 - i) for i in range(4)}}
    for name, tensors in adapters.items():
        if name is not None:
            runner.load(name, tensors)
    wrong: list[Any] = []
    done = threading.Event()

    def calls(name: str | None) -> None:
        expected = slotted.net_in_numpy(X, adapters[name])
        for _ in range(150):
            if not np.allclose(runner.run({"x": X}, name)["y"], expected, atol=1e-4):
                wrong.append(name)

    def changes() -> None:
        for i in range(10**6):
            runner.load(f"other{i}", slotted.adapter(i % 50))
            runner.load("a0", adapters["a0"], replace=True)
            runner.unload(f"other{i}")
            if done.is_set():
                return

    threads = [threading.Thread(target=calls, args=[name]) for name in adapters]
    other = threading.Thread(target=changes)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not wrong and set(runner.adapters) == {"a0", "a1", "a2", "a3"}


def test_a_generation_ends_as_it_began_when_its_adapter_is_unloaded(tmp_path: Path) -> None:
    runner, tensors = OnnxRunner(slotted.decoder(tmp_path / "net.onnx")), slotted.decoder_adapter(30)
    runner.load("a", tensors)
    stream = runner.stream(TEXTS[:1], 10, adapter="a")
    steps = [next(stream)]
    runner.unload("a")
    runner.load("a", slotted.decoder_adapter(40))
    steps += list(stream)
    assert [int(step[0]) for step in steps] == slotted.greedy_in_numpy(TEXTS[0], 10, tensors)[5:]


TORCHLESS = """
import sys
sys.modules["torch"] = None
import numpy as np
from surgery.onnx import OnnxRunner, convert_peft
runner = OnnxRunner(sys.argv[1] + "/net.onnx")
runner.load("a", convert_peft(sys.argv[1] + "/peft", sys.argv[1] + "/net.onnx", sys.argv[1] + "/a.onnx_adapter"))
print(runner.generate(np.array([[1, 2, 3]]), 6, adapter="a").tolist())
names = {name.partition(".")[0] for name in sys.modules}
assert not names & {"transformers", "peft", "onnx", "onnxscript", "networkx", "rules"}, names
"""


def test_nothing_here_needs_torch(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    slotted.decoder(tmp_path / "net.onnx")
    tensors = slotted.decoder_adapter(30, 2, 2)
    keys = {
        slot(path, name): f"base_model.model.{path}.lora_{name}.weight" for path in ("query", "value") for name in "AB"
    }
    (tmp_path / "peft").mkdir()
    save_file({keys[name]: tensor for name, tensor in tensors.items()}, tmp_path / "peft" / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["query", "value"]}'
    (tmp_path / "peft" / "adapter_config.json").write_text(config)
    words = [sys.executable, "-c", TORCHLESS, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == str([slotted.greedy_in_numpy([1, 2, 3], 6, tensors)])


# Generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("required", [False, True], ids=["overridable", "inputs"])
@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("positions", [True, False], ids=["position_ids", "counted"])
@pytest.mark.parametrize("masked", [True, False], ids=["mask", "no mask"])
def test_greedy_texts(tmp_path: Path, cached: bool, required: bool, positions: bool, masked: bool) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx", cached, required, positions, masked))
    adapters: dict[str | None, Any] = {
        None: None,
        "a": slotted.decoder_adapter(30),
        "b": slotted.decoder_adapter(40, 5, 1),
    }
    for name in ("a", "b"):
        runner.load(name, adapters[name])
    for name, tensors in adapters.items():
        tokens = runner.generate(TEXTS, max_new_tokens=12, adapter=name)
        assert tokens.tolist() == [slotted.greedy_in_numpy(text, 12, tensors) for text in TEXTS]
        assert tokens.dtype == TEXTS.dtype


def test_tokens_come_one_after_the_other(tmp_path: Path) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx"))
    expected = runner.generate({"input_ids": TEXTS}, 6)[:, 5:]
    stream = runner.stream(TEXTS, 6)
    assert np.array_equal(np.stack(list(stream), 1), expected)


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_rows_end_by_themselves(tmp_path: Path, cached: bool) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx", cached))
    texts = [slotted.greedy_in_numpy(text, 12)[5:] for text in TEXTS]
    ends = [texts[0][3], texts[1][6]]
    expected = []
    for text in texts:
        at = next(i for i, token in enumerate(text) if token in ends)
        expected.append(text[: at + 1])
    length = max(map(len, expected))
    for padding in (None, 12):
        filled = [text + [ends[0] if padding is None else padding] * (length - len(text)) for text in expected]
        tokens = runner.generate(TEXTS, 12, eos_token_id=ends, pad_token_id=padding)
        assert tokens[:, 5:].tolist() == filled


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("placed", [True, False], ids=["position_ids", "no positions at all"])
def test_texts_padded_on_their_left(tmp_path: Path, cached: bool, placed: bool) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx", cached, positions=placed, counted=False))
    texts, padded = [[1, 2, 3, 4], [5, 6], [7]], np.zeros((3, 4), int)
    mask = np.zeros_like(padded)
    for row, text in enumerate(texts):
        padded[row, 4 - len(text) :], mask[row, 4 - len(text) :] = text, 1
    for attention_mask in (mask, mask.astype(bool)):
        tokens = runner.generate({"input_ids": padded, "attention_mask": attention_mask}, 9)
        new = [slotted.greedy_in_numpy(text, 9, placed=placed)[len(text) :] for text in texts]
        assert tokens[:, 4:].tolist() == new


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_a_file_that_counts_the_padding_is_found_out(tmp_path: Path, cached: bool) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx", cached, positions=False))
    mask = np.array([[1, 1, 1], [0, 0, 1]])
    with pytest.raises(SurgeryError, match="padded on their left") as caught:
        runner.generate({"input_ids": TEXTS[:, :3], "attention_mask": mask}, 4)
    assert "position_ids among the example inputs" in str(caught.value)


def test_what_can_not_be_continued(tmp_path: Path) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx"))
    for inputs, message in [
        ({"ids": TEXTS}, "input_ids are missing"),
        (TEXTS[0], "whole numbers .batch, positions."),
        (TEXTS.astype(np.float32), "whole numbers"),
        ({"input_ids": TEXTS, "attention_mask": TEXTS}, "not an array of ones and zeros"),
        ({"input_ids": TEXTS, "attention_mask": np.array([[1, 1, 1, 1, 0]] * 2)}, "ends in padding"),
        ({"input_ids": TEXTS, "past_key_values.0.key": TEXTS}, "is not an input of generate"),
        ({"input_ids": TEXTS, "labels": TEXTS}, "there is no input 'labels'"),
    ]:
        with pytest.raises(SurgeryError, match=message):
            runner.stream(inputs)  # before the first token is computed
    settings: list[tuple[dict[str, Any], str]] = [
        ({"max_new_tokens": 0}, "max_new_tokens=0"), ({"eos_token_id": "x"}, "not a token id"),
        ({"temperature": 0.5}, "do_sample=True"), ({"seed": 1}, "do_sample=True"), ({"top_k": 3}, "do_sample=True"),
        ({"do_sample": True, "temperature": 0}, "temperature=0"), ({"do_sample": True, "top_p": 0.0}, "top_p=0.0"),
        ({"do_sample": True, "top_k": 0}, "top_k=0"), ({"adapter": "x"}, "no adapter 'x'"),
    ]  # fmt: skip
    for fields, message in settings:
        with pytest.raises(SurgeryError, match=message):
            runner.stream(TEXTS, **fields)
    unmasked = OnnxRunner(slotted.decoder(tmp_path / "unmasked.onnx", masked=False))
    with pytest.raises(SurgeryError, match="takes no attention_mask"):
        unmasked.generate({"input_ids": TEXTS, "attention_mask": np.array([[0, 1, 1, 1, 1], [1] * 5])})
    with pytest.raises(SurgeryError, match="is not a decoder"):
        OnnxRunner(slotted.net(tmp_path / "other.onnx")).generate(TEXTS)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, None), (0.7, 5, None), (1.3, None, 0.8), (2.0, 6, 0.6)]
)
def test_chances_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float | None) -> None:
    from transformers.generation import logits_process as theirs

    warpers: list[Any] = [theirs.TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [theirs.TopKLogitsWarper(top_k)] if top_k is not None else []
    warpers += [theirs.TopPLogitsWarper(top_p)] if top_p is not None else []
    logits = 3 * slotted.random(1, 4, 20)
    scores = torch.from_numpy(logits)
    for warper in warpers:
        scores = warper(None, scores)
    actual = probabilities(logits, temperature, top_k, top_p)
    np.testing.assert_allclose(actual, scores.double().softmax(-1).numpy(), atol=1e-6)


def test_draws(tmp_path: Path) -> None:
    runner = OnnxRunner(slotted.decoder(tmp_path / "net.onnx"))
    greedy = runner.generate(TEXTS, 8)
    assert np.array_equal(runner.generate(TEXTS, 8, do_sample=True, top_k=1), greedy)
    drawn = [runner.generate(TEXTS, 8, do_sample=True, temperature=3.0, seed=seed) for seed in (1, 1, 2)]
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])
    many = runner.generate(np.tile(TEXTS[:1], (4000, 1)), 1, do_sample=True, temperature=4.0, seed=0)[:, -1]
    chances = probabilities(slotted.decoder_in_numpy(TEXTS[0])[-1:], 4.0, None, None)[0]
    np.testing.assert_allclose(np.bincount(many, minlength=len(chances)) / 4000, chances, atol=0.03)


# Real decoders ----------------------------------------------------------------------------------------------------


def tiny(kind: str) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "initializer_range": 0.5}
    if kind == "gpt2":
        config = GPT2Config(n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, **sizes)
        config.bos_token_id = config.eos_token_id = None
        return GPT2LMHeadModel(config).eval()
    sizes |= {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, eos_token_id=None, bos_token_id=None, **sizes)).eval()


def example(model: Any) -> dict[str, Any]:
    """Two more tokens after three: tracing would take sizes of one for constants."""
    ids = torch.randint(0, 40, (2, 5))
    with torch.no_grad():
        past = model(ids[:, :3], use_cache=True).past_key_values
    return {"input_ids": ids[:, 3:], "attention_mask": torch.ones_like(ids),
            "position_ids": torch.tensor([[3, 4]] * 2), "past_key_values": past, "use_cache": True}  # fmt: skip


@pytest.mark.parametrize("kind", onnx_cases(["gpt2", "llama"], "gpt2"))
@pytest.mark.filterwarnings("ignore")  # transformers' and the exporters'
def test_greedy_texts_are_those_of_transformers(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("onnxscript")
    model = tiny(kind)
    export_onnx(model, tmp_path / "model.onnx", example(model), adapters="merged", verify=False)
    runner = OnnxRunner(tmp_path / "model.onnx")
    assert len(runner.manifest.cache) == 2 * LAYERS
    ids = torch.randint(1, 40, (3, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=14, do_sample=False)
    end = int(plain[1, 10])
    for attention_mask in (torch.ones_like(ids), mask):
        for ends in (None, end):
            fields: dict[str, Any] = {"max_new_tokens": 14, "eos_token_id": ends}
            expected = model.generate(ids, attention_mask=attention_mask, do_sample=False, pad_token_id=0, **fields)
            inputs = {"input_ids": ids.numpy(), "attention_mask": attention_mask.numpy()}
            assert runner.generate(inputs, pad_token_id=0, **fields).tolist() == expected.tolist()
