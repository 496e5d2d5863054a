"""Finds, while planning, which modules of a model take a text, and how they treat masks and positions."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import Site, SiteError, SurgeryError, hidden_of
from surgery.rules._shared.hidden_states import features_of
from surgery.rules._virtual_tokens.token_rows import CHANGED


def starred(site: Site) -> str | None:
    """Returns the name of the forward's ** argument, or None."""
    return next((name for name, p in site.own.signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)


def takes_text(module: nn.Module) -> bool:
    return _takes(module, "input_ids", "inputs_embeds", "attention_mask") and hasattr(module, "get_input_embeddings")


def readers_of_ids(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the outermost modules that take token ids, and the modules that take a text inside them."""
    outer: nn.Module | None = None
    for name, inner in module.named_modules(prefix=path):
        inside = outer is not None and any(other is inner for other in outer.modules())
        if _takes(inner, "input_ids") and (takes_text(inner) or not inside):
            outer = outer if inside else inner
            yield name, inner


def hosts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the innermost modules that take a text, as ids or embeddings, with its mask, without decoders of two."""
    owners = tuple(inner for inner in module.modules() if has_both(inner))
    return ((name, inner) for name, inner in _innermost(module, path) if role_of(inner, owners) != "decoder")


def decoders(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules that attend to an encoder's states through a mask."""
    owners = tuple(inner for inner in module.modules() if has_both(inner))
    for name, inner in _innermost(module, path):
        if _takes(inner, "encoder_hidden_states", "encoder_attention_mask") and role_of(inner, owners) == "decoder":
            yield name, inner


def role_of(module: nn.Module, owners: tuple[nn.Module, ...]) -> str:
    """ "encoder" or "decoder" of a model that has both, or "alone"."""
    for owner in owners:
        if owner is not module and has_both(owner) and any(inner is module for inner in owner.modules()):
            encoder = owner.get_encoder()  # type: ignore[operator]
            inside = encoder is not owner and any(inner is module for inner in encoder.modules())
            return "encoder" if inside else "decoder"
    return "alone"


def _innermost(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, inner in module.named_modules(prefix=path):
        if takes_text(inner) and not any(takes_text(other) for other in inner.modules() if other is not inner):
            yield name, inner


def example_of(site: Site) -> dict[str, Any] | None:
    """Returns the module's arguments in the example call by name, or None without an example."""
    if site.example is None:
        return None
    args, kwargs = site.example
    arguments = dict(site.own.signature.bind(*args, **kwargs).arguments)
    return {**arguments, **arguments.pop(starred(site) or "", {})}


def has_both(module: nn.Module) -> bool:
    return _takes(module, "encoder_outputs") and hasattr(module, "get_encoder")


def reads_padding(model: nn.Module) -> bool:
    """Whether code around the text's module looks for padding: heads that find the text's last token by its id."""
    forward = inspect.unwrap(getattr(model, "_surgery_base", type(model)).forward)
    names = getattr(getattr(forward, "__code__", None), "co_names", ())
    return "pad_token_id" in names and takes_text(model) and not has_both(model) and bool(_inner_hosts(model))


def _inner_hosts(model: nn.Module) -> list[str]:
    return [path for path, _ in _innermost(model, "") if path]


def _takes(module: nn.Module, *names: str) -> bool:
    return set(names) <= _arguments(getattr(module, "_surgery_base", type(module)))


@functools.lru_cache(1024)
def _arguments(kind: type[nn.Module]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(kind.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()


def role(site: Site) -> str:
    """What the module is in the model: "encoder", "decoder", "alone", or a "layer" that knows of no text."""
    if takes_text(site.module):
        return role_of(site.module, site.owners)
    if any(map(takes_text, (*site.owners, *site.module.modules()))):
        raise SiteError(
            f"{site.label} goes on the module that takes the text's mask",
            where=site.path,
            why="here, the mask and the positions would not follow",
            fix="target that module: without targets it is found",
        )
    return "layer"


def probe_text_model(site: Site) -> dict[str, Any]:
    """Returns what short calls of a text model show."""
    try:
        embedding = site.module.get_input_embeddings()  # type: ignore[operator]
    except NotImplementedError as error:
        raise _refused(site, "it does not tell its embedding of tokens: get_input_embeddings()") from error
    run: Callable[..., Any] = site.run
    try:
        findings = probe(run, embedding)
    except SurgeryError:  # it needs more than a text, so the example's arguments are used
        example = example_of(site)
        if example is None:
            raise
        more = {name: value for name, value in example.items() if name not in CHANGED and value is not None}
        run = functools.partial(site.run, **more)
        findings = probe(run, embedding, example.get("input_ids"))
    if findings["why"]:
        raise _refused(site, findings["why"])
    findings["counted"] = _takes(site.module, "position_ids") and counts_positions(run, embedding)
    return findings | probe_padding(run, embedding)


def probe_padding(run: Callable[..., Any], embedding: nn.Module) -> dict[str, bool]:
    """Finds out what padding does to a text in a call without positions.

    `moves`: padding on the left changes nothing, for example if positions are distances; `gaps`: padding inside the
    text changes nothing either.
    """
    ids = _short(embedding)
    try:
        alone = hidden_of(run(input_ids=ids))
        results = {}
        for name, at in (("moves", 0), ("gaps", 1)):
            order = [*range(at), *[3] * 2, *range(at, 4)]
            kept_columns = [*range(at), *range(at + 2, 6)]
            mask = torch.zeros(1, 6, dtype=torch.long, device=ids.device)
            mask[:, kept_columns] = 1
            results[name] = _near(hidden_of(run(input_ids=ids[:, order], attention_mask=mask))[:, kept_columns], alone)
        return results
    except SurgeryError:
        return {"moves": False, "gaps": False}


def traits(site: Site) -> tuple[bool, bool, bool]:
    """`left`, `moves` and `gaps` of `seen`."""
    seen = site.facts["seen"]
    return seen["left"], seen.get("moves", True), seen.get("gaps", True)


def after_of(site: Site, after: int | None) -> int:
    """Returns how many tokens of a text stand before the virtual tokens."""
    if after is None and site.facts["role"] != "layer":
        return int(site.facts["seen"]["pooled"])
    return after or 0


def width(site: Site, random: bool, after: int | None) -> int:
    """Returns the size of a text's embeddings, or of the output of a module that takes no text."""
    if site.facts["role"] != "layer":
        return site.facts["seen"]["width"]
    if not random:
        raise _refused(site, "it has no embedding of tokens to start from: init='random'")
    if after is None:
        raise _refused(site, "say how many of its tokens stay first: after=1 keeps a class token's place, else 0")
    size = features_of(site.module, None)
    if isinstance(size, int):
        return size
    example = example_of(site)
    if example is None:
        raise _refused(site, "it does not say how wide its output is: give example_inputs")
    return hidden_of(site.run(**example)).shape[-1]


def start(site: Site, init: str, ids: Sequence[int]) -> Callable[[Tensor], Any]:
    """Returns the initial values of a prompt: as torch's Embedding, or rows of the module's own embedding."""
    if init == "random":
        return nn.init.normal_
    embedding = site.module.get_input_embeddings()  # type: ignore[operator]

    def fill(tensor: Tensor) -> None:
        if init == "vocab":
            chosen = torch.randint(next(embedding.parameters()).shape[0], tensor.shape[:1])
        else:
            chosen = torch.tensor(ids).repeat(-(-len(tensor) // len(ids)))[: len(tensor)]
        tensor.copy_(embedding(chosen.to(tensor.device)))

    return fill


def _refused(site: Site, why: str) -> SiteError:
    return SiteError(f"{site.label} can't go on this {site.base_class.__name__}", where=site.path, why=why)


def probe(run: Callable[..., Any], embedding: nn.Module, ids: Tensor | None = None) -> dict[str, Any]:
    """Returns what short calls show of a text model, or `why` it does not take embeddings in place of ids.

    `width`: the size of its embeddings; `pooled`: whether it returns a vector of the whole text beside the hidden
    states; `left`: whether padding on the left has the same effect for embeddings as for ids.
    """
    padding = getattr(embedding, "padding_idx", None)
    ids = _short(embedding) if ids is None else ids
    output, embeds = run(input_ids=ids), embedding(ids)
    if not isinstance(embeds, Tensor):
        return {"why": f"its embedding returns a {type(embeds).__name__}"}
    embeds, hidden = embeds.detach(), hidden_of(output)
    findings = {"why": "", "width": embeds.shape[-1], "left": True}
    if hidden.dim() != 3 or hidden.shape[1] != ids.shape[1]:
        return {**findings, "why": f"for {ids.shape[1]} tokens it returns {tuple(hidden.shape)}"}
    if not _same(hidden, hidden_of(run(inputs_embeds=embeds))):
        return {**findings, "why": "given inputs_embeds, it computes something else than for the ids that they embed"}
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    findings["pooled"] = any(isinstance(value, Tensor) and value.shape == hidden[:, 0].shape for value in values)
    if padding is not None:
        ids, mask = ids.clone(), torch.ones_like(ids)
        ids[:, 0], mask[:, 0] = padding, 0
        as_ids = hidden_of(run(input_ids=ids, attention_mask=mask))
        embedded = hidden_of(run(inputs_embeds=embedding(ids).detach(), attention_mask=mask))
        findings["left"] = _same(as_ids[:, 1:], embedded[:, 1:])
    return findings


def counts_positions(run: Callable[..., Any], embedding: nn.Module) -> bool:
    """Whether a text's positions are 0, 1, 2, … in a call without positions, with and without padding on the left."""
    ids = _short(embedding)
    mask = torch.ones_like(ids)
    mask[:, 0] = 0
    positions = torch.arange(4, device=ids.device).unsqueeze(0)
    try:
        return all(
            _same(hidden_of(run(**call))[:, 1:], hidden_of(run(**call, position_ids=positions))[:, 1:])
            for call in ({"input_ids": ids}, {"input_ids": ids, "attention_mask": mask})
        )
    except SurgeryError:
        return False


def encoder_moves(site: Site) -> bool:
    """Returns the trait `moves` of the encoder whose states a decoder attends to."""

    def probe_encoder() -> bool:
        owner: Any = next((owner for owner in site.owners if has_both(owner)), None)
        inside = () if owner is None else owner.get_encoder().modules()
        encoder = next((module for module in inside if takes_text(module)), None)
        if encoder is None:
            return True
        run = functools.partial(site.run, encoder)
        return probe_padding(run, encoder.get_input_embeddings())["moves"]  # type: ignore[operator]

    return site.fact("moves", probe_encoder)


def _short(embedding: nn.Module) -> Tensor:
    """Returns four tokens, none of which is the padding token."""
    weight = next(embedding.parameters())
    rows = [row for row in range(min(weight.shape[0], 8)) if row != getattr(embedding, "padding_idx", None)]
    return torch.tensor([(rows * 4)[:4]], device=weight.device)


def _near(first: Tensor, other: Tensor) -> bool:
    """Whether two outputs differ only by rounding, which is some hundredths in half precision."""
    if first.is_meta or first.shape != other.shape:
        return first.is_meta
    near = 1e-3 if first.dtype in (torch.float32, torch.float64) else 0.05
    return bool((first - other).float().norm() <= near * other.float().norm())


def _same(first: Tensor, other: Tensor) -> bool:
    return first.is_meta or first.shape == other.shape and torch.equal(first, other)
