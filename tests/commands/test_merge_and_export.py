"""`surgery merge`, `surgery export` and `surgery bench`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from surgery import activate, apply_rules, load_adapter, merge, merge_to, save_adapter
from surgery.adapter_files.entry import PEFT
from surgery.rules import LoraRule, TrainRule
from tests.support.command_line import Files, run

IDS = torch.arange(8).reshape(2, 4)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_several_adapters_with_weights(files: Files, tmp_path: Path) -> None:
    words = ["--weight", "0.5", "--weight", "-2"]
    done = run("merge", files.model, files.peft, files.ours, "--out", tmp_path / "m", *words, "--json")
    assert done.code == 0 and [report["adapter"] for report in done.data["adapters"]] == ["news", "mail"]
    expected = files.load()
    for folder in (files.peft, files.ours):
        load_adapter(expected, folder, folder.name)
    activate(expected, ["news", "mail"], weights=[0.5, -2.0])
    merge(expected)
    assert torch.equal(logits(files.load(tmp_path / "m")), logits(expected))


def test_records_dtypes_and_threads(files: Files, tmp_path: Path) -> None:
    done = run("merge", files.model, files.peft, "--out", tmp_path / "m", "--keep-record", "--workers", "2", "--json")
    assert done.code == 0 and done.data["streamed"] and done.data["record"] > 0, done
    back = run("unmerge", tmp_path / "m", "--out", tmp_path / "base", "--json")
    base = (files.model / "model.safetensors").read_bytes()
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == base
    assert back.data["shards"] == {"model.safetensors": hashlib.sha256(base).hexdigest()}
    assert "keep_record" in run("unmerge", files.model, "--out", tmp_path / "x").err

    half = run("merge", files.model, files.peft, "--out", tmp_path / "half", "--dtype", "bfloat16")
    assert half.code == 0 and files.load(tmp_path / "half").dtype == torch.bfloat16
    both = run("merge", files.model, files.peft, "--out", tmp_path / "x", "--dtype", "bfloat16", "--keep-record")
    assert both.code == 1 and "leave out --dtype" in both.err
    loaded = run("merge", files.model, files.peft, "--out", tmp_path / "x", "--keep-record", "--with-example")
    assert loaded.code == 1 and "--keep-record is not for a model that is loaded" in loaded.err
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".*"))


def test_a_head_that_the_base_does_not_have_loads_the_model(files: Files, tmp_path: Path) -> None:
    files.load().bert.save_pretrained(tmp_path / "bare")
    model = apply_rules(files.load(), [LoraRule("query", rank=2, init="random"), TrainRule("classifier")])
    save_adapter(model, tmp_path / "head")
    done = run("merge", tmp_path / "bare", tmp_path / "head", "--out", tmp_path / "m")
    assert done.code == 0 and "the model was loaded" in done.out
    assert "classifier.weight" in load_file(tmp_path / "m" / "model.safetensors")


def test_a_dry_run_checks_the_adapter_and_reads_no_weights(files: Files, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((files.model / "config.json").read_bytes())
    done = run("merge", tmp_path, files.peft, "--out", tmp_path / "m", "--dry-run")
    assert done.code == 0 and "4 tensors fit" in done.out and not (tmp_path / "m").exists()
    real = run("merge", tmp_path, files.peft, "--out", tmp_path / "m")
    assert real.code == 1 and "no weights in safetensors files" in real.err and not (tmp_path / "m").exists()


def test_what_does_not_fit_is_an_error(files: Files, tmp_path: Path) -> None:
    wrong = run("merge", files.model, files.peft, "--out", tmp_path / "m", "--weight", "1", "--weight", "2")
    assert wrong.code == 1 and "2 weights for 1 adapters" in wrong.err
    twice = run("merge", files.model, files.peft, files.peft, "--out", tmp_path / "m")
    assert twice.code == 1 and "two adapters have the name 'news'" in twice.err
    other = tmp_path / "other"
    shutil.copytree(files.model, other)
    model = files.load()
    torch.nn.init.ones_(model.bert.embeddings.word_embeddings.weight)
    model.save_pretrained(other)
    refused = run("merge", other, files.peft, "--out", tmp_path / "m", "--json")
    assert refused.code == 1 and "another base" in refused.data["error"]["text"]
    told = refused.data["error"]["text"]
    assert "; --any-base makes this a warning" in told and "same_base" not in told
    assert not (tmp_path / "m").exists()
    loose = run("merge", other, files.peft, "--out", tmp_path / "m", "--any-base", "--json")
    assert loose.code == 0 and any("another base" in warning for warning in loose.data["warnings"])


def test_weights_that_are_absent_are_a_warning(files: Files, tmp_path: Path) -> None:
    done = run("merge", files.model, files.ours, "--out", tmp_path / "m", "--class", "BertForTokenClassification")
    assert done.code == 0 or "another base" in done.err
    assert "files of" in run("bench", files.model, "--class", "BertForMaskedLM", "--rounds", "1").err


def test_an_export_with_slots(files: Files, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    out, form = tmp_path / "deep" / "m.onnx", "slots"
    done = run("export", files.model, files.peft, "--out", out, "--as", form, "--no-verify", "--json")
    assert done.code == 0 and done.data["parity"] is None and done.data["path"] == str(out)
    names = ["m.onnx", "m.onnx.manifest.json", "news.onnx_adapter"]
    assert sorted(file.name for file in out.parent.iterdir()) == names == done.data["files"]
    described = run("inspect", out, "--json").data
    assert described["format"] == "ONNX, adapters as slots" and described["outputs"] == ["logits"]
    again = run("export", files.model, files.peft, "--out", out, "--as", form)
    assert again.code == 1 and "--overwrite" in again.err


def test_adapters_that_train_the_same_head_have_one_file_with_slots(files: Files, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from surgery.onnx import OnnxRunner

    expected = {}
    for name in ("one", "two"):
        model = apply_rules(
            files.load(), [LoraRule("query", rank=2, init="random"), TrainRule("classifier")], adapter=name
        )
        torch.nn.init.normal_(model.classifier.adapters.get_parameter(f"{name}.weight"))
        torch.nn.init.normal_(model.classifier.adapters.get_parameter(f"{name}.bias"))
        save_adapter(model, tmp_path / name, name)
        expected[name] = logits(model)
    adapters, out = (tmp_path / "one", tmp_path / "two"), tmp_path / "m.onnx"
    done = run("export", files.model, *adapters, "--out", out, "--as", "slots", "--no-verify", "--json")
    assert done.code == 0, (done.out, done.err)
    runner = OnnxRunner(out)
    for name, output in expected.items():
        runner.load(name, tmp_path / f"{name}.onnx_adapter")
        inputs = {"input_ids": IDS.numpy(), "attention_mask": torch.ones_like(IDS).numpy()}
        ours = torch.from_numpy(runner.run(inputs, adapter=name)["logits"])
        torch.testing.assert_close(ours, output, rtol=1e-4, atol=1e-5)  # other kernels
    assert not torch.allclose(expected["one"], expected["two"])

    together = run("merge", files.model, *adapters, "--out", tmp_path / "merged")
    assert "TrainRule [one] and TrainRule [two] can't be live together" in together.err
    assert "fix:   merge one of them at a time; in Python: combine(" in together.err
    constant = run("export", files.model, *adapters, "--out", tmp_path / "c.onnx", "--as", "constant")
    assert "fix:   export one of them at a time, or use --as slots;" in constant.err
    assert not (tmp_path / "merged").exists() and not (tmp_path / "c.onnx").exists()


def test_an_export_that_can_not_be(files: Files, tmp_path: Path) -> None:
    assert (
        "slots are made for adapters" in run("export", files.model, "--out", tmp_path / "m.onnx", "--as", "slots").err
    )
    assert "is a folder" in run("export", files.model, "--out", tmp_path).err
    dry = run("export", files.model, files.peft, "--out", tmp_path / "m.onnx", "--dry-run")
    assert dry.code == 0 and "4 tensors fit" in dry.out
    usage = run("export", files.model, "--out", tmp_path / "m.onnx", "--as", "slot")
    assert usage.code == 2 and "slots" in usage.err
    assert list(tmp_path.iterdir()) == []


def test_an_example_from_a_file(files: Files, tmp_path: Path) -> None:
    save_file({"input_ids": IDS}, tmp_path / "call.safetensors")
    done = run("bench", files.model, "--example", tmp_path / "call.safetensors", "--rounds", "1", "--json")
    assert done.code == 0 and done.data["example"] == {"input_ids": [2, 4]}
    assert {"apply_rules", "merge", "call, live"} <= done.data["milliseconds"].keys()
    (tmp_path / "call.pt").write_bytes(b"")
    assert "not a safetensors file" in run("bench", files.model, "--example", tmp_path / "call.pt").err


def test_example_calls_are_made_for_texts_and_images() -> None:
    from surgery.commands.example_call import example_call
    from surgery.errors import SurgeryError
    from tests.support import tiny

    for build in (tiny.bert, tiny.gpt2, tiny.t5, tiny.vit):
        model, _ = build()
        with torch.no_grad():
            model.eval()(**example_call(model, None))
    for build, why in ((tiny.whisper, "no example can be made"), (tiny.clip, "can't be called with input_ids")):
        with pytest.raises(SurgeryError, match=why):
            example_call(build()[0], None)


def test_errors_name_options(files: Files, tmp_path: Path) -> None:
    done = run("export", files.model, "--out", tmp_path / "x.onnx", "--opset", "3")
    assert "--opset 3 can't be written" in done.err and "leave --opset out" in done.err
    done = run("export", files.model, "--out", tmp_path / "x.onnx", "--cache")
    assert "fix:   leave --cache out" in done.err
    (tmp_path / "prefix.yaml").write_text("- {rule: prefix, targets: [self], length: 2}")
    assert run("apply", files.model, tmp_path / "prefix.yaml", "--with-example", "--out", tmp_path / "prefix").code == 0
    done = run("export", files.model, tmp_path / "prefix", "--out", tmp_path / "x.onnx")
    assert "PrefixRule can't be merged" in done.err and "fix:   --as constant, or --as slots" in done.err
    shutil.copytree(files.peft, tmp_path / "damaged")
    tensors = load_file(files.peft / "adapter_model.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, tmp_path / "damaged" / PEFT[0])
    done = run("merge", files.model, tmp_path / "damaged", "--out", tmp_path / "out")
    assert "fix:   take an earlier checkpoint; in Python: load_adapter(…, finite=False)" in done.err
    assert {file.name for file in tmp_path.iterdir()} == {"damaged", "prefix", "prefix.yaml"}


def test_an_absent_package_is_named_with_its_extra(
    files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import surgery.onnx

    def absent(*arguments: object, **options: object) -> None:
        raise ModuleNotFoundError("No module named 'onnx_ir'", name="onnx_ir")

    monkeypatch.setattr(surgery.onnx, "export_onnx", absent)
    done = run("export", files.model, "--out", tmp_path / "x.onnx")
    assert done.code == 1 and "fix:   pip install 'model-surgery[onnx]'" in done.err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["gguf", "mlx"])
def test_merge_into_another_programs_files(tmp_path: Path, format: str) -> None:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    sizes: dict[str, Any] = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2)).eval()
    model.save_pretrained(tmp_path / "base")
    apply_rules(model, LoraRule("q_proj", rank=2, init="random"))
    save_adapter(model, tmp_path / "adapter")
    name = "m.gguf" if format == "gguf" else "m"
    expected = merge_to(model, tmp_path / "e" / name, format=format)  # type: ignore[arg-type]
    words = ["merge", tmp_path / "base", tmp_path / "adapter", "--out", tmp_path / name, "--format", format]
    done = run(*words, "--json")
    assert done.code == 0 and done.data["streamed"] and (tmp_path / name).exists()
    if format == "gguf":
        assert (tmp_path / name).read_bytes() == expected.read_bytes() and done.data["files"] == ["m.gguf"]
    else:
        weights = "model.safetensors"
        assert (tmp_path / name / weights).read_bytes() == (expected / weights).read_bytes()
        assert not [file for file in (tmp_path / name).iterdir() if file.is_dir()]
    assert run(*words).code == 1  # it is there already
    assert "unmerge goes through" in run(*words[:-3], tmp_path / "n", *words[-2:], "--keep-record").err
    loaded = run(
        *words[:-3], tmp_path / f"loaded-{name}", *words[-2:], "--any-base", "--with-example", "--dtype", "float16"
    )
    assert loaded.code == 0, loaded.err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["base", "adapter", "e", name, f"loaded-{name}"])


def test_a_quantised_model(files: Files, tmp_path: Path) -> None:
    """The command writes what `merge_to` writes: plain weights, or new codes, if they lose little."""
    pytest.importorskip("bitsandbytes")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    base = tmp_path / "base"
    type(files.load()).from_pretrained(files.model, quantization_config=config, device_map="cpu").save_pretrained(base)
    words = ("merge", base, files.peft, "--out", tmp_path / "m")
    refused = run(*words)
    assert refused.code == 1 and "--quantised dequantise" in refused.err and not (tmp_path / "m").exists()
    lost = run(*words, "--quantised", "requantise", "--limit", "0.001")
    assert lost.code == 1 and "--limit inf merges anyway" in lost.err and not (tmp_path / "m").exists()
    unused = run(*words, "--limit", "0.5")
    assert unused.code == 1 and "--limit is not used" in unused.err

    model = type(files.load()).from_pretrained(base, device_map="cpu")
    load_adapter(model, files.peft)
    for name, options in {"dequantise": {"dtype": torch.float32}, "requantise": {"limit": None}}.items():
        more = ("--dtype", "float32") if name == "dequantise" else ("--limit", "inf")
        done = run("merge", base, files.peft, "--out", tmp_path / name, "--quantised", name, *more, "--json")
        assert done.code == 0 and not done.data["streamed"], (done.out, done.err)
        merge_to(model, tmp_path / "expected" / name, quantised=name, **options)  # type: ignore[arg-type]
        assert same_tensors(tmp_path / name, tmp_path / "expected" / name)
    merge(model, quantised="dequantise", dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")  # transformers alone can't save a model from a quantised checkpoint again
    query, files_query = (load_file(tmp_path / f / "model.safetensors") for f in ("plain", "dequantise"))
    key = "bert.encoder.layer.0.attention.self.query.weight"
    assert torch.equal(query[key], files_query[key])


def same_tensors(folder: Path, other: Path) -> bool:
    (mine, theirs) = (load_file(each / "model.safetensors") for each in (folder, other))
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_rounding_of_a_model_in_half_precision(files: Files, tmp_path: Path) -> None:
    base = tmp_path / "base"
    files.load().to(torch.bfloat16).save_pretrained(base)
    done = run("merge", base, files.peft, "--out", tmp_path / "m", "--rounding", "error-feedback", "--json")
    assert done.code == 0 and not done.data["streamed"]
    model = type(files.load()).from_pretrained(base)
    load_adapter(model, files.peft)
    merge_to(model, tmp_path / "expected", rounding="error-feedback")
    assert same_tensors(tmp_path / "m", tmp_path / "expected")
