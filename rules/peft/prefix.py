"""Prefix tuning in PEFT's files: the keys and values of all layers in one matrix, a row a virtual token.

PEFT puts them into the cache, so the text's positions begin after them; here prefixes take no positions. With rotary
positions a query turned by p + n against a key is one turned by p against that key turned back by n: the prefix's keys
are turned back by its length n, and the output is PEFT's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules._attention.rotary_keys import rotate_keys, why_not
from surgery.rules.peft.tasks import task_of, with_head
from surgery.rules.prefix import EVERYWHERE, PrefixRule

KEY = "prompt_embeddings"


@peft_method
class Prefix(PeftMethod):
    peft_type, rule = "PREFIX_TUNING", PrefixRule
    targeted, prefix = False, "base_model."

    def read(self, config: PeftConfig) -> Iterable[Rule]:
        config.silent("token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size", "init_weights")
        config.silent("prefix_projection")  # the file holds what the projection made
        config.only("num_transformer_submodules", 1, None, why="encoder-decoders have a prefix in the decoder alone")
        why, shift = why_not(config.model)
        if why:
            raise config.refuse("peft_type", why)
        return [PrefixRule(length=config.take("num_virtual_tokens", 0), shift=shift)]

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        config.silent("token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules", "init_weights")
        width = config.take("encoder_hidden_size") if config.take("prefix_projection", False) else None
        config.silent("encoder_hidden_size")
        if width is None and config.data.get("prefix_projection"):
            width = next(module for module in config.model.modules() if isinstance(module, nn.Embedding)).embedding_dim
        exclude = _encoder(config)  # of an encoder-decoder PEFT's prefix is in the decoder alone
        why, shift = why_not(config.model)
        length, shift = config.take("num_virtual_tokens", 0), None if why else shift
        return [PrefixRule(length=length, projection=width, exclude=exclude, shift=shift)]

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        assert isinstance(place.rule, PrefixRule)
        length, layers = place.rule.length, [path for path in place.modules.by_path if path in place.main]
        at = 2 * layers.index(place.path)
        heads, size = place.config.get("num_attention_heads"), getattr(place.module, "head_dim", None)
        heads, size = (heads or _key_heads(place.modules.model), -1) if heads or not size else (-1, size)

        def take(matrix: Tensor, which: int) -> Tensor:
            part = matrix.view(length, 2 * len(layers), -1)[:, which]
            return part.view(length, heads, size).transpose(0, 1)

        def flatten(tensor: Tensor) -> Tensor:
            return tensor.transpose(0, 1).flatten(1)

        model, module = place.modules.model, place.module
        return {
            "key": PeftEntry(
                f"/{KEY}",
                lambda matrix: rotate_keys(model, module, take(matrix, at), -1),
                lambda key: flatten(rotate_keys(model, module, key, 1)),
            ),
            "value": PeftEntry(f"/{KEY}", lambda matrix: take(matrix, at + 1), flatten),
        }

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        (rule, paths), *more = placed
        task = task_of(modules)
        why, shift = why_not(modules.model)
        if not why and rule.shift != shift:
            why = f"PEFT shifts the text's positions: PrefixRule(shift={shift!r}) is like its"
        why = why or ("it has a gate" if rule.gate else "") or ("there are two" if more else "")
        if rule.targets != EVERYWHERE or rule.exclude or rule.layers is not None or task is None:
            why = why or "PEFT's is on every layer of a model of transformers"
        if why:
            raise SurgeryError("PEFT's format can't hold this PrefixRule", why=why,
                               fix='save_adapter(…, format="surgery")')  # fmt: skip
        return {
            "num_virtual_tokens": rule.length, "num_layers": len(paths), "num_transformer_submodules": 1,
            "prefix_projection": False, "task_type": task,
        }  # fmt: skip

    def complete(self, config: dict[str, Any], tensors: dict[str, Tensor], modules: Any) -> Any:
        width = tensors[KEY].shape[1] // (2 * config["num_layers"])
        heads = _key_heads(modules.model)
        sizes = {"token_dim": width, "encoder_hidden_size": width, "num_attention_heads": heads}
        return with_head(self.prefix, config | sizes, tensors, modules)

    def join(self, key: str, tensors: Sequence[Tensor], sites: Sequence[nn.Module]) -> Tensor:
        return torch.stack(list(tensors), 1).flatten(1) if key == KEY else super().join(key, tensors, sites)


def _key_heads(model: Any) -> int:
    config = model.config.get_text_config()
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def _encoder(config: PeftConfig) -> Sequence[str]:
    model: Any = config.model
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return ()
    encoder = model.get_encoder()
    return [rf"re:{re.escape(path)}\..*" for path, module in config.modules.by_path.items() if module is encoder]
