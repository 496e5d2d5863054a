"""How the keys of PEFT's files have been spelt over time, and by programs beside PEFT. Needs no torch.

Today's key is `base_model.model.<path of the module>.<tensor>`. Others wrote an adapter's name into it, the segments of
wrappers (`_orig_mod`), the component of a pipeline (`unet.`), diffusers' names of old, or left PEFT's prefix out; and
models of transformers moved their text model to another path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from surgery.errors import SurgeryError

__all__ = ["COMPONENTS", "METHOD_KEY", "PREFIX", "WRAPPERS", "Spelt", "current_keys"]

PREFIX = "base_model.model."
WRAPPERS = frozenset("module _orig_mod _fsdp_wrapped_module _checkpoint_wrapped_module _forward_module".split())
COMPONENTS = (
    "unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet",
)  # fmt: skip
_STRUCTURE = WRAPPERS | {"model", "language_model", "text_model"}  # models are moved by these, at the head of a path
_SPELLINGS = (
    (re.compile(r"(?:[._]lora|\.lora_linear_layer)\.down\.weight$"), ".lora_A.weight"),
    (re.compile(r"(?:[._]lora|\.lora_linear_layer)\.up\.weight$"), ".lora_B.weight"),
    (re.compile(r"(?:[._]lora|\.lora_linear_layer|\.lora_[AB])\.alpha$"), ".alpha"),
    (re.compile(r"\.self_attn\.to_([qkv])\.(?=lora_|alpha$)"), r".self_attn.\1_proj."),  # of text encoders
    (re.compile(r"\.self_attn\.to_out\.(?=lora_|alpha$)"), ".self_attn.out_proj."),
)  # diffusers' layers of old
_METHODS = "lora hada lokr oft boft ia3 vera randlora road hra fourierft shira c3a miss bone ln_tuning trainable_tokens"
METHOD_KEY = rf"\.(?:{'|'.join(_METHODS.split())})_\w+"
_UNNAMED = re.compile(rf"{METHOD_KEY}(?:\.(?:weight|bias))?$")
_NAMED = re.compile(rf"{METHOD_KEY}\.(?!weight$|bias$|alpha$)([^.]+)(?:\.(?:weight|bias))?$")  # an adapter's own name
_DEEPEST = 4  # segments that follow a module's path, at most


@dataclass(frozen=True)
class Spelt:
    """`keys`: PEFT's key of today → the key in the file. `others`: keys of other components, or of no adapter.

    `component`: the one that the keys are of. `moved`: the file's path of a module → the model's, where they differ.
    """

    keys: dict[str, str]
    others: tuple[str, ...] = ()
    component: str = ""
    moved: Mapping[str, str] = field(default_factory=dict)


def current_keys(
    file_keys: Sequence[str],
    known: Callable[[], Collection[str]],
    component: str | None = None,
    fits: Callable[[str, str], bool] | None = None,
) -> Spelt:
    """The keys of a file as PEFT writes them today. `known` gives the paths of the model's modules.

    `component`: which of a pipeline's is wanted, where the file holds several. `fits`: whether the tensor under a key
    of the file has the sizes of the module at a path: it tells two components with the same paths apart.
    """
    if "prompt_embeddings" in file_keys:
        return Spelt({key: key for key in file_keys})
    texts, paths = {key: _without_wrappers(key) for key in file_keys}, frozenset(known())
    others: dict[str, str] = {}
    chosen = ""
    if not any(key.startswith("base_model.") for key in texts.values()):
        chosen = _component(texts, paths, component, fits)
        start = f"{chosen}." if chosen else ""
        others = {key: text for key, text in texts.items() if _first(text) in _elsewhere(chosen, paths)}
        texts = {key: PREFIX + _spelt(text, start) for key, text in texts.items() if key not in others}
    texts = _without_adapter_name(texts)
    moves = _Moves(paths)
    keys: dict[str, str] = {}
    for key, text in texts.items():
        if ".original_module." in text:  # what PEFT keeps beside a module that is trained
            others[key] = text
            continue
        first = keys.setdefault(moves.key(text), key)
        twice = next((each for each in (first, key) if ".modules_to_save." in each), None)
        if first != key and twice is None:
            raise SurgeryError("two tensors of the file have the same name here", where=key)
        if first != key:  # PEFT writes a module both ways where the vocabulary was resized
            keys[moves.key(text)] = first if twice == key else key
            others[str(twice)] = text
    return Spelt(keys, tuple(others), chosen, moves.made)


def _without_wrappers(key: str) -> str:
    while (first := _first(key)) in WRAPPERS and ".base_model." in f".{key}":
        key = key[len(first) + 1 :]
    return key


def _first(key: str) -> str:
    return key.partition(".")[0]


# Components of a pipeline ---------------------------------------------------------------------------------------


def _component(
    file_texts: Mapping[str, str],
    paths: Collection[str],
    wanted: str | None,
    fits: Callable[[str, str], bool] | None,
) -> str:
    """Which component of a pipeline's file the model is: the one whose paths it has; "" for a file of one model."""
    there = [name for name in COMPONENTS if any(_first(text) == name for text in file_texts.values())]
    if wanted is not None:
        if wanted not in there:
            why = f"it holds {', '.join(there) or 'one model alone'}"
            raise SurgeryError(f"the file has no component {wanted!r}", why=why)
        return wanted
    scores: dict[str, tuple[int, int]] = {}
    for name in ("", *there):
        texts = {key: _spelt(text, f"{name}." if name else "") for key, text in file_texts.items()}
        hits = {key: path for key, text in texts.items() if (path := _path_of(text, paths))}
        scores[name] = len(hits), sum(fits(key, path) for key, path in hits.items()) if fits and there else 0
    best = max(scores.values())
    first, *more = [name for name, score in scores.items() if score == best]
    if more and best[0]:
        raise SurgeryError(
            f"the file holds adapters of {' and '.join((first, *more))}, and this model may be each of them",
            fix=f"load_adapter(…, component={more[0]!r}), or another of these",
        )
    return first


def _elsewhere(chosen: str, paths: Collection[str]) -> set[str]:
    """The components that keys may be of which are not this model's."""
    return {name for name in COMPONENTS if name != chosen and (chosen or name not in paths)} if chosen else set()


def _path_of(text: str, paths: Collection[str]) -> str | None:
    """The module that a key is of, if the model has it."""
    for _ in range(_DEEPEST):
        text = text.rpartition(".")[0]
        if text and text in paths:
            return text
    return None


def _spelt(key: str, before: str) -> str:
    key = re.sub(r"(^|\.)processor\.", r"\1", key.removeprefix(before))
    for pattern, suffix in _SPELLINGS:
        key = pattern.sub(suffix, key)
    return re.sub(r"(^|\.)to_out\.(lora_|alpha$)", r"\1to_out.0.\2", key)


# An adapter's name ----------------------------------------------------------------------------------------------


def _without_adapter_name(texts: Mapping[str, str]) -> dict[str, str]:
    """Keys without the adapter's name, which a model's own state dict has in them."""
    hits = (_NAMED.search(text) for text in texts.values())
    names = list(dict.fromkeys(hit[1] for hit in hits if hit))
    if len(names) > 1 and any(_UNNAMED.search(text) for text in texts.values()):
        names = []  # they are tensors of a method: adapters' names would be in all keys
    if len(names) > 1:
        raise SurgeryError(
            f"the file holds the tensors of {len(names)} adapters: {', '.join(names[:5])}",
            fix="save them each by itself: save_pretrained(…, selected_adapters=[…])",
        )
    there = frozenset(texts.values())
    return {key: _without(text, names[0] if names else _name_of_second(text, there)) for key, text in texts.items()}


def _name_of_second(text: str, texts: Collection[str]) -> str | None:
    """The adapter's name in a key of a trained module, where the file has the tensor under a key without it, too.

    With `bias="all"` PEFT writes the biases inside of such a module a second time.
    """
    hit = re.search(r"\.modules_to_save\.([^.]+)\.", text)
    return hit[1] if hit and text.replace(hit[0], ".") in texts else None


def _without(text: str, name: str | None) -> str:
    if name is not None:
        text = text.replace(f".modules_to_save.{name}.", ".")
        if _NAMED.search(text):
            head, _, last = text.rpartition(".")
            text = head if last == name else f"{head.removesuffix(f'.{name}')}.{last}"
    text = text.replace(".modules_to_save.", ".")
    return text.removesuffix(".weight") if text.endswith(".lora_magnitude_vector.weight") else text


# Paths that moved -----------------------------------------------------------------------------------------------


class _Moves:
    """Keys under the paths that a model has, where the file has its modules at others.

    Two paths are the same module's where they agree but for wrappers' segments and those at their heads that models of
    transformers are moved by. `made`: the file's path → the model's.
    """

    def __init__(self, paths: Collection[str]):
        self.paths = paths
        self.made: dict[str, str] = {}
        self._plain: dict[str, str | None] | None = None

    def key(self, text: str) -> str:
        if not text.startswith(PREFIX) or not self.paths:
            return text
        parts = text.removeprefix(PREFIX).split(".")
        for end in range(len(parts) - 1, 0, -1):
            path = ".".join(parts[:end])
            if path in self.paths:
                return text
            if (here := self.plain.get(_plain(parts[:end]))) is not None and end >= len(parts) - _DEEPEST:
                self.made[path] = here
                return ".".join([PREFIX + here, *parts[end:]])
        return text

    @property
    def plain(self) -> Mapping[str, str | None]:
        """The model's paths without what they may differ in; None where two are alike."""
        if self._plain is None:
            self._plain = {}
            for path in self.paths:
                plain = _plain(path.split("."))
                self._plain[plain] = None if plain in self._plain or not plain else path
        return self._plain


def _plain(parts: Iterable[str]) -> str:
    kept = [part for part in parts if part not in WRAPPERS]
    while kept and kept[0] in _STRUCTURE:
        kept.pop(0)
    return ".".join(kept)
