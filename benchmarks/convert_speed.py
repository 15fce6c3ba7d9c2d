"""`convert --to hf` against `cp` and `sync`, by turns, and the memory that it takes.

    python benchmarks/convert_speed.py --size gpt2-xl --json benchmarks/results/convert-cpu-gpt2-xl.json

The source is random, in the article's layout; each conversion has a fresh process and is not verified. Only
the ratio carries over to another disk. Exits with 1 where memory or the ratio is above what is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from gpt2lite import GPTConfig
from gpt2lite.benchmarking import TINY, write_random_checkpoint
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import bytes_bar, facts
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.memory import human

MIB = 1 << 20
WANTED_PEAK, WANTED_RATIO = 200 * MIB, 1.3
PREPARE = """
import subprocess, sys, time
from gpt2lite import convert, track_memory
from machine import warm_memory
source, destination, tiny, nbytes = sys.argv[1:]
convert(tiny, tiny + ".safetensors", to="huggingface", config={"n_heads": 2}, verify=False)
"""
START = "warm_memory(int(nbytes)); began = time.perf_counter()\n"
STOP = "print(time.perf_counter() - began)"
COPY = """
subprocess.run(["cp", source, destination], check=True)
subprocess.run(["sync", destination], check=True)
"""
CONVERT = 'convert(source, destination, to="huggingface", verify=False)\n'
TRACK = f"with track_memory() as memory:\n    {CONVERT}print(memory.peak_host_anonymous)"


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of every run and bytes of anonymous memory above the imports."""

    size: str
    source_bytes: int
    copy_seconds: list[float]
    convert_seconds: list[float]
    peak_host_anonymous: int

    @property
    def ratio(self) -> float:
        """Median by median."""
        return median(self.convert_seconds) / median(self.copy_seconds)


def run(script: str, source: Path, destination: Path, tiny: Path) -> float:
    """What a script prints in a fresh process; what it wrote is removed."""
    nbytes = source.stat().st_size
    command = [sys.executable, "-c", PREPARE + script, *map(str, (source, destination, tiny, nbytes))]
    folder = Path(__file__).parent
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=folder).stdout
    destination.unlink()
    return float(printed)


def measure(size: str, folder: Path, runs: int) -> Result:
    """Write a source into `folder`, then copy and convert it by turns."""
    source, tiny, made = folder / "model.pth", folder / "tiny.pth", folder / "hf.safetensors"
    write_random_checkpoint(TINY, tiny)
    with bytes_bar(f"writing {size}") as progress:
        config = GPTConfig.of(GPTConfig.named(size).as_dict() | {"tied_head": False})
        write_random_checkpoint(config, source, progress)
    os.sync()
    copies, conversions = [], []
    peak = int(run(TRACK, source, made, tiny))
    for _ in range(runs):
        copies.append(run(START + COPY + STOP, source, made, tiny))
        conversions.append(run(START + CONVERT + STOP, source, made, tiny))
    return Result(size, source.stat().st_size, copies, conversions, peak)


def main() -> int:
    """Measure and print; 1 where more was taken than is wanted."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=OFFICIAL_SIZES, default="gpt2")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpt2lite-", dir=args.folder))
    try:
        found = measure(args.size, folder, args.runs)
    finally:
        shutil.rmtree(folder)
    print(facts([
        ("read", human(found.source_bytes)),
        ("cp and sync, s", " ".join(f"{seconds:.1f}" for seconds in found.copy_seconds)),
        ("convert, s", " ".join(f"{seconds:.1f}" for seconds in found.convert_seconds)),
        ("ratio", f"{found.ratio:.2f} of the medians; wanted at most {WANTED_RATIO}"),
        ("host anon", f"{human(found.peak_host_anonymous)}; wanted at most {human(WANTED_PEAK)}"),
    ]))  # fmt: skip
    if args.json:
        record = {"environment": environment(), "ratio": found.ratio, **asdict(found)}
        args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0 if found.peak_host_anonymous <= WANTED_PEAK and found.ratio <= WANTED_RATIO else 1


if __name__ == "__main__":
    sys.exit(main())
