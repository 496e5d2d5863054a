"""How PEFT writes what the rules are: tables of names, beside the rules. Importing this registers them all."""

from surgery.rules.peft import (
    adalora,
    adaption,
    experts,
    extras,
    layers,
    lora,
    methods,
    prefix,
    projections,
    prompts,
    tokens,
)

__all__ = [
    "adalora",
    "adaption",
    "experts",
    "extras",
    "layers",
    "lora",
    "methods",
    "prefix",
    "projections",
    "prompts",
    "tokens",
]
