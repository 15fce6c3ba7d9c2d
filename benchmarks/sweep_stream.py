"""Which number of readers, which size of chunks and of the ring `stream` should take by default.

    python benchmarks/sweep_stream.py --size gpt2-xl --json benchmarks/results/sweep-cpu-gpt2-xl.json

Every combination loads by turns in one process, in random order, so that the memory that one load frees is
the next one's; medians. In place: what a CPU reads straight into its parameters. Cast: the same to bfloat16,
through the ring, as everything goes towards a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from gpt2lite import GPTConfig, GPTModel, Tuning
from gpt2lite.benchmarking import write_random_checkpoint
from gpt2lite.cli.bench import environment
from gpt2lite.cli.terminal import bytes_bar, steps_bar, table
from gpt2lite.config import OFFICIAL_SIZES

MIB = 1 << 20
READERS = (1, 2, 4, 8)
CHUNKS_MIB = (1, 4, 16, 64)
RINGS_MIB = (4, 16, 64, 256)


def load(path: Path, device: str, tuning: Tuning, dtype: torch.dtype | None) -> float:
    """Seconds of one load."""
    began = time.perf_counter()
    model = GPTModel.from_checkpoint(path, device, "stream", dtype=dtype, tuning=tuning)
    if device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del model
    return seconds


def sweep(path: Path, device: str, runs: int) -> dict[str, float]:
    """Median seconds by "in place, readers, chunk MiB" and "cast, readers, ring MiB"."""
    cases = {
        **{
            f"in place, {readers}, {chunk}": (Tuning(readers=readers, chunk_bytes=chunk * MIB), None)
            for readers, chunk in itertools.product(READERS, CHUNKS_MIB)
        },
        **{
            f"cast, {readers}, {ring}": (Tuning(readers=readers, ring_bytes=ring * MIB), torch.bfloat16)
            for readers, ring in itertools.product(READERS, RINGS_MIB)
        },
    }
    order, times = random.Random(0), {name: [] for name in cases}
    load(path, device, Tuning(), None)
    with steps_bar([""] * runs, "measuring") as bar:
        for _ in range(runs):
            for name in order.sample(list(cases), len(cases)):
                times[name].append(load(path, device, *cases[name]))
            bar.update()
    return {name: median(seconds) for name, seconds in times.items()}


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=OFFICIAL_SIZES, default="gpt2")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="FILE.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="gpt2lite-", dir=args.folder))
    try:
        config = GPTConfig.of(GPTConfig.named(args.size).as_dict() | {"tied_head": False})
        with bytes_bar(f"writing {args.size}") as progress:
            write_random_checkpoint(config, folder / "model.pth", progress)
        found = sweep(folder / "model.pth", args.device, args.runs)
    finally:
        shutil.rmtree(folder)
    for kind, label, sizes in (("in place", "chunk", CHUNKS_MIB), ("cast", "ring", RINGS_MIB)):
        rows = [
            (f"readers {n}", *(f"{found[f'{kind}, {n}, {size}']:.3f}" for size in sizes)) for n in READERS
        ]
        print(f"\n{args.size} to {args.device}, {kind}, seconds")
        print(table((f"{label} MiB", *map(str, sizes)), *rows))
    default = Tuning()
    print(f"\ndefault here: {default}")
    if args.json:
        record = {"size": args.size, "device": args.device, "environment": environment(), "seconds": found}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
