"""`gpt2lite bench` and `env`: what this machine is, and what loading costs on it."""

from __future__ import annotations

import argparse
import os
import platform
import re
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpt2lite._version import __version__
from gpt2lite.benchmarking import Failure, Measurement, compare_strategies, write_random_checkpoint
from gpt2lite.cli.loading import config_of
from gpt2lite.cli.plots import plot_strategies, require_matplotlib
from gpt2lite.cli.terminal import as_json, bytes_bar, facts, steps_bar, table
from gpt2lite.config import EMBEDDED, GPTConfig
from gpt2lite.devices import accelerators, free_memory, name_of, resolve_device, total_memory
from gpt2lite.errors import UsageError
from gpt2lite.generation.engines import products
from gpt2lite.memory import GIB, MIB, host_memory, human
from gpt2lite.opening import locate

PACKAGES = ("psutil", "tiktoken", "huggingface_hub", "transformers", "safetensors", "matplotlib")


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    about = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)", about.read_text() if about.is_file() else "", re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


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
        "products": products(),
        "host_memory": asdict(host_memory()),
        "gpus": [
            {"name": name_of(device), "free": free_memory(device), "total": total_memory(device)}
            for device in accelerators()
        ],
    }


def run_env(args: argparse.Namespace) -> int:
    """Print the environment."""
    found = environment()
    memory = found["host_memory"]
    free, total = human(memory["available"]), human(memory["total"])
    gpus = [f"{gpu['name']}, {human(gpu['free'])} free of {human(gpu['total'])}" for gpu in found["gpus"]]
    print(as_json(found) if args.json else facts([
        *((name, found[name]) for name in ("gpt2lite", "python", "torch")),
        *found["packages"].items(),
        ("system", found["system"]),
        ("cpu", f"{found['cpu']}, {found['cores']} cores for this process"),
        ("products", found["products"]),
        ("memory", f"{free} of {total} available, limited by {memory['limited_by']}"),
        ("swap", f"{human(memory['swap'])} free, which auto does not count on"),
        ("gpu", "; ".join(gpus) or "none that torch can use"),
    ]))  # fmt: skip
    return 0


HEADER = ("strategy", "load s", "logits s", "device", "plan", "host anon", "plan", "host file", "exact")
DEVICE_COLUMNS = (3, 4)
LEGEND = """\
{unit} above what was in use after the imports. device, host anon: peaks while
loading, each beside what `gpt2lite plan` predicts; anon cannot be reclaimed.
host file: mapped pages by the first logits, which the system can reclaim.
exact: every parameter is bit for bit what plain torch loads, logits within 1e-4
(0.05 for 16 bits)."""


def _row(result: Measurement | Failure, unit: int) -> list[str]:
    if isinstance(result, Failure):
        return [result.strategy, *["–"] * (len(HEADER) - 1)]
    device = result.peak_device, result.forecast["peak_device"]
    host = result.peak_host_anonymous, result.forecast["peak_host_anonymous"], result.peak_host_reclaimable
    figures = (result.seconds_to_load, result.seconds_to_logits, *(peak / unit for peak in (*device, *host)))
    exact = "BITS" if not result.bitwise_equal else "yes" if result.logits_equal else "LOGITS"
    return [result.strategy, *(f"{figure:.2f}" for figure in figures), exact]


def _print_table(results: Sequence[Measurement | Failure], has_device: bool) -> None:
    peaks = [result.peak_host_anonymous for result in results if isinstance(result, Measurement)]
    name, unit = ("GiB", GIB) if max(peaks, default=0) > GIB / 10 else ("MiB", MIB)
    shown = [at for at in range(len(HEADER)) if has_device or at not in DEVICE_COLUMNS]
    lines = (HEADER, *(_row(result, unit) for result in results))
    print(table(*([line[at] for at in shown] for line in lines)))
    for result in results:
        if isinstance(result, Failure):
            print(f"{result.strategy} did not run: {result.reason}")
    print(f"\n{LEGEND.format(unit=name)}")


def _measure(path: Path, args: argparse.Namespace) -> list[Measurement | Failure]:
    results: list[Measurement | Failure] = []
    options: dict[str, Any] = {"folder": args.folder, "dtype": args.dtype, "config": config_of(args)}
    with steps_bar(args.strategies, "measuring") as bar:
        bar.set_postfix_str("reference")
        for result in compare_strategies(path, args.device, args.strategies, **options):
            results.append(result)
            bar.update()
            bar.set_postfix_str(" ".join(args.strategies[len(results) : len(results) + 1]))
    return results


def _measure_random(args: argparse.Namespace) -> list[Measurement | Failure]:
    """Write a checkpoint of --size, untied as in the article, measure it, remove it."""
    config = replace(GPTConfig.named(args.size), tied_head=False)
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=args.folder) as folder:
        path = Path(folder) / "model.pth"
        with bytes_bar(f"writing {args.size}") as progress:
            write_random_checkpoint(config, path, progress)
        return _measure(path, args)


def _check(args: argparse.Namespace) -> None:
    """Refuse before the long work begins."""
    for target, suffix in ((args.json, ".json"), (args.plot, ".png")):
        if target not in (None, "-") and (Path(target).suffix != suffix or not Path(target).parent.is_dir()):
            raise UsageError(f"{target}: expected a file name ending in {suffix}, in an existing folder")
    resolve_device(args.device)
    if args.plot:
        require_matplotlib()


def run_bench(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a strategy failed or was not exact."""
    _check(args)
    subject = f"random {args.size}" if args.size else str(args.path or "the embedded model")
    path = locate(args.path or EMBEDDED, {"revision": args.revision})
    if not isinstance(path, Path):
        raise UsageError(f"{path}: bench compares ways to load a local file; download it")
    results = _measure_random(args) if args.size else _measure(path, args)
    measured = [result for result in results if isinstance(result, Measurement)]
    rows = [asdict(result) for result in results]
    record = {"subject": subject, "device": args.device, "environment": environment(), "results": rows}
    if args.json not in (None, "-"):
        Path(args.json).write_text(as_json(record) + "\n", encoding="utf-8")
    if args.plot and measured:
        plot_strategies(measured, args.plot, f"{subject} to {args.device}")
    if args.json == "-":
        print(as_json(record))
    else:
        size = human(measured[0].model_bytes) if measured else "nothing"
        print(f"{subject}, {size} of parameters, to {args.device}\n")
        _print_table(results, has_device=resolve_device(args.device).type != "cpu")
    exact = [result.bitwise_equal and result.logits_equal for result in measured]
    return 0 if len(exact) == len(results) and all(exact) else 1
