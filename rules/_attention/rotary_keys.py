"""Rotates keys as rotary models do, to make up for the positions that PEFT gives a prefix."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any

import torch
from torch import Tensor, nn

from surgery import SurgeryError, class_of
from surgery.rules._virtual_tokens.learned_positions import position_embedding

TURN = "apply_rotary_pos_emb"


def why_not(model: nn.Module) -> tuple[str | None, str | None]:
    """Returns why the text's positions can't be shifted as PEFT's prefix does, and the embedding that can be shifted.

    Rotary models have no such embedding: the prefix's keys are rotated instead.
    """
    shift = None if _rotary(model) is not None or _windowed(model) else position_embedding(model)
    return _why_not(model, shift), shift


def _why_not(model: nn.Module, shift: str | None) -> str | None:
    if _windowed(model):
        return "its prefix leaves the window of attention as the text goes on, and stays in sight here"
    tables = any(_table(module) is not None for module in model.modules())
    if _rotary(model) is None and shift is None and not tables:
        return "it shifts the text's positions, and here these are neither rotary nor those of one embedding"
    kinds = {class_of(module) for module in model.modules() if _table(module) is None}
    unknown = [kind.__name__ for kind in kinds if _condition(kind) == ""]
    if unknown:
        return f"how {unknown[0]} turns its queries and keys, which would make up for shifted positions, is not known"
    return None


def rotate_keys(model: nn.Module, module: nn.Module, key: Tensor, way: int) -> Tensor:
    """Rotates keys (heads, length, size) by their number of positions, forwards or backwards."""
    kind, table = class_of(module), _table(module)
    turn: Any = getattr(sys.modules[kind.__module__], TURN, None)
    if table is not None:
        return _rotate_by_table(turn, table, key, way)
    condition = _condition(kind)
    rotary: Any = _rotary(model)
    if rotary is None:
        return key  # positions are shifted
    if turn is None or condition in ("", "none"):
        raise SurgeryError("PEFT's prefix can't be held exactly", why=f"how {kind.__name__} turns keys is not known")
    if key.is_meta or (condition and not getattr(module, condition)):
        return key
    length = key.shape[1]
    x = key.float().unsqueeze(0)
    cos, sin = rotary(x, torch.full((1, length), length, device=key.device))
    scale = getattr(rotary, "attention_scaling", 1.0)
    size = getattr(module, "rotary_ndims", x.shape[-1])  # some models rotate only the first part of a head
    _, first = turn(x[..., :size], x[..., :size], cos / scale, way * sin / scale)
    return torch.cat([first, x[..., size:]], -1)[0].to(key.dtype)


def _rotate_by_table(turn: Any, table: Tensor, key: Tensor, way: int) -> Tensor:
    """Rotates keys by an attention's own table of sines and cosines for each position."""
    length = key.shape[1]
    if key.is_meta:
        return key
    sin, cos = (part.expand(1, length, -1) for part in table[length].float().to(key.device).chunk(2))
    x, size = key.float().transpose(0, 1).unsqueeze(0), table.shape[1]
    first = turn(x[..., :size], way * sin, cos)
    return torch.cat([first, x[..., size:]], -1)[0].transpose(0, 1).to(key.dtype)


def rotation_of(model: nn.Module, module: nn.Module) -> dict[str, Any]:
    """Returns how keys are rotated: `{"turn": {"frequencies": …, "pairs": …}}`, or None if they are not.

    The i-th frequency rotates component i and its partner for each position. The partner is half of the rotated
    components further ("halves") or the next one ("neighbours"). Empty if no rotation makes up for the shift by PEFT's
    prefix, or if that is not known.
    """
    why, shift = why_not(model)
    if why or shift is not None:
        return {}
    size = getattr(module, "head_dim", getattr(module, "head_size", None))  # in GPT-NeoX
    if type(size) is not int or (_table(module) is None and _condition(class_of(module)) == "none"):
        return {}
    whole = torch.eye(size, dtype=torch.float32).unsqueeze(1)  # a head for each component, of one position
    matrix = rotate_keys(model, module, whole, 1)[:, 0].double()
    if bool((matrix == torch.eye(size)).all()):
        return {"turn": None}
    count = int((matrix - matrix.diagonal().diag()).count_nonzero()) // 2  # the cosine of a small angle is 1
    for pairs, first, distance in (("halves", torch.arange(count), count), ("neighbours", torch.arange(count) * 2, 1)):
        second = first + distance
        angles = torch.atan2(matrix[first, second], matrix[first, first])
        if int(second.max()) >= size:
            continue
        rotation = torch.eye(size, dtype=torch.float64)
        rotation[first, first] = rotation[second, second] = angles.cos()
        rotation[first, second], rotation[second, first] = angles.sin(), -angles.sin()
        if torch.allclose(rotation, matrix, atol=1e-6):
            return {"turn": {"frequencies": angles.tolist(), "pairs": pairs}}
    return {}


def _rotary(model: nn.Module) -> nn.Module | None:
    """Returns the one module that computes a model's rotary positions, if its angles are the same at any length."""
    rotaries = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
    if len(rotaries) != 1 or list(inspect.signature(type(rotaries[0]).forward).parameters)[1:] != ["x", "position_ids"]:
        return None
    return None if getattr(rotaries[0], "rope_type", "default") in ("dynamic", "longrope") else rotaries[0]


def _table(module: nn.Module) -> Tensor | None:
    """The sines and cosines (positions, rotated numbers) of an attention that rotates by itself (GPT-J, CodeGen)."""
    table = getattr(module, "embed_positions", None)
    own = TURN in getattr(getattr(class_of(module).forward, "__code__", None), "co_names", ())
    return table if own and isinstance(table, Tensor) and table.dim() == 2 else None


def _windowed(model: nn.Module) -> bool:
    """Whether there are layers in which late tokens do not attend to the first tokens."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return not set(kinds) <= {"full_attention"}
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return True
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    longest = getattr(config, "max_position_embeddings", None)
    return any(type(size) is int and (type(longest) is not int or size < longest) for size in windows)


def _condition(kind: type[nn.Module]) -> str | None:
    """The flag under which a forward turns keys. None: it always does; "none": it never does; "": that is not known."""
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    if code is None or TURN not in code.co_names:
        return "none"
    if any("attn_scale" in name for name in code.co_names):  # queries scaled by their position
        return ""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):
        return ""
    branches = [node for node in ast.walk(tree) if isinstance(node, ast.If) and TURN in ast.unparse(node)]
    tests = {ast.unparse(node.test) for node in branches}
    if not tests:
        return None
    flag = tests.pop()
    return flag.removeprefix("self.") if not tests and flag.removeprefix("self.").isidentifier() else ""
