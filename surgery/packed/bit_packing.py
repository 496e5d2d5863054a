"""Codes of a few bits in 32-bit words: one stream of bits, the least significant first, along the first dimension."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["WORD", "pack_words", "unpack_words"]

WORD = 32


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """Returns the codes as uint8 of shape (count, columns).

    Args:
        words: int32 (number of words, columns). 32 codes lie in `bits` words; a code may cross the border of two words.
        bits: the bits of one code, 1 to 8.
        count: how many codes there are. The rest of the last words is padding.
    """
    mask = 2**bits - 1
    periods = -(-words.shape[0] // bits)
    padding = words.new_zeros(periods * bits - words.shape[0], words.shape[1])
    grouped = torch.cat([words, padding]).view(periods, bits, words.shape[1])
    codes = torch.empty(periods, WORD, words.shape[1], dtype=torch.uint8, device=words.device)
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        code = (grouped[:, word] >> offset) & mask
        lower = WORD - offset  # how many bits lie in this word
        if lower < bits:
            code = (code & (2**lower - 1)) | ((grouped[:, word + 1] << lower) & mask)
        codes[:, index] = code.to(torch.uint8)
    return codes.view(periods * WORD, words.shape[1])[:count]


def pack_words(codes: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `unpack_words`: int32 words of shape (rows, columns)."""
    periods = -(-rows // bits)
    padded = codes.new_zeros(periods * WORD, codes.shape[1])
    padded[: codes.shape[0]] = codes
    grouped = padded.view(periods, WORD, codes.shape[1])
    words = torch.zeros(periods, bits, codes.shape[1], dtype=torch.int64, device=codes.device)
    for index in range(WORD):
        word, offset = divmod(index * bits, WORD)
        code = grouped[:, index].to(torch.int64)
        words[:, word] |= (code << offset) & 0xFFFFFFFF
        if offset + bits > WORD:
            words[:, word + 1] |= code >> (WORD - offset)
    words = torch.where(words >= 2 ** (WORD - 1), words - 2**WORD, words)  # as signed numbers
    return words.view(periods * bits, codes.shape[1])[:rows].to(torch.int32)
