"""PEFT's modules of prompts, for code that makes them itself. Adapters here have the same tensors, and no modules."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from surgery.errors import SurgeryWarning
from surgery.peft.base_config import PromptEncoderReparameterizationType, PromptTuningInit
from surgery.peft.errors import invalid
from surgery.peft.prompt_configs import PromptEncoderConfig

__all__ = ["PromptEmbedding", "PromptEncoder"]


class PromptEncoder(nn.Module):
    """P-tuning's network: an embedding, and an MLP or LSTM after it.

    >>> import torch
    >>> from surgery.peft import PromptEncoder, PromptEncoderConfig
    >>> sizes = {"num_virtual_tokens": 3, "num_transformer_submodules": 1, "token_dim": 8, "encoder_hidden_size": 4}
    >>> PromptEncoder(PromptEncoderConfig(**sizes))(torch.arange(3)).shape
    torch.Size([3, 8])

    Args:
        config: a `PromptEncoderConfig` with the sizes of the model.

    Source: PEFT's PromptEncoder.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size = config.encoder_hidden_size
        self.total_virtual_tokens = config.num_virtual_tokens * config.num_transformer_submodules
        self.encoder_type = config.encoder_reparameterization_type
        self.embedding = nn.Embedding(self.total_virtual_tokens, self.token_dim)
        width, size = self.token_dim, self.hidden_size
        if self.encoder_type not in list(PromptEncoderReparameterizationType):
            raise invalid("Prompt encoder type not recognized. Please use one of MLP (recommended) or LSTM.")
        if config.inference_mode:
            return
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            layers, dropout = config.encoder_num_layers, config.encoder_dropout
            self.lstm_head = nn.LSTM(width, size, layers, dropout=dropout, bidirectional=True, batch_first=True)
            self.mlp_head = nn.Sequential(nn.Linear(2 * size, 2 * size), nn.ReLU(), nn.Linear(2 * size, width))
            return
        if config.encoder_num_layers != PromptEncoderConfig.encoder_num_layers:
            text = "for MLP, the argument `encoder_num_layers` is ignored. Exactly 2 MLP layers are used."
            warnings.warn(text, SurgeryWarning, stacklevel=2)
        self.mlp_head = nn.Sequential(
            nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size), nn.ReLU(), nn.Linear(size, width)
        )

    def forward(self, indices: Tensor) -> Tensor:
        hidden = self.embedding(indices)
        if self.encoder_type == PromptEncoderReparameterizationType.LSTM:
            hidden = self.lstm_head(hidden)[0]
        return self.mlp_head(hidden)


class PromptEmbedding(nn.Module):
    """The trained vectors of prompt tuning.

    >>> import torch
    >>> from torch import nn
    >>> from surgery.peft import PromptEmbedding, PromptTuningConfig
    >>> config = PromptTuningConfig(num_virtual_tokens=3, num_transformer_submodules=1, token_dim=8)
    >>> PromptEmbedding(config, nn.Embedding(10, 8))(torch.arange(3)).shape
    torch.Size([3, 8])

    Args:
        config: a `PromptTuningConfig` with the sizes of the model.
        word_embeddings: the model's embedding, from which the vectors may start.

    Source: PEFT's PromptEmbedding.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module):
        super().__init__()
        count = config.num_virtual_tokens * config.num_transformer_submodules
        self.embedding = nn.Embedding(count, config.token_dim)
        words: Any = word_embeddings
        if config.inference_mode or config.prompt_tuning_init == PromptTuningInit.RANDOM:
            return
        if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
            ids = torch.randint(0, words.num_embeddings, (count,))
        else:
            from transformers import AutoTokenizer

            options = dict(config.tokenizer_kwargs or {})
            if options.pop("trust_remote_code", False):
                text = "`trust_remote_code` in tokenizer_kwargs is not followed: it may come from a file of others"
                warnings.warn(text, SurgeryWarning, stacklevel=2)
            tokenizer: Any = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
            of_text = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
            ids = torch.tensor((of_text * -(-count // len(of_text)))[:count])
        self.embedding.weight = nn.Parameter(words(ids.to(words.weight.device)).detach().clone().float())

    def forward(self, indices: Tensor) -> Tensor:
        return self.embedding(indices)
