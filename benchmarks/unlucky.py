"""Writers that are killed or fill a disk, and loads by the thousand: what is lost, and what is left behind.

    python benchmarks/unlucky.py writers --json benchmarks/results/unlucky-writers.json
    python benchmarks/unlucky.py resources --json benchmarks/results/unlucky-resources.json

`writers`: each of four kinds is killed 200 times at random moments, and meets 200 full disks (a small one
that its process alone sees) and 20 races of three processes; "met" counts those that came in the middle.
`resources`: what is open, mapped or running after loads by every strategy, errors, threads, forks and Ctrl-C.
Exits with 1 where something was wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "unlucky"))


def writers(folder: Path) -> dict[str, Any]:
    """800 kills, 800 full disks, 80 races; a few of torch's own writer."""
    import dying

    slow = "convert to dcp"
    names = [name for name in dying.WRITERS if name != slow]
    found = dying.run(folder, names, kills=200, fulls=200, races=20)
    (folder / "dcp").mkdir()
    few = dying.run(folder / "dcp", [slow], kills=20, fulls=20, races=5)
    return {kind: each | few[kind] for kind, each in found.items()}


def resources(folder: Path) -> dict[str, Any]:
    """1,000 loads, 100 generations, 100 failed loads, 100 presses of Ctrl-C."""
    import lasting

    return lasting.run(folder, loads=1000, generations=100, failures=100, presses=100)


def faults(found: Any) -> list[Any]:
    """All that was wrong, however deep."""
    parts = found.items() if isinstance(found, dict) else ()
    return [fault for key, each in parts for fault in (each if key == "faults" else faults(each))]


def main() -> int:
    """Run, keep, and say what was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sections = {"writers": writers, "resources": resources}
    parser.add_argument("section", choices=sections)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = sections[args.section](Path(folder))
    from gpt2lite.cli.bench import environment

    said = {"environment": environment(), "seconds": time.perf_counter() - began, "found": found}
    if args.json:
        args.json.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))
    return 1 if faults(found) else 0


if __name__ == "__main__":
    sys.exit(main())
