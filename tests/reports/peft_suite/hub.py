"""A folder that looks like the cache of a model hub, and the tokenizer of all stand-in models."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import tokenizers
import transformers

from tests.reports.peft_suite import OUT

HOME = OUT / "hub"  # HF_HOME of the runs


def place(repository: str, revision: str = "main") -> Path:
    """The folder of a repository's revision, which exists then."""
    commit = hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()
    folder = HOME / "hub" / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / revision).write_text(commit, encoding="utf-8")
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True, exist_ok=True)
    return snapshot


@cache
def tokenizer(size: int = 300, more: tuple[str, ...] = ()) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of bytes and a few merges. `more`: special tokens, which come after the usual five."""
    special = {"pad": "<pad>", "eos": "</s>", "bos": "<s>", "unk": "<unk>", "mask": "<mask>"}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=None))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[*special.values(), *more],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(
        ["the quick brown fox jumps over the lazy dog " * 20, "hello world, a test " * 20], trainer
    )
    names = {f"{name}_token": text for name, text in special.items()}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, cls_token=special["bos"], sep_token=special["eos"], **names
    )
