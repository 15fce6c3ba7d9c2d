"""What memory this process can have: `find_budget`, `host_memory`.

Everything is in bytes; where text says GB it means 1024³ of them, as the article does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import psutil
import torch

from gpt2lite.devices import free_memory
from gpt2lite.errors import UsageError

GB = 1024**3
UNITS = {
    f"{letter}{i}B": base**n for i, base in (("", 1000), ("i", 1024)) for n, letter in enumerate("KMGT", 1)
}
# What a forecast does not count (page tables, Python's own objects, what rounding costs) comes out of what is
# there: of the host 24 MiB or 3 %, of a device 32 MiB or 1 %, whichever is more.
LEFT_ALONE = {"host": (24 << 20, 0.03), "device": (32 << 20, 0.01)}


def human(nbytes: float) -> str:
    """Bytes for people: '622.0 MiB', '6.13 GiB'."""
    if 0 < abs(nbytes) < 1024:
        return f"{nbytes:.0f} B"
    if abs(nbytes) >= GB:
        return f"{nbytes / GB:.2f} GiB"
    return f"{nbytes / 1024**2:.1f} MiB" if abs(nbytes) >= 1024**2 else f"{nbytes / 1024:.1f} KiB"


def parse_size(size: int | str) -> int:
    """Bytes, from a number of them or from text: "512MiB" is 512 × 1024², "8GB" is 8 × 1000³.

    Raises UsageError for anything else, and for a size that is not positive.
    """
    found = re.fullmatch(
        r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([KMGT]i?B|)\s*", size if isinstance(size, str) else ""
    )
    nbytes = int(Decimal(found.group(1)) * UNITS.get(found.group(2), 1)) if found else 0
    if type(size) is int:
        nbytes = size if size < NO_LIMIT else 0
    if nbytes < 1:
        shown = "so large a number" if isinstance(size, int) and size >= NO_LIMIT else repr(size)[:40]
        raise UsageError(f"{shown} is no amount of memory; write a number of bytes, 512MiB, 2.5GiB or 8GB")
    return nbytes


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of host memory: physical, and what this process can still take, and what limits that.

    `swap` is what is free beside it and no cgroup forbids; 0 where a cgroup grants less than is available.
    """

    total: int
    available: int
    limited_by: str
    swap: int


@dataclass(frozen=True, slots=True)
class _CgroupFiles:
    limits: tuple[str, ...]
    usage: str
    file_backed: tuple[str, str]  # keys of memory.stat: page cache that the kernel takes back under pressure


CGROUP_V1 = _CgroupFiles(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
CGROUP_V2 = _CgroupFiles(("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
NO_LIMIT = 1 << 60  # v1 says so with a number near 2**63
PROC = Path("/proc/self")


def _own_cgroups(proc: Path) -> list[tuple[Path, _CgroupFiles]]:
    """A process's memory cgroups and all that enclose them, innermost first, in both versions."""
    try:
        own = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return []
    found = []
    for _, controllers, path in own:
        files = CGROUP_V2 if not controllers else CGROUP_V1
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount in mounts:
            kind = mount[mount.index("-") + 1] if "-" in mount else ""
            is_memory = not controllers or "memory" in mount[-1].split(",")
            if kind == ("cgroup" if controllers else "cgroup2") and is_memory:
                root, at = Path(mount[3]), Path(mount[4])
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                found += [(at / level, files) for level in (inside, *inside.parents)]
    return found


def _read(path: Path) -> str:
    """A small file's text, "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _cgroup_available(folder: Path, files: _CgroupFiles) -> int | None:
    """Bytes that a cgroup still grants, its page cache counted as free; None where it sets no limit."""
    limits = [int(text) for text in (_read(folder / name) for name in files.limits) if text.isdigit()]
    usage = _read(folder / files.usage)
    if not usage.isdigit() or min(limits, default=NO_LIMIT) >= NO_LIMIT:
        return None
    stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
    cached = sum(int(stat.get(key, 0)) for key in files.file_backed)
    return max(min(limits) - int(usage) + cached, 0)


def cgroup_grants(proc: Path = PROC) -> list[tuple[int, str]]:
    """(bytes still granted, "cgroup <folder>") for every limit around a process, at every level."""
    rests = [(_cgroup_available(folder, files), f"cgroup {folder}") for folder, files in _own_cgroups(proc)]
    return [(rest, name) for rest, name in rests if rest is not None]


# Both count what is mapped, too: privately and writable, as checkpoints are.
PROCESS_LIMITS = {"Max address space": ("VmSize", "ulimit -v"), "Max data size": ("VmData", "ulimit -d")}


def process_grants(proc: Path = PROC) -> list[tuple[int, str]]:
    """(bytes still granted, "ulimit -v") for what limits a process's own mappings: RLIMIT_AS, RLIMIT_DATA."""
    limits = _read(proc / "limits").splitlines()
    used = dict(line.split(":", 1) for line in _read(proc / "status").splitlines())
    found = []
    for name, (counted, said) in PROCESS_LIMITS.items():
        soft = next((line.split()[-3] for line in limits if line.startswith(name)), "")
        if soft.isdigit() and counted in used:
            found.append((max(int(soft) - 1024 * int(used[counted].split()[0]), 0), said))
    return found


def host_memory() -> HostMemory:
    """What this process can really have: the least of physical memory and what cgroups and ulimits grant."""
    physical = psutil.virtual_memory()
    grants = [*cgroup_grants(), *process_grants()]
    available, limited_by = min(
        [(physical.available, "physical memory"), *grants], key=lambda grant: grant[0]
    )
    beyond = [granted - physical.available for granted, _ in grants]
    swap = max(min(psutil.swap_memory().free, *beyond, NO_LIMIT), 0)
    return HostMemory(physical.total, available, limited_by, swap)


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes a load may take of one kind of memory, in words, too. `nbytes` None: not known."""

    nbytes: int | None
    said: str

    def admits(self, nbytes: int) -> bool:
        """Whether so much fits."""
        return self.nbytes is None or nbytes <= self.nbytes


@dataclass(frozen=True, slots=True)
class Budget:
    """What a load may take. `swap` is not part of `host`; it ends where a cap does.

    `virtual` is for what is allocated on the host and mapped files together.
    """

    host: Limit
    device: Limit
    swap: int = 0
    virtual: Limit = Limit(None, "not limited")

    def of(self, place: str) -> Limit:
        """The limit of "host", "device" or "virtual"."""
        return {"host": self.host, "device": self.device, "virtual": self.virtual}[place]

    def with_swap(self) -> Budget:
        """The budget of one who counts on swap."""
        return replace(self, host=replace(self.host, nbytes=(self.host.nbytes or 0) + self.swap), swap=0)


def _limit(kind: str, available: int | None, source: str, cap: int | str | None) -> Limit:
    """What is available, less what is left alone, or the caller's cap where that is lower."""
    limits = []
    if available is not None:
        least, share = LEFT_ALONE[kind]
        usable = max(available - max(least, int(available * share)), 0)
        said = f"{human(usable)}, which is {human(available)} ({source}) less {human(available - usable)}"
        limits.append(Limit(usable, said))
    if cap is not None:
        limits.append(Limit(parse_size(cap), f"max_{kind}_memory={human(parse_size(cap))}"))
    return min(limits, key=lambda limit: limit.nbytes or 0) if limits else Limit(None, "not known")


def find_budget(
    device: torch.device, max_host_memory: int | str | None = None, max_device_memory: int | str | None = None
) -> Budget:
    """What this process can really have, lowered by the caller's caps. On the CPU there is no device memory.

    Raises UsageError for a cap that is no size.
    """
    memory = host_memory()
    host = _limit("host", memory.available, memory.limited_by, max_host_memory)
    room = NO_LIMIT if max_host_memory is None else parse_size(max_host_memory) - (host.nbytes or 0)
    on_device = _limit("device", free_memory(device), str(device), max_device_memory)
    granted, source = min(process_grants(), default=(None, ""))
    virtual = _limit("host", granted, source, None)
    return Budget(host, on_device, min(memory.swap, room), virtual)
