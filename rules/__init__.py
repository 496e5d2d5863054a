"""The rule library: one method a file, built on surgery's public names alone. Imported as `surgery.rules`.

The files lie in `rules/` of the repository; `surgery/rules` is a link to it. `import rules`, which works in a checkout
alone, gives the same package.
"""

import sys

import surgery.rules.peft  # noqa: F401, I001  # how PEFT writes what is here: it needs the rules above
from surgery.rules._rewriting.match import RewriteMatch
from surgery.rules.adalora import AdaLoraRule
from surgery.rules.adaption import AdaptionRule
from surgery.rules.allocate import RankAllocator, orthogonal_loss
from surgery.rules.bias import BiasRule
from surgery.rules.boft import BoftRule
from surgery.rules.bottleneck import BottleneckRule
from surgery.rules.c3a import C3aRule
from surgery.rules.capture import Captured, CaptureRule, captured
from surgery.rules.experts import ExpertLoraRule
from surgery.rules.fit import fit_direction
from surgery.rules.fitted_prefix import fit_prefix
from surgery.rules.fold import fold_prompts
from surgery.rules.fourier import FourierRule
from surgery.rules.head import HeadRule
from surgery.rules.hra import HraRule
from surgery.rules.ia3 import IA3Rule
from surgery.rules.insert import InsertRule
from surgery.rules.layers import DropRule, ReorderRule, RepeatRule
from surgery.rules.loha import LohaRule
from surgery.rules.lokr import LokrRule
from surgery.rules.lora import LoraRule
from surgery.rules.miss import MissRule
from surgery.rules.multitask import MultitaskPromptRule, task_of
from surgery.rules.norm import NormRule
from surgery.rules.oft import OftRule
from surgery.rules.prefix import PrefixRule
from surgery.rules.prompt import PromptRule
from surgery.rules.randlora import RandLoraRule
from surgery.rules.reft import ReftRule
from surgery.rules.replace import ReplaceRule
from surgery.rules.rewrite import RewriteRule
from surgery.rules.rewrite_pairs import RewritePattern, rewrite_pattern
from surgery.rules.road import RoadRule
from surgery.rules.shira import ShiraRule
from surgery.rules.statistics import StatisticsRule
from surgery.rules.steer import SteerRule
from surgery.rules.ties import TieRule, UntieRule
from surgery.rules.tokens import BaseRowsRule, TokensRule
from surgery.rules.train import TrainRule
from surgery.rules.vera import VeraRule
from surgery.rules.vocabulary import ResizeVocabRule
from surgery.short_help import list_names, shorten_help

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
    "DropRule",
    "ExpertLoraRule",
    "FourierRule",
    "HeadRule",
    "HraRule",
    "IA3Rule",
    "InsertRule",
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
    "ReorderRule",
    "RepeatRule",
    "ReplaceRule",
    "RewriteMatch",
    "RewritePattern",
    "ResizeVocabRule",
    "RewriteRule",
    "RoadRule",
    "ShiraRule",
    "StatisticsRule",
    "SteerRule",
    "TieRule",
    "TokensRule",
    "TrainRule",
    "UntieRule",
    "VeraRule",
    "captured",
    "fit_direction",
    "fold_prompts",
    "fit_prefix",
    "orthogonal_loss",
    "rewrite_pattern",
    "task_of",
]

list_names(globals())
shorten_help(globals())

if __name__ == "rules":
    sys.modules["rules"] = sys.modules["surgery.rules"]
