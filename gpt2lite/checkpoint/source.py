"""Where bytes lie. Whoever reads a checkpoint asks a `ByteSource` for ranges and knows no path.

Every file is opened here, and only plain ones are. A local file can also be read without leaving anything in
the system's page cache.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import stat
import sys
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, ClassVar

import torch

from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, InsufficientMemoryError

if TYPE_CHECKING:
    from gpt2lite.checkpoint.remote import Place

STEP = 1 << 20
MOST_MEMORIES = 512  # of one read; Linux takes 1024
PAGE = 4096
BUFFER_BYTES = 2 << 20  # of a reader past the page cache: a huge page
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SAMPLES = 16
FREE_BYTES = 32 << 20  # of memory for what describes tensors, beside four times its size
MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0  # Python names it from 3.13 on
MAP_FIXED = 0x10
CHANGED = "changed while it was being read. Load it again."
MEMORY = "/proc/self/mem"  # this process's own


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy; they keep the tensor alive."""
    nbytes = tensor.numel() * tensor.element_size()
    exposed = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    exposed.owner = tensor  # type: ignore[attr-defined]
    return memoryview(exposed).cast("B")


def may_take(nbytes: int) -> int:
    """Bytes of memory that reading `nbytes` of a file which only describe something may take."""
    return FREE_BYTES + 4 * nbytes


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells that a file was replaced, truncated or written to."""

    size: int
    modified_ns: int
    inode: int
    tag: str = ""  # what a server says of the content

    @classmethod
    def of(cls, found: os.stat_result) -> FileState:
        """What the system says of a file."""
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


def _plain(path: str | Path | int) -> os.stat_result:
    """What lies at a path, links followed. Raises CheckpointError for what no checkpoint can be."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        is_link = not isinstance(path, int) and os.path.islink(path)
        said = "is a link to what is not there" if is_link else "no such file or folder"
        raise CheckpointNotFoundError(path, said) from None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CheckpointError(path, "its links form a loop. Copy or download the file itself.") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a FIFO, socket or device"
        raise CheckpointError(path, f"is {kind}, wanted a plain file. Save it as one, and pass that.")
    return found


def open_plain(path: str, flags: int) -> int:
    """A descriptor of a plain file, for `open` as its opener; waits for nobody, whatever takes its place."""
    _plain(path)
    file = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    try:
        _plain(file)
    except CheckpointError:
        os.close(file)
        raise
    return file


class FileReader(io.FileIO):
    """A local file, read through the page cache."""

    def __init__(self, path: Path, flags: int = 0) -> None:
        super().__init__(path, opener=lambda name, own: open_plain(name, own | flags))

    def read_into(self, memories: Iterable[memoryview], offset: int) -> None:
        """Fill one memory after the other from byte `offset`, STEP at a time across them.

        Small steps in order, on even places of the file, let the system read ahead: reads of 16 MiB by turns
        made a cold disk a third slower. Raises CheckpointError where the file ends first.
        """
        empty = deque(memory for memory in memories if memory)
        while empty:
            count = self.read_once(_first(empty, STEP - offset % STEP), offset)
            if not count:
                raise CheckpointError(self.name, f"ends at byte {offset}; it was truncated while being read")
            offset += count
            while count:
                memory = empty.popleft()
                if count < len(memory):
                    empty.appendleft(memory[count:])
                count = max(count - len(memory), 0)

    def read_once(self, memories: Sequence[memoryview], offset: int) -> int:
        """One read that fills memories in order, or the first of them where the system has no such call."""
        if hasattr(os, "preadv"):
            return os.preadv(self.fileno(), memories, offset)
        self.seek(offset)
        return self.readinto(memories[0])

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Small ranges from all over the file; see the function of this name."""
        return read_each(self.fileno(), ranges)

    def stop(self) -> None:
        """Do nothing: what a disk reads ends by itself."""

    def forget(self, offset: int = 0, nbytes: int = 0) -> None:
        """Give back the cached pages of a range (0 bytes: to the end), where the system can be told so."""
        _advise(self.fileno(), "POSIX_FADV_DONTNEED", *(_pages(offset, nbytes) if nbytes else (offset, 0)))


class PastCache(FileReader):
    """A local file, read past the page cache (O_DIRECT), in whole pages, through a buffer.

    The buffer is a huge page. On pages of 4 KiB, of which a disk takes some hundred at a time, a cold load
    took 0.34 s where 0.21 go through the cache; on a huge one 0.19 (548 MB).
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, os.O_DIRECT)
        memory = mmap.mmap(-1, 2 * BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        memory.madvise(mmap.MADV_HUGEPAGE)
        begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % BUFFER_BYTES
        self.buffer = memoryview(memory)[begin : begin + BUFFER_BYTES]

    def read_once(self, memories: Sequence[memoryview], offset: int) -> int:
        """Fill memories in order, as far as one read goes; returns its bytes."""
        page, nbytes = _pages(offset, sum(map(len, memories)))
        end = os.preadv(self.fileno(), [self.buffer[:nbytes]], page)
        at = begin = min(offset - page, end)
        for memory in memories:
            count = min(len(memory), end - at)
            memory[:count] = self.buffer[at : at + count]
            at += count
        return at - begin


@dataclass(frozen=True, slots=True, order=True)
class ByteSource:
    """Where bytes lie, read by ranges: a local file. `str` is what messages say."""

    is_local: ClassVar[bool] = True
    can_map: ClassVar[bool] = True
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def state(self) -> FileState:
        """Its state now. Raises CheckpointNotFoundError, and CheckpointError for what is no plain file."""
        return FileState.of(_plain(self.path))

    def open(self) -> BinaryIO:
        """The file, buffered, for headers."""
        return open(self.path, "rb", opener=open_plain)

    def sibling(self, name: str) -> ByteSource:
        """The file of this name, relative to its folder, there or not."""
        return ByteSource(self.path.parent / name)

    def reader(self, *, past_cache: bool = False, ahead: Sequence[tuple[int, int]] = ()) -> FileReader:
        """The file for one thread, unbuffered; past the page cache, which takes BUFFER_BYTES, if asked to.

        `ahead` are the ranges (begin, end) that will be read, in order, for sources whose requests are dear.
        """
        return (PastCache if past_cache else FileReader)(self.path)

    def check_sha256(self) -> bool:
        """Whether its content was compared with a hash that is stated of it: of a local file none is."""
        return False

    def is_best_past_cache(self) -> bool:
        """Whether most of it is not in the page cache, and reading past that (O_DIRECT) is as fast here."""
        try:
            if "[never]" in HUGE_PAGES.read_text():
                return False
            with PastCache(self.path) as trial:
                trial.read_once([memoryview(bytearray(1))], 0)
            with FileReader(self.path) as file:
                _advise(file.fileno(), "POSIX_FADV_RANDOM")
                places = (self.state().size * i // SAMPLES for i in range(SAMPLES))
                samples = [_read_cached(file.fileno(), 1, place) for place in places]
        except (AttributeError, OSError):  # no such calls, or a file system that does not take them
            return False
        return samples.count(None) > SAMPLES // 2

    def map(self) -> torch.UntypedStorage:
        """A private mapping of the whole file, which may be larger than memory and swap (MAP_NORESERVE).

        It keeps no descriptor: a model may have more files than a process may have open. `in_memory` reads
        tensors over it. Raises InsufficientMemoryError where the address space is too small for it.
        """
        with self.open() as file:
            try:
                return mapped(file.fileno(), self)
            except OSError as error:
                if error.errno != errno.ENOMEM:
                    raise
                said = f"{self}: its {self.state().size} bytes cannot be mapped ({error.strerror})"
                raise InsufficientMemoryError(
                    f'{said}; raise `ulimit -v`, or use strategy="stream"'
                ) from None

    def forget(self) -> None:
        """Give the cached pages of the whole file back, once the disk has them."""
        with FileReader(self.path) as file:
            os.fsync(file.fileno())
            file.forget()


# What is mapped: by its first byte's address, the one after its last, and of which file in which state.
_mappings: dict[int, tuple[int, ByteSource, FileState]] = {}


def mapped(file: int, source: ByteSource | None = None) -> torch.UntypedStorage:
    """A file's pages, put over empty ones that Python gives back in the end: its own mappings of a file keep
    a descriptor as long as they live. Without a source, a file that nobody else can reach."""
    found, private = os.fstat(file), mmap.MAP_PRIVATE | MAP_NORESERVE
    pages = mmap.mmap(-1, found.st_size, flags=private | mmap.MAP_ANONYMOUS)
    storage = torch.frombuffer(pages, dtype=torch.uint8).untyped_storage()
    address, place = storage.data_ptr(), ctypes.CDLL(None, use_errno=True).mmap
    place.restype, flags = ctypes.c_void_p, private | MAP_FIXED
    size, begin = ctypes.c_size_t(found.st_size), ctypes.c_long(0)
    put = place(ctypes.c_void_p(address), size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, begin)
    if put != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    if source:
        note_mapping(pages, address, found.st_size, source, FileState.of(found))
    return storage


def note_mapping(owner: object, address: int, nbytes: int, source: ByteSource, state: FileState) -> None:
    """Have `in_memory` know that a file is mapped there as long as `owner` lives."""
    weakref.finalize(owner, _mappings.pop, address, None).atexit = False
    _mappings[address] = address + nbytes, source, state


def in_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that lies in a mapping, copied out of it, its axes in the same order; any other as it is.

    The kernel copies, about as fast as we would: where the file was truncated meanwhile it says so, while a
    read of our own would end the process (SIGBUS). Raises CheckpointError then, and where the file was
    written to.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
        return tensor
    address, around = tensor.data_ptr(), list(_mappings.items())
    known = next((found for begin, found in around if begin <= address < found[0]), None)
    try:
        memory = open(MEMORY, "rb", buffering=0) if known else None  # noqa: SIM115  closed below
    except OSError:  # no /proc
        memory = None
    if known is None or memory is None:
        return tensor
    with memory:
        copied = _copied(tensor, partial(_fill, memory.fileno(), known[1]))
    _require_same(*known[1:])
    return copied


def _copied(tensor: torch.Tensor, fill: Callable[[memoryview, int], None]) -> torch.Tensor:
    """What `fill` puts into fresh memory from a tensor's address; row by row where half of it is gaps."""
    address, size, stride = tensor.data_ptr(), tensor.element_size(), list(tensor.stride())
    axis = max(range(tensor.dim()), key=lambda axis: (tensor.shape[axis] > 1) * stride[axis], default=None)
    count = 1
    if axis is not None and _extent(tensor) > 2 * tensor.numel():
        count, row = tensor.shape[axis], _extent(tensor.select(axis, 0))
        step, stride[axis] = stride[axis] * size, row
        flat = _fresh(count * row, tensor.dtype)
    else:
        step, flat = 0, _fresh(_extent(tensor), tensor.dtype)
    memory, width = memory_of(flat), len(flat) * size // count
    for number in range(count):
        fill(memory[number * width : (number + 1) * width], address + number * step)
    return flat.as_strided(tensor.shape, stride)


def _fresh(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Fresh memory that goes back to the system when it is let go.

    Of torch's own, pieces that are copied and what is made of them lie in turn in malloc's memory; a hole is
    filled by a smaller one, and a load kept up to two thirds more than its model (a cast one of 34 MiB: 57).
    """
    pages = mmap.mmap(-1, numel * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=dtype)


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to the last."""
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _fill(memory: int, source: ByteSource, place: memoryview, address: int) -> None:
    while place:
        try:
            count = os.preadv(memory, [place], address)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise CheckpointError(source, "was truncated while it was being read. Load it again.") from None
        place, address = place[count:], address + count


def _require_same(source: ByteSource, state: FileState) -> None:
    """Raise CheckpointError if a mapped file was written to; one that was replaced or deleted stays."""
    with suppress(FileNotFoundError):
        now = FileState.of(os.stat(source.path))
        if now.inode == state.inode and now != state:
            raise CheckpointError(source, CHANGED)


# ---- places ------------------------------------------------------------------------------------------------


def lies(place: Place) -> bool:
    """Whether something is there, be it a link to nothing."""
    return os.path.lexists(place) if isinstance(place, Path) else place.exists()


def children(folder: Place, pattern: str = "*") -> list[Place]:
    """What lies in a folder under a name of this pattern, in the order of the names."""
    found: list[Place] = [*folder.glob(pattern)]
    return sorted(found, key=str)


def source_of(place: Place) -> ByteSource:
    """What reads a file, wherever it lies."""
    return ByteSource(place) if isinstance(place, Path) else place.source


# ---- small reads -------------------------------------------------------------------------------------------


def read_all(source: ByteSource, most: int) -> bytes:
    """The content of a file of at most so many bytes. Raises CheckpointError for a larger or an empty one.

    In /proc are files that say they are empty, and have no end.
    """
    size = source.state().size
    if not 0 < size <= most:
        said = f"has {size} bytes; the limit is {most >> 20} MiB" if size else "is empty; copy it again"
        raise CheckpointError(source, said)
    with source.open() as file:
        return file.read(size)


def _first(memories: Iterable[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of some memories, as they lie."""
    found: list[memoryview] = []
    for memory in islice(memories, MOST_MEMORIES):
        found.append(memory[:nbytes])
        nbytes -= len(found[-1])
        if not nbytes:
            break
    return found


def _advise(file: int, advice: str, offset: int = 0, nbytes: int = 0) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, offset, nbytes, getattr(os, advice))


def _pages(offset: int, nbytes: int) -> tuple[int, int]:
    """Offset and bytes of all pages that a range touches; the kernel itself would round inwards."""
    begin = offset // PAGE * PAGE
    return begin, -(-(offset + nbytes) // PAGE) * PAGE - begin


def _read_cached(file: int, nbytes: int, offset: int) -> bytes | None:
    """A range from the page cache; None if it is known not to be there, b"" if the system cannot tell."""
    memory = bytearray(nbytes)
    try:
        return bytes(memory) if os.preadv(file, [memory], offset, os.RWF_NOWAIT) == nbytes else None
    except BlockingIOError:
        return None
    except (AttributeError, OSError):  # no such call, or a file system that cannot tell
        return b""


def read_each(file: int, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Small ranges (offset, bytes) from all over a file, each shorter where the file ends in it.

    Uncached pages are requested from the disk together and dropped again: a lone page left in the cache
    breaks up what the system later reads ahead, and cost a cold load a quarter of its time.
    """
    _advise(file, "POSIX_FADV_RANDOM")  # or the system takes neighbours of a range along
    found = [(each, _read_cached(file, each[1], each[0])) for each in ranges]
    cold = [_pages(*each) for each, known in found if known is None]
    for offset, nbytes in cold:
        _advise(file, "POSIX_FADV_WILLNEED", offset, nbytes)
    parts = [known or _pread(file, nbytes, offset) for (offset, nbytes), known in found]
    for offset, nbytes in cold:
        _advise(file, "POSIX_FADV_DONTNEED", offset, nbytes)
    _advise(file, "POSIX_FADV_NORMAL")
    return parts


def _pread(file: int, nbytes: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file, nbytes, offset)
    os.lseek(file, offset, os.SEEK_SET)
    return os.read(file, nbytes)
