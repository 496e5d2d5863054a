"""The families that take no prefix, and how others take it."""

from __future__ import annotations

__all__ = ["NONE", "OTHER"]


# Without attention of the form softmax(q kᵀ) v by itself, or hidden in a function of torch's.
NONE = set(
    "fnet squeezebert yoso mra mamba mamba2 falcon_mamba rwkv xlstm convnext convnextv2 resnet regnet bit focalnet "
    "mobilevitv2 mobilenet_v1 mobilenet_v2 efficientnet poolformer upernet wavlm sew_d encodec dac autoformer "
    "patchtsmixer reformer".split()
)


# With an attention of another form, and why it is refused.
OTHER = {
    "xlnet": "no products of a softmax",  # einsum
    "funnel": "no products of a softmax",
    "longformer": "no products of queries",  # in pieces
    "big_bird_sparse": "4 products",
    "nystromformer": "8 products",
    "ibert": "no products of a softmax",  # integers
    "openai_gpt": "a number for each key",
    "longt5": "no products of a softmax",
    "pegasus_x": "no products of a softmax",
    "led": "no products of a softmax",
    "prophetnet": "no products of a softmax",
    "fsmt": "batch and heads",  # time first
    "vitdet": "batch and heads",
    "cvt": "no products of a softmax",
    "swiftformer": "no products of a softmax",
    "groupvit": "no products of a softmax",
    "lilt": "2 products",
    "informer": "batch and heads",
}
