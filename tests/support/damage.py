"""Damages adapter files: flipped bytes, cut files, forged headers, settings of wrong types. Also kills saves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery import Rule, adapter_state_dict, apply_rules, save_adapter
from surgery.rules import LokrRule, LoraRule, OftRule, ReftRule, TokensRule, TrainRule, VeraRule
from tests.support import ROOT

ODD: list[Any] = [
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 1e308, -0.5, "", "x", "lin0", "re:(", "(", ".*", "all-linear",
    "../../x", "\u0000", "é" * 300, [], ["lin0"], [None], [[]], [0] * 2000, {}, {"lin0": 1}, {"lin0": 2**40}, {"(": 2},
    {"a": {"b": {}}},
]  # fmt: skip


def model() -> nn.Module:
    torch.manual_seed(0)
    from collections import OrderedDict

    layers = {"emb": nn.Embedding(12, 8), "lin0": nn.Linear(8, 16), "lin1": nn.Linear(16, 8), "out": nn.Linear(8, 3)}
    return nn.Sequential(OrderedDict(layers))


KINDS: dict[str, tuple[list[Rule], str]] = {
    "lora": ([LoraRule(["lin0", "lin1"], rank=2, rank_pattern={"lin1": 3}), TrainRule("out")], "peft"),
    "tokens": ([LoraRule("lin0", rank=2, dora=True), TokensRule("emb", tokens=[3, 1])], "peft"),
    "oft": ([OftRule("lin0", block_size=4)], "peft"),
    "vera": ([VeraRule("lin0", rank=3)], "peft"),
    "mlx": ([LoraRule(["lin0", "lin1"], rank=2, dora=True)], "mlx"),
    "lycoris": ([LoraRule(["lin0", "lin1"], rank=2, alpha_pattern={"lin1": 3})], "lycoris"),
    "lokr": ([LokrRule(["lin0", "lin1"], rank=2, alpha=2)], "lycoris"),
    "stack": ([LoraRule("lin0", rank=2, bias="all"), ReftRule("lin1"), TokensRule("emb", tokens=[5])], "surgery"),
}  # fmt: skip


def originals(folder: Path) -> dict[str, dict[str, bytes]]:
    """Intact adapters: kind → file name → bytes."""
    adapters = {}
    for kind, (rules, format) in KINDS.items():
        adapted = apply_rules(model(), rules)
        place = save_adapter(adapted, folder / kind, format=format)
        adapters[kind] = {file.name: file.read_bytes() for file in place.iterdir()}
    pickled = folder / "pickled"
    pickled.mkdir()
    from safetensors.torch import load_file

    torch.save(load_file(str(folder / "lora/adapter_model.safetensors")), pickled / "adapter_model.bin")
    (pickled / "adapter_config.json").write_bytes(adapters["lora"]["adapter_config.json"])
    adapters["pickled"] = {file.name: file.read_bytes() for file in pickled.iterdir()}
    return adapters


def damaged(files: dict[str, bytes], chance: random.Random) -> dict[str, bytes]:
    """The same files with one to three kinds of damage."""
    result = dict(files)
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        name = chance.choice(sorted(result))
        ways: list[Callable[[bytes, random.Random], bytes]] = [flipped, cut, grown]
        if name.endswith(".safetensors"):
            ways += [forged, forged]
        if name.endswith(".json"):
            ways += [mistyped, mistyped, mistyped]
        result[name] = chance.choice(ways)(result[name], chance)
    return result


def flipped(content: bytes, chance: random.Random) -> bytes:
    buffer = bytearray(content)
    for _ in range(chance.choice((1, 2, 8, 64))):
        if buffer:
            buffer[chance.randrange(min(len(buffer), chance.choice((16, 400, 10**9))))] = chance.randrange(256)
    return bytes(buffer)


def cut(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content) + 1)
    return content[:start] if chance.random() < 0.7 else content[start:]


def grown(content: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(content) + 1)
    return content[:at] + chance.randbytes(chance.choice((1, 8, 5000))) + content[at:]


def forged(content: bytes, chance: random.Random) -> bytes:
    """Forge a header: other shapes, offsets, dtypes, names or lengths."""
    if len(content) < 9:
        return content
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        keys = [key for key in header if key != "__metadata__"]
        key = chance.choice(keys)
        entry = header[key]
        way = chance.randrange(8)
        if way == 0:
            entry["shape"] = chance.choice([[2**40], [2**20, 2**20], [-1, -16], [], [0], [1] * 40, ["a"], 7, [2, 8, 1]])
        elif way == 1:
            entry["data_offsets"] = chance.choice([[0, 2**60], [-8, 8], [64, 0], [0], "x", [1.5, 9], [0, 0]])
        elif way == 2:
            entry["dtype"] = chance.choice(["F64", "F16", "I64", "BOOL", "F4", "", 3, "BF16", "F8_E4M3"])
        elif way == 3:
            header[chance.choice(["../x", "", "a" * 5000, "base_model.model.lin0.lora_A.weight", "__metadata__"])] = (
                entry
            )
        elif way == 4:
            del header[key]
        elif way == 5:
            header[key] = chance.choice(ODD)
        elif way == 6:
            header["__metadata__"] = chance.choice([{"surgery": "{"}, {"surgery": "[]"}, {"surgery": 3}, [], None, {}])
        else:
            header[key], header[keys[0]] = header[keys[0]], header[key]
        text = json.dumps(header).encode()
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return flipped(content, chance)
    header_length = chance.choice([len(text)] * 6 + [len(text) + 8, 2**63, 0])
    return header_length.to_bytes(8, "little") + text + content[8 + length :]


def mistyped(content: bytes, chance: random.Random) -> bytes:
    """Change a setting to another type, remove a field, or add a field."""
    try:
        document = json.loads(content)
    except ValueError:
        return flipped(content, chance)
    spot: Any = document
    while isinstance(spot, (dict, list)) and spot:
        keys = sorted(spot) if isinstance(spot, dict) else range(len(spot))
        key = chance.choice(list(keys))
        if not isinstance(spot[key], (dict, list)) or not spot[key] or chance.random() < 0.4:
            draw = chance.random()
            if draw < 0.75:
                spot[key] = chance.choice(ODD)
            elif draw < 0.9:
                del spot[key]
            elif isinstance(spot, dict):
                spot[chance.choice(["", "x", "use_dora", "rule", "peft_type", "kwargs"])] = chance.choice(ODD)
            break
        spot = spot[key]
    return json.dumps(document).encode()


# Saves that are killed ----------------------------------------------------------------------------------------


def saves(folder: str) -> None:
    """A process that forks, for each line, a child that saves two adapters in turn into one folder."""
    pair = [versioned(0), versioned(1)]
    for _ in sys.stdin:
        child = os.fork()
        turn = 0
        while not child:
            save_adapter(pair[turn % 2], folder, format="peft" if turn % 3 else "surgery")
            turn += 1
        print(child, flush=True)
        os.waitpid(child, 0)
        print("gone", flush=True)


def versioned(version: int) -> nn.Module:
    """An adapter that its rule and its tensors both identify."""
    adapted = apply_rules(model(), [LoraRule(["lin0", "lin1"], rank=4, alpha=1 + version)])
    with torch.no_grad():
        for tensor in adapter_state_dict(adapted).values():
            tensor.fill_(1.0 + version)
    return adapted


def kill_saves(folder: Path, times: int, seen: Callable[[Path], None], chance: random.Random) -> None:
    """Start saving, kill it at a random moment, and check the folder; repeat."""
    command = [sys.executable, "-c", f"from tests.support.damage import saves; saves({str(folder)!r})"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        for _ in range(times):
            print("next", file=process.stdin, flush=True)
            child = int(process.stdout.readline())
            try:
                deadline = time.monotonic() + 60
                while not any(folder.glob("adapter*.safetensors")) and time.monotonic() < deadline:
                    time.sleep(0.001)
                time.sleep(chance.random() * 0.05)
            finally:
                os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "gone\n"
            seen(folder)
        process.stdin.close()
