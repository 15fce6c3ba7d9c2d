"""What memory and which devices this process can have: `host_memory`, `resolve_device`.

Everything is in bytes; where text says GB it means 1024³ of them, as the article does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from gpt2lite.errors import UsageError

GB = 1024**3


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
        raise UsageError(f"{device} was asked for, this machine has {have}. Take cpu instead.")
    try:
        return torch.empty(1, device=found).device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"{device} was asked for, this machine's torch cannot use it. Use cpu.") from None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch or Python says that host or device memory ran out."""
    known = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, known) or "DefaultCPUAllocator: can't allocate memory" in str(error)
