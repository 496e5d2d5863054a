"""Writes the tokens of a folder's tokenizer into a GGUF file, in llama.cpp's terms."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from surgery.adapter_files.plain_json import LARGE, read_json
from surgery.errors import SurgeryError
from surgery.storage.model_files.checkpoint import Checkpoint
from surgery.storage.model_files.pre_tokenizers import ADDS_BOS, pre_tokenizer_of

__all__ = ["write_vocabulary"]

REMEDY = "tokenizer=False writes no vocabulary: the program takes token numbers; or merge_to(model, folder), and "
REMEDY += "llama.cpp's convert_hf_to_gguf.py on the folder"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama_token_type of llama.h
_CONTROL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")  # added tokens that are special, although not marked as such
_CONTROL_ENDS = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))


class _Token(NamedTuple):
    text: str
    type: int


def write_vocabulary(writer: Any, checkpoint: Checkpoint) -> None:
    """Adds the fields of a vocabulary. Without a tokenizer in the folder, those of a model without one."""
    folder, config = checkpoint.folder, checkpoint.config
    size = int(config["vocab_size"])
    if not (folder / "tokenizer.json").is_file():
        if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
            why = "tokenizer.json is absent, and the other files of the tokenizer are not read"
            raise SurgeryError("the vocabulary can't be written", why=why, fix=REMEDY)
        writer.add_tokenizer_model("none")
        key = f"{writer.arch}.vocab_size"
        if not any(key in fields for fields in writer.kv_data):
            writer.add_uint32(key, size)
        return
    tokenizer = read_json(folder / "tokenizer.json", LARGE)
    model = tokenizer.get("model") if isinstance(tokenizer, Mapping) else None
    if not isinstance(model, Mapping) or model.get("type") != "BPE" or model.get("byte_fallback"):
        what = "Unigram or byte fallback" if isinstance(model, Mapping) and model.get("byte_fallback") else "not BPE"
        raise SurgeryError(
            "the vocabulary can't be written", where="tokenizer.json", why=f"its model is {what}", fix=REMEDY
        )
    name = pre_tokenizer_of(tokenizer)
    if name is None:
        why = "none of llama.cpp's pre-tokenizers splits texts as this one does"
        raise SurgeryError("the vocabulary can't be written", where="tokenizer.json", why=why, fix=REMEDY)
    from transformers import AutoTokenizer

    own: Any = AutoTokenizer.from_pretrained(folder)
    tokens = _tokens(own, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([token.text for token in tokens])
    writer.add_token_types([token.type for token in tokens])
    _add_special(writer, folder)
    _say_first_token(writer, own, name)


def _tokens(tokenizer: Any, size: int) -> list[_Token]:
    """A token for each row of the embeddings; rows without a token are unused."""
    known = {number: text for text, number in tokenizer.get_vocab().items()}
    if known and max(known) >= size:
        why = f"the token {max(known)} has no row among the {size} of the embeddings"
        raise SurgeryError("the tokenizer does not fit the model", why=why, fix="resize the embeddings first")
    added = tokenizer.added_tokens_decoder
    tokens: list[_Token] = []
    for number in range(size):
        text = known.get(number)
        if text is None:
            tokens.append(_Token(f"[PAD{number}]", UNUSED))
        elif number not in added:
            tokens.append(_Token(text, NORMAL))
        else:
            if not added[number].normalized:
                text = tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))
            special = added[number].special or text in _CONTROL
            special = special or any(text.startswith(start) and text.endswith(end) for start, end in _CONTROL_ENDS)
            tokens.append(_Token(text, CONTROL) if special else _Token(text.replace("▁", " "), USER_DEFINED))
    return tokens


def _add_special(writer: Any, folder: Path) -> None:
    """Merges, special tokens and the template of chats, as the package `gguf` reads them from a folder."""
    from gguf import SpecialVocab

    SpecialVocab(folder, load_merges=True).add_to_gguf(writer, quiet=True)


def _say_first_token(writer: Any, tokenizer: Any, name: str) -> None:
    """Says that no token is added before a text, where llama.cpp adds one unless the file says no."""
    key = "tokenizer.ggml.add_bos_token"
    if name in ADDS_BOS and not any(key in fields for fields in writer.kv_data):
        begins = tokenizer.encode("a")[:1] == [tokenizer.bos_token_id]
        writer.add_bool(key, begins)
