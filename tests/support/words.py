"""A tokenizer of sixty words, for tests of what needs text."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.peers import transformers

__all__ = ["words"]


def words() -> Any:
    """A tokenizer of the words w0 to w59, split at spaces."""
    tokenizers = pytest.importorskip("tokenizers")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    numbers = {word: i for i, word in enumerate([*special.values(), *(f"w{i}" for i in range(60))])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special)
