"""Samples a process's resident memory until it is told to stop; also a program of its own.

`python sampler.py PID` prints ready, then, once its standard input says stop, [peak anonymous, peak
file-backed, [[seconds, anonymous, file-backed], …]] in bytes. It is a process of its own because a thread
would wait for the GIL just when a long call allocates. Imports nothing outside the standard library.
"""

from __future__ import annotations

import json
import select
import sys
import time
from collections.abc import Callable

SECONDS = 0.002  # between two samples
MAX_POINTS = 240  # of the timeline, which is thinned as it grows

Resident = tuple[int, int]  # bytes: anonymous and shared, file-backed
Seen = tuple[int, int, list[tuple[float, int, int]]]


def resident(pid: int | str) -> Resident:
    """What is resident of a process now, by Linux. Raises OSError or KeyError elsewhere."""
    with open(f"/proc/{pid}/status") as file:
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file if line.startswith("Rss")}
    return found["RssAnon"] + found["RssShmem"], found["RssFile"]


def watch(read: Callable[[], Resident], stopped: Callable[[float], object], seconds: float) -> Seen:
    """Sample every `seconds` until `stopped`, which waits that long, returns something true."""
    began, step = time.monotonic(), seconds
    timeline: list[tuple[float, int, int]] = []
    peak_anonymous = peak_file = 0
    while not stopped(seconds) or not timeline:
        anonymous, file = read()
        peak_anonymous, peak_file = max(peak_anonymous, anonymous), max(peak_file, file)
        now = time.monotonic() - began
        if not timeline or now - timeline[-1][0] >= step:
            timeline.append((now, anonymous, file))
        if len(timeline) == MAX_POINTS:
            timeline, step = timeline[::2], 2 * step
    return peak_anonymous, peak_file, timeline


if __name__ == "__main__":
    print("ready", flush=True)
    stop = lambda seconds: select.select([sys.stdin], [], [], seconds)[0]  # noqa: E731
    print(json.dumps(watch(lambda: resident(sys.argv[1]), stop, SECONDS)))
