"""How much memory a block of code took: `with track_memory("cuda") as memory`. Everything is in bytes."""

from __future__ import annotations

import ctypes
import gc
import inspect
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

import psutil
import torch

from gpt2lite import sampler
from gpt2lite.devices import (
    CPU,
    allocated,
    counts_peaks,
    peak_allocated,
    resolve_device,
    restart_peak,
    synchronize,
)
from gpt2lite.memory import GIB, ShownAsTable


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment: seconds since tracking began, and bytes above the baseline."""

    seconds: float
    host_anonymous: int
    host_reclaimable: int


@dataclass(repr=False)
class MemoryUse(ShownAsTable):
    """What `track_memory` found, in bytes above what was in use when it began.

    `peak_host_anonymous` cannot be reclaimed (anonymous and shared pages); `peak_host_reclaimable` is pages
    of files mapped into the process; `peak_host_total` is the kernel's own exact peak of their sum, None
    where the kernel does not tell. `method` says how the host was measured.
    """

    device: torch.device
    method: str = ""
    peak_device: int = 0
    peak_host_anonymous: int = 0
    peak_host_reclaimable: int = 0
    peak_host_total: int | None = None
    timeline: list[Sample] = field(default_factory=list)

    def report(self) -> str:
        """The article's lines, in the article's GB, which are 1024³ bytes: GiB."""
        device = f"Maximum GPU memory allocated: {self.peak_device / GIB:.2f} GB\n"
        host = f"Maximum CPU memory allocated: {self.peak_host_anonymous / GIB:.2f} GB"
        mapped = f"{self.peak_host_reclaimable / GIB:.2f} GB of mapped files, which the system can take back"
        lacks = f"\n{self.method}: a peak between can be missing" if self.method and not self.timeline else ""
        return f"{device if self.device != CPU else ''}{host} (+ {mapped}){lacks}"


def clean_up(device: str | torch.device = "cpu") -> int:
    """Collect garbage, give cached memory back, restart the device's peak, as the article does.

    That is the device's cache, and what glibc keeps of freed host memory: a later load that used it again
    would seem to take nothing. Returns the bytes that torch still has allocated on the device: 0 once every
    model is deleted.
    """
    gc.collect()
    with suppress(AttributeError, OSError):  # not glibc
        ctypes.CDLL(None).malloc_trim(0)
    device = resolve_device(device)
    restart_peak(device)
    return allocated(device)


def _status() -> dict[str, int]:
    """The memory figures of /proc/self/status, in bytes; empty where that file does not exist."""
    try:
        fields = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    except OSError:
        return {}
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in fields if words[-1:] == ["kB"]}


Read = Callable[[], sampler.Resident]
Stop = Callable[[], tuple[str, sampler.Seen]]  # ends the sampling: how it was done, and what was seen
AT_ENDS = "read at the beginning and at the end alone, since {}"


def _all_resident() -> sampler.Resident:
    """Where the system does not tell the two apart, all counts as anonymous."""
    return psutil.Process().memory_info().rss, 0


def _by_helper(read: Read) -> Stop:
    """A process samples, in a session of its own: Ctrl-C is for the measured process to handle."""
    program = inspect.getsource(sampler)  # a package in a zip has no file to run
    command, pipe = [sys.executable, "-I", "-S", "-c", program, str(os.getpid())], subprocess.PIPE
    process = subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )

    def stop() -> tuple[str, sampler.Seen]:
        output, _ = process.communicate("stop\n")
        if not output:
            return AT_ENDS.format("the helper process that sampled it died"), (0, 0, [])
        return f"sampled every {sampler.SECONDS * 1000:.0f} ms by a helper process", tuple(json.loads(output))

    assert process.stdout is not None
    if not process.stdout.readline():
        stop()
        raise OSError("it did not start")
    return stop


def _by_thread(read: Read) -> Stop:
    done, pool = threading.Event(), ThreadPoolExecutor(1)
    seen = pool.submit(sampler.watch, read, done.wait, 0.01)
    pool.shutdown(wait=False)

    def stop() -> tuple[str, sampler.Seen]:
        done.set()
        return "sampled every 10 ms by a thread", seen.result()

    return stop


def _sampling() -> tuple[str, Read, Stop]:
    """What is read, how, and what ends its sampling by the first way that the system grants."""
    can_tell = "RssAnon" in _status()
    read = partial(sampler.resident, os.getpid()) if can_tell else _all_resident
    what = "RssAnon and RssFile" if can_tell else "resident set, of which mapped files count as anonymous,"
    for start in (_by_helper, _by_thread) if can_tell else (_by_thread,):
        with suppress(OSError, RuntimeError):  # no more processes, or threads
            return what, read, start(read)
    return what, read, lambda: (AT_ENDS.format("no process or thread could be started"), (0, 0, []))


class _KernelPeak:
    """The kernel's own exact peak of the resident set, counted anew from here; may be nested."""

    active: ClassVar[list[_KernelPeak]] = []

    def __init__(self) -> None:
        self.before, status = 0, _status()
        for enclosing in self.active:  # whose peak is about to be reset
            enclosing.before = max(enclosing.before, status.get("VmHWM", 0))
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.baseline: int | None = status["VmRSS"]
        except (OSError, KeyError):
            self.baseline = None
        self.active.append(self)

    def stop(self) -> int | None:
        """The bytes above what was resident at the beginning, None where the kernel cannot tell."""
        self.active.remove(self)
        highest = max(_status().get("VmHWM", 0), self.before)
        return None if self.baseline is None else highest - self.baseline


@contextmanager
def track_memory(device: str | torch.device = "cpu") -> Iterator[MemoryUse]:
    """Measure what a block of code takes on host and device: `with track_memory("cuda") as memory: …`.

    After the block, `memory` (a `MemoryUse`) holds peaks in bytes above the baseline at entry. Import what
    the block needs first, otherwise the imports are counted. It begins with `clean_up`, so that memory that
    was freed before counts again; glibc may keep some MiB, so be exact in a fresh process. Blocks may be
    nested on the host; a device has one peak, which an inner block restarts. Costs a helper process that
    sleeps most of the time.
    """
    use = MemoryUse(resolve_device(device))
    device_baseline = clean_up(use.device)
    what, read, stop = _sampling()
    kernel_peak = _KernelPeak()
    base_anonymous, base_file = read()
    try:
        yield use
        synchronize(use.device)
        last_anonymous, last_file = read()
    finally:
        total = use.peak_host_total = kernel_peak.stop()
        how, (anonymous, file, samples) = stop()
    use.peak_device = peak_allocated(use.device) - device_baseline
    uncounted = use.device != CPU and not counts_peaks(use.device)
    use.method = f"{what} {how}{f'; torch does not count the memory of {use.device}' if uncounted else ''}"
    sampled_anonymous = max(anonymous, last_anonymous) - base_anonymous
    sampled_file = max(file, last_file) - base_file
    # What rose and fell between two samples is in the kernel's peak alone: counted as both, not as none.
    use.peak_host_anonymous = max(sampled_anonymous, (total or 0) - sampled_file)
    use.peak_host_reclaimable = max(sampled_file, (total or 0) - sampled_anonymous)
    use.timeline = [Sample(t, a - base_anonymous, f - base_file) for t, a, f in samples]
