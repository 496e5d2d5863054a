"""Prefix tuning in PEFT's files: the keys and values of all layers in one matrix, a row a virtual token.

PEFT puts them into the cache, so the text's positions begin after them; here prefixes take no positions. With rotary
positions a query turned by p + n against a key is one turned by p against that key turned back by n: the prefix's keys
are turned back by its length n, and the output is PEFT's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rules.prefix import EVERYWHERE, PrefixRule
from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method


@peft_method
class Prefix(PeftMethod):
    peft_type, rule, targeted = "PREFIX_TUNING", PrefixRule, False

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        config.silent("token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size", "init_weights")
        config.silent("prefix_projection")  # the file holds what the projection made
        config.only("num_transformer_submodules", 1, None, why="encoder-decoders have a prefix in the decoder alone")
        why = _why_not(config.model)
        if why:
            raise config.refuse("peft_type", why)
        return [PrefixRule(length=config.take("num_virtual_tokens", 0))]

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        config.silent("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "init_weights")
        width = config.take("encoder_hidden_size") if config.take("prefix_projection", False) else None
        config.silent("encoder_hidden_size")
        if width is None and config.data.get("prefix_projection"):
            width = next(module for module in config.model.modules() if isinstance(module, nn.Embedding)).embedding_dim
        return [PrefixRule(length=config.take("num_virtual_tokens", 0), projection=width)]

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        assert isinstance(place.rule, PrefixRule)
        length, layers = place.rule.length, [path for path in place.modules.by_path if path in place.main]
        at = 2 * layers.index(place.path)

        def taken(matrix: Tensor, which: int) -> Tensor:
            part = matrix.view(length, 2 * len(layers), -1)[:, which]
            return part.view(length, -1, _head_size(place.module)).transpose(0, 1)

        def put(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).flatten(1)

        model, module = place.modules.model, place.module
        return {
            "key": PeftEntry(
                "/prompt_embeddings",
                lambda matrix: _turned(model, module, taken(matrix, at), -1),
                lambda key: put(_turned(model, module, key, 1)),
            ),
            "value": PeftEntry("/prompt_embeddings", lambda matrix: taken(matrix, at + 1), put),
        }

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        (rule, paths), *more = placed
        why = _why_not(modules.model) or ("it has a gate" if rule.gate else "") or ("there are two" if more else "")
        if rule.targets != EVERYWHERE or not type(modules.model).__name__.endswith("ForCausalLM"):
            why = why or "PEFT's is on every layer of a causal language model"
        if why:
            raise SurgeryError("PEFT's format can't hold this PrefixRule", why=why,
                               fix='save_adapter(…, format="surgery")')  # fmt: skip
        size = _head_size(modules.by_path[paths[0]])
        heads = modules.by_path[paths[0]].k_proj.out_features // size
        return {
            "num_virtual_tokens": rule.length, "num_layers": len(paths), "num_attention_heads": heads,
            "token_dim": heads * size, "num_transformer_submodules": 1, "encoder_hidden_size": heads * size,
            "prefix_projection": False, "task_type": "CAUSAL_LM",
        }  # fmt: skip

    def joined(self, key: str, tensors: Sequence[Tensor], sites: Sequence[nn.Module]) -> Tensor:
        return torch.stack(list(tensors), 1).flatten(1)


def _head_size(module: Any) -> int:
    return int(module.head_dim)


def _rotary(model: nn.Module) -> nn.Module | None:
    """The one module that gives a model's rotary positions, if its angles are the same at any length."""
    found = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
    if len(found) != 1 or list(inspect.signature(type(found[0]).forward).parameters)[1:] != ["x", "position_ids"]:
        return None
    return None if getattr(found[0], "rope_type", "default") in ("dynamic", "longrope") else found[0]


def _why_not(model: nn.Module) -> str | None:
    if _rotary(model) is None:
        return "it shifts the text's positions, which a rotation of its keys makes up for on rotary models alone"
    return None


def _turned(model: nn.Module, module: nn.Module, key: Tensor, way: int) -> Tensor:
    """Keys (heads, length, size) turned by their number of positions, forth or back, as the model turns keys."""
    if key.is_meta:
        return key
    rotary: Any = _rotary(model)
    base = getattr(type(module), "_surgery_base", type(module))
    turn = getattr(sys.modules[base.__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        raise SurgeryError("PEFT's prefix can't be held exactly", why=f"how {base.__name__} turns keys is not known")
    length = key.shape[1]
    x = key.float().unsqueeze(0)
    cos, sin = rotary(x, torch.full((1, length), length, device=key.device))
    scale = getattr(rotary, "attention_scaling", 1.0)
    _, turned = turn(x, x, cos / scale, way * sin / scale)
    return turned[0].to(key.dtype)
