"""`gpt2lite env`: versions, processors, and how much memory this process can really take."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpt2lite._version import __version__
from gpt2lite.cli.terminal import as_json, facts
from gpt2lite.devices import accelerators, free_memory, name_of, total_memory
from gpt2lite.memory import host_memory, human

PACKAGES = ("psutil", "tiktoken", "huggingface_hub", "transformers", "safetensors", "matplotlib")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def environment() -> dict[str, Any]:
    """Versions, processors and memory, in bytes."""
    return {
        "gpt2lite": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {package: _version(package) for package in PACKAGES},
        "system": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "host_memory": asdict(host_memory()),
        "gpus": [
            {"name": name_of(device), "free": free_memory(device), "total": total_memory(device)}
            for device in accelerators()
        ],
    }


def run(args: argparse.Namespace) -> int:
    """Print the environment."""
    found = environment()
    if args.json:
        print(as_json(found))
        return 0
    memory = found["host_memory"]
    free, total = human(memory["available"]), human(memory["total"])
    gpus = [f"{gpu['name']}, {human(gpu['free'])} free of {human(gpu['total'])}" for gpu in found["gpus"]]
    print(facts([
        *((name, found[name]) for name in ("gpt2lite", "python", "torch")),
        *found["packages"].items(),
        ("system", found["system"]),
        ("cpu", f"{found['cpu']}, {found['cores']} cores for this process"),
        ("memory", f"{free} of {total} available, limited by {memory['limited_by']}"),
        ("swap", f"{human(memory['swap'])} free, which auto does not count on"),
        ("gpu", "; ".join(gpus) or "none that torch can use"),
    ]))  # fmt: skip
    return 0
