"""Ready-made rewrites: patterns of operations, and what computes the same with fewer or faster ones.

>>> import torch
>>> from torch import nn
>>> from surgery import apply_rules
>>> from surgery.rules.rewrites import fuse_silu
>>> class Swish(nn.Module):
...     def forward(self, x):
...         return x * torch.sigmoid(x)
>>> model, x = Swish(), torch.randn(3)
>>> before = model(x)
>>> _ = apply_rules(model, fuse_silu(), example_inputs=x)
>>> torch.allclose(model(x), before)
True

Each is a function that returns a rule for `apply_rules`. Its arguments are the targets (default: everywhere) and the
fields of `RewriteRule`.
"""

from surgery.rules.rewrites.activations import fuse_gelu, fuse_silu
from surgery.rules.rewrites.attention import fuse_attention
from surgery.rules.rewrites.centring import CentreNormRule, centre_layer_norm
from surgery.rules.rewrites.folding import FoldNormRule, fold_batch_norm
from surgery.rules.rewrites.fused_linears import fuse_linears
from surgery.rules.rewrites.layer_norm import fuse_layer_norm
from surgery.rules.rewrites.linears import JoinLinearsRule, join_linears
from surgery.rules.rewrites.no_ops import NoOpsRule, ShareRule
from surgery.rules.rewrites.quantise import Int8Linear, QuantiseRule
from surgery.rules.rewrites.rms_norm import fuse_rms_norm

__all__ = [
    "CentreNormRule",
    "FoldNormRule",
    "Int8Linear",
    "JoinLinearsRule",
    "NoOpsRule",
    "QuantiseRule",
    "ShareRule",
    "centre_layer_norm",
    "fold_batch_norm",
    "fuse_attention",
    "fuse_gelu",
    "fuse_layer_norm",
    "fuse_linears",
    "fuse_rms_norm",
    "fuse_silu",
    "join_linears",
]
