"""The models that are measured, and both libraries' adapters on them."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from surgery import apply_rules
from surgery.rules import LoraRule, PrefixRule

LETTERS = list("qkvogud")


class Stack(nn.Module):
    """Linears by the hundred, in layers of seven. They share one block of memory: their number is what matters."""

    def __init__(self, layers: int, size: int):
        super().__init__()
        block = torch.randn(size, size)

        def linear() -> nn.Linear:
            layer = nn.Linear(size, size, bias=False, device="meta")
            layer.weight = nn.Parameter(block)
            return layer

        self.layers = nn.ModuleList([nn.ModuleDict({name: linear() for name in LETTERS}) for _ in range(layers)])


def minilm(device: str, dtype: torch.dtype) -> nn.Module:
    """MiniLM's shape: 6 layers of 384. Its dropout is off, so that only the adapters' dropout is measured."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        vocab_size=1000,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return _frozen(BertModel(config, add_pooling_layer=False), device, dtype)


def llama(device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama of 4 layers of 1,024."""
    return _llama(4, 1024, 2816, 16, device, dtype)


def compiled_llama(device: str, dtype: torch.dtype) -> nn.Module:
    """A Llama of 3 layers of 512."""
    return _llama(3, 512, 1408, 8, device, dtype)


def small_llama(device: str, dtype: torch.dtype) -> nn.Module:
    """The shape of SmolLM2-135M, 6 layers of 576."""
    return _llama(6, 576, 1536, 9, device, dtype)


def _llama(layers: int, hidden: int, inner: int, heads: int, device: str, dtype: torch.dtype) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        intermediate_size=inner,
        vocab_size=1000,
    )
    return _frozen(LlamaModel(config), device, dtype)


def decoder(device: str, dtype: torch.dtype, layers: int = 12) -> nn.Module:
    """A Llama of 12 layers of 512, with its head: PEFT's prefixes go on whole language models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=layers, num_attention_heads=8, intermediate_size=1408, vocab_size=1000
    )
    return _frozen(LlamaForCausalLM(config), device, dtype)


_NAMES = {
    minilm: "MiniLM, 384 wide",
    llama: "Llama, 1,024 wide",
    small_llama: "Llama, 576 wide",
    compiled_llama: "Llama, 512 wide",
    decoder: "12 layers, 512 wide",
}


def named(make: Any, dtype: torch.dtype) -> str:
    return _NAMES[make] if dtype is torch.float32 else f"{_NAMES[make]}, {str(dtype).removeprefix('torch.')}"


TARGETS = {
    "BertModel": ["query", "key", "value", "dense"],
    "LlamaModel": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "Stack": LETTERS,
    "Layers": LETTERS,  # of `verbs`
}


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same parameters' memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def ours(model: nn.Module, adapter: str = "default", **fields: Any) -> nn.Module:
    return apply_rules(model, [LoraRule(TARGETS[type(model).__name__], rank=8, **fields)], adapter=adapter)


def theirs(model: nn.Module, adapter: str = "default", **fields: Any) -> Any:
    """The model in PEFT's wrapper."""
    import peft

    config = peft.LoraConfig(r=8, target_modules=TARGETS[type(model).__name__], **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config, adapter_name=adapter)  # type: ignore[arg-type]


def many(model: nn.Module, count: int) -> nn.Module:
    """The model with `count` adapters, a0 and on, away from zero."""
    for index in range(count):
        ours(model, f"a{index}", init="random")
    return model


def many_of_theirs(model: nn.Module, count: int) -> Any:
    """The same in PEFT's wrapper."""
    peft_model = theirs(model, "a0", init_lora_weights=False)
    for index in range(1, count):
        peft_model.add_adapter(f"a{index}", peft_model.peft_config["a0"])
    return peft_model


def stack_of_theirs(layers: int, size: int, count: int) -> Any:
    """A `Stack` with many of PEFT's adapters. Adding them to the whole takes minutes; each layer gets its own instead.

    The order of creation is the same, so the tensors have the same order in memory."""
    stacks = [theirs(Stack(1, size), "a0", init_lora_weights=False) for _ in range(layers)]
    for index in range(1, count):
        for layer in stacks:
            layer.add_adapter(f"a{index}", layer.peft_config["a0"])
    whole = stacks[0]
    whole.base_model.model.layers.extend([layer.base_model.model.layers[0] for layer in stacks[1:]])
    return whole


def our_prefix(model: nn.Module, length: int) -> Any:
    example = {"input_ids": torch.ones(1, 16, dtype=torch.long, device=next(model.parameters()).device)}
    return apply_rules(model, [PrefixRule(length=length)], example_inputs=example)


def their_prefix(model: nn.Module, length: int) -> Any:
    import peft

    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def disturb(model: nn.Module, share: float = 0.03, seed: int = 0) -> None:
    """Move every B from zero until ‖ΔW‖ is this share of ‖W‖, for adapters of either library."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        weight = module._parameters.get("weight")
        named = {name: p for name, p in module.named_parameters() if name.startswith(("adapters.", "lora_"))}
        if weight is None and (base := module._modules.get("base_layer")) is not None:
            weight = base._parameters["weight"]
        A = next((p for name, p in named.items() if name.endswith(".A") or "lora_A" in name), None)
        B = next((p for name, p in named.items() if name.endswith(".B") or "lora_B" in name), None)
        if weight is None or A is None or B is None:
            continue
        with torch.no_grad():
            B.copy_(torch.randn(B.shape, generator=draw))
            B.mul_(share * weight.float().norm() / (B.float() @ A.float()).norm())


def _frozen(model: nn.Module, device: str, dtype: torch.dtype) -> nn.Module:
    return model.to(device, dtype).eval().requires_grad_(False)
