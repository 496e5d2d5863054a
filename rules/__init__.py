"""The rule library: one method a file, built on surgery's public names alone."""

from rules.bias import BiasRule
from rules.bottleneck import BottleneckRule
from rules.capture import Captured, CaptureRule, captured
from rules.fit import fit_direction
from rules.lora import LoraRule
from rules.norm import NormRule
from rules.reft import ReftRule
from rules.replace import ReplaceRule
from rules.steer import SteerRule
from rules.tokens import TokensRule
from rules.train import TrainRule

__all__ = [
    "BiasRule",
    "BottleneckRule",
    "CaptureRule",
    "Captured",
    "LoraRule",
    "NormRule",
    "ReftRule",
    "ReplaceRule",
    "SteerRule",
    "TokensRule",
    "TrainRule",
    "captured",
    "fit_direction",
]
