"""Serves the ONNX file of examples/ship.py. Each request names its adapter. Works without torch.

python examples/serve.py out/ship --port 8000
curl localhost:8000/score -H "Content-Type: application/json" -d '{"texts": ["They won 3:1."], "adapter": "sports"}'
curl -X PUT localhost:8000/adapters/new -H "Content-Type: application/octet-stream" --data-binary @new.onnx_adapter
"""

import argparse
import tempfile
from pathlib import Path
from typing import Annotated

from _common import require


def serve(args: argparse.Namespace) -> None:
    import uvicorn
    from fastapi import Body, FastAPI
    from fastapi.responses import JSONResponse
    from tokenizers import Tokenizer

    from surgery import SurgeryError
    from surgery.onnx import OnnxRunner

    runner = OnnxRunner(args.folder / "model.onnx", threads=args.threads)
    for file in sorted(args.folder.glob("adapters/*.onnx_adapter")):
        runner.load(file.stem, file)
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    tokenizer.enable_truncation(args.tokens)
    tokenizer.enable_padding()
    app = FastAPI(exception_handlers={SurgeryError: lambda _, error: JSONResponse({"detail": str(error)}, 400)})  # type: ignore[arg-type]

    @app.post("/score")
    def score(texts: Annotated[list[str], Body()], adapter: Annotated[str | None, Body()] = None) -> list[float]:
        rows = tokenizer.encode_batch(texts)
        inputs = {"input_ids": [row.ids for row in rows], "attention_mask": [row.attention_mask for row in rows]}
        return runner.run(inputs, adapter)["logits"][:, 0].tolist()

    @app.put("/adapters/{name}")
    def put_adapter(name: str, file: Annotated[bytes, Body(media_type="application/octet-stream")]) -> tuple[str, ...]:
        with tempfile.TemporaryDirectory() as folder:
            (sent := Path(folder) / "sent.onnx_adapter").write_bytes(file)
            runner.load(name, sent, replace=True)
        return runner.adapters

    uvicorn.run(app, port=args.port, log_level="warning")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("out/ship"), help="what ship.py wrote")
    for name, default in {"port": 8000, "threads": 1, "tokens": 48}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"(default {default})")
    args = parser.parse_args(argv)
    require(dict.fromkeys(("fastapi", "uvicorn", "onnxruntime", "tokenizers"), "serve"))
    serve(args)


if __name__ == "__main__":
    main()
