"""The engine never imports the rule library, and nothing before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import networkx
import pytest

import surgery
from surgery import rules
from tests.support import ROOT


@pytest.mark.parametrize("package", [surgery, rules], ids=lambda package: package.__name__)
def test_no_public_name_is_a_submodules(package: ModuleType) -> None:
    """Importing a submodule puts it on its package: the name would be one thing before and another after."""
    folder = ROOT.joinpath(*package.__name__.split("."))
    submodules = {file.stem for file in folder.glob("*.py")} | {file.parent.name for file in folder.glob("*/*.py")}
    assert not submodules & set(package.__all__)


@pytest.mark.parametrize("stub", sorted(ROOT.glob("surgery/**/*.pyi")), ids=lambda stub: stub.parent.name)
def test_all_names_of_a_lazy_package_are_listed_once_and_there(stub: Path) -> None:
    tree = ast.parse(stub.read_text())
    imported = [
        alias.name for node in tree.body if isinstance(node, ast.ImportFrom) and node.module for alias in node.names
    ]
    (listed,) = [n.value for n in tree.body if isinstance(n, (ast.Assign, ast.AnnAssign)) and n.value is not None]
    assert sorted(imported) == sorted(ast.literal_eval(listed)) and len(imported) == len(set(imported))
    name = ".".join(stub.parent.relative_to(ROOT).parts)
    package = __import__(name, fromlist=["__all__"])
    assert sorted(package.__all__) == sorted(imported) and all(hasattr(package, name) for name in imported)


# A file imports from its own package and from those before it in this list.
ORDER: dict[str, int] = {
    name: place
    for place, name in enumerate(
        (
            *(
                "short_help",
                "errors",
                "progress",
                "results",
                "complex_numbers",
                "sharded_tensors",
                "transaction",
            ),
            *("arithmetic", "packed", "patterns", "model_edits", "forward", "tracing", "structures"),
            *("authoring", "state", "weaving", "rewritten_model", "planning", "merging"),
            *(
                "lifecycle",
                "inspection",
                "pictures",
                "routing",
                "adapter_files",
                "peft_format",
                "storage",
                "checkpoints",
                "lora_conversion",
                "serving",
                "trainer",
                "testing",
            ),
            *("peft", "onnx.runtime", "onnx.conversion", "onnx.calls", "onnx.graph", "onnx.checking", "onnx.export"),
            *("rules._shared", "rules._linear", "rules._virtual_tokens", "rules._attention", "rules.slots"),
            *("rules._low_rank", "rules._rewriting", "rules", "rules.rewrites", "rules.peft", "commands", "__main__"),
        )
    )
}


def _files() -> list[Path]:
    """The files of the engine and of the rule library, each once."""
    return sorted({file.resolve() for folder in ("surgery", "rules") for file in (ROOT / folder).rglob("*.py")})


def _imports(file: Path) -> Iterator[Path]:
    """The files of the project that a file imports from; imports for types and in functions count, too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module or ""]
        else:
            continue
        places = (ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names)
        yield from (place.resolve() for place in places if place.is_file() and place.resolve() != file)


def test_no_files_import_each_other() -> None:
    """Not through any number of others, and not for types or in functions either. So any file can be imported first."""
    graph = networkx.DiGraph((file, other) for file in _files() for other in _imports(file))
    circles = [ring for ring in networkx.strongly_connected_components(graph) if len(ring) > 1]
    assert not circles, [sorted(str(file.relative_to(ROOT)) for file in ring) for ring in circles]


def _place(file: Path) -> int | None:
    """The place of a file in `ORDER`; None for a package's list of public names."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "surgery" else parts
    if parts[-1] == "__init__":
        return None
    name = ".".join(parts[:2] if parts[0] == "onnx" or len(parts) > 2 and parts[0] == "rules" else parts[:1])
    return ORDER[name]


def test_packages_import_in_one_direction() -> None:
    places = [(file, _place(file), other, _place(other)) for file in _files() for other in _imports(file)]
    assert not [(file, other) for file, at, other, to in places if at is not None and to is not None and to > at]


def test_torch_is_imported_when_it_is_needed() -> None:
    code = "import sys; sys.modules['torch'] = None; import surgery, surgery.errors, surgery.onnx; surgery.LoadError"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_test_imports_another() -> None:
    """What several tests share stands in tests/support."""
    for file in ROOT.glob("tests/*/test_*.py"):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith("tests.") and ".test_" in name], file


def test_tests_lie_in_folders() -> None:
    """A test lies in the folder of what it tests, and what tests share in tests/support; each folder is a package."""
    assert {file.name for file in ROOT.glob("tests/*.py")} == {"__init__.py", "conftest.py"}
    folders = {file.parent for file in ROOT.glob("tests/*/*.py")}
    assert not [folder.name for folder in folders if not (folder / "__init__.py").exists()]
    shared = [*ROOT.glob("tests/support/test_*.py"), *ROOT.glob("tests/reports/test_*.py")]
    assert not [file.name for file in shared]


def test_in_a_checkout_the_folder_gives_the_same_package() -> None:
    code = "import rules, surgery.rules; assert rules is surgery.rules and rules.LoraRule is surgery.rules.LoraRule"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


def test_the_engine_never_imports_the_rule_library() -> None:
    """Also not in functions: a rule is asked for by its name, as the rules of others are."""
    for file in (ROOT / "surgery").rglob("*.py"):
        if "rules" in file.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.startswith("surgery.rules")], file
