"""Mutated files of every format, read until the weights: what is no CheckpointError, slow, or large is kept.

    python benchmarks/fuzz.py --cases 100000 --log fuzz.jsonl

Each case is drawn from (format, number) alone. A line of the log is a case that failed, with its file beside
the log; the last line counts all. Exits with 1 where one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # an adapter's base may have any name
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "fuzz"))

import watching
from formats import FORMATS
from running import run_cases


def main() -> int:
    """Run, and say what failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="per format")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--log", type=Path, default=Path("fuzz.jsonl"))
    args = parser.parse_args()
    watching.MOST_SECONDS = 2.0  # as docs/THREATS.md promises
    failed = dict.fromkeys(args.formats, 0)
    with open(args.log, "w", encoding="utf-8") as log:
        for name in args.formats:
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                for case in run_cases(name, range(args.first, args.first + args.cases), Path(folder)):
                    failed[name] += 1
                    kept = args.log.with_suffix(f".{name}-{case.number}".replace(" ", "-"))
                    kept.write_bytes(case.content)
                    said = {"format": name, "case": case.number, "file": case.file, "faults": case.faults}
                    print(json.dumps(said), file=log, flush=True)
            seconds = time.perf_counter() - began
            print(f"{name:15} {args.cases} cases, {failed[name]} failed, {seconds:.0f} s", flush=True)
        print(json.dumps({"cases": args.cases, "failed": failed}), file=log)
    return 1 if any(failed.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
