"""The pages' code runs and prints the output that they show; the names, tests and files that they mention exist.

Blocks of one page run in order in one namespace. A ```text block right after a ```python block is what it prints.
"""

from __future__ import annotations

import ast
import dataclasses
import doctest
import re
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
import surgery.onnx
import surgery.peft
import surgery.testing
import surgery.trainer
from surgery import rules
from surgery.rules import rewrites
from tests.support import ROOT
from tests.support.pages import TEXT, blocks, runs

ONNX = (
    "export-to-onnx", "serve-without-torch", "generate-text-with-onnx", "convert-peft-to-onnx", "run-in-a-browser",
)  # fmt: skip
NEEDS = {
    "docs/how-to/train-with-the-trainer.md": ("accelerate",),
    "docs/tutorials/classifier.md": ("accelerate",),
    "docs/how-to/train-on-a-quantised-model.md": ("bitsandbytes",),
    "docs/how-to/merge-into-quantised-weights.md": ("bitsandbytes",),
    **{f"docs/how-to/{task}.md": ("onnxscript", "onnxruntime") for task in ONNX},
    "docs/tutorials/ship.md": ("onnxscript", "onnxruntime"),
    "docs/how-to/match-by-condition.md": ("yaml",),
    "docs/how-to/write-rules-as-yaml.md": ("yaml",),
    "docs/how-to/train-several-parts.md": ("peft",),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # PEFT's own call
@pytest.mark.parametrize("name", [name for name, text in TEXT.items() if "```python" in text])
def test_code_runs_and_prints_what_is_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    for block, printed, shown in runs(name, tmp_path):
        expected = shown.text if shown else ""
        same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
        assert same, f"{name}:{block.line} prints\n{printed}\nand the page shows\n{expected}"


# Names ----------------------------------------------------------------------------------------------------------


def in_code(text: str) -> set[str]:
    """The words between backquotes."""
    return {word for quoted in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"\w+", quoted)}


def rows(name: str) -> dict[str, str]:
    """First and last cell of each row of a page's tables."""
    cells = [line.strip("|").split(" | ") for line in TEXT[name].splitlines() if line.startswith("|")]
    return {row[0].strip(" `"): row[-1].strip() for row in cells}


def public_names() -> set[str]:
    """Every public name as the reference lists it: those of `surgery` and the rule library without a module."""
    named = (surgery.testing, surgery.trainer, surgery.peft, surgery.onnx, rewrites)
    modules: dict[str, Any] = {module.__name__: module for module in named}
    public = {*surgery.__all__, *rules.__all__}
    public |= {f"{path}.{name}" for path, module in modules.items() for name in module.__all__}
    return public - {f"surgery.onnx.{name}" for name in surgery.__all__}  # the same


def test_every_public_name_is_in_the_reference() -> None:
    listed, public = rows("docs/reference/index.md") | rows("docs/reference/module-names.md"), public_names()
    assert public <= listed.keys(), public - listed.keys()
    assert all(listed[name] for name in public)
    assert {name for name in listed if re.fullmatch(r"[\w.]+", name)} - {"name"} == public


def test_every_public_name_has_its_signature_on_one_page() -> None:
    pages = [text for name, text in TEXT.items() if name.startswith("docs/reference/api/")]
    shown = [name for text in pages for name in re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)]
    packages = {name: "surgery.rules." if name in rules.__all__ else "surgery." for name in public_names()}
    assert sorted(shown) == sorted(
        name if name.startswith("surgery.") else package + name for name, package in packages.items()
    )


KINDS = [
    kind for name in rules.__all__ if name.endswith("Rule") and issubclass(kind := getattr(rules, name), surgery.Rule)
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_field_of_a_rule_is_told(kind: type[surgery.Rule]) -> None:
    page = TEXT[f"docs/reference/rules/{kind.name}.md"]
    assert page.startswith(f"# {kind.__name__}\n")
    assert f"\nName in files: `{kind.name}`. " in page
    own = {field.name for field in dataclasses.fields(kind)} - {f.name for f in dataclasses.fields(surgery.Rule)}
    assert own <= in_code(page), own - in_code(page)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_pefts_fields_on_a_rules_page_are_pefts(kind: type[surgery.Rule]) -> None:
    peft = optional_peft()
    configs: list[str] = []
    for line in TEXT[f"docs/reference/rules/{kind.name}.md"].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")] if line.startswith("|") else []
        if cells[:1] == ["field"]:
            configs = re.findall(r"`(\w+Config)`", cells[1])
        elif not cells:
            configs = []
        elif configs and not cells[0].startswith("---"):
            known = {field.name for name in configs for field in dataclasses.fields(getattr(peft, name))}
            named = in_code(cells[0] if cells[1] == "the same" else cells[1])
            assert named <= known | {"True", "False"}, named - known


def test_every_hook_of_a_rule_is_told() -> None:
    bases = [base for base in surgery.SlotRule.__mro__ if base is not object]
    fields = {field.name for field in dataclasses.fields(surgery.Rule)}
    hooks = {name for base in bases for name in vars(base) if not name.startswith("_")} - fields - {"bad"}
    pages = [name for name in TEXT if name.startswith("docs/reference/writing-rules/")]
    words = in_code("\n".join(TEXT[name] for name in [*pages, "docs/how-to/choose-modules.md"]))
    assert hooks <= words, hooks - words


def test_every_rule_is_in_the_table_of_slots() -> None:
    section = TEXT["docs/reference/onnx-slots.md"].partition("## Which rules have a slot\n")[2].partition("\n## ")[0]
    table, _, below = section.rpartition("|\n")
    kinds = {kind.__name__: kind for kind in KINDS}
    with_slots = {name for name, kind in kinds.items() if kind.slot_kind is not None}
    assert set(re.findall(r"`(\w+Rule)`", table)) == with_slots
    assert set(re.findall(r"`(\w+Rule)`", below)) | {"CaptureRule"} == set(kinds) - with_slots


def test_every_field_of_pefts_config_is_told() -> None:
    peft = optional_peft()
    code_words = in_code(TEXT["docs/reference/peft-names.md"])
    missing = [field.name for field in dataclasses.fields(peft.LoraConfig) if field.name not in code_words]
    assert not missing


@pytest.mark.parametrize("name", TEXT)
def test_every_column_of_a_table_has_a_heading(name: str) -> None:
    text = re.sub(r"(?ms)^( *)```.*?^\1```", "", TEXT[name])
    for head in re.findall(r"(?m)^ *\|(.+)\| *\n *\|(?: *:?-+:? *\|)+ *$", text):
        assert all(cell.strip() for cell in re.split(r"(?<!\\)\|", head)), f"{name}: |{head}|"


def test_the_figures_of_the_readme_are_measured() -> None:
    """The readme is short, and its figures are in the table of benchmarks."""
    assert len(TEXT["README.md"].splitlines()) <= 150
    figures = re.findall(r"\d+(?:\.\d+)? [×%]", TEXT["README.md"].partition("## Why")[2].partition("\n## ")[0])
    assert figures
    measured = TEXT["docs/explanation/benchmarks.md"]
    for figure in figures:
        assert figure in measured or f"| {figure[:-2]} |" in measured, figure


def optional_peft() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("peft")


# What pages point at --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXT)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXT[name]):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            page = (ROOT / name).parent / path if path else ROOT / name
            assert page.exists(), f"{name}: {target}"
            if anchor:
                text = page.read_text(encoding="utf-8")
                anchors = [anchor_of(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
                anchors += re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE)
                assert anchor in anchors, f"{name}: {target}"


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("name", TEXT)
def test_tests_and_files_and_targets_exist(name: str) -> None:
    text = TEXT[name]
    tests = list(ROOT.glob("tests/*/test_*.py"))
    files = {file.stem for file in tests}
    functions = {test for file in tests for test in re.findall(r"def (test_\w+)", file.read_text(encoding="utf-8"))}
    for word in re.findall(r"`(test_\w+)(?:\.py)?`", text):
        assert word in functions or word in files, f"{name}: there is no {word}"
    for path in re.findall(r"`((?:surgery|rules|tests|docs|examples)/[\w/]+\.\w+)`", text):
        assert (ROOT / path).exists(), f"{name}: there is no {path}"
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([a-z-]+)`", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name}: there is no make {target}"


GENERATED = {"coverage", "onnx-families", "onnx-models", "peft-checkpoints", "peft-suite", "rewrites-models"}


def test_extras_are_installed_in_one_way() -> None:
    """By the distribution's name, which is true in a checkout and elsewhere. The page about installing shows both."""
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pages = [
        path for folder in ("docs", "surgery") for path in (ROOT / folder).rglob("*") if path.suffix in (".md", ".py")
    ]
    for path in [ROOT / "README.md", *pages]:
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"pip install '([\w.-]+)\[([\w,]+)\]'", text)
        assert {extra for _, extras in named for extra in extras.split(",")} <= {*known}, path
        assert path.name == "install.md" or {name for name, _ in named} <= {"model-surgery"}, path


def test_pages_are_short() -> None:
    lengths = {name: text.count("\n") for name, text in TEXT.items() if name.startswith("docs/")}
    assert not [name for name, length in lengths.items() if length > 300 and Path(name).stem not in GENERATED]


def test_each_page_is_listed_in_its_folder() -> None:
    for name in TEXT:
        index = f"{Path(name).parent}/index.md"
        if name.startswith("docs/") and name != index and index in TEXT:
            assert f"]({Path(name).name}" in TEXT[index], f"{index} does not link to {name}"


def test_the_rules_in_the_docs_are_short() -> None:
    for name, text in TEXT.items():
        sources = [block.text for block in blocks(text) if block.kind == "python"]
        lengths = [length for source in sources for length in rule_lengths(source)]
        assert max(lengths, default=0) < 15, f"{name}: {lengths}"


def rule_lengths(source: str) -> list[int]:
    """Lines of code of each rule defined in a source, blank lines left out."""

    def lines(node: ast.ClassDef) -> int:
        first = node.decorator_list[0].lineno
        return sum(bool(line.strip()) for line in source.splitlines()[first - 1 : node.end_lineno])

    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    return [lines(node) for node in classes if any("rule" in ast.unparse(d) for d in node.decorator_list)]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """What the pages' code changes for the whole process: the random state, rules by name, and what is registered."""
    from surgery.authoring import rule_names
    from surgery.packed import packed_weight
    from surgery.serving import known as programs
    from surgery.serving import profile
    from surgery.storage.formats import known, module_names, table

    packed_classes, state = packed_weight._registered, torch.get_rng_state()
    registries: list[dict[str, Any]] = [rule_names._classes, table._formats, module_names._names, profile._profiles]
    assert known.adapter_formats() and programs.target_profiles()  # registered before, and not by a page
    before, classes = [dict(registry) for registry in registries], list(packed_classes)
    yield
    for registry, content in zip(registries, before, strict=True):
        registry.clear()
        registry.update(content)
    added = [kind for kind in packed_classes if kind not in classes and kind.__module__.startswith("docs_")]
    packed_classes[:] = [kind for kind in packed_classes if kind not in added]
    torch.set_rng_state(state)
