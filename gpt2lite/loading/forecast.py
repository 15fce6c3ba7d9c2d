"""What a load will take, counted without allocating: the `Ledger` in which a strategy's forecast adds it up.

A forecast repeats its strategy's allocations, in the same order, as entries. Host memory counts once it is
written to, device memory once it is allocated, as `track_memory` sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpt2lite.devices import caches_in_blocks, grows_segments
from gpt2lite.memory import MIB, ShownAsTable


@dataclass(frozen=True, slots=True, repr=False)
class Forecast(ShownAsTable):
    """Bytes that a load will add: at its peak, as `MemoryUse` means them, and once it is done.

    `peak_device` is what tensors take on the device, `peak_reserved` what torch's allocator takes of it for
    them, in whole segments: that must fit.
    `peak_host_reclaimable` is what the load itself reads through a mapping; `stays_mapped` is how much of the
    files the loaded module keeps using through it, which the system can take back at any time.
    """

    peak_device: int
    peak_host_anonymous: int
    peak_host_reclaimable: int
    stays_device: int
    stays_host: int
    stays_mapped: int
    peak_reserved: int = 0


class Pool:
    """Memory of which every byte that is taken counts."""

    def __init__(self) -> None:
        self.used = self.peak = 0

    def take(self, nbytes: int) -> int:
        """Take memory; returns what `give` wants back."""
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return nbytes

    def give(self, block: int) -> None:
        """Give back what `take` returned."""
        self.used -= block

    def touch(self, nbytes: int) -> None:
        """Take memory and give it back at once."""
        self.give(self.take(nbytes))


class CachingPool(Pool):
    """Device memory as torch's caching allocator hands it out, and counts it: `used`, and `reserved`.

    Blocks are multiples of 512 bytes, cut from the smallest free one that holds them, or from a new segment.
    Up to 1 MiB they come from segments of 2 MiB, and all of the rest stays free. Above, segments are 20 MiB,
    or from 10 MiB on the next multiple of 2 MiB; a rest of up to 1 MiB is not cut off and counts. A block
    that is given back becomes one with the free ones beside it in its segment. Before `reserved` passes
    `limit`, segments that are free go back to the device. Where segments grow, there is one for small blocks
    and one for large ones, in steps of 2 and 20 MiB, and every rest is cut off.
    Source: c10/cuda/CUDACachingAllocator.cpp.
    """

    def __init__(self, limit: int | None = None, *, grows: bool = False) -> None:
        super().__init__()
        self.limit, self.grows, self.reserved, self.peak_reserved = limit, grows, 0, 0
        self.free: dict[bool, dict[int, int]] = {True: {}, False: {}}  # small or not: address → bytes
        self.taken: dict[int, tuple[int, bool]] = {}
        self.segments: dict[int, int] = {}
        self.ends = {True: 0, False: 1 << 60}

    def take(self, nbytes: int) -> int:
        """Take a block of at least `nbytes`; returns its address. Nothing is 0 bytes, at -1."""
        if not nbytes:
            return -1
        size = round_up(nbytes, 512)
        small = size <= MIB
        free = self.free[small]
        _, at = min(((has, at) for at, has in free.items() if has >= size), default=(0, -1))
        if at < 0:
            at = self._grow(size, small) if self.grows else self._add_segment(size, small)
        block = free.pop(at)
        if block - size >= (512 if small or self.grows else MIB + 1):
            free[at + size] = block - size
            block = size
        self.taken[at] = super().take(block), small
        return at

    def _add_segment(self, size: int, small: bool) -> int:
        segment = 2 * MIB if small else 20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)
        if self.limit is not None and self.reserved + segment > self.limit:
            self._release()
        at = self.ends[small]
        self.ends[small] += segment + 1  # segments never touch, so they never merge
        self.segments[at] = self.free[small][at] = segment
        self._reserve(segment)
        return at

    def _grow(self, size: int, small: bool) -> int:
        free, end = self.free[small], self.ends[small]
        at = next((at for at, has in free.items() if at + has == end), end)
        more = round_up(size - free.get(at, 0), 2 * MIB if small else 20 * MIB)
        free[at] = free.get(at, 0) + more
        self.ends[small] += more
        self._reserve(more)
        return at

    def _reserve(self, nbytes: int) -> None:
        self.reserved += nbytes
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def _release(self) -> None:
        for free in self.free.values():
            for at in [at for at, has in free.items() if self.segments.get(at) == has]:
                self.reserved -= free.pop(at)
                del self.segments[at]

    def give(self, block: int) -> None:
        """Give the block at an address back; it can be taken again."""
        if block < 0:
            return
        size, small = self.taken.pop(block)
        self.used -= size
        free = self.free[small]
        size += free.pop(block + size, 0)
        before = next((at for at, has in free.items() if at + has == block), block)
        free[before] = free.pop(before, 0) + size


class Ledger:
    """The accounts of one load. On the CPU, `device` is `host`: there is one memory.

    `limit` is what torch's allocator can take of the device before it gives back what it keeps unused.
    """

    def __init__(self, device: torch.device, limit: int | None = None) -> None:
        self.host, self.mapped, self.stays_mapped = Pool(), Pool(), 0
        self.on_cpu = device.type == "cpu"
        own = CachingPool(limit, grows=grows_segments()) if caches_in_blocks(device) else Pool()
        self.device = self.host if self.on_cpu else own

    def balance(self) -> Forecast:
        """What has been counted so far."""
        device, host = Pool() if self.on_cpu else self.device, self.host
        reserved = device.peak_reserved if isinstance(device, CachingPool) else device.peak
        stays = device.used, host.used, self.stays_mapped
        return Forecast(device.peak, host.peak, self.mapped.peak, *stays, reserved)


def round_up(nbytes: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-nbytes // step) * step
