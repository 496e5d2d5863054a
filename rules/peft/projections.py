"""VeRA and RandLoRA in PEFT's files: one pair of random matrices for the model, of which each site takes a corner."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from surgery import LiveSite, PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules._linear import maps
from surgery.rules.randlora import RandLoraRule
from surgery.rules.vera import VeraRule


def _shape_of(config: PeftConfig) -> dict[str, Any]:
    """The size that PEFT's matrices have: the largest out and the largest in, where the sites differ."""
    layouts = [maps.linear_map(config.modules.by_path[path], "linear", "conv1d") for path in config.targeted]
    sizes = {maps.sizes(layout) for layout in layouts if not isinstance(layout, str)}
    if len(sizes) < 2:
        return {}
    return {"projection_shape": (max(out for out, *_ in sizes), max(inner for _, inner, *_ in sizes))}


def _are_drawn(rule: Rule, live: LiveSite) -> bool:
    """Whether a site's matrices are those that its rule draws."""
    drawn = {name: torch.empty_like(live.params[name]) for name in ("A", "B")}
    with torch.no_grad():
        rule.initialise(LiveSite(live.module, live.path, live.adapter, drawn, lambda name, _: live.tensor(name)))
    return all(torch.equal(live.params[name], drawn[name]) for name in drawn)


class _Projected(PeftMethod):
    biased = True

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("fan_in_fan_out")
        config.silent("save_projection")  # without them in the file, the rule draws the matrices, as PEFT does
        return _shape_of(config)

    def derived_in(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        return () if config.get("save_projection", True) else ("A", "B")

    def retained(self, original: Mapping[str, Any], live: Iterable[tuple[Rule, LiveSite]]) -> dict[str, Any]:
        """The matrices are left out only if they are those that the key draws."""
        wanted = original.get("save_projection", True) is False
        leave_out = wanted and all(_are_drawn(rule, site) for rule, site in live)
        return {"save_projection": False} if leave_out else {}

    def write_fields(self, rule: Any) -> dict[str, Any]:
        return {"save_projection": True}

    def size(self, key: str, tensors: Sequence[Tensor], sites: Sequence[nn.Module]) -> list[int]:
        return [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]

    def join(self, key: str, tensors: Sequence[Tensor], sites: Sequence[nn.Module]) -> Tensor:
        """A tensor that each site's is a corner of."""
        if "base_model.model." in key:
            return super().join(key, tensors, sites)
        most = tensors[0].new_zeros(self.size(key, tensors, sites))
        corners = [tuple(slice(size) for size in tensor.shape) for tensor in tensors]
        for corner, tensor in zip(corners, tensors, strict=True):
            most[corner] = tensor
        if not all(torch.equal(most[corner], tensor) for corner, tensor in zip(corners, tensors, strict=True)):
            raise SurgeryError(
                f"PEFT's format can't hold projections of their own for each size of site ({key})",
                why="its sites take corners of one pair of matrices; those made here are drawn for each size",
                fix='save_adapter(…, format="surgery")',
            )
        return most


@peft_method
class Vera(_Projected):
    peft_type, rule = "VERA", VeraRule
    fields = {name: name for name in ("d_initial", "projection_prng_key")} | {"r": "rank", "vera_dropout": "dropout"}
    tensors = {"d": "vera_lambda_d", "b": "vera_lambda_b"}

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        out, inner = maps.sizes(maps.linear_map(place.module, *maps.NAMES))  # type: ignore[arg-type]
        A = PeftEntry("/base_model.vera_A", lambda A: A[:, :inner])
        return {**super().entries(place), "A": A, "B": PeftEntry("/base_model.vera_B", lambda B: B[:out])}


@peft_method
class RandLora(_Projected):
    peft_type, rule = "RANDLORA", RandLoraRule
    fields = {name: name for name in ("projection_prng_key", "sparse", "very_sparse")} | {
        "r": "rank", "randlora_alpha": "alpha", "randlora_dropout": "dropout",
    }  # fmt: skip
    tensors = {"lambda_": "randlora_lambda", "gamma": "randlora_gamma"}
    passed_over = (".randlora_A", ".randlora_B")  # PEFT writes them for each site, too

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        sizes = maps.sizes(maps.linear_map(place.module, *maps.NAMES))  # type: ignore[arg-type]
        small, large = min(sizes), max(sizes)
        assert isinstance(place.rule, RandLoraRule)
        n = -(-small // place.rule.rank)
        return {
            **super().entries(place),
            "A": PeftEntry("/base_model.randlora_A", lambda A: A[:, :, :small]),
            "B": PeftEntry("/base_model.randlora_B", lambda B: B[:large, :n]),
        }

    def size(self, key: str, tensors: Sequence[Tensor], sites: Sequence[nn.Module]) -> list[int]:
        # PEFT takes the largest out and the largest in of all sites, and of these two the smaller and the larger.
        sizes = [maps.sizes(maps.linear_map(site, *maps.NAMES)) for site in sites]  # type: ignore[arg-type]
        small, large = sorted((max(out for out, _ in sizes), max(inner for _, inner in sizes)))
        rank = tensors[0].shape[0] if key.endswith("A") else tensors[0].shape[-1]
        return [rank, 1, small] if key.endswith("A") else [large, -(-small // rank), rank]
