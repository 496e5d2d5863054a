"""Methods whose tensors stand in PEFT's files as they are here, or nearly so: each a table of names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from surgery import PeftConfig, PeftEntry, PeftMethod, PeftPlace, Rule, SurgeryError, peft_method
from surgery.rules._linear import delta, maps
from surgery.rules.boft import BoftRule
from surgery.rules.c3a import C3aRule
from surgery.rules.fourier import FourierRule
from surgery.rules.hra import HraRule
from surgery.rules.ia3 import IA3Rule
from surgery.rules.loha import LohaRule
from surgery.rules.lokr import LokrRule
from surgery.rules.miss import MissRule
from surgery.rules.norm import NormRule
from surgery.rules.oft import OftRule, nearest_divisor, patch_width
from surgery.rules.peft.path_values import PathValuesMethod
from surgery.rules.road import RoadRule
from surgery.rules.shira import ShiraRule

LYCORIS = {
    "r": "rank", "alpha": "alpha", "rank_dropout": "rank_dropout", "module_dropout": "module_dropout",
    "use_effective_conv2d": "use_effective_conv2d",
}  # fmt: skip


class _Patterned(PeftMethod):
    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        return {name: config.fitting(name) for name in ("rank_pattern", "alpha_pattern")}

    def write_fields(self, rule: Rule) -> dict[str, Any]:
        return {name: dict(getattr(rule, name) or {}) for name in ("rank_pattern", "alpha_pattern")}


@peft_method
class Loha(_Patterned):
    peft_type, rule, fields = "LOHA", LohaRule, LYCORIS
    tensors = {name: f"hada_{name}" for name in ("t1", "w1_a", "w1_b", "t2", "w2_a", "w2_b")}


@peft_method
class Lokr(_Patterned):
    peft_type, rule = "LOKR", LokrRule
    fields = {name: name for name in ("decompose_both", "decompose_factor", "rank_dropout_scale")} | LYCORIS
    tensors = {name: f"lokr_{name}" for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}
    inits = {True: "identity", "lycoris": "lycoris", False: "random"}


@peft_method
class Ia3(PeftMethod):
    peft_type, rule = "IA3", IA3Rule
    init_field, tensors = "init_ia3_weights", {"scale": "ia3_l"}

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("fan_in_fan_out")
        names = config.take("feedforward_modules", ())
        if isinstance(names, str):
            return {"feedforward": f"re:{names}"}
        fed = [path for path in config.targeted if any(path.endswith(name) for name in names)]  # as PEFT: no dot
        return {"feedforward": config.regular(fed) if fed else ()}

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        assert isinstance(place.rule, IA3Rule)
        kernel = len(maps.sizes(maps.linear_map(place.module, *maps.NAMES))) - 2  # type: ignore[arg-type]
        shape = (1, -1, *(1,) * kernel) if kernel else (1, -1) if place.rule.feeds(place.path) else (-1, 1)
        return {"scale": PeftEntry("ia3_l", lambda tensor: tensor.flatten(), lambda scale: scale.view(shape))}

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        fed = [path for rule, paths in placed for path in paths if rule.feeds(path)]
        return {**super().write(placed, modules), "feedforward_modules": _regular(fed) if fed else []}


@peft_method
class Oft(PeftMethod):
    peft_type, rule = "OFT", OftRule
    biased = True
    tensors, derived = {"R": "oft_R.weight"}, ("index",)
    marks = ("oft_R.weight", "oft_embedding_R.weight")
    fields = {
        "oft_block_size": "block_size", "r": "blocks", "block_share": "block_share", "coft": "coft", "eps": "eps",
        "use_cayley_neumann": "use_cayley_neumann", "num_cayley_neumann_terms": "num_cayley_neumann_terms",
    }  # fmt: skip

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("fan_in_fan_out", "module_dropout")  # the latter does nothing in PEFT
        if "use_cayley_neumann" not in config.data:  # OFT of before PEFT 0.16: R holds whole blocks, on another side
            raise config.refuse("use_cayley_neumann", "the file is of PEFT before 0.16, whose OFT was another")
        convolutions = any(isinstance(config.modules.by_path[path], nn.Conv2d) for path in config.targeted)
        return self._nearest(config) | ({"patches": True} if convolutions else {})

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        if isinstance(place.module, nn.Embedding):
            return {"R": PeftEntry("oft_embedding_R.weight")}
        return super().entries(place)

    def write(self, placed: Any, modules: Any) -> dict[str, Any]:
        for rule, paths in placed:
            for path in paths:
                module, patched = modules.by_path[path], rule.replace(patches=True)
                if not rule.patches and patched.turns_patches(module, maps.linear_map(module, *maps.NAMES)):
                    why = "PEFT's OFT rotates the patches of its input"
                    fix = 'OftRule(patches=True) does that; save_adapter(…, format="surgery") holds any rules'
                    what = "PEFT's format can't hold the OFT of a Conv2d's weight"
                    raise SurgeryError(what, where=path, why=why, fix=fix)
        return super().write(placed, modules)

    def _nearest(self, config: PeftConfig) -> dict[str, Any]:
        """Where the blocks divide not every site, PEFT takes the nearest number that does."""
        name = "r" if config.data.get("r") else "oft_block_size"
        count = config.data.get(name) or (0 if name == "r" else 32)
        widths = set(map(_width, (config.modules.by_path[path] for path in config.targeted))) - {0}
        others = sorted(width for width in widths if isinstance(count, int) and count > 0 and width % count)
        if not others:
            return {}
        sizes = ", ".join(f"{nearest_divisor(width, count)} for {width} features" for width in others)
        config.notes.append(f"Invalid `{name}` ({count})! Adjusted `{name}` to the nearest that divides: {sizes}")
        return {"nearest": True}


def _width(module: nn.Module) -> int:
    """How many numbers PEFT's OFT of a module rotates together; 0 where there is none."""
    layout = maps.linear_map(module, *maps.NAMES)
    if isinstance(layout, str):
        return 0
    return patch_width(module) if isinstance(module, nn.Conv2d) else maps.turned_width(layout)


@peft_method
class Boft(PeftMethod):
    peft_type, rule = "BOFT", BoftRule
    biased = True
    tensors = {"R": "boft_R", "s": "boft_s"}
    fields = {
        "boft_block_size": "block_size", "boft_block_num": "blocks", "boft_dropout": "dropout",
        "boft_n_butterfly_factor": "n_butterfly_factor",
    }  # fmt: skip

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("fan_in_fan_out")
        return {}

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        turned = isinstance(place.module, nn.Conv2d)
        scale = PeftEntry("boft_s", lambda s: s.reshape(-1, 1), lambda s: s.t() if turned else s)
        return {"R": PeftEntry("boft_R"), "s": scale}


@peft_method
class Hra(PeftMethod):
    peft_type, rule = "HRA", HraRule
    biased = True
    fields, tensors = {"r": "rank", "apply_GS": "apply_GS"}, {"u": "hra_u"}


@peft_method
class Road(PeftMethod):
    peft_type, rule = "ROAD", RoadRule
    fields = {"variant": "variant", "group_size": "group_size"}
    tensors = {"theta": "road_theta", "alpha": "road_alpha"}


@peft_method
class Miss(PeftMethod):
    peft_type, rule = "MISS", MissRule
    biased = True
    fields = {"r": "rank", "mini_r": "mini_r", "miss_dropout": "dropout"}
    tensors = {"block": "miss_block"}
    inits = {True: "identity", False: "random", "mini": "identity", "bat": "identity"}

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        start = config.take("init_weights", True)
        return {"variant": start if isinstance(start, str) else "miss"}

    def write_fields(self, rule: Rule) -> dict[str, Any]:
        assert isinstance(rule, MissRule)
        return {} if rule.variant == "miss" else {"init_weights": rule.variant}


@peft_method
class C3a(PathValuesMethod):
    peft_type, rule = "C3A", C3aRule
    biased = True
    fields, tensors = {"block_size": "block_size"}, {"kernel": "c3a_kernel"}
    inits = {True: "identity", **{name: name for name in ("xavier_uniform", "kaiming_uniform", "gaussian")}}
    inits |= {False: "xavier_uniform"}
    number, pattern = "block_size", "block_size_pattern"


@peft_method
class Fourier(PathValuesMethod):
    peft_type, rule, derived = "FOURIERFT", FourierRule, ("index",)
    biased = True
    fields = {"n_frequency": "n_frequency", "scaling": "scaling", "random_loc_seed": "random_loc_seed"}
    tensors = {"spectrum": "fourierft_spectrum"}
    number, pattern = "n_frequency", "n_frequency_pattern"

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("fan_in_fan_out")
        return super().read_fields(config)


@peft_method
class Shira(PeftMethod):
    peft_type, rule = "SHIRA", ShiraRule
    fields = {"r": "rank", "random_seed": "random_seed"}
    tensors = {"values": "shira_weight"}

    def read_fields(self, config: PeftConfig) -> dict[str, Any]:
        config.silent("fan_in_fan_out", "mask_type")  # the file holds the places
        return {}

    def start(self, config: PeftConfig) -> Iterable[Rule]:
        config.only("mask_type", "random", why="a mask by a function needs the function: config.mask_fn = …")
        return super().start(config)

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        import torch

        turned = delta.turned(place.module)
        _, inner = delta.sizes(place.module)

        def read(pairs: Any) -> Any:
            rows, columns = pairs.flip(0) if turned else pairs
            return rows.long() * inner + columns.long()

        def write(index: Any) -> Any:
            pairs = torch.stack([index // inner, index % inner]).int()
            return pairs.flip(0) if turned else pairs

        return {"values": PeftEntry("shira_weight"), "index": PeftEntry("shira_indices", read, write)}


@peft_method
class Norm(PeftMethod):
    peft_type, rule, inits = "LN_TUNING", NormRule, {True: ""}

    def entries(self, place: PeftPlace) -> dict[str, PeftEntry]:
        return {name: PeftEntry(f"ln_tuning_layers.{name}") for name in place.names}


def _regular(paths: Any) -> str:
    import re

    return "|".join(map(re.escape, paths))
