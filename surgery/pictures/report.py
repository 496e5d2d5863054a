"""`report`: one HTML file about a rewritten model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from surgery.errors import SurgeryError
from surgery.pictures.page import page
from surgery.pictures.report_data import report_data
from surgery.transaction.created_folder import created_folder
from surgery.transaction.neutral_context import neutrally

__all__ = ["report"]


@neutrally(collects=True)
def report(model: nn.Module, path: str | Path, *, example_inputs: Any = None, title: str | None = None) -> Path:
    """Write an HTML page about a model: summary, tree, sites before and after, code, parameters, rules, outputs.

    >>> import tempfile
    >>> from pathlib import Path
    >>> import torch
    >>> from torch import nn
    >>> from surgery import apply_rules, report
    >>> from surgery.rules import LoraRule
    >>> model = apply_rules(nn.Sequential(nn.Linear(8, 8)), [LoraRule("0", rank=2)])
    >>> written = report(model, Path(tempfile.mkdtemp()) / "surgery.html", example_inputs=torch.ones(1, 8))
    >>> written.name, "LoraRule" in written.read_text(encoding="utf-8")
    ('surgery.html', True)

    The page is one file without outside links, and its policy (CSP) forbids loading anything. It follows the browser's
    light or dark colours. Sites with the same code and shapes are one entry, so pages of large models stay small.

    Args:
        model: the model, rewritten or untouched. It is not changed.
        path: the file to write. Its folder is made.
        example_inputs: an example call: a tensor, a tuple of arguments or a dict of keyword arguments. The model runs
            on it twice, with the live adapters and without adapters, and the page shows in which layers outputs change.
            A model without adapters runs once, and the page shows the norm of each layer's output. Default None: the
            page does not have this part.
        title: the heading. Default None: the model's class.

    Returns:
        The path of the file.

    Raises:
        SurgeryError: pygraphviz is missing (`pip install 'model-surgery[pictures]'`); the example call fails; or an
            adapter is merged and `example_inputs` are given.
    """
    file = Path(path)
    if file.is_dir():
        raise SurgeryError("a report is one file", where=str(file), why="this is a folder", fix="name a file in it")
    text = page(report_data(model, example_inputs, title))
    with created_folder(file.parent):
        file.write_text(text, encoding="utf-8")
    return file
