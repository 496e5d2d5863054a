"""DDP and FSDP2 on two processes: the single-process model's outputs, and gradients on every adapter tensor."""

from __future__ import annotations

import copy
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from rules import LoraRule
from surgery import (
    SurgeryError,
    activate,
    apply_rules,
    deactivate,
    hotswap,
    load_adapter,
    pad_rank,
    remove,
    save_adapter,
)

tiny: Any = pytest.importorskip("tests.tiny", reason="needs transformers")

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo"
)


def test_ddp_and_fsdp2_on_two_processes(tmp_path: Path) -> None:
    """Both in one pair of processes: starting them takes longer than what they do."""
    context = multiprocessing.get_context("spawn")
    errors = context.SimpleQueue()
    workers = [context.Process(target=worker, args=(rank, str(tmp_path / "store"), errors)) for rank in (0, 1)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(120)
    stuck = [process for process in workers if process.is_alive()]
    for process in stuck:
        process.kill()
    found = []
    while not errors.empty():
        found.append(errors.get())
    assert not found, "\n".join(found)
    assert not stuck and all(process.exitcode == 0 for process in workers)


def worker(rank: int, store: str, errors: Any) -> None:
    import traceback

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for check in (ddp, fsdp2, fsdp2_of_single_sites, fsdp2_in_half_precision):
            check(rank)
            dist.barrier()
        fsdp2_saves_the_whole_adapter(rank, Path(store).parent)
        fsdp2_takes_new_weights(rank, Path(store).parent)
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()


def patient(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    """The same model with LoRA, and the same batch, on each process."""
    torch.manual_seed(0)
    model, _ = tiny.llama()
    apply_rules(model.to(dtype), [LoraRule("all-linear", rank=4, init="random")])
    return model.train(), {"input_ids": tiny.ids()}


def loss_of(output: Any) -> Tensor:
    return output.logits.float().square().mean()


def adapters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if ".adapters." in name}


def reference(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients of one process without any wrapper."""
    model = copy.deepcopy(model)
    output = model(**batch)
    loss_of(output).backward()
    gradients = {name: p.grad for name, p in adapters_of(model).items()}
    assert len(gradients) == 28 and all(gradient is not None for gradient in gradients.values())
    return output.logits.detach(), gradients  # type: ignore[return-value]


def ddp(rank: int) -> None:
    model, batch = patient()
    logits, gradients = reference(model, batch)
    wrapped = nn.parallel.DistributedDataParallel(model)
    output = wrapped(input_ids=batch["input_ids"][rank : rank + 1])
    torch.testing.assert_close(output.logits.detach(), logits[rank : rank + 1])
    loss_of(output).backward()
    for name, parameter in adapters_of(model).items():
        assert parameter.grad is not None and parameter.grad.any(), name
        # The mean over two processes of a row each is the mean over both rows, in another order of sums.
        torch.testing.assert_close(parameter.grad, gradients[name], msg=name)
    assert all(p.grad is None for name, p in model.named_parameters() if ".adapters." not in name)
    remove(model)
    assert not adapters_of(model)


def sharded_as(rank: int, modules: Any, slack: float = 0.0, **fields: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    model, batch = patient(**fields)
    logits, gradients = reference(model, batch)
    kinds = {path: type(module) for path, module in model.named_modules()}
    for module in (*modules(model), model):
        fully_shard(module)
    assert all(isinstance(module, kinds[path]) for path, module in model.named_modules())
    output = model(**batch)
    if slack:
        torch.testing.assert_close(output.logits.detach(), logits, rtol=slack, atol=slack)
    else:
        assert torch.equal(output.logits.detach(), logits)
    loss_of(output).backward()
    for name, parameter in adapters_of(model).items():
        grad: Any = parameter.grad
        assert grad is not None, name
        whole = grad.full_tensor()
        assert whole.any(), name
        torch.testing.assert_close(whole, gradients[name], rtol=slack or None, atol=slack or None, msg=name)
    return model


def fsdp2(rank: int) -> None:
    model = sharded_as(rank, lambda model: model.model.layers)
    # Sharded weights are refused in either direction, with the reason and the model as it was.
    kinds = [type(module) for module in model.modules()]
    for change in (lambda: remove(model), lambda: apply_rules(model, [LoraRule("q_proj")], adapter="late")):
        try:
            change()
        except SurgeryError as error:
            assert "its parameters are sharded" in str(error), error
        else:
            raise AssertionError("a sharded model was rewritten")
    assert kinds == [type(module) for module in model.modules()]
    # A switch finds the sharded tensors, which have taken the others' places.
    for trains in (False, True):
        held = adapters_of(activate(model, "default") if trains else deactivate(model)).values()
        assert {(hasattr(tensor, "device_mesh"), tensor.requires_grad) for tensor in held} == {(True, trains)}


def fsdp2_of_single_sites(rank: int) -> None:
    """A site may itself be sharded: FSDP2 puts a class of its own on top of the generated one."""
    sharded_as(rank, lambda model: [layer.self_attn.q_proj for layer in model.model.layers])


def fsdp2_in_half_precision(rank: int) -> None:
    sharded_as(rank, lambda model: model.model.layers, slack=2e-2, dtype=torch.bfloat16)


def fsdp2_saves_the_whole_adapter(rank: int, folder: Path) -> None:
    model = sharded_as(rank, lambda model: model.model.layers)
    plain, batch = patient()
    with torch.no_grad():
        expected = plain(**batch).logits
    remove(plain)
    for format in ("peft", "surgery"):
        save_adapter(model, folder / format, format=format)  # type: ignore[arg-type]
        load_adapter(plain, folder / format)
        with torch.no_grad():
            assert torch.equal(plain(**batch).logits, expected)
        remove(plain)


def fsdp2_takes_new_weights(rank: int, folder: Path) -> None:
    """Each process its part; sites that nothing came for do nothing."""
    for targets in ("all-linear", ["q_proj"]):
        other, batch = patient()
        remove(other)
        torch.manual_seed(1)
        apply_rules(other, LoraRule(targets, rank=2, alpha=3, init="random"))
        source = save_adapter(other, folder / "new")
        model = sharded_as(rank, lambda model: model.model.layers)
        hotswap(model, "default", source)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, other(**batch).logits)
    try:
        pad_rank(model, "default", 8)
    except SurgeryError as error:
        assert "sharded" in str(error), error
    else:
        raise AssertionError("sharded tensors were padded")
