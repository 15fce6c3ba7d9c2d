"""`gpt2lite bench`: the article's table, measured here."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gpt2lite.benchmarking import Failure, Measurement, compare_strategies, write_random_checkpoint
from gpt2lite.cli.env import environment
from gpt2lite.cli.plot import plot_timelines, require_matplotlib
from gpt2lite.cli.terminal import (
    EMBEDDED,
    add_config_arguments,
    add_dtype_argument,
    add_revision_argument,
    as_json,
    bytes_bar,
    config_of,
    local_path,
    steps_bar,
    table,
)
from gpt2lite.config import OFFICIAL_SIZES, GPTConfig
from gpt2lite.devices import resolve_device
from gpt2lite.errors import UsageError
from gpt2lite.loading import STRATEGIES
from gpt2lite.memory import GB, human

HEADER = ("strategy", "load s", "logits s", "device", "plan", "host anon", "plan", "host file", "exact")
DEVICE_COLUMNS = (3, 4)
LEGEND = """\
{unit} (1024**{power} bytes) above the imports. device, host anon: peaks while loading, and
beside them what `gpt2lite plan` foretells; anon cannot be reclaimed. host file:
mapped pages by the first logits, which the system can take back. exact: every
parameter bit for bit as plain torch loads it, logits within 1e-4 (0.05 for 16 bits)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "path",
        nargs="?",
        help="a checkpoint, or a model on the Hub: gpt2 … gpt2-xl, owner/name (default: the embedded model)",
    )
    source.add_argument(
        "--size",
        choices=OFFICIAL_SIZES,
        help="write a random checkpoint of this size first, in the article's layout",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 … (default: cpu)")
    parser.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME",
        default=list(STRATEGIES),
        help=f"of {', '.join(STRATEGIES)}",
    )
    parser.add_argument("--json", metavar="FILE.json", help="keep everything as JSON; - for standard output")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="draw memory over time (needs matplotlib)"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where temporary files go (default: %(default)s)",
    )
    add_revision_argument(parser)
    add_config_arguments(parser)
    add_dtype_argument(parser)


def _row(result: Measurement | Failure, unit: int) -> list[str]:
    if isinstance(result, Failure):
        return [result.strategy, *["–"] * (len(HEADER) - 1)]
    peaks = (
        result.peak_device,
        result.forecast["peak_device"],
        result.peak_host_anonymous,
        result.forecast["peak_host_anonymous"],
        result.peak_host_reclaimable,
    )
    return [
        result.strategy,
        f"{result.seconds_to_load:.2f}",
        f"{result.seconds_to_logits:.2f}",
        *(f"{peak / unit:.2f}" for peak in peaks),
        "BITS" if not result.bitwise_equal else "yes" if result.logits_equal else "LOGITS",
    ]


def _print_table(results: Sequence[Measurement | Failure], on_cuda: bool) -> None:
    peaks = [result.peak_host_anonymous for result in results if isinstance(result, Measurement)]
    name, unit = ("GB", GB) if max(peaks, default=0) > GB / 10 else ("MB", GB // 1024)
    shown = [at for at in range(len(HEADER)) if on_cuda or at not in DEVICE_COLUMNS]
    print(
        table(*([line[at] for at in shown] for line in (HEADER, *(_row(result, unit) for result in results))))
    )
    for result in results:
        if isinstance(result, Failure):
            print(f"{result.strategy} did not run: {result.reason}")
    print(f"\n{LEGEND.format(unit=name, power=3 if name == 'GB' else 2)}")


def _record(results: Sequence[Measurement | Failure], subject: str, device: str) -> dict[str, Any]:
    return {
        "subject": subject,
        "device": device,
        "environment": environment(),
        "results": [asdict(result) for result in results],
    }


def _measure(path: Path, args: argparse.Namespace) -> list[Measurement | Failure]:
    results: list[Measurement | Failure] = []
    with steps_bar(args.strategies, "measuring") as bar:
        bar.set_postfix_str("reference")
        measured = compare_strategies(
            path, args.device, args.strategies, folder=args.folder, dtype=args.dtype, config=config_of(args)
        )
        for result in measured:
            results.append(result)
            bar.update()
            bar.set_postfix_str(" ".join(args.strategies[len(results) : len(results) + 1]))
    return results


def _measure_random(args: argparse.Namespace) -> list[Measurement | Failure]:
    """Write a checkpoint of the size that was asked for, untied as in the article, measure it, remove it."""
    config = GPTConfig.of(GPTConfig.named(args.size).as_dict() | {"tied_head": False})
    with tempfile.TemporaryDirectory(prefix="gpt2lite-", dir=args.folder) as folder:
        path = Path(folder) / "model.pth"
        with bytes_bar(f"writing {args.size}") as progress:
            write_random_checkpoint(config, path, progress)
        return _measure(path, args)


def _check(args: argparse.Namespace) -> None:
    unknown = [name for name in args.strategies if name not in STRATEGIES]
    if unknown:
        raise UsageError(f"no strategy is called {', '.join(unknown)}; there are {', '.join(STRATEGIES)}")
    if not args.folder.is_dir():
        raise UsageError(f"--folder {args.folder}: no such folder")
    for target, suffix in ((args.json, ".json"), (args.plot, ".png")):
        if target not in (None, "-") and (Path(target).suffix != suffix or not Path(target).parent.is_dir()):
            raise UsageError(f"{target}: wanted a file name that ends in {suffix}, in a folder that is there")
    resolve_device(args.device)
    if args.plot:
        require_matplotlib()


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a strategy failed or was not exact."""
    _check(args)
    subject = f"random {args.size}" if args.size else str(args.path or "the embedded model")
    path = local_path(args.path or EMBEDDED, args.revision)
    results = _measure_random(args) if args.size else _measure(path, args)
    measured = [result for result in results if isinstance(result, Measurement)]
    kept = as_json(_record(results, subject, args.device))
    if args.json == "-":
        print(kept)
    else:
        size = human(measured[0].model_bytes) if measured else "nothing"
        print(f"{subject}, {size} of parameters, to {args.device}\n")
        _print_table(results, on_cuda=args.device.startswith("cuda"))
    if args.json not in (None, "-"):
        Path(args.json).write_text(kept + "\n", encoding="utf-8")
    if args.plot:
        plot_timelines(measured, Path(args.plot), subject)
    return (
        0
        if len(measured) == len(results) and all(m.bitwise_equal and m.logits_equal for m in measured)
        else 1
    )
