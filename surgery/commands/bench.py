"""`surgery bench`: what rules cost on a model, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from surgery.commands.answer import Answer, Table
from surgery.commands.example_call import example_call
from surgery.commands.model_folder import load_model
from surgery.commands.options import ClassName, Example, ModelPath, Trust
from surgery.commands.rules_file import read_rules
from surgery.errors import SurgeryError

__all__ = ["bench"]


def _check_device(name: str) -> None:
    """Raises `SurgeryError` unless torch can put tensors on the device."""
    import torch

    try:
        torch.zeros(1, device=name).cpu()
    except Exception as error:  # of many classes: AssertionError, RuntimeError, NotImplementedError
        why = f"{type(error).__name__}: {error}".partition("\n")[0][:300]
        raise SurgeryError(f"torch can't use the device {name!r}", why=why, fix="--device cpu") from error


def bench(
    model: ModelPath,
    rules: Annotated[
        Path | None,
        typer.Argument(
            metavar="RULES", help="A file of rules; default: LoRA on all linear layers.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="The device of torch.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Calls of each kind; the median is shown.")] = 5,
    batch: Annotated[int, typer.Option(min=1, help="Rows of the example.")] = 2,
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row of the example.")] = 32,
    example: Example = None,
    class_name: ClassName = None,
    trust: Trust = False,
) -> Answer:
    """Time a model's call without rules, with live rules and merged, and the verbs.

    surgery bench models/bert lora.yaml
    """
    import torch

    from surgery import apply_rules, merge, remove, unmerge
    from surgery.authoring.rule_names import registered

    _check_device(device)
    chosen = [registered("lora")("all-linear")] if rules is None else read_rules(rules, trust)
    net: Any = load_model(model, class_name)
    call = {name: tensor.to(device) for name, tensor in example_call(net, example, batch, length).items()}
    net.to(device)

    def timed(work: Callable[[], object], count: int = 1) -> float:
        seconds = []
        for _ in range(count):
            started = time.perf_counter()
            work()
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return 1000 * statistics.median(seconds)

    def forward() -> None:
        with torch.inference_mode():
            net(**call)

    def calls() -> float:
        forward()  # caches and kernels are ready
        return timed(forward, rounds)

    times = {"call, without rules": calls()}
    times["apply_rules"] = timed(lambda: apply_rules(net, chosen, example_inputs=call, progress=True))
    times["call, live"] = calls()
    times["merge"] = timed(lambda: merge(net, progress=True))
    times["call, merged"] = calls()
    times["unmerge"] = timed(lambda: unmerge(net))
    times["remove"] = timed(lambda: remove(net))
    base = times["call, without rules"]
    rows = [[name, f"{ms:.2f}", f"{ms / base:.2f}" if name.startswith("call") else ""] for name, ms in times.items()]
    sizes = {name: list(tensor.shape) for name, tensor in call.items()}
    data = {"model": type(net).__name__, "device": device, "example": sizes, "milliseconds": times}
    head = f"{type(net).__name__} on {device}, {', '.join(f'{name} {shape}' for name, shape in sizes.items())}"
    return Answer(data, [head, Table(["", "ms", "of the call without rules"], rows)])
