import json
from pathlib import Path
from types import SimpleNamespace


def read_manifest(path):
    d = json.loads(Path(str(path) + ".manifest.json").read_text())
    d["free"] = {n: {int(a): t for a, t in f.items()} for n, f in d["free"].items()}
    return SimpleNamespace(**d)
