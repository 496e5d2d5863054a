"""`surgery extract`: the difference between a base and its fine-tune becomes a LoRA."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.commands.answer import Answer, size_text
from surgery.commands.new_files import check_new_folder, new_folder
from surgery.commands.options import ModelPath
from surgery.commands.paths import existing, size_of
from surgery.commands.weight_files import weight_files
from surgery.errors import SurgeryError

__all__ = ["extract"]

TunedPath = Annotated[
    Path, typer.Argument(metavar="TUNED", help="A folder with the fine-tune of the base.", show_default=False)
]


def extract(
    model: ModelPath,
    tuned: TunedPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; new or empty.")],
    rank: Annotated[int | None, typer.Option(help="The rank at every site; default: as many as needed.")] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="The share of each change that may be lost, such as 0.05.")
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A module's name; only these modules get a LoRA. Default: all.")
    ] = None,
    others: Annotated[
        Literal["train", "refuse", "leave-out"],
        typer.Option(help="Other tensors that changed: hold them in full, refuse them, or leave them out."),
    ] = "train",
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None, typer.Option(help="The dtype of the LoRA's tensors.")
    ] = None,
    format: Annotated[Literal["auto", "peft", "surgery"], typer.Option(help="The format of the adapter.")] = "auto",
) -> Answer:
    """Write the difference between a base and its fine-tune as an adapter: LoRA of the largest singular values.

    Weights are read one pair at a time, so models larger than memory work.

        surgery extract models/llama models/llama-tuned --rank 16 --out adapters/tuned
    """
    import torch

    from surgery import extract_lora

    check_new_folder(out)
    for folder in (existing(model), existing(tuned)):
        if folder.is_dir() and not weight_files(folder)[0] and any(folder.glob("*.bin")):
            raise SurgeryError(f"{folder} holds pickles", why="pickles are not opened", fix="save it as safetensors")
    kind: Any = None if dtype is None else getattr(torch, dtype)
    rest: Any = "leave out" if others == "leave-out" else others
    with new_folder(out) as place:
        report = extract_lora(
            model, tuned, place, rank=rank, tolerance=tolerance, only=only or None, others=rest, dtype=kind,
            format=format, progress=True,
        )  # fmt: skip
        files = sorted(file.name for file in place.iterdir())
    size = size_of(out)
    data = {"out": str(out), "files": files, "nbytes": size, **report.to_dict()}
    return Answer(data, [str(report), f"{out}: {size_text(size)} ({', '.join(files)})"])
