"""How much memory this process can take: `host_memory`, `find_budget`. Everything is in bytes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

import psutil
import torch

from gpt2lite.devices import free_memory, shares_memory
from gpt2lite.errors import UsageError

MIB, GIB = 1 << 20, 1 << 30
SIZE = r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([kmgt]?)((?:(?<=[kmgt])i)?b?)\s*"
# Left for what a forecast does not count (page tables, Python objects, rounding): 24 MiB or 3 % of the host,
# 32 MiB or 1 % of a device, whichever is more.
LEFT_ALONE = {"host": (24 << 20, 0.03), "device": (32 << 20, 0.01)}


def human(nbytes: float) -> str:
    """Bytes for people: '622.0 MiB', '6.13 GiB'."""
    for unit, digits, name in ((GIB, 2, "GiB"), (MIB, 1, "MiB"), (1024, 1, "KiB")):
        if abs(nbytes) >= unit:
            return f"{nbytes / unit:.{digits}f} {name}"
    return f"{nbytes:.0f} B"


class ShownAsTable:
    """A dataclass whose bytes are printed as people read them, and are a table in a notebook."""

    __slots__ = ()

    def _rows(self) -> dict[str, str]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}  # type: ignore[attr-defined]
        return {name.replace("_", " "): human(n) for name, n in found.items() if isinstance(n, int) and n}

    def __repr__(self) -> str:
        rows = ", ".join(f"{name} {size}" for name, size in self._rows().items())
        return f"{type(self).__name__}({rows or 'nothing'})"

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{name}</td><td>{size}</td></tr>" for name, size in self._rows().items())
        return f"<table><caption>{type(self).__name__}</caption>{rows}</table>"


def parse_size(size: int | str) -> int:
    """Bytes, from a number of them or from text, in any case: "8GiB", "8GB", "8G", "512m", "0.65 GB".

    "8GB" is 8 × 1000³, as it says. "8GiB", "8Gi" and "8G" are 8 × 1024³: a bare letter counts as docker,
    systemd and java count it. A number without a unit must be at least 1 MiB, since 8 usually means 8 GiB.
    Raises UsageError for anything else, and for a size that is not positive.
    """
    text = str(size) if type(size) is int and size < NO_LIMIT else size
    found = re.fullmatch(SIZE, text, re.IGNORECASE) if isinstance(text, str) else None
    number, letter, suffix = found.groups() if found else ("0", "", "")
    base = 1000 if suffix.lower() == "b" else 1024
    nbytes = int(Decimal(number) * base ** (" kmgt".index(letter.lower()) if letter else 0))
    if nbytes < 1:
        shown = "so large a number" if isinstance(size, int) and size >= NO_LIMIT else repr(size)[:40]
        raise UsageError(f"{shown} is not a memory size; write 512MiB, 2.5GiB, 8GB or a number of bytes")
    if nbytes < MIB and not letter + suffix:
        raise UsageError(f"memory size {size} has no unit; write {size}GiB, {size}MiB or {size}B")
    return nbytes


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of host memory: physical, what this process can still take, and what limits that.

    `swap` is the free swap that no cgroup forbids; 0 where a cgroup grants less than is free.
    """

    total: int
    available: int
    limited_by: str
    swap: int


# (limits, usage, keys of memory.stat: page cache that the kernel takes back under pressure)
CGROUP_V1 = (
    ("memory.limit_in_bytes",),
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)
CGROUP_V2 = (("memory.max", "memory.high"), "memory.current", ("inactive_file", "active_file"))
CgroupFiles = tuple[tuple[str, ...], str, tuple[str, str]]
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2**63
PROC = Path("/proc/self")


def _read(path: Path) -> str:
    """A small file's text, "" where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _own_cgroups(proc: Path) -> Iterator[tuple[Path, CgroupFiles]]:
    """A process's memory cgroups and all that enclose them, innermost first, in both versions."""
    mounts = [line.partition(" - ") for line in _read(proc / "mountinfo").splitlines()]
    for _, controllers, path in (line.split(":", 2) for line in _read(proc / "cgroup").splitlines()):
        files, kind = (CGROUP_V1, "cgroup") if controllers else (CGROUP_V2, "cgroup2")
        if controllers and "memory" not in controllers.split(","):
            continue
        for mount, _, filesystem in mounts:
            words = filesystem.split()
            if words[:1] == [kind] and (not controllers or "memory" in words[-1].split(",")):
                root, at = map(Path, mount.split()[3:5])
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                yield from ((at / level, files) for level in (inside, *inside.parents))


def cgroup_grants(proc: Path = PROC) -> list[tuple[int, str]]:
    """(bytes still granted, "cgroup <folder>") for every limit around a process; page cache is free."""
    grants = []
    for folder, (names, usage, file_backed) in _own_cgroups(proc):
        limits = [_read(folder / name) for name in names]
        limit = min((int(text) for text in limits if text.isdigit()), default=NO_LIMIT)
        used = _read(folder / usage)
        if used.isdigit() and limit < NO_LIMIT:
            stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines())
            cached = sum(int(stat.get(key, 0)) for key in file_backed)
            grants.append((max(limit - int(used) + cached, 0), f"cgroup {folder}"))
    return grants


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
    """What this process can really take: the least of physical memory and what cgroups and ulimits grant."""
    physical = psutil.virtual_memory()
    grants = [*cgroup_grants(), *process_grants()]
    available, limited_by = min([(physical.available, "physical memory"), *grants])
    beyond = [granted - physical.available for granted, _ in grants]
    swap = max(min(psutil.swap_memory().free, *beyond, NO_LIMIT), 0)
    return HostMemory(physical.total, available, limited_by, swap)


@dataclass(frozen=True, slots=True)
class Limit:
    """How many bytes of one kind of memory a load may take, also in words. `nbytes` None: not known."""

    nbytes: int | None
    said: str

    def admits(self, nbytes: int) -> bool:
        """Whether `nbytes` fit."""
        return self.nbytes is None or nbytes <= self.nbytes


@dataclass(frozen=True, slots=True)
class Budget:
    """What a load may take. `swap` comes on top of `host`, up to the caller's cap.

    `virtual` limits allocated host memory and mapped files together. Where the device's memory is the
    host's (`is_shared`), `host` limits the sum of both, and `granted` is what torch's allocator may take of
    the device.
    """

    host: Limit
    device: Limit
    swap: int = 0
    virtual: Limit = Limit(None, "not limited")
    is_shared: bool = False
    granted: int | None = None

    def of(self, place: str) -> Limit:
        """The limit of "host", "device" or "virtual"."""
        return {"host": self.host, "device": self.device, "virtual": self.virtual}[place]

    def less(self, place: str, nbytes: int) -> Budget:
        """The budget without so many bytes of "host" or "device"."""
        limit = self.of(place)
        left = None if limit.nbytes is None else max(limit.nbytes - nbytes, 0)
        return replace(self, **{place: replace(limit, nbytes=left)})  # type: ignore[arg-type]

    def with_swap(self) -> Budget:
        """The budget if swap counts, too."""
        if self.host.nbytes is None:
            return self
        return replace(self, host=replace(self.host, nbytes=self.host.nbytes + self.swap), swap=0)


def _limit(kind: str, available: int | None, source: str, cap: int | str | None) -> Limit:
    """What is available, less LEFT_ALONE, or the caller's cap where that is lower."""
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
    """What this process can really take, lowered by the caller's caps. On the CPU there is no device memory.

    Raises UsageError for a cap that is not a memory size.
    """
    memory = host_memory()
    host = _limit("host", memory.available, memory.limited_by, max_host_memory)
    room = NO_LIMIT if max_host_memory is None else parse_size(max_host_memory) - (host.nbytes or 0)
    free, is_shared = free_memory(device), shares_memory(device)
    if is_shared:
        free = min(memory.available, NO_LIMIT if free is None else free)
    on_device = _limit("device", free, str(device), max_device_memory)
    granted, source = min(process_grants(), default=(None, ""))
    virtual = _limit("host", granted, source, None)
    return Budget(host, on_device, min(memory.swap, room), virtual, is_shared, free)
