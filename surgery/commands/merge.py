"""`surgery merge`: a model and adapters become a plain checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from surgery.adapter_files.plain_json import read_json
from surgery.commands.adapters import base_class, load_all, names_of
from surgery.commands.answer import Answer, size_text
from surgery.commands.example_call import model_and_call
from surgery.commands.model_folder import CONFIG, class_in_config, model_on_meta
from surgery.commands.new_files import check_new_file, check_new_folder, new_files, new_folder
from surgery.commands.options import (
    AdapterPaths,
    ClassName,
    DryRun,
    ModelPath,
    PlanningExample,
    Trust,
    Untie,
    WithExample,
    Workers,
)
from surgery.commands.paths import existing, size_of
from surgery.commands.weight_files import INDEX
from surgery.errors import NotInFilesError, SurgeryError, abbreviate

__all__ = ["AnyBase", "Weights", "merge"]

Weights = Annotated[
    list[float] | None, typer.Option("--weight", help="A weight for each adapter, in their order; default 1.")
]
AnyBase = Annotated[bool, typer.Option("--any-base", help="Another base than the adapter's is only a warning.")]


def merge(
    model: ModelPath,
    adapters: AdapterPaths,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; new or empty. For gguf: the file.")],
    format: Annotated[
        Literal["transformers", "gguf", "mlx"],
        typer.Option(help="transformers; gguf for llama.cpp; mlx for mlx-lm."),
    ] = "transformers",
    weight: Weights = None,
    untie: Untie = False,
    any_base: AnyBase = False,
    example: PlanningExample = None,
    with_example: WithExample = False,
    class_name: ClassName = None,
    trust: Trust = False,
    dry_run: DryRun = False,
    keep_record: Annotated[
        bool,
        typer.Option("--keep-record", help="Write records, with which `surgery unmerge` restores the base."),
    ] = False,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="The dtype of the result; default: that of the files."),
    ] = None,
    quantised: Annotated[
        Literal["refuse", "dequantise", "requantise"],
        typer.Option(help="Quantised weights: refused; plain weights in the result; or new codes and scales."),
    ] = "refuse",
    limit: Annotated[
        float,
        typer.Option(help="With --quantised requantise: the share of a change that a weight may lose; inf for any."),
    ] = 0.10,
    rounding: Annotated[
        Literal["nearest", "stochastic", "error-feedback"],
        typer.Option(help="How sums are rounded to float16 and bfloat16."),
    ] = "nearest",
    workers: Workers = 1,
) -> Answer:
    """Merge adapters into a model and write a plain checkpoint, which loads without this package.

    The files are merged one tensor at a time where the adapters allow it, so the model may be larger than the memory.
    If such a merge is stopped, the same command goes on with it.

        surgery merge models/bert adapters/topics --out merged
        surgery merge models/llama adapters/topics --out merged.gguf --format gguf
    """
    from surgery import activate, merge_to

    if format == "gguf":
        check_new_file(out, overwrite=False)
    else:
        check_new_folder(out)
    names = names_of(adapters)
    if weight and len(weight) != len(names):
        raise SurgeryError(f"there are {len(weight)} weights for {len(names)} adapters", fix="--weight once for each")
    kind = class_name or base_class(adapters)
    options = {"keep_record": keep_record, "dtype": dtype, "workers": workers}
    in_format = format != "transformers"
    if in_format and keep_record:
        why = "an unmerge goes through a checkpoint of transformers"
        raise SurgeryError("--keep-record is not for this format", why=why, fix="leave out --format or --keep-record")
    of_files = dtype is not None and not in_format and quantised != "dequantise"
    used = {"--keep-record": keep_record, "--dtype": of_files, "--workers": workers > 1}
    told = [option for option, is_used in used.items() if is_used]
    why_loaded = None
    if not dry_run:
        why_loaded = "an example call needs the model" if example or with_example else _why_loaded(model, kind)
        why_loaded = why_loaded or _why_loaded_for(quantised, limit, rounding)
        if why_loaded is None:
            try:
                chosen = {**options, "untie": untie, "weights": weight, "trust": trust, "same_base": not any_base}
                return _by_files(model, kind, adapters, out, format, chosen)
            except NotInFilesError as error:
                if told:
                    raise
                why_loaded = f"{error.what}: {error.why}"
        if told:
            what = f"{abbreviate(told)} is not for a model that is loaded"
            raise SurgeryError(what, why=why_loaded, fix="leave it out")
    net, call = model_and_call(model, kind, example, with_example, weights=not dry_run)
    reports = load_all(net, adapters, trust=trust, same_base=not any_base, example=call)
    data = {"out": str(out), "written": not dry_run, "model": type(net).__name__, "adapters": reports}
    lines = [f"{name}: {len(report['loaded'])} tensors fit" for name, report in zip(names, reports, strict=True)]
    if dry_run:
        return Answer(data, [*lines, f"{out} would be {type(net).__name__} with {', '.join(names)} merged"])
    if weight:
        activate(net, names, weights=weight)
    with_dtype = in_format or quantised == "dequantise"
    settings: dict[str, Any] = {"untie": untie, "dtype": _dtype(dtype) if with_dtype else None, "progress": True}
    settings |= {"quantised": quantised, "limit": limit, "rounding": rounding}
    if quantised == "requantise" or rounding == "error-feedback":
        settings["example_inputs"] = call  # the inputs that the changes are weighed with
    if format == "gguf":
        merge_to(net, out, format=format, **settings)
        files = [out.name]
    else:
        with new_folder(out) as place:
            merge_to(net, place, format=format, **settings)
            files = sorted(file.name for file in place.iterdir())
    size = size_of(out)
    text = f"{out}: {type(net).__name__} with {', '.join(names)} merged, {size_text(size)}"
    lines += [f"the model was loaded: {why_loaded}"] if why_loaded else []
    return Answer({**data, "files": files, "nbytes": size, "streamed": False}, [*lines, text])


def _why_loaded(model: Path, kind: str | None) -> str | None:
    """Why a merge can't go through the files of a model; None if it can."""
    folder = existing(model) if model.is_dir() else model.parent
    if not any((folder / name).is_file() for name in ("model.safetensors", INDEX)):
        return "its weights are not in files of transformers' names"
    saved = class_in_config(read_json(folder / CONFIG)) if (folder / CONFIG).is_file() else None
    return None if kind in (None, saved) else f"its files are of {saved}, and the result is {kind}"


def _why_loaded_for(quantised: str, limit: float, rounding: str) -> str | None:
    """Why options of the merge need the loaded model; None if they do not."""
    if quantised != "refuse":
        return "the codes of quantised weights are read through its modules"
    if limit != 0.10:
        raise SurgeryError("--limit is not used", why="only codes lose a share", fix="--quantised requantise")
    return f"rounding={rounding} is done there" if rounding != "nearest" else None


def _dtype(name: str | None) -> Any:
    import torch

    return getattr(torch, name) if name is not None else None


def _by_files(
    model: Path, kind: str | None, adapters: Sequence[Path], out: Path, format: str, options: dict[str, Any]
) -> Answer:
    """Merges through the files, without loading the model."""
    from surgery import merge_files

    net, folder = model_on_meta(model, kind), model if model.is_dir() else model.parent
    dtype = _dtype(options.pop("dtype"))
    options = {**options, "model": net, "progress": True}
    paths = [existing(path) for path in adapters]
    if format == "transformers":
        report = merge_files(folder, paths, out, dtype=dtype, **options)
    else:
        report = _into_format(folder, paths, out, format, dtype, options)
    loaded, size = [each.to_dict() for each in report.loaded], size_of(out)
    files = sorted(file.name for file in out.iterdir()) if out.is_dir() else [out.name]
    data = {"out": str(out), "written": True, "model": type(net).__name__, "adapters": loaded}
    data |= {"files": files, "nbytes": size, "streamed": True}
    data |= {"reused": list(report.reused), "left_out": list(report.left_out), "record": report.nbytes}
    lines = [f"{each['adapter']}: {len(each['loaded'])} tensors fit" for each in loaded]
    lines += [f"{len(report.reused)} files were finished by an earlier run"] if report.reused else []
    lines += [f"not copied: {', '.join(report.left_out)}"] if report.left_out else []
    lines += [f"records to unmerge: {size_text(report.nbytes)}"] if report.base else []
    names = ", ".join(report.adapters)
    return Answer(data, [*lines, f"{out}: {type(net).__name__} with {names} merged, {size_text(size)}"])


def _into_format(
    folder: Path, adapters: list[Path], out: Path, format: str, dtype: Any, options: dict[str, Any]
) -> Any:
    """Merges into a checkpoint beside the result, and converts it. Returns the report of the merge."""
    from surgery import merge_files
    from surgery.storage.model_files.formats import check_model_format, write_model

    check_model_format(format, options["model"], out, None, dtype)
    with new_files(out, False) if format == "gguf" else new_folder(out) as place:
        checkpoint = place / ".checkpoint" / out.stem
        report = merge_files(folder, adapters, checkpoint, **options)
        written = write_model(format, checkpoint, place, out.name, dtype, progress=True)
        for file in list(written.iterdir()) if written.is_dir() else []:
            file.rename(place / file.name)
        if written.is_dir():
            written.rmdir()
        shutil.rmtree(place / ".checkpoint")
    return report
