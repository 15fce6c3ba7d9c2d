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
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from gpt2lite import GPTConfig
from gpt2lite.benchmarking import TINY, write_random_checkpoint
from gpt2lite.cli.env import environment
from gpt2lite.cli.terminal import bytes_bar, facts
from gpt2lite.config import OFFICIAL_SIZES
from gpt2lite.memory import human

MIB = 1 << 20
WANTED_PEAK, WANTED_RATIO = 200 * MIB, 1.3
RUN = """
import sys, time
from gpt2lite import convert
source, destination, tiny = sys.argv[1:]
convert(tiny, tiny + ".safetensors", to="huggingface", config={"n_heads": 2}, verify=False)
began = time.perf_counter()
convert(source, destination, to="huggingface", verify=False)
print(time.perf_counter() - began)
"""
TRACK = """
import sys
from gpt2lite import convert, track_memory
source, destination, tiny = sys.argv[1:]
convert(tiny, tiny + ".safetensors", to="huggingface", config={"n_heads": 2}, verify=False)
with track_memory() as memory:
    convert(source, destination, to="huggingface", verify=False)
print(memory.peak_host_anonymous)
"""


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds of every run and bytes of anonymous memory above the imports."""

    size: str
    source_bytes: int
    written_bytes: int
    copy_seconds: list[float]
    convert_seconds: list[float]
    peak_host_anonymous: int

    @property
    def ratio(self) -> float:
        """Median by median."""
        return median(self.convert_seconds) / median(self.copy_seconds)


def copy(source: Path, destination: Path) -> float:
    """Seconds of `cp source destination && sync destination`."""
    began = time.perf_counter()
    subprocess.run(["cp", str(source), str(destination)], check=True)
    subprocess.run(["sync", str(destination)], check=True)
    return time.perf_counter() - began


def convert(script: str, source: Path, destination: Path, tiny: Path) -> float:
    """What one conversion in a fresh process prints: RUN its seconds, TRACK its peak."""
    command = [sys.executable, "-c", script, str(source), str(destination), str(tiny)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(size: str, folder: Path, runs: int) -> Result:
    """Write a source into `folder`, then copy and convert it by turns."""
    source, tiny, made = folder / "model.pth", folder / "tiny.pth", folder / "hf.safetensors"
    write_random_checkpoint(TINY, tiny)
    with bytes_bar(f"writing {size}") as progress:
        config = GPTConfig.of(GPTConfig.named(size).as_dict() | {"tied_head": False})
        write_random_checkpoint(config, source, progress)
    os.sync()
    copies, conversions = [], []
    peak = int(convert(TRACK, source, made, tiny))
    written = made.stat().st_size
    made.unlink()
    for _ in range(runs):
        copies.append(copy(source, folder / "copy"))
        (folder / "copy").unlink()
        conversions.append(convert(RUN, source, made, tiny))
        made.unlink()
    return Result(size, source.stat().st_size, written, copies, conversions, peak)


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
        ("written", human(found.written_bytes)),
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
