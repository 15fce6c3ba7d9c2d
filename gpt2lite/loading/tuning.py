"""How bytes are moved: chosen for the machine, and open to whoever knows theirs better."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from gpt2lite.errors import UsageError

MIB = 1 << 20
MOST_READERS = 64


def _cpus() -> int:
    """The processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _readers() -> int:
    """Four keep a disk busy whatever the processors; eight are many for one bus."""
    return max(4, min(_cpus(), 8))


@dataclass(frozen=True, slots=True)
class Tuning:
    """How `stream` and `mmap` read; `benchmarks/sweep_stream.py` shows what the numbers do.

    `readers` threads read at once, `chunk_bytes` at most before they look up (for progress, or an error).
    What cannot be read into its place goes through a ring of `ring_bytes` of host memory (made smaller where
    that is short), an eighth of it at a time. `keep_cached=False`, for containers that count it, leaves
    nothing of what `stream` read in the page cache: a file that is not there is read past it, where the
    system can, about as fast, and one that is there goes out of it.
    `prefetch` has `mmap` read and map everything before it returns, so that the first logits do not wait for
    the disk or for one fault a page; what it reads can be reclaimed like the rest. Raises UsageError for
    numbers that cannot work.
    """

    readers: int = field(default_factory=_readers)
    chunk_bytes: int = 16 * MIB
    ring_bytes: int = 64 * MIB
    keep_cached: bool = True
    prefetch: bool = False

    def __post_init__(self) -> None:
        for name, least, most in (
            ("readers", 1, MOST_READERS),
            ("chunk_bytes", 4096, 1 << 30),
            ("ring_bytes", 64, 1 << 36),
        ):
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                raise UsageError(f"Tuning: {name} must be a whole number in {least} … {most}, got {value!r}")
        for name in ("keep_cached", "prefetch"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"Tuning: {name} must be True or False, got {getattr(self, name)!r}")
