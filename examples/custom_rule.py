"""A custom method, the idea of (IA)³, as a rule of eleven lines: trained, merged, removed.

The model has random weights, so that nothing is loaded; it learns to continue sequences that count in steps of one.

    python examples/custom_rule.py                 # a few seconds
    python examples/custom_rule.py --steps 500
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from _common import quiet, require

require({"torch": "demo", "transformers": "demo"})

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from surgery import LiveSite, Rule, Site, apply_rules, merge, remove, rule, show, summary, unmerge  # noqa: E402


@rule("scale")
class ScaleRule(Rule):
    """Multiplies a linear layer's output by one trained number per feature. Liu et al. 2022, arXiv:2205.05638."""

    identity = True

    def check(self, module: nn.Module, path: str) -> str | None:
        return None if isinstance(module, nn.Linear) else "it is no Linear"

    def rewrite(self, site: Site) -> Tensor:
        return site.output * site.param("scale", (site.out_features,), init=1.0)

    def merged(self, site: LiveSite) -> Mapping[str, Tensor]:
        own = [name for name, _ in site.module.named_parameters(recurse=False)]
        return {name: torch.einsum("o...,o->o...", site.tensor(name), site.params["scale"]) for name in own}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the sequences (default 0)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    parser.add_argument("--rate", type=float, default=0.1, help="learning rate (default 0.1)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    quiet()
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    held_out = sequences(16)
    before = loss_of(model, held_out).item()

    apply_rules(model, [ScaleRule(["k_proj", "v_proj", "up_proj", "lm_head"])], example_inputs={"input_ids": held_out})
    print(summary(model))
    print(f"\nthe code that runs at one site:\n{show(model, 'model.layers.0.self_attn.k_proj')}\n")

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.rate)
    for _ in range(args.steps):
        loss_of(model.train(), sequences(16)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        logits = model.eval()(held_out).logits
        after = loss_of(model, held_out).item()
        print(f"loss on sequences it has not seen: {before:.3f} before, {after:.3f} after {args.steps} steps")
        print(merge(model))
        difference = (model(held_out).logits - logits).abs().max().item()
    print(f"merged and unmerged logits differ by at most {difference:.1e}")
    remove(unmerge(model))
    same = all(torch.equal(tensor, original[name]) for name, tensor in model.state_dict().items())
    same = same and list(model.state_dict()) == list(original) and type(model.lm_head) is nn.Linear
    print("removed: the same bits as before" if same else "DIFFERENT BITS: this is a defect")
    return {"before": before, "after": after, "difference": difference, "same": same}


def sequences(count: int) -> Tensor:
    """Token ids (count, 12) that increase by one from a random start."""
    return (torch.randint(0, 32, (count, 1)) + torch.arange(12)) % 32


def loss_of(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, labels=ids).loss


if __name__ == "__main__":
    main()
