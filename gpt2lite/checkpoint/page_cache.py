"""The system's page cache: what to leave there, and how to read without leaving anything."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import torch

PAGE = 4096
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SAMPLES = 16


def drop_cached(file: int, offset: int = 0, nbytes: int = 0) -> None:
    """Give the cached pages of a file range (0 bytes: to its end) back, where the system can be told so."""
    _advise(file, "POSIX_FADV_DONTNEED", *(_pages(offset, nbytes) if nbytes else (offset, 0)))


def _advise(file: int, advice: str, offset: int = 0, nbytes: int = 0) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, nbytes, getattr(os, advice))


def forget_cached(path: Path) -> None:
    """Give the cached pages of a whole file back, once the disk has them."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        drop_cached(file.fileno())


def _pages(offset: int, nbytes: int) -> tuple[int, int]:
    """Offset and bytes of all pages that a range touches; the kernel itself would round inwards."""
    begin = offset // PAGE * PAGE
    return begin, -(-(offset + nbytes) // PAGE) * PAGE - begin


def _read_cached(file: int, nbytes: int, offset: int) -> bytes | None:
    """A range that lies in the page cache; None where it is known not to, nothing where that is not known."""
    memory = bytearray(nbytes)
    try:
        return bytes(memory) if os.preadv(file, [memory], offset, os.RWF_NOWAIT) == nbytes else None
    except BlockingIOError:
        return None
    except (AttributeError, OSError):  # no such call, or a file system that cannot tell
        return b""


def read_each(file: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Small ranges (offset, bytes) from all over a file, each shorter where the file ends in it.

    What is cold the disk is asked for at once, and it leaves the page cache again: a page that stays there
    alone breaks up what the system later reads ahead, and cost a cold load a quarter of its time.
    """
    _advise(file, "POSIX_FADV_RANDOM")  # or the system takes neighbours of a range along
    found = [_read_cached(file, nbytes, offset) for offset, nbytes in ranges]
    cold = [(offset, nbytes) for (offset, nbytes), known in zip(ranges, found, strict=True) if known is None]
    for offset, nbytes in cold:
        _advise(file, "POSIX_FADV_WILLNEED", *_pages(offset, nbytes))
    parts = [
        known or _pread(file, nbytes, offset) for (offset, nbytes), known in zip(ranges, found, strict=True)
    ]
    for offset, nbytes in cold:
        drop_cached(file, offset, nbytes)
    _advise(file, "POSIX_FADV_NORMAL")
    return parts


def _pread(file: int, nbytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, nbytes, offset)
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, nbytes)


class PastCache(io.FileIO):
    """A file that is read past the page cache (O_DIRECT), in whole pages, through a buffer of `nbytes`.

    The buffer is a huge page. On pages of 4 KiB, of which a disk takes some hundred at a time, a cold load
    took 0.34 s where 0.21 go through the cache; on a huge one 0.19 (548 MB).
    """

    nbytes = 2 << 20

    def __init__(self, path: Path) -> None:
        super().__init__(path, opener=lambda name, flags: os.open(name, flags | os.O_DIRECT))
        memory = mmap.mmap(-1, 2 * self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % self.nbytes
        self.buffer = memoryview(memory)[begin : begin + self.nbytes]

    def read_into(self, memories: Sequence[memoryview], offset: int) -> int:
        """Fill memories in order from byte `offset`, as far as one read goes; returns its bytes."""
        page, nbytes = _pages(offset, sum(map(len, memories)))
        end = os.preadv(self.fileno(), [self.buffer[:nbytes]], page)
        at = begin = min(offset - page, end)
        for memory in memories:
            count = min(len(memory), end - at)
            memory[:count] = self.buffer[at : at + count]
            at += count
        return at - begin


def is_best_past_cache(path: Path) -> bool:
    """Whether a file lies on the disk and not in the page cache, and reading past that one is fast here."""
    try:
        if "[never]" in HUGE_PAGES.read_text():
            return False
        with PastCache(path) as trial:
            trial.read_into([memoryview(bytearray(1))], 0)
        with open(path, "rb", buffering=0) as file:
            _advise(file.fileno(), "POSIX_FADV_RANDOM")
            size = path.stat().st_size
            samples = [_read_cached(file.fileno(), 1, size * i // SAMPLES) for i in range(SAMPLES)]
    except (AttributeError, OSError):  # no such calls, or a file system that does not take them
        return False
    return samples.count(None) > SAMPLES // 2
