"""What the machine itself can do, for a ratio to stand beside: no code of the package is measured here."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import psutil
import torch

from gpt2lite import Tuning

ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
COPIES = 8
SPARE = 256 << 20


def fresh_memory(nbytes: int, *, huge: bool) -> mmap.mmap:
    """Memory that nobody has touched, on huge pages if asked and possible."""
    memory = mmap.mmap(-1, nbytes, flags=ANONYMOUS)
    if huge and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def warm_memory(file_bytes: int) -> None:
    """Touch memory and free it, just before a file is loaded: for the model, and for the file's cached pages.

    A virtual machine may give pages that were free for some seconds back to its host; taking them again then
    costs ten times more than anything that is measured here (seen: 0.4 against 4 GB/s). Whoever ran a moment
    after another had freed its memory would win. No more than half of what can be had, or the machine goes on
    looking for memory beside what is measured (headers of 48 blocks read in 92 instead of 60 ms).
    """
    nbytes = min(2 * file_bytes + SPARE, psutil.virtual_memory().available // 2)
    with fresh_memory(nbytes, huge=True) as memory:
        torch.frombuffer(memory, dtype=torch.uint8)[:: mmap.PAGESIZE] = 1


def _read(file: int, memory: memoryview, offset: int) -> None:
    while memory:
        count = os.preadv(file, [memory], offset)
        if not count:
            return
        memory, offset = memory[count:], offset + count


def _chunks(path: Path, step: int) -> list[int]:
    return list(range(0, path.stat().st_size, step))


@contextmanager
def _opened(path: Path, flags: int = 0) -> Iterator[int]:
    file = os.open(path, os.O_RDONLY | flags)
    try:
        yield file
    finally:
        os.close(file)


def read(path: Path, device: str, tuning: Tuning, *, threads: int, flags: int = 0) -> float:
    """Seconds to read a file into one small buffer a thread."""
    own, step = threading.local(), tuning.chunk_bytes

    def read_one(offset: int) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(fresh_memory(step, huge=True))
        _read(file, own.buffer, offset)

    with _opened(path, flags) as file, ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        list(pool.map(read_one, _chunks(path, step)))
        return time.perf_counter() - began


def read_directly(path: Path, device: str, tuning: Tuning, *, threads: int) -> float | None:
    """The same past the page cache; None where the file system does not."""
    try:
        return read(path, device, tuning, threads=threads, flags=os.O_DIRECT)
    except OSError:
        return None


def read_into_fresh_memory(path: Path, device: str, tuning: Tuning, *, huge: bool) -> float:
    """Seconds of as many threads as `stream` has to read a file into memory of its size."""
    nbytes = path.stat().st_size
    began = time.perf_counter()
    memory = memoryview(fresh_memory(nbytes, huge=huge))
    step = tuning.chunk_bytes
    with _opened(path) as file, ThreadPoolExecutor(tuning.readers) as pool:
        list(pool.map(lambda at: _read(file, memory[at : at + step], at), _chunks(path, step)))
    return time.perf_counter() - began


def copy_to_device(path: Path, device: str, tuning: Tuning, *, pinned: bool) -> float | None:
    """Seconds to copy a file's size from the host to a CUDA device; None where there is none."""
    if not device.startswith("cuda"):
        return None
    host = torch.ones(256 << 20, dtype=torch.uint8, pin_memory=pinned)
    there = host.to(device)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(COPIES):
        there.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / COPIES / host.numel() * path.stat().st_size


LIMITS: dict[str, Callable[[Path, str, Tuning], float | None]] = {
    "read, 1 thread": partial(read, threads=1),
    "read, all readers": lambda path, device, tuning: read(path, device, tuning, threads=tuning.readers),
    "read past the cache, 1 thread": partial(read_directly, threads=1),
    "read past the cache, all readers": lambda path, device, tuning: read_directly(
        path, device, tuning, threads=tuning.readers
    ),
    "read into fresh memory": partial(read_into_fresh_memory, huge=False),
    "read into fresh huge pages": partial(read_into_fresh_memory, huge=True),
    "copy to device, page-locked": partial(copy_to_device, pinned=True),
    "copy to device, pageable": partial(copy_to_device, pinned=False),
}
