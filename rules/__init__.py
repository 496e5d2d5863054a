"""The rule library: one method a file, built on surgery's public names alone."""

from rules.adalora import AdaLoraRule
from rules.allocate import RankAllocator, orthogonal_loss
from rules.bias import BiasRule
from rules.bottleneck import BottleneckRule
from rules.c3a import C3aRule
from rules.capture import Captured, CaptureRule, captured
from rules.fit import fit_direction
from rules.fourier import FourierRule
from rules.lora import LoraRule
from rules.norm import NormRule
from rules.randlora import RandLoraRule
from rules.reft import ReftRule
from rules.replace import ReplaceRule
from rules.shira import ShiraRule
from rules.steer import SteerRule
from rules.tokens import TokensRule
from rules.train import TrainRule

__all__ = [
    "AdaLoraRule",
    "BiasRule",
    "BottleneckRule",
    "C3aRule",
    "CaptureRule",
    "Captured",
    "FourierRule",
    "LoraRule",
    "NormRule",
    "RandLoraRule",
    "RankAllocator",
    "ReftRule",
    "ReplaceRule",
    "ShiraRule",
    "SteerRule",
    "TokensRule",
    "TrainRule",
    "captured",
    "fit_direction",
    "orthogonal_loss",
]
