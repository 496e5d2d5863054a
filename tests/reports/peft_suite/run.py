"""Run the copies of PEFT's tests: long files in a process each, short ones together; what has run is not run again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import surgery.peft
from tests.reports.peft_suite import OUT, PACKAGE, SIDES, hub
from tests.support import ROOT

Results = dict[str, dict[str, Any]]

LONG = 40_000  # bytes of a long file
# Files that are not run: what they need.
NOT_RUN = {
    "test_common_gpu.py": "a GPU",
    "test_gpu_examples.py": "a GPU",
    "test_gptqmodel.py": "a GPU and gptqmodel",
    "test_lora_megatron.py": "megatron",
    "test_stablediffusion.py": "diffusers",
    "test_torch_compile.py": "a GPU",
}

# Files whose tests are all of what the façade does not have.
ABSENT = {
    "test_adamss_asa.py": "AdaMSS", "test_arrow.py": "Arrow", "test_bdlora.py": "BD-LoRA",
    "test_bufferdict.py": "a private class", "test_cartridge.py": "Cartridge", "test_cpt.py": "CPT",
    "test_deft.py": "DEFT", "test_frod.py": "FRoD", "test_incremental_pca.py": "a private class",
    "test_lora_ga.py": "LoRA-GA", "test_osf.py": "OSF", "test_poly.py": "Poly", "test_pvera.py": "PVeRA",
    "test_riemannian_lora.py": "an optimizer", "test_shadow.py": "Shadow", "test_supertuning.py": "SuperTuning",
    "test_unilora.py": "UniLoRA", "test_vblora.py": "VB-LoRA", "test_velora.py": "VeLoRA", "test_xlora.py": "X-LoRA",
}  # fmt: skip


def results_file(side: str) -> Path:
    return OUT / f"{side}.jsonl"


def file_of(test: str) -> str:
    return test.partition("::")[0].rpartition("/")[2]


def lines(side: str) -> list[dict[str, Any]]:
    path = results_file(side)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def results(side: str) -> Results:
    """Test id → its result. A test that fails in its teardown has failed."""
    by_id: Results = {}
    for line in lines(side):
        if "id" in line and by_id.get(line["id"], {}).get("outcome") != "failed":
            by_id[line["id"]] = line
    return by_id


def files() -> list[str]:
    """The files of tests, the longest first, as they take the longest."""
    paths = [path for path in (OUT / "base" / PACKAGE).glob("test_*.py") if path.name not in {*NOT_RUN, *ABSENT}]
    return [path.name for path in sorted(paths, key=lambda path: -path.stat().st_size)]


def forget(side: str, drop: Callable[[dict[str, Any]], bool]) -> None:
    """Drop results, and the marks of their files, so that these tests run again."""
    dropped = {file_of(line["id"]) for line in lines(side) if "id" in line and drop(line)}
    kept = [line for line in lines(side) if not ("id" in line and drop(line)) and line.get("finished") not in dropped]
    new = results_file(side).with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    new.replace(results_file(side))


def forget_absent() -> None:
    """Drop what was not run for want of a configuration that the façade has by now."""
    forget("base", lambda line: line["outcome"] == "absent" and line["method"] in surgery.peft.__all__)


def run_files(side: str, names: list[str], every: int, seconds: int) -> str:
    """Run the tests of files that have no result yet; with the façade, those that pass with PEFT."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(OUT / side)]),
        "HF_HOME": str(hub.HOME),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PEFT_SUITE_SIDE": side,
        "PEFT_SUITE_RESULTS": str(results_file(side)),
        "PEFT_SUITE_SECONDS": str(seconds),
        "PEFT_SUITE_EVERY": str(every),
    }
    if side == "facade":
        passed = OUT / "passed.txt"
        ids = [test for test, line in results("base").items() if line["outcome"] == "passed"]
        passed.write_text("\n".join(ids), encoding="utf-8")
        environment["PEFT_SUITE_PASSED"] = str(passed)
    begin = time.monotonic()
    options = "-q --tb=native -p tests.reports.peft_suite.recorder -p no:cacheprovider -p no:warnings".split()
    command = [sys.executable, "-m", "pytest", *options, *(f"{PACKAGE}/{name}" for name in names)]
    log = OUT / "logs" / side / f"{names[0]}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=OUT / side, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode not in (0, 1, 5):  # all passed, some failed, none to run
        return f"{side} {' '.join(names)}: pytest ended with {done.returncode}, see {log.relative_to(ROOT)}"
    took = round(time.monotonic() - begin)
    with results_file(side).open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"finished": name, "every": every}) + "\n" for name in names)
    return f"{side} {' '.join(names)}: {took} s"


def batches(names: Iterable[str]) -> list[list[str]]:
    """Long files alone; short ones ten together, as starting a process takes longer than their tests."""
    groups: list[list[str]] = []
    short: list[str] = []
    for name in names:
        long = (OUT / "base" / PACKAGE / name).stat().st_size > LONG
        (groups.append([name]) if long else short.append(name))
    return groups + [short[first : first + 10] for first in range(0, len(short), 10)]


def run(side: str, names: Iterable[str], every: int, seconds: int, jobs: int) -> None:
    """Run files of tests on one side, a few at a time."""
    finished = {line["finished"] for line in lines(side) if line.get("every", every + 1) <= every}
    waiting = batches(name for name in names if name not in finished)
    with ThreadPoolExecutor(jobs) as pool:
        for told in pool.map(lambda group: run_files(side, group, every, seconds), waiting):
            print(told, flush=True)


def run_all(names: Iterable[str], every: int, seconds: int, jobs: int, sides: Iterable[str] = SIDES) -> None:
    for side in sides:
        run(side, names, every, seconds, jobs)
