"""What a load will take, counted without allocating: the `Ledger` in which a strategy's forecast adds it up.

A forecast repeats its strategy's allocations, in the same order, as entries. Host memory counts once it is
written to, device memory once it is allocated, as `track_memory` sees them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpt2lite.devices import caches_in_blocks
from gpt2lite.memory import MIB, ShownAsTable


@dataclass(frozen=True, slots=True, repr=False)
class Forecast(ShownAsTable):
    """Bytes that a load will add: at its peak, as `MemoryUse` means them, and once it is done.

    `peak_host_reclaimable` is what the load itself reads through a mapping; `stays_mapped` is how much of the
    files the loaded module keeps using through it, which the system can take back at any time.
    """

    peak_device: int
    peak_host_anonymous: int
    peak_host_reclaimable: int
    stays_device: int
    stays_host: int
    stays_mapped: int


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
    """Device memory as `torch.cuda.max_memory_allocated` counts it: in blocks of torch's caching allocator.

    Blocks are multiples of 512 bytes. A block above 1 MiB is cut from the smallest free one that holds it, or
    from a new segment (20 MiB, or from 10 MiB on the next multiple of 2 MiB); a rest of up to 1 MiB is not
    cut off and counts. A block that is given back becomes one with the free ones beside it in its segment.
    Source: c10/cuda/CUDACachingAllocator.cpp.
    """

    def __init__(self) -> None:
        super().__init__()
        self.free: dict[int, int] = {}  # address → bytes, of blocks above 1 MiB
        self.taken: dict[int, int] = {}
        self.end = 0

    def take(self, nbytes: int) -> int:
        """Take a block of at least `nbytes`; returns its address."""
        size = round_up(nbytes, 512)
        fitting = [(free, at) for at, free in self.free.items() if free >= size > MIB]
        if fitting:
            _, at = min(fitting)
        else:
            segment = size if size <= MIB else 20 * MIB if size < 10 * MIB else round_up(size, 2 * MIB)
            at, self.end = self.end, self.end + segment + 1  # segments never touch, so they never merge
            self.free[at] = segment
        block = self.free.pop(at)
        if block - size > MIB:
            self.free[at + size] = block - size
            block = size
        self.taken[at] = super().take(block)
        return at

    def give(self, block: int) -> None:
        """Give the block at an address back; it can be taken again."""
        size = self.taken.pop(block)
        super().give(size)
        if size <= MIB:
            return
        size += self.free.pop(block + size, 0)
        before = next((at for at, free in self.free.items() if at + free == block), block)
        self.free[before] = self.free.pop(before, 0) + size


class Ledger:
    """The accounts of one load. On the CPU, `device` is `host`: there is one memory."""

    def __init__(self, device: torch.device) -> None:
        self.host, self.mapped, self.stays_mapped = Pool(), Pool(), 0
        self.on_cpu = device.type == "cpu"
        own = CachingPool() if caches_in_blocks(device) else Pool()
        self.device = self.host if self.on_cpu else own

    def balance(self) -> Forecast:
        """What has been counted so far."""
        device, host = Pool() if self.on_cpu else self.device, self.host
        return Forecast(device.peak, host.peak, self.mapped.peak, device.used, host.used, self.stays_mapped)


def round_up(nbytes: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-nbytes // step) * step
