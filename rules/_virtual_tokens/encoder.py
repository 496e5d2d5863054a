"""The networks of p-tuning, which compute virtual tokens: PEFT's PromptEncoder as functions of its tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Name, shape, and the bound of the uniform distribution that torch's own layers start from.
Spec = tuple[str, tuple[int, ...], float]


def specs(kind: str, width: int, size: int, layers: int) -> Iterator[Spec]:
    """Returns the tensors of an encoder, in PEFT those of `mlp_head` and `lstm_head`."""
    inputs = [width, size, size] if kind == "mlp" else [2 * size, 2 * size]
    for index, (fan, out) in enumerate(zip(inputs, [*inputs[1:], width], strict=True)):
        yield f"mlp_{2 * index}_weight", (out, fan), 1 / math.sqrt(fan)
        yield f"mlp_{2 * index}_bias", (out,), 1 / math.sqrt(fan)
    for layer in range(layers if kind == "lstm" else 0):
        fan = 2 * size if layer else width
        for end in ("", "_reverse"):
            for name, shape in (("weight_ih", (fan,)), ("weight_hh", (size,)), ("bias_ih", ()), ("bias_hh", ())):
                yield f"lstm_{name}_l{layer}{end}", (4 * size, *shape), 1 / math.sqrt(size)


def uniform(bound: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: nn.init.uniform_(tensor, -bound, bound)


def encode(prompt: Tensor, tensors: Mapping[str, Tensor], dropout: float, training: bool) -> Tensor:
    """Returns the network's output for (length, width): an MLP, or a bidirectional LSTM followed by an MLP."""
    h = prompt
    recurrent = [tensor for name, tensor in tensors.items() if name.startswith("lstm_")]
    if recurrent:
        layers = len(recurrent) // 8  # four tensors for each of two directions
        start = h.new_zeros(2 * layers, 1, recurrent[1].shape[1])
        h = torch.lstm(h.unsqueeze(0), (start, start), recurrent, True, layers, dropout, training, True, True)[0][0]
    count = (len(tensors) - len(recurrent)) // 2
    for index in range(count):
        h = F.linear(h.relu() if index else h, tensors[f"mlp_{2 * index}_weight"], tensors[f"mlp_{2 * index}_bias"])
    return h
