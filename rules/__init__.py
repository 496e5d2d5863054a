"""The rule library: one method a file, built on surgery's public names alone."""

from rules.bias import BiasRule
from rules.boft import BoftRule
from rules.hra import HraRule
from rules.ia3 import IA3Rule
from rules.loha import LohaRule
from rules.lokr import LokrRule
from rules.lora import LoraRule
from rules.miss import MissRule
from rules.norm import NormRule
from rules.oft import OftRule
from rules.road import RoadRule
from rules.tokens import TokensRule
from rules.train import TrainRule
from rules.vera import VeraRule

__all__ = [
    "BiasRule",
    "BoftRule",
    "HraRule",
    "IA3Rule",
    "LohaRule",
    "LokrRule",
    "LoraRule",
    "MissRule",
    "NormRule",
    "OftRule",
    "RoadRule",
    "TokensRule",
    "TrainRule",
    "VeraRule",
]
