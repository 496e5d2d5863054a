"""The report part of `make rewrites`: each ready-made rewrite on a model of each of transformers' families.

`python -m tests.reports.rewrites` writes docs/reference/rewrites-models.md. With names of families, it prints their
rows. `--results FILE` appends the rows of each family to a file of JSON lines as soon as they are there, and a later
run with the same file goes on with the families that are not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from surgery import Rule, SurgeryError, apply_rules, class_of, remove
from surgery.rules.rewrites import (
    NoOpsRule,
    ShareRule,
    centre_layer_norm,
    fuse_attention,
    fuse_gelu,
    fuse_layer_norm,
    fuse_linears,
    fuse_rms_norm,
    fuse_silu,
)
from tests.support import ROOT
from tests.support.families import FAMILIES, Family

PAGE = ROOT / "docs" / "reference" / "rewrites-models.md"

REWRITES: dict[str, Callable[[nn.Module, Any], Rule]] = {
    "fuse_attention": lambda model, inputs: fuse_attention(weights=False),
    "fuse_rms_norm": lambda model, inputs: fuse_rms_norm(),
    "fuse_layer_norm": lambda model, inputs: fuse_layer_norm(),
    "fuse_gelu": lambda model, inputs: fuse_gelu(),
    "fuse_gelu (tanh)": lambda model, inputs: fuse_gelu(approximate="tanh"),
    "fuse_silu": lambda model, inputs: fuse_silu(),
    "fuse_linears (3)": lambda model, inputs: fuse_linears(),
    "fuse_linears (2)": lambda model, inputs: fuse_linears(count=2),
    "NoOpsRule": lambda model, inputs: NoOpsRule(),
    "ShareRule": lambda model, inputs: ShareRule(),
    "centre_layer_norm": centre_layer_norm,
}
CALLS = 3  # whose times are taken, before and after a rewrite

INTRO = """# Rewrites on all families

Where each of the [rewrites](rules/rewrites.md) fits in transformers' models. Each family is a tiny model with random
weights, in evaluation, with attention written out (`attn_implementation="eager"`). A row says how many modules of which
classes were rewritten, and by how much the outputs and the gradients of the parameters moved, as a share of the largest
value. "–": autograd refuses the gradients of the model itself, or the rewrite gives the model other parameters. The
time is that of a call without gradients, as a share of the time before: processor time, the shortest of three calls. In
a model so tiny it shows the cost of calls, and not that of arithmetic. Other rewrites that change weights or modules
are not in the list: their page says how each is tested.

`python -m tests.reports.rewrites`, a part of `make rewrites`, writes this page.
"""


_NOT_FOUND = ("does not find its pattern", "finds nothing to do", "no LayerNorm follows a Linear")


@dataclass
class Row:
    """One rewrite on one family."""

    rewrite: str
    family: str
    classes: str = ""
    sites: int = 0
    outputs: float = 0.0
    gradients: float | None = 0.0  # None: the model itself can't be differentiated, or has other parameters
    time: float = 1.0
    refused: str = ""


def rows_of(family: Family) -> Iterator[Row]:
    """Yields a row for each rewrite that fits somewhere in a family's model."""
    torch.manual_seed(0)
    model, inputs = family.make().eval(), family.inputs()
    with contextlib.suppress(AttributeError, ValueError):
        model.set_attn_implementation("eager")  # type: ignore[operator]
    _results(model, inputs)  # the first call may change a model for good: BigBird gives up sparse attention
    before, seconds = _results(model, inputs), _seconds(model, inputs)
    for name, make in REWRITES.items():
        row = Row(name, family.name)
        try:
            apply_rules(model, make(model, inputs), example_inputs=inputs)
        except SurgeryError as error:
            text = " ".join(" ".join(str(error).splitlines()[:3]).split())
            row.refused = re.sub(r"/\S*/site-packages/", "", text)[:200]
            if not any(words in text for words in _NOT_FOUND):
                yield row
            continue
        changed = Counter(class_of(m).__name__ for m in model.modules() if hasattr(type(m), "_surgery_base"))
        if not changed:  # other modules are in the place of the model's
            changed = Counter(type(m).__name__ for m in model.modules() if type(m) is nn.RMSNorm)
        row.classes, row.sites = ", ".join(changed), changed.total()
        try:
            after = _results(model, inputs)
            row.time = _seconds(model, inputs) / seconds
        finally:
            remove(model)
        own = before if after[0].keys() == before[0].keys() else _results(model, inputs, after[0].keys())
        row.outputs = _largest([*own[0].values()], [*after[0].values()])
        same = own[1] is not None and after[1] is not None and name != "centre_layer_norm"
        row.gradients = _largest(own[1], after[1]) if same else None  # type: ignore[arg-type]
        yield row


def _results(
    model: nn.Module, inputs: Any, only: Collection[str] | None = None
) -> tuple[dict[str, Tensor], list[Tensor] | None]:
    """Returns the outputs of a call by their place, and the gradients of the sum of their squares.

    `only`: the outputs that count, such as those that a rewrite does not omit. The gradients are None where autograd
    refuses them: some forwards write to what the backward needs.
    """
    torch.manual_seed(1)
    numpy.random.seed(1)  # block-sparse attention draws its blocks by numpy
    outputs = {name: x for name, x in _named(model(**inputs)) if x.is_floating_point() and (not only or name in only)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = sum((tensor.float().square().mean() for tensor in outputs.values() if tensor.requires_grad), torch.zeros(()))
    outputs = {name: tensor.detach() for name, tensor in outputs.items()}
    try:
        gradients = torch.autograd.grad(loss, trained, allow_unused=True) if loss.requires_grad else ()
    except RuntimeError:
        return outputs, None
    return outputs, [torch.zeros(()) if g is None else g for g in gradients]


def _seconds(model: nn.Module, inputs: Any) -> float:
    """Returns the processor time of the shortest of some calls without gradients."""
    times = []
    with torch.no_grad():
        for _ in range(CALLS):
            start = time.process_time()
            model(**inputs)
            times.append(time.process_time() - start)
    return min(times)


def _named(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields all tensors of a model's output with their places, without caches."""
    if isinstance(output, Tensor):
        yield name, output
    elif isinstance(output, (Mapping, tuple, list)):
        for key, value in output.items() if isinstance(output, Mapping) else enumerate(output):
            yield from _named(value, f"{name}.{key}")


def _largest(before: list[Tensor], after: list[Tensor]) -> float:
    """Returns the largest difference, as a share of the largest value of all these tensors."""
    top = max((float(x.abs().nan_to_num(0, 0, 0).max()) for x in before if x.numel()), default=0.0) or 1.0
    pairs = [(x, y) for x, y in zip(before, after, strict=True) if x.numel()]
    return max((float((x - y).nan_to_num(0, 0, 0).abs().max()) for x, y in pairs), default=0.0) / top


def page(rows: list[Row], measured: int) -> str:
    lines = [INTRO, f"transformers {metadata.version('transformers')}, torch {torch.__version__.split('+')[0]}, "
             f"{measured} of {len(FAMILIES)} families.", ""]  # fmt: skip
    lines += [
        "| rewrite | families | modules | largest difference of outputs | of gradients | time, median |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name in REWRITES:
        done = [row for row in rows if row.rewrite == name and not row.refused]
        if done:
            outputs = max(row.outputs for row in done)
            gradients = _number(max((g for row in done if (g := row.gradients) is not None), default=None))
            modules, ratio = sum(row.sites for row in done), median(row.time for row in done)
            lines.append(f"| `{name}` | {len(done)} | {modules} | {outputs:.1e} | {gradients} | {ratio:.2f} |")
    for name in REWRITES:
        lines += ["", f"## {name}", "", "| family | classes | modules | outputs | gradients | time |"]
        lines.append("|---|---|--:|--:|--:|--:|")
        for row in rows:
            if row.rewrite == name and not row.refused:
                cells = [row.family, row.classes, str(row.sites), f"{row.outputs:.1e}", _number(row.gradients)]
                lines.append(f"| {' | '.join(cells)} | {row.time:.2f} |")
    refused = [row for row in rows if row.refused]
    if refused:
        lines += ["", "## Refused", "", "| rewrite | family | classes | reason |", "|---|---|---|---|"]
        lines += [
            f"| {row.rewrite} | {row.family} | {row.classes} | {row.refused.replace('|', '')} |" for row in refused
        ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


def measure(family: Family) -> list[Row]:
    """Returns the rows of a family; a family whose model can't be called has one row that says why."""
    try:
        return list(rows_of(family))
    except Exception as error:  # the other families follow
        return [Row("", family.name, refused=f"{type(error).__name__}: {error}"[:200])]


def read_results(path: Path | None) -> dict[str, list[Row]]:
    """Returns the rows in a file of results by family. A last line that an interrupt cut off is left out."""
    results: dict[str, list[Row]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path is not None and path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            results[record["family"]] = [Row(**row) for row in record["rows"]]
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="default: all, and the page is written")
    parser.add_argument(
        "--results", type=Path, help="a file of JSON lines: a run adds to it, and leaves out its families"
    )
    parser.add_argument("--again", action="store_true", help="measure the named families although they are in the file")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    results = read_results(options.results)
    names = options.families or list(FAMILIES)
    for name in names:
        if name in results and not options.again:
            continue
        start = time.process_time()
        results[name] = measure(FAMILIES[name])
        seconds = round(time.process_time() - start, 1)
        print(f"{name}, {seconds} s of CPU", *results[name], sep="\n  ", flush=True)
        if options.results is not None:
            record = {"family": name, "seconds": seconds, "rows": [asdict(row) for row in results[name]]}
            with options.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        gc.collect()
    if not options.families:
        rows = [row for name in FAMILIES for row in results[name]]
        PAGE.write_text(page(rows, len(FAMILIES)), encoding="utf-8")
        print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
