"""The rule library: one method a file, built on surgery's public names alone."""

import rules.peft  # noqa: F401, I001  # how PEFT writes what is here: it needs the rules above
from rules.adalora import AdaLoraRule
from rules.adaption import AdaptionRule
from rules.allocate import RankAllocator, orthogonal_loss
from rules.bias import BiasRule
from rules.boft import BoftRule
from rules.bottleneck import BottleneckRule
from rules.c3a import C3aRule
from rules.capture import Captured, CaptureRule, captured
from rules.experts import ExpertLoraRule
from rules.fit import fit_direction
from rules.fold import fold_prompts
from rules.fitted_prefix import fit_prefix
from rules.fourier import FourierRule
from rules.hra import HraRule
from rules.ia3 import IA3Rule
from rules.loha import LohaRule
from rules.lokr import LokrRule
from rules.lora import LoraRule
from rules.miss import MissRule
from rules.multitask import MultitaskPromptRule, task_of
from rules.norm import NormRule
from rules.oft import OftRule
from rules.prefix import PrefixRule
from rules.prompt import PromptRule
from rules.randlora import RandLoraRule
from rules.reft import ReftRule
from rules.replace import ReplaceRule
from rules.road import RoadRule
from rules.shira import ShiraRule
from rules.statistics import StatisticsRule
from rules.steer import SteerRule
from rules.tokens import BaseRowsRule, TokensRule
from rules.train import TrainRule
from rules.vera import VeraRule

__all__ = [
    "BaseRowsRule",
    "AdaLoraRule",
    "AdaptionRule",
    "BiasRule",
    "BoftRule",
    "BottleneckRule",
    "C3aRule",
    "CaptureRule",
    "Captured",
    "ExpertLoraRule",
    "FourierRule",
    "HraRule",
    "IA3Rule",
    "LohaRule",
    "LokrRule",
    "LoraRule",
    "MissRule",
    "MultitaskPromptRule",
    "NormRule",
    "OftRule",
    "PrefixRule",
    "PromptRule",
    "RandLoraRule",
    "RankAllocator",
    "ReftRule",
    "ReplaceRule",
    "RoadRule",
    "ShiraRule",
    "StatisticsRule",
    "SteerRule",
    "TokensRule",
    "TrainRule",
    "VeraRule",
    "captured",
    "fit_direction",
    "fold_prompts",
    "fit_prefix",
    "orthogonal_loss",
    "task_of",
]


def __dir__() -> list[str]:
    return __all__  # without the modules, for those who complete names
