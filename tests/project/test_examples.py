"""The examples run in their smallest setting, say what they need, and give the model back to the bit.

`make examples` runs all of them, each in a new process. `make test` leaves out three, of which other tests show
the parts, and forks the processes of the others from one that has imported torch and transformers."""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.example_runs import ALL, EXAMPLES, LIBRARIES, WEIGHTS, python, run

NAMES = sorted(file.stem for file in EXAMPLES.glob("*.py") if not file.stem.startswith("_"))
LONG = pytest.mark.skipif(not ALL, reason="`make examples` runs it")
WITHOUT_CHANCE = {"inspect_attention", "serve"}  # nothing in them is random, so there is no seed


@pytest.mark.parametrize("name", NAMES)
def test_help(name: str, tmp_path: Path) -> None:
    done = python(str(EXAMPLES / f"{name}.py"), "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"python examples/{name}.py" in done.stdout
    assert name in WITHOUT_CHANCE or "--seed" in done.stdout


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_one_sentence(name: str, tmp_path: Path) -> None:
    missing = (*WEIGHTS.get(name, ()), *LIBRARIES[name])[0]
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['{name}.py']; import {name}; {name}.main([])"
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"{name}.py needs the package {missing}, which is not installed: run pip install")


def test_custom_rule(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    results, printed = run("custom_rule", tmp_path, packaged, "--steps", "30")
    assert results["same"] and results["difference"] < 1e-4 and results["after"] < results["before"] - 0.5
    assert "# ScaleRule [default]" in printed and "keeps" in printed


def test_the_custom_rule_is_short_and_public() -> None:
    source = (EXAMPLES / "custom_rule.py").read_text(encoding="utf-8")
    tree = ast.parse(source)
    (rule_class,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    lines = source.splitlines()[rule_class.decorator_list[0].lineno - 1 : rule_class.end_lineno]
    assert len([line for line in lines if line.strip()]) < 15
    imported = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert "rules" not in {str(node.module).partition(".")[0] for node in imported}
    import surgery

    for node in imported:
        if str(node.module).startswith("surgery"):
            assert node.module == "surgery" and {alias.name for alias in node.names} <= set(surgery.__all__)


def test_topics(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    words = ("--limit", "40", "--epochs", "1", "--tokens", "8", "--batch", "10", "--out", str(tmp_path / "out"))
    results, printed = run("topics", tmp_path, packaged, *words)
    assert results["same"] and results["difference"] < 1e-3 and results["onnx"] == results["after"]
    assert "the same bits" in printed and "equal" in printed and "DIFFERS" not in printed
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"adapter", "topics.onnx", "topics.svg", "surgery.html"} <= written
    saved = {file.name: file.stat().st_mode & 0o077 for file in (tmp_path / "out" / "adapter").iterdir()}
    assert saved.keys() == {"adapter_config.json", "adapter_model.safetensors"} and len(set(saved.values())) == 1


@LONG
@pytest.mark.parametrize("peft", [True, False], ids=["beside PEFT", "without it"])
def test_many(peft: bool, tmp_path: Path, packaged: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    if not peft:
        (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['peft'] = None")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    elif find_spec("peft") is None:
        pytest.skip("needs peft")
    words = ["--steps", "2", "--batch", "4", "--texts", "12", "--tokens", "8", "--rounds", "1", "--threads", "1"]
    results, printed = run("many", tmp_path, packaged, *words, "--out", str(tmp_path / "out"))
    assert results["same"] and results["as_saved"] and results["apart"] < 1e-5 and results["swapped"] < 1e-5
    assert len(results["right"]) == 5 and (results["peft"] < 1e-5 if peft else results["peft"] is None)
    assert "the same bits" in printed and ("PEFT is not installed" in printed) is not peft
    assert {"business", "tech"} <= {folder.name for folder in (tmp_path / "out" / "adapters").iterdir()}


@LONG
def test_ship(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    words = ["--steps", "1", "--batch", "2", "--texts", "3", "--tokens", "8", "--clients", "2"]
    results, printed = run("ship", tmp_path, packaged, *words, "--out", str(tmp_path / "out"))
    assert results["ok"] and results["refused"] == [400, 400] and results["asked"] == {"one": 3, "several": 18}
    assert len(results["sizes"]) == 5 and max(results["sizes"].values()) < 0.02 * results["nbytes"]
    assert "DIFFERS" not in printed and all(f"{name} " in printed for name in ("base", *results["sizes"]))


def test_the_server_is_short_and_needs_no_torch(tmp_path: Path) -> None:
    source = EXAMPLES / "serve.py"
    assert len(source.read_text(encoding="utf-8").splitlines()) <= 60
    for package in LIBRARIES["serve"]:
        pytest.importorskip(package)
    code = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; import serve; serve.main()"
    done = python("-c", code, str(tmp_path), folder=tmp_path)
    assert "there is no file" in done.stderr and "ImportError" not in done.stderr, done.stderr


@LONG
def test_serve_vllm(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    if not (EXAMPLES.parent / ".venv-vllm" / "bin" / "vllm").exists():
        pytest.skip("needs vLLM in .venv-vllm, which make interop sets up")
    words = ("--steps", "2", "--requests", "12", "--words", "4", "--merged", "0", "--threads", "1")
    results, printed = run("serve_vllm", tmp_path, packaged, *words)
    assert results["equal"] and results["different"] and results["adapters"]["seconds"] > 0
    assert "DIFFERS" not in printed and "--enable-lora" in printed


def test_serving_by_vllm_says_where_vllm_is_absent(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    for package in WEIGHTS["serve_vllm"]:
        packaged(package)
    done = python(str(EXAMPLES / "serve_vllm.py"), "--vllm", "absent", folder=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("serve_vllm.py needs an environment with vLLM")


@LONG
def test_style(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    words = ("--steps", "1", "--batch", "1", "--tokens", "24", "--length", "4", "--sample", "4", "--threads", "1")
    results, printed = run("style", tmp_path, packaged, *words)
    assert results["same"] and results["again"] == results["frozen"] == pytest.approx(51.5, abs=0.1)
    assert len({results[name] for name in ("frozen", "prefix", "lora", "both")}) == 4
    assert "the same bits, the same logits" in printed


@LONG
def test_upscale(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    words = ("--steps", "1", "--batch", "1", "--tokens", "24", "--threads", "1")
    results, printed = run("upscale", tmp_path, packaged, *words)
    assert results["same"] and results["kept"]["equal"]
    assert [row["layers"] for row in results["rows"]] == [30, 30, 24, 24, 36, 36]
    loaded, _, cut, _, deep, _ = (row["perplexity"] for row in results["rows"])
    assert loaded == pytest.approx(51.5, abs=0.1) and cut > loaded and deep > loaded
    assert "the same bits, the same logits" in printed


def test_vision(tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    words = ("--limit", "40", "--epochs", "1", "--pixels", "32", "--batch", "10", "--out", str(tmp_path / "out"))
    results, printed = run("vision", tmp_path, packaged, *words)
    assert results["same"] and results["difference"] < 1e-2  # a few hundred roundings of float32 deep
    assert "the same bits" in printed
    assert {"adapter", "vision.svg"} <= {file.name for file in (tmp_path / "out").iterdir()}
    assert len(list((tmp_path / "out" / "adapter").iterdir())) == 2  # tensors and rules


@pytest.mark.parametrize("mean", [False, True], ids=["every head", "mean"])
def test_inspect_attention(mean: bool, tmp_path: Path, packaged: Callable[[str], Path]) -> None:
    words = ["--text", "The mice ate, and it cost $5 or $6.", "--out", str(tmp_path / "out"), *["--mean"] * mean]
    results, printed = run("inspect_attention", tmp_path, packaged, *words)
    assert results["right"] and results["same"]
    tokens = results["tokens"]
    assert tokens[0] == "[CLS]" and tokens[-1] == "[SEP]" and [row[0] for row in results["looks"]] == tokens
    for token, (most, share), (word, share_of_word) in results["looks"]:
        assert most in tokens and 1 >= share >= share_of_word > 0 and word not in ("[CLS]", "[SEP]")
        assert tokens.count(token) > 1 or word != token
    assert "the same bits, the same classes" in printed
    drawing = (tmp_path / "out" / "attention.svg").read_text(encoding="utf-8")
    assert drawing.count("<image") == (6 if mean else 6 * 12)  # a map each
