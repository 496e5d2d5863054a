"""DDP and FSDP2 on two processes: the single-process model's outputs, and gradients on every adapter tensor."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from surgery import (
    SurgeryError,
    activate,
    adapter_state_dict,
    apply_rules,
    combine,
    deactivate,
    hotswap,
    load_adapter,
    load_adapter_state_dict,
    merge,
    pad_rank,
    remove,
    save_adapter,
    unmerge,
    using,
)
from surgery.rules import BiasRule, LoraRule

tiny: Any = pytest.importorskip("tests.support.tiny", reason="needs transformers")

pytestmark = pytest.mark.skipif(
    not dist.is_available() or not dist.is_gloo_available() or sys.platform == "win32", reason="needs gloo"
)


def test_ddp_and_fsdp2_on_two_processes(tmp_path: Path) -> None:
    """Both in one pair of processes, because starting processes takes longer than the tests."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports the modules of both processes once
    errors = context.SimpleQueue()
    workers = [context.Process(target=worker, args=(rank, str(tmp_path / "store"), errors)) for rank in (0, 1)]
    for process in workers:
        process.start()
    for process in workers:
        process.join(300)
    stuck = [process for process in workers if process.is_alive()]
    for process in stuck:
        process.kill()
    messages = []
    while not errors.empty():
        messages.append(errors.get())
    assert not messages, "\n".join(messages)
    assert not stuck and all(process.exitcode == 0 for process in workers)


def worker(rank: int, store: str, errors: Any) -> None:
    import traceback

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for check in (ddp, ddp_and_what_trains_later, fsdp2, fsdp2_of_single_sites, fsdp2_in_half_precision):
            check(rank)
            dist.barrier()
        fsdp2_saves_the_whole_adapter(rank, Path(store).parent)
        fsdp2_takes_new_weights(rank, Path(store).parent)
        fsdp2_with_checkpointed_blocks(rank, Path(store).parent)
        what_sharding_forbids(rank)
        fsdp1_of_an_opaque_module(rank)
        who_writes(rank, Path(store).parent)
        fsdp2_from_the_meta_device(rank)
        dist.barrier()
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
    finally:
        dist.destroy_process_group()
    os._exit(
        0
    )  # a normal exit destroys statics that torch's threads may still use, which ends the process with a signal


def patient(dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, Tensor]]:
    """A model with LoRA and a batch, the same on each process."""
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


def ddp_and_what_trains_later(rank: int) -> None:
    """Gradients that DDP reduces are equal on all processes. A gradient that it does not reduce raises an error."""
    DDP = nn.parallel.DistributedDataParallel
    ids = tiny.ids()[rank : rank + 1]

    def step(model: Any) -> None:
        model.zero_grad()
        loss_of(model(input_ids=ids)).backward()

    def drifts(model: Any) -> None:
        try:
            step(model)
        except SurgeryError as error:
            assert "DDP does not reduce the gradients of the adapter 'b'" in str(error), error
        else:
            raise AssertionError("gradients stayed with their process")

    def agree(model: nn.Module) -> None:
        for name, parameter in adapters_of(model).items():
            if parameter.grad is not None:
                gradients = [torch.empty_like(parameter.grad) for _ in range(2)]
                dist.all_gather(gradients, parameter.grad)
                assert torch.equal(*gradients), name

    def two() -> Any:
        model, _ = patient()
        return apply_rules(model, [LoraRule("q_proj", rank=2, init="random")], adapter="b")

    model = activate(two(), "default")
    wrapped = DDP(model)
    step(wrapped)
    agree(model)
    with using(model, "b"), torch.no_grad():
        wrapped(input_ids=ids)
    step(wrapped)
    agree(model)
    activate(model, "b")
    drifts(wrapped)
    del wrapped
    step(DDP(activate(activate(model, "default"), "b")))
    agree(model)
    model = two()
    wrapped = DDP(model, find_unused_parameters=True)
    for names in ("default", "b", ["default", "b"]):
        step(activate(model, names) and wrapped)
        agree(model)
    model, _ = patient()
    wrapped = DDP(model)
    apply_rules(model, [LoraRule("q_proj", rank=2, init="random")], adapter="b")
    drifts(wrapped)
    del wrapped
    model, _ = patient()
    wrapped = DDP(model)
    gc.freeze()  # the wrapper is not in gc.get_objects()
    try:
        apply_rules(model, [LoraRule("q_proj", rank=2, init="random")], adapter="b")
        drifts(wrapped)
    finally:
        gc.unfreeze()


def shard_and_check(rank: int, modules: Any, slack: float = 0.0, **fields: Any) -> Any:
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
    model = shard_and_check(rank, lambda model: model.model.layers)
    # With sharded weights, applying and removing raise an error with the reason, and the model is unchanged.
    kinds = [type(module) for module in model.modules()]
    for change in (lambda: remove(model), lambda: apply_rules(model, [LoraRule("q_proj")], adapter="late")):
        try:
            change()
        except SurgeryError as error:
            assert "its parameters are sharded" in str(error), error
        else:
            raise AssertionError("a sharded model was rewritten")
    assert kinds == [type(module) for module in model.modules()]
    # Switching adapters finds the sharded tensors, which have replaced the original tensors.
    for trains in (False, True):
        tensors = adapters_of(activate(model, "default") if trains else deactivate(model)).values()
        assert {(hasattr(tensor, "device_mesh"), tensor.requires_grad) for tensor in tensors} == {(True, trains)}


def fsdp2_of_single_sites(rank: int) -> None:
    """A site may itself be sharded: FSDP2 puts a class of its own on top of the generated one."""
    shard_and_check(rank, lambda model: [layer.self_attn.q_proj for layer in model.model.layers])


def fsdp2_in_half_precision(rank: int) -> None:
    shard_and_check(rank, lambda model: model.model.layers, slack=2e-2, dtype=torch.bfloat16)


def fsdp2_saves_the_whole_adapter(rank: int, folder: Path) -> None:
    model = shard_and_check(rank, lambda model: model.model.layers)
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
    """Each process swaps its part; sites without new tensors have no effect."""
    for targets in ("all-linear", ["q_proj"]):
        other, batch = patient()
        remove(other)
        torch.manual_seed(1)
        apply_rules(other, LoraRule(targets, rank=2, alpha=3, init="random"))
        source = save_adapter(other, folder / "new")
        model = shard_and_check(rank, lambda model: model.model.layers)
        hotswap(model, "default", source)
        with torch.no_grad():
            torch.testing.assert_close(model(**batch).logits, other(**batch).logits)
    try:
        pad_rank(model, "default", 8)
    except SurgeryError as error:
        assert "sharded" in str(error), error
    else:
        raise AssertionError("sharded tensors were padded")


def fsdp2_with_checkpointed_blocks(rank: int, folder: Path) -> None:
    """Wraps layers as accelerate's fsdp_activation_checkpointing does; the first process saves without waiting."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    model, batch = patient()
    with torch.no_grad():
        expected = model(**batch).logits
    layers = model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
        fully_shard(layers[i])
    fully_shard(model)
    model(**batch).logits.sum().backward()
    parts: Any = get_model_state_dict(model)
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        save_adapter(model, folder / "alone", state_dict=whole)
        save_adapter(model, folder / "prefixed", state_dict={f"module.{name}": t for name, t in whole.items()})
        for wrong, why in ((parts, "is sharded"), ({}, "lacks 28 tensors")):
            assert_refused(lambda wrong=wrong: save_adapter(model, folder / "none", state_dict=wrong), why)
    save_adapter(model, folder / "together")
    assert not (folder / "none").exists()
    for name in ("alone", "prefixed", "together"):
        plain, _ = patient()
        load_adapter(remove(plain), folder / name)
        with torch.no_grad():
            assert torch.equal(plain(**batch).logits, expected), name
        dist.barrier()


def assert_refused(call: Any, why: str) -> None:
    try:
        call()
    except SurgeryError as error:
        assert why in str(error), error
    else:
        raise AssertionError(f"not refused: {why}")


def what_sharding_forbids(rank: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    def net() -> Any:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def make_adapted() -> Any:
        return apply_rules(net(), [LoraRule("0", rank=2, init="random")])

    x = torch.ones(1, 4)
    model = make_adapted()
    merge(model)
    merged = model(x)
    fully_shard(model)
    assert_refused(lambda: unmerge(model), "can't be unmerged")
    assert torch.equal(model(x), merged)
    model = fully_shard(make_adapted())
    sharded: Any = adapter_state_dict(model)
    new_tensors: Any = {name: tensor.full_tensor() * 0 + 0.5 for name, tensor in sharded.items()}
    load_adapter_state_dict(model, new_tensors)
    assert all(bool((tensor.full_tensor() == 0.5).all()) for tensor in sharded.values())
    assert_refused(lambda: combine(model, {"default": 1.0}, "sum"), "its parameters are sharded")

    model = make_adapted()
    before = model(x)
    mesh = init_device_mesh("cpu", (2,))
    assert_refused(lambda: parallelize_module(model, mesh, {"0": ColwiseParallel()}), "can't split a rewritten Linear")
    assert torch.equal(model(x), before)

    def flat(model: Any, **settings: Any) -> Any:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **settings)

    for whole in (True, False):
        wrapped = flat(net(), use_orig_params=whole)
        assert_refused(lambda wrapped=wrapped: apply_rules(wrapped, [LoraRule("0", rank=2)]), "parts of a flat one")
    model = make_adapted()
    wrapped = flat(model, use_orig_params=True)
    assert torch.equal(wrapped(x), before)
    for verb in (merge, remove, adapter_state_dict, lambda model: save_adapter(model, "none")):
        assert_refused(lambda verb=verb: verb(model), "flat")


def fsdp1_of_an_opaque_module(rank: int) -> None:
    """Within a call, FSDP1 sets whole parameters as plain attributes, and a view of the module replaces these, too."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x)[0]

    torch.manual_seed(0)
    model = apply_rules(Attention(), [BiasRule("inner"), LoraRule("inner", rank=2, init="random")])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapters." in name:
                parameter.add_(torch.randn_like(parameter))
    x = torch.randn(3, 8)
    expected = model(x)
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    torch.testing.assert_close(wrapped(x), expected)


def who_writes(rank: int, folder: Path) -> None:
    """The first process saves without waiting. Saving different parts to one folder raises an error."""

    def stage() -> Any:
        torch.manual_seed(0)
        layers = nn.ModuleDict({str(i): nn.Linear(4, 4) for i in range(2)})
        del layers[str(1 - rank)]
        return apply_rules(layers, [LoraRule("all-linear", rank=2, init="random")])

    model, _ = patient()
    if rank == 0:  # as in `if accelerator.is_main_process:`
        save_adapter(model, folder / "first")
    assert save_adapter(model, folder / "both") and (folder / "both" / "adapter_model.safetensors").exists()
    part = stage()
    dist.barrier()
    try:
        save_adapter(part, folder / "stages")
    except SurgeryError as error:
        assert "only a part of the adapter" in str(error) and f"{1 - rank}.lora_A" in str(error), error
    else:
        assert rank == 0  # the other process saved later
    mine = save_adapter(part, folder / f"stage {rank}", state_dict=part.state_dict())
    assert set(load_adapter(stage_of(part), mine).loaded)
    if rank == 1:
        from surgery.adapter_files import process_group

        process_group.PATIENCE = timedelta(seconds=0.1)
        assert_refused(lambda: save_adapter(model, folder / "second"), "process 0, which writes, has not saved one")
        process_group.PATIENCE = timedelta(seconds=120)


def stage_of(part: Any) -> Any:
    return remove(copy.deepcopy(part))


def fsdp2_from_the_meta_device(rank: int) -> None:
    """Apply on meta, shard, allocate memory; then load values from a state dict or reset to the initial values."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.fsdp import fully_shard

    def net(device: str = "cpu") -> Any:
        torch.manual_seed(0)
        with torch.device(device):
            return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def sharded() -> Any:
        model = apply_rules(net("meta"), LoraRule("all-linear", rank=2))
        fully_shard(model)
        model.to_empty(device="cpu")
        return model

    x, whole = torch.ones(1, 4), StateDictOptions(full_state_dict=True, strict=False)
    trained = apply_rules(net(), LoraRule("all-linear", rank=2, init="random"))
    model = sharded()
    set_model_state_dict(model, net().state_dict(), options=whole)
    assert_refused(lambda: model(x), "has no values yet")
    model = sharded()
    set_model_state_dict(model, trained.state_dict(), options=whole)
    assert torch.equal(model(x), trained(x))
    model = sharded()
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    set_model_state_dict(model, net().state_dict(), options=whole)
    assert torch.equal(model(x), net()(x))
    model(x).sum().backward()
    assert any(bool(p.grad.full_tensor().any()) for p in adapters_of(model).values())  # type: ignore[union-attr]
