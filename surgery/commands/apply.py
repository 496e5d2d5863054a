"""`surgery apply`: rules on a model; the new adapter, or the merged model, in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from surgery.commands.answer import Answer, size_text
from surgery.commands.example_call import model_and_call
from surgery.commands.new_files import check_new_folder, new_folder
from surgery.commands.options import ClassName, DryRun, ModelPath, PlanningExample, RulesPath, Trust, Untie, WithExample
from surgery.commands.paths import size_of
from surgery.commands.plan import answer_of_plan
from surgery.commands.rules_file import read_rules
from surgery.errors import SurgeryError

__all__ = ["apply"]


def apply(
    model: ModelPath,
    rules: RulesPath,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; new or empty.")],
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the rules merged.")] = False,
    untie: Untie = False,
    format: Annotated[
        Literal["auto", "peft", "surgery"], typer.Option(help="The adapter's format; auto: PEFT's if it fits.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="The seed of the starting values.", min=0, max=2**64 - 1)] = 0,
    example: PlanningExample = None,
    with_example: WithExample = False,
    class_name: ClassName = None,
    trust: Trust = False,
    dry_run: DryRun = False,
) -> Answer:
    """Apply rules to a model and write the new adapter, with its starting values.

    Training or load_adapter goes on from the folder. The base is not written, except with --merged.

        surgery apply models/bert lora.yaml --out adapters/start
    """
    from surgery import apply_rules, merge_to, plan_rules, save_adapter

    check_new_folder(out)
    chosen = read_rules(rules, trust)
    if untie and not merged:
        raise SurgeryError("--untie is for merged models", fix="add --merged")
    import torch

    torch.manual_seed(seed)
    net, call = model_and_call(model, class_name, example, with_example, weights=not dry_run)
    if dry_run:
        plan = plan_rules(net, chosen, example_inputs=call)
        return answer_of_plan(net, plan, apply, {"out": str(out), "written": False})
    apply_rules(net, chosen, example_inputs=call, progress=True)
    with new_folder(out) as place:
        if merged:
            merge_to(net, place, untie=untie, progress=True)
        else:
            save_adapter(net, place, format=format, progress=True)
        files = sorted(file.name for file in place.iterdir())
    added = sum(p.numel() for name, p in net.named_parameters() if ".adapters." in f".{name}")
    size = size_of(out)
    data = {"out": str(out), "written": True, "files": files, "nbytes": size, "added": added, "merged": merged}
    what = "the merged model" if merged else f"an adapter of {added:,} parameters"
    return Answer(data, [f"{out}: {what}, {size_text(size)} ({', '.join(files)})"])
