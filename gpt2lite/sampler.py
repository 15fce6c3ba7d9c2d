"""A program: samples another process's memory until its standard input says stop, then prints what it saw.

`python sampler.py PID` prints ready, then [peak anonymous, peak file-backed, [[seconds, anonymous, file], …]]
in KiB. It is a process of its own because a thread would wait for the GIL just when a long call allocates.
"""

from __future__ import annotations

import json
import select
import sys
import time

SECONDS = 0.002  # between two samples
MAX_POINTS = 240  # of the timeline, which is thinned as it grows


def sample(pid: str) -> tuple[int, int]:
    """(anonymous and shared, file-backed) KiB of a process that are resident now."""
    with open(f"/proc/{pid}/status") as file:
        found = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
    resident = {name: int(value.split()[0]) for name, value in found.items()}
    return resident["RssAnon"] + resident["RssShmem"], resident["RssFile"]


def watch(pid: str) -> tuple[int, int, list[tuple[float, int, int]]]:
    """Sample until standard input can be read."""
    began, step = time.monotonic(), SECONDS
    timeline: list[tuple[float, int, int]] = []
    peak_anonymous = peak_file = 0
    while not select.select([sys.stdin], [], [], SECONDS)[0] or not timeline:
        anonymous, file = sample(pid)
        peak_anonymous, peak_file = max(peak_anonymous, anonymous), max(peak_file, file)
        now = time.monotonic() - began
        if not timeline or now - timeline[-1][0] >= step:
            timeline.append((now, anonymous, file))
        if len(timeline) == MAX_POINTS:
            timeline, step = timeline[::2], 2 * step
    return peak_anonymous, peak_file, timeline


if __name__ == "__main__":
    print("ready", flush=True)
    print(json.dumps(watch(sys.argv[1])))
