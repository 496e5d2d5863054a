"""The rule library: one method a file, built on surgery's public names alone."""

from rules.bias import BiasRule
from rules.lora import LoraRule
from rules.norm import NormRule
from rules.tokens import TokensRule
from rules.train import TrainRule

__all__ = ["BiasRule", "LoraRule", "NormRule", "TokensRule", "TrainRule"]
