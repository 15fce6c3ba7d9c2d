"""`gpt2lite bench`: the article's table, measured here."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from gpt2lite.benchmarking import Failure, Measurement, compare_strategies, write_random_checkpoint
from gpt2lite.cli.env import environment
from gpt2lite.cli.loading import config_of, local_path
from gpt2lite.cli.plot import plot_timelines, require_matplotlib
from gpt2lite.cli.terminal import EMBEDDED, as_json, bytes_bar, steps_bar, table
from gpt2lite.config import GPTConfig
from gpt2lite.devices import resolve_device
from gpt2lite.errors import UsageError
from gpt2lite.memory import GIB, MIB, human

HEADER = ("strategy", "load s", "logits s", "device", "plan", "host anon", "plan", "host file", "exact")
DEVICE_COLUMNS = (3, 4)
LEGEND = """\
{unit} above what was in use after the imports. device, host anon: peaks while loading,
each beside what `gpt2lite plan` predicts; anon cannot be reclaimed. host file: mapped
pages by the first logits, which the system can reclaim. exact: every parameter is bit
for bit what plain torch loads, logits within 1e-4 (0.05 for 16 bits)."""


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
    with steps_bar(args.strategies, "measuring") as bar:
        bar.set_postfix_str("reference")
        for result in compare_strategies(
            path, args.device, args.strategies, folder=args.folder, dtype=args.dtype, config=config_of(args)
        ):
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


def run(args: argparse.Namespace) -> int:
    """Measure and print; 1 if a strategy failed or was not exact."""
    _check(args)
    subject = f"random {args.size}" if args.size else str(args.path or "the embedded model")
    path = local_path(args.path or EMBEDDED, args.revision)
    results = _measure_random(args) if args.size else _measure(path, args)
    measured = [result for result in results if isinstance(result, Measurement)]
    rows = [asdict(result) for result in results]
    record = {"subject": subject, "device": args.device, "environment": environment(), "results": rows}
    if args.json == "-":
        print(as_json(record))
    else:
        size = human(measured[0].model_bytes) if measured else "nothing"
        print(f"{subject}, {size} of parameters, to {args.device}\n")
        _print_table(results, has_device=resolve_device(args.device).type != "cpu")
    if args.json not in (None, "-"):
        Path(args.json).write_text(as_json(record) + "\n", encoding="utf-8")
    if args.plot:
        plot_timelines(measured, args.plot, subject)
    exact = [result.bitwise_equal and result.logits_equal for result in measured]
    return 0 if len(exact) == len(results) and all(exact) else 1
