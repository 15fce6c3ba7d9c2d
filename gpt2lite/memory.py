"""How much memory there is, and how much was used: `host_memory`, `device_memory`, `track_memory`.

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

from gpt2lite.errors import UsageError

GB = 1024**3
SAMPLE_SECONDS = 0.002
TIMELINE_POINTS = 120

# ---- what there is ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of host memory: physical, and what this process can still take, and what limits that."""

    total: int
    available: int
    limited_by: str


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    limit: str
    usage: str
    file_backed: tuple[str, str]  # keys of memory.stat: page cache that the kernel takes back under pressure


CGROUP_V1 = _CgroupFiles(
    "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
CGROUP_V2 = _CgroupFiles("memory.max", "memory.current", ("inactive_file", "active_file"))


def _own_cgroups() -> list[tuple[Path, _CgroupFiles]]:
    """This process's memory cgroups and all that enclose them, innermost first, in both versions."""
    try:
        own = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
        mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in own:
        files = CGROUP_V2 if not controllers else CGROUP_V1
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            kind, options = mount[mount.index("-") + 1], mount[-1].split(",")
            if kind == ("cgroup" if controllers else "cgroup2") and (not controllers or "memory" in options):
                root, at = Path(mount[3]), Path(mount[4])
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                found += [(at / level, files) for level in (inside, *inside.parents)]
    return found


def _cgroup_available(folder: Path, files: _CgroupFiles) -> int | None:
    """Bytes that a cgroup still grants, its page cache counted as free; None where it sets no limit."""
    try:
        limit = (folder / files.limit).read_text().strip()
        usage = int((folder / files.usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    if limit == "max" or int(limit) >= 1 << 60:
        return None
    return max(int(limit) - usage + sum(int(stat.get(key, 0)) for key in files.file_backed), 0)


def host_memory() -> HostMemory:
    """What this process can really have: the least of physical memory and every enclosing cgroup's rest."""
    physical = psutil.virtual_memory()
    grants = [(physical.available, "physical memory")]
    for folder, files in _own_cgroups():
        available = _cgroup_available(folder, files)
        if available is not None:
            grants.append((available, f"cgroup {folder}"))
    available, limited_by = min(grants, key=lambda grant: grant[0])
    return HostMemory(physical.total, available, limited_by)


def resolve_device(device: str | torch.device) -> torch.device:
    """`device` as its tensors name it. Raises UsageError where this machine has no such device."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UsageError(f"no device is called {device!r}; try cpu, cuda or cuda:0") from None
    if found.type == "meta":
        raise UsageError("a model on the meta device holds no weights; try cpu or cuda")
    count = torch.cuda.device_count() if found.type == "cuda" and torch.cuda.is_available() else 0
    if found.type == "cuda" and (found.index or 0) >= count:
        have = f"only {count} CUDA device(s)" if count else "no CUDA device that torch can use"
        raise UsageError(f'{device} was asked for, this machine has {have}. Use device="cpu".')
    try:
        return torch.empty(1, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"{device} was asked for, this machine's torch cannot use it. Use cpu.") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that host or device memory ran out."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "DefaultCPUAllocator: can't allocate memory" in str(error)


# ---- what was used ---------------------------------------------------------------------------------------


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
        device = f"Maximum GPU memory allocated: {self.peak_device / GB:.1f} GB\n" if self.on_cuda else ""
        return (
            f"{device}Maximum CPU memory allocated: {self.peak_host_anonymous / GB:.1f} GB"
            f" (+ {self.peak_host_reclaimable / GB:.1f} GB of mapped files, which the system can take back)"
        )

    @property
    def on_cuda(self) -> bool:
        """Whether device memory was counted."""
        return self.device.type == "cuda"


def clean_up(device: str | torch.device = "cpu") -> int:
    """Collect garbage, give cached device memory back, restart the device's peak; the article's third habit.

    Returns the bytes that torch still has allocated on a CUDA device: 0 once every model is deleted.
    """
    gc.collect()
    device = resolve_device(device)
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


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


# Runs in a process of its own: a thread would wait for the GIL just when a long call allocates.
SAMPLER = f"""
import json, select, sys, time
pid, points = sys.argv[1], {TIMELINE_POINTS}
def sample():
    with open(f"/proc/{{pid}}/status") as file:
        found = dict(line.split(":", 1) for line in file if line.startswith("Rss"))
    kilobytes = {{key: int(value.split()[0]) for key, value in found.items()}}
    return kilobytes["RssAnon"] + kilobytes["RssShmem"], kilobytes["RssFile"]
began, samples, step, last = time.monotonic(), [], {SAMPLE_SECONDS}, 0
print("ready", flush=True)
peak_anonymous = peak_file = 0
while True:
    anonymous, file = sample()
    peak_anonymous, peak_file = max(peak_anonymous, anonymous), max(peak_file, file)
    now = time.monotonic() - began
    if not samples or now - samples[-1][0] >= step:
        samples.append((now, anonymous, file))
        if len(samples) == 2 * points:
            samples, step = samples[::2], 2 * step
    if select.select([sys.stdin], [], [], {SAMPLE_SECONDS})[0]:
        break
print(json.dumps([peak_anonymous, peak_file, samples]))
"""


class _ProcSampler:
    """Linux: a helper process reads what is anonymous and what is file-backed; the kernel checks the sum."""

    active: ClassVar[list[_ProcSampler]] = []

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", "-c", SAMPLER, str(os.getpid())]
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
        use.method = f"RssAnon and RssFile sampled every {SAMPLE_SECONDS * 1000:.0f} ms by a helper process"
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
    the block needs before, or its imports are counted. Blocks may be nested for the host; a device has
    one peak, which begins anew with the inner block. Costs a helper process that sleeps most of the time.
    """

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.use = MemoryUse(resolve_device(device))

    def __enter__(self) -> MemoryUse:
        clean_up(self.use.device)
        self.device_baseline = torch.cuda.memory_allocated(self.use.device) if self.use.on_cuda else 0
        self.sampler = _ProcSampler() if _has_proc() else _RssSampler()
        return self.use

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.sampler.abandon()
            return
        if self.use.on_cuda:
            torch.cuda.synchronize(self.use.device)
            self.use.peak_device = torch.cuda.max_memory_allocated(self.use.device) - self.device_baseline
        self.sampler.finish(self.use)
