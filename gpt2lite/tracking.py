"""How much memory a block of code took: `with track_memory("cuda") as memory`.

Everything is in bytes; where text says GB it means 1024³ of them, as the article does.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import psutil
import torch

from gpt2lite import sampler
from gpt2lite.devices import allocated, peak_allocated, resolve_device, restart_peak, synchronize
from gpt2lite.memory import GB


@dataclass(frozen=True, slots=True)
class Sample:
    """A moment: seconds since tracking began, and bytes above the baseline."""

    seconds: float
    host_anonymous: int
    host_reclaimable: int


@dataclass
class MemoryUse:
    """What `track_memory` found, in bytes above what was in use when it began.

    `peak_host_anonymous` cannot be reclaimed (anonymous and shared pages); `peak_host_reclaimable` is pages
    of files mapped into the process; `peak_host_total` is the kernel's own exact peak of their sum, None
    where it cannot be asked. `method` says how the host was measured.
    """

    device: torch.device
    method: str = ""
    peak_device: int = 0
    peak_host_anonymous: int = 0
    peak_host_reclaimable: int = 0
    peak_host_total: int | None = None
    timeline: list[Sample] = field(default_factory=list)

    def report(self) -> str:
        """The article's line, in GB."""
        device = f"Maximum GPU memory allocated: {self.peak_device / GB:.2f} GB\n" if self.on_device else ""
        return (
            f"{device}Maximum CPU memory allocated: {self.peak_host_anonymous / GB:.2f} GB"
            f" (+ {self.peak_host_reclaimable / GB:.2f} GB of mapped files, which the system can take back)"
        )

    @property
    def on_device(self) -> bool:
        """Whether device memory was counted."""
        return self.device.type != "cpu"


def clean_up(device: str | torch.device = "cpu") -> int:
    """Collect garbage, give cached device memory back, restart the device's peak; the article's third habit.

    Returns the bytes that torch still has allocated on the device: 0 once every model is deleted.
    """
    gc.collect()
    device = resolve_device(device)
    restart_peak(device)
    return allocated(device)


def _status(pid: int | str = "self") -> dict[str, int]:
    """The figures of /proc/PID/status that count memory, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    fields = (line.split() for line in lines if line.endswith(" kB"))
    return {key.rstrip(":"): int(value) * 1024 for key, value, _ in fields}


def _has_proc() -> bool:
    try:
        return "RssAnon" in _status()
    except OSError:
        return False


def _anonymous_and_file(status: dict[str, int]) -> tuple[int, int]:
    return status["RssAnon"] + status["RssShmem"], status["RssFile"]


class _ProcSampler:
    """Linux: a helper process reads what is anonymous and what is file-backed; the kernel checks the sum."""

    active: ClassVar[list[_ProcSampler]] = []

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", sampler.__file__, str(os.getpid())]
        pipe = subprocess.PIPE  # a session of its own: Ctrl-C is for the measured process to handle
        self.helper = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, start_new_session=True
        )
        assert self.helper.stdout is not None
        self.helper.stdout.readline()
        self.peak_before: int = 0
        for enclosing in self.active:  # whose peak is about to be reset
            enclosing.peak_before = max(enclosing.peak_before, _status()["VmHWM"])
        self.resets_peak = self._reset_peak()
        self.active.append(self)
        status = _status()
        self.baseline, self.baseline_total = _anonymous_and_file(status), status["VmRSS"]

    @staticmethod
    def _reset_peak() -> bool:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return False
        return True

    def finish(self, use: MemoryUse) -> None:
        anonymous_now, file_now = _anonymous_and_file(status := _status())
        output, _ = self.helper.communicate("stop\n")
        self.active.remove(self)
        anonymous, file, samples = json.loads(output or "[0, 0, []]")  # the helper may have been killed
        base_anonymous, base_file = self.baseline
        use.method = f"RssAnon and RssFile sampled every {sampler.SECONDS * 1000:.0f} ms by a helper process"
        sampled_anonymous = max(anonymous * 1024, anonymous_now) - base_anonymous
        sampled_file = max(file * 1024, file_now) - base_file
        highest = max(status["VmHWM"], self.peak_before)
        use.peak_host_total = highest - self.baseline_total if self.resets_peak else None
        # What rose and fell between two samples is in the kernel's peak alone: counted as both, not as none.
        total = use.peak_host_total or 0
        use.peak_host_anonymous = max(sampled_anonymous, total - sampled_file)
        use.peak_host_reclaimable = max(sampled_file, total - sampled_anonymous)
        use.timeline = [Sample(t, a * 1024 - base_anonymous, f * 1024 - base_file) for t, a, f in samples]

    def abandon(self) -> None:
        self.active.remove(self)
        self.helper.kill()
        self.helper.communicate()


class _RssSampler:
    """Elsewhere: a thread samples the resident set, all of which counts as anonymous."""

    def __init__(self) -> None:
        self.process = psutil.Process()
        self.baseline, self.began = self.process.memory_info().rss, time.monotonic()
        self.samples: list[Sample] = []
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _take(self) -> None:
        rss = self.process.memory_info().rss - self.baseline
        self.samples.append(Sample(time.monotonic() - self.began, rss, 0))

    def _run(self) -> None:
        while not self.done.wait(0.01):
            self._take()

    def finish(self, use: MemoryUse) -> None:
        self.abandon()
        self._take()
        use.method = "resident set sampled every 10 ms by a thread; mapped files count as anonymous"
        use.peak_host_anonymous = max(max(sample.host_anonymous for sample in self.samples), 0)
        use.timeline = self.samples

    def abandon(self) -> None:
        self.done.set()
        self.thread.join()


class track_memory:
    """Measure what a block of code takes on host and device: `with track_memory("cuda") as memory: …`.

    After the block, `memory` (a `MemoryUse`) holds peaks in bytes above the baseline at entry. Import what
    the block needs before, or its imports are counted, and measure in a fresh process: memory that was freed
    before and is used again adds nothing. Blocks may be nested for the host; a device has
    one peak, which begins anew with the inner block. Costs a helper process that sleeps most of the time.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.use = MemoryUse(resolve_device(device))

    def __enter__(self) -> MemoryUse:
        clean_up(self.use.device)
        self.device_baseline = allocated(self.use.device)
        self.sampler = _ProcSampler() if _has_proc() else _RssSampler()
        return self.use

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.sampler.abandon()
            return
        synchronize(self.use.device)
        self.use.peak_device = peak_allocated(self.use.device) - self.device_baseline
        self.sampler.finish(self.use)
