"""`surgery doctor`: versions, extras, devices, and whether the engine works here."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from importlib.util import find_spec
from typing import Any

from surgery import __version__
from surgery.commands.answer import Answer, Table, size_text

__all__ = ["doctor"]

PACKAGE = "model-surgery"
INTERNAL = ("dev", "release", "bench", "demo")  # extras of those who change this package


def doctor() -> Answer:
    """Show versions, extras and devices, and try the engine on a small model.

    The exit code is 1 if a required package is absent or the engine does not work.

        surgery doctor
    """
    required, extras = _requirements()
    packages = [{"package": name, "version": _version(name)} for name in required]
    devices, checks = _devices(), _checks()
    failed = [check for check in checks if not check["ok"]] + [each for each in packages if each["version"] is None]
    data = {
        "surgery": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "extras": extras,
        "devices": devices,
        "checks": checks,
        "ok": not failed,
    }
    rows = [[each["package"], each["version"] or "absent"] for each in packages]
    extra_rows = [
        [extra["extra"], "installed" if extra["ok"] else f"pip install '{PACKAGE}[{extra['extra']}]'", _listed(extra)]
        for extra in extras
    ]
    device_rows = [
        [each["device"], each["name"], size_text(each["memory"]) if each["memory"] else ""] for each in devices
    ]
    check_rows = [[check["check"], "works" if check["ok"] else "FAILS", check["reason"]] for check in checks]
    parts: list[str | Table] = [
        f"surgery {__version__}, Python {data['python']} ({sys.executable}), {data['platform']}", "",
        Table(["package", "version"], rows), "", Table(["extra", "state", "packages"], extra_rows), "",
        Table(["device", "name", "memory"], device_rows), "", Table(["check", "result", ""], check_rows),
    ]  # fmt: skip
    return Answer(data, parts, code=1 if failed else 0)


def _requirements() -> tuple[list[str], list[dict[str, Any]]]:
    """The required packages; and the extras for users, each with its packages."""
    try:
        lines = metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        lines = []
    required: list[str] = []
    extras: dict[str, list[str]] = {}
    for line in lines:
        name = re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0]
        extra = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", line)
        if extra is None:
            required.append(name)
        elif extra[1] not in INTERNAL and name != PACKAGE:
            extras.setdefault(extra[1], []).append(name)
    described = []
    for extra, names in sorted(extras.items()):
        packages = [{"package": name, "version": _version(name)} for name in names]
        described.append({"extra": extra, "ok": all(each["version"] for each in packages), "packages": packages})
    return required, described


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _listed(extra: dict[str, Any]) -> str:
    return ", ".join(f"{each['package']} {each['version'] or '(absent)'}" for each in extra["packages"])


def _devices() -> list[dict[str, Any]]:
    if find_spec("torch") is None:
        return []
    import torch

    devices = [{"device": "cpu", "name": f"{torch.get_num_threads()} threads", "memory": None}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append({"device": f"cuda:{index}", "name": properties.name, "memory": properties.total_memory})
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Apple GPU", "memory": None})
    return devices


def _checks() -> list[dict[str, Any]]:
    """Applies LoRA, merges and removes it on each device; the base must come back to the bit."""
    return [_check(device["device"]) for device in _devices()]


def _check(device: str) -> dict[str, Any]:
    check = {"check": f"apply, merge, remove on {device}", "ok": True, "reason": ""}
    try:
        import torch
        from torch import nn

        from surgery import apply_rules, merge, remove, unmerge
        from surgery.authoring.rule_names import registered

        layer = nn.Linear(8, 8).to(device)
        model: Any = nn.Sequential(layer)
        x = torch.ones(1, 8, device=device)
        before, weight = model(x), layer.weight.detach().clone()
        apply_rules(model, registered("lora")("0", **{"rank": 2, "init": "random"}))
        if torch.equal(model(x), before):
            return {**check, "ok": False, "reason": "the rule changes nothing"}
        merge(model)
        remove(unmerge(model))
        if not (torch.equal(model(x), before) and torch.equal(layer.weight, weight)):
            return {**check, "ok": False, "reason": "the base does not come back to the bit"}
    except Exception as error:  # any failure is the answer
        return {**check, "ok": False, "reason": f"{type(error).__name__}: {error}"}
    return check
