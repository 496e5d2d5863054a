"""llama.cpp's names of pre-tokenizers, by how a `tokenizer.json` splits texts before its merges.

Source: llama.cpp, src/llama-vocab.cpp, which has regular expressions of its own for each name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["ADDS_BOS", "pre_tokenizer_of"]

ADDS_BOS = frozenset({"llama-bpe", "tekken"})  # names for which llama.cpp adds the first token unless a file says no

_GPT_2 = "bytes, split"  # the byte level's own regular expression
_DIGITS = "each digit"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA_3 = _WORDS + r"\p{N}{1,3}|" + _SIGNS
_QWEN_2 = _WORDS + r"\p{N}|" + _SIGNS
_CASES = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join((*_CASES, r"\p{N}", _SLASHED))
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_GPT_4O = "|".join((*(case + _ENDING for case in _CASES), r"\p{N}{1,3}", _SLASHED))
_DEEPSEEK_3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| "
    "?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)

# The steps of a pre-tokenizer, and whether merges are passed over for a word that is a token → llama.cpp's name.
_NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((_GPT_2,), False): "gpt-2",
    ((_DIGITS, _GPT_2), False): "smollm",
    ((_LLAMA_3,), True): "llama-bpe",
    ((_LLAMA_3,), False): "dbrx",
    ((_QWEN_2,), False): "qwen2",
    ((_TEKKEN,), True): "tekken",
    ((_GPT_4O,), False): "gpt-4o",
    (_DEEPSEEK_3, False): "deepseek-v3",
}


def pre_tokenizer_of(tokenizer: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the pre-tokenizer of a `tokenizer.json`; None if it has no name that is known here."""
    normalizer = tokenizer.get("normalizer")
    if normalizer is not None and _flat(normalizer, "normalizers") not in ([], [{"type": "NFC"}]):
        return None
    steps = list(_steps(_flat(tokenizer.get("pre_tokenizer"), "pretokenizers")))
    if None in steps:
        return None
    return _NAMES.get((tuple(str(step) for step in steps), bool(tokenizer["model"].get("ignore_merges"))))


def _flat(step: Any, inner: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    if step.get("type") == "Sequence":
        return [each for part in step[inner] for each in _flat(part, inner)]
    return [step]


def _steps(steps: Sequence[Mapping[str, Any]]) -> Iterator[str | None]:
    """Each step in the words of the table; None for a step that it does not have. Bytes alone are not a step."""
    if not steps or steps[-1].get("type") != "ByteLevel":
        yield None
    for step in steps:
        if step.get("type") == "ByteLevel":
            if step.get("add_prefix_space"):
                yield None
            if step.get("use_regex", True):
                yield _GPT_2
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            yield _DIGITS
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            pattern = step.get("pattern")
            yield pattern.get("Regex") if isinstance(pattern, Mapping) else None
        else:
            yield None
