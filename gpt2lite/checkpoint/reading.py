"""Tensors out of a manifest, as the article reads them: all at once, one file at a time, or mapped."""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
import sys
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import Manifest, TensorSpan, flatten
from gpt2lite.checkpoint.page_cache import PastCache
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.errors import CheckpointError, InsufficientMemoryError, first_line, is_out_of_memory

STEP = 1 << 20
MOST_MEMORIES = 512  # of one read; Linux takes 1024
# Python names them from 3.13 on, and later.
MADV_WILLNEED, MADV_POPULATE_READ = 3, 22
LINUX_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable and without a copy; they keep the tensor alive."""
    nbytes = tensor.numel() * tensor.element_size()
    exposed = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    exposed.owner = tensor  # type: ignore[attr-defined]
    return memoryview(exposed).cast("B")


def read_bytes_into(memory: memoryview, source: ByteSource, offset: int) -> None:
    """Fill `memory` from byte `offset` of a file. Raises CheckpointError where the file ends first."""
    with open(source.path, "rb", buffering=0) as file:
        read_file_into([memory], file, offset)


def read_file_into(memories: Iterable[memoryview], file: io.FileIO, offset: int) -> None:
    """Fill one memory after the other from byte `offset` of an open file, STEP at a time across them.

    Small steps in order, on even places of the file, let the system read ahead: reads of 16 MiB by turns made
    a cold disk a third slower.
    """
    empty = deque(memory for memory in memories if memory)
    while empty:
        count = read_once(file, _first(empty, STEP - offset % STEP), offset)
        if not count:
            raise CheckpointError(file.name, f"ends at byte {offset}; it was truncated while being read")
        offset += count
        while count:
            memory = empty.popleft()
            if count < len(memory):
                empty.appendleft(memory[count:])
            count = max(count - len(memory), 0)


def _first(memories: Iterable[memoryview], nbytes: int) -> list[memoryview]:
    """The first `nbytes` of some memories, as they lie."""
    found: list[memoryview] = []
    for memory in islice(memories, MOST_MEMORIES):
        found.append(memory[:nbytes])
        nbytes -= len(found[-1])
        if not nbytes:
            break
    return found


def read_once(file: io.FileIO, memories: list[memoryview], offset: int) -> int:
    """One read that fills memories in order, or the first of them where the system has no such call."""
    if isinstance(file, PastCache):
        return file.read_into(memories, offset)
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), memories, offset)
    file.seek(offset)
    return file.readinto(memories[0])


def as_strided(flat: Tensor, span: TensorSpan) -> Tensor:
    """A span's tensor over `flat`, its bytes (uint8), which must be aligned to its dtype."""
    return flat[: span.extent].view(span.dtype).as_strided(span.shape, span.stride)


def read_span(span: TensorSpan) -> Tensor:
    """One tensor in fresh host memory."""
    flat = torch.empty(span.extent, dtype=torch.uint8, device="cpu")
    read_bytes_into(memory_of(flat), span.source, span.offset)
    return as_strided(flat, span)


def _torch_load(path: Path, device: torch.device, *, mmap: bool = False) -> object:
    try:
        return torch.load(path, map_location=device, mmap=mmap, weights_only=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(
            path, f'torch.load refuses it ({first_line(error)}); strategy="stream" does not use it'
        ) from None


def _read_zip(manifest: Manifest, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """All tensors of all files: a state dict keeps its masks to the end."""
    state: dict[str, Tensor] = {}
    for source in manifest.storages:
        state |= flatten(_torch_load(source.path, device), Tensor)  # type: ignore[arg-type]
    return state


def _read_folder(manifest: Manifest, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    return {name: _torch_load(manifest.tensors[name].source.path, device) for name in names}  # type: ignore[misc]


def _read_spans(manifest: Manifest, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    return {name: read_span(manifest.tensors[name]).to(device) for name in names}


def _zip_sizes(manifest: Manifest, names: Iterable[str]) -> Sequence[int]:
    return [size for sizes in manifest.storages.values() for size in sizes]


def _folder_sizes(manifest: Manifest, names: Iterable[str]) -> Sequence[int]:
    return [size for name in names for size in manifest.storages[manifest.tensors[name].source]]


def _span_sizes(manifest: Manifest, names: Iterable[str]) -> Sequence[int]:
    return [manifest.tensors[name].extent for name in names]


SPAN_BY_SPAN = (_read_spans, _span_sizes)
READERS = {"torch_zip": (_read_zip, _zip_sizes), "tensor_folder": (_read_folder, _folder_sizes)}


def _reader(manifest: Manifest) -> tuple[Callable[..., dict[str, Tensor]], Callable[..., Sequence[int]]]:
    return READERS.get(manifest.format, SPAN_BY_SPAN) if manifest.is_plain else SPAN_BY_SPAN


def read_tensors(manifest: Manifest, names: Iterable[str], device: torch.device) -> dict[str, Tensor]:
    """At least `names`, at once, on `device`, by the call that its users write (torch.load for `.pth`).

    Costs what torch.load costs: every byte of the file on the device, passengers included, and on the way
    there one tensor of host memory. A pickle that torch.load may refuse is read tensor by tensor.
    """
    read, _ = _reader(manifest)
    own, beside = _apart(manifest, names)
    return read(manifest, own, device) | _read_spans(manifest, beside, device)


def stored_versions(manifest: Manifest, prefix: str) -> dict[str, object]:
    """`state_dict()._metadata` of the state dict whose names begin with `prefix`: the versions of modules.

    Only torch.save keeps it, an attribute of the state dict.
    """
    if manifest.format != "torch_zip" or len(manifest.storages) != 1:
        return {}
    (path,) = (source.path for source in manifest.storages)
    node = _torch_load(path, torch.device("cpu"), mmap=zipfile.is_zipfile(path))
    while isinstance(node, dict) and (key := prefix.partition(".")[0]) in node:
        node, prefix = node[key], prefix.partition(".")[2]
    stored = getattr(node, "_metadata", {}).items()
    return {f"{name}.".removeprefix(prefix).removesuffix("."): version for name, version in stored}


def sizes_read(manifest: Manifest, names: Iterable[str]) -> Sequence[int]:
    """Bytes of every allocation that `read_tensors` makes, in its order."""
    _, sizes = _reader(manifest)
    own, beside = _apart(manifest, names)
    return [*sizes(manifest, own), *_span_sizes(manifest, beside)]


def _apart(manifest: Manifest, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """What torch.load reads, and what lies in other files: all of some formats, an adapter's tensors."""
    own: list[str] = []
    beside: list[str] = []
    for name in names:
        (own if manifest.tensors[name].source in manifest.storages else beside).append(name)
    return own, beside


def _map_file(path: Path) -> torch.UntypedStorage:
    """A private mapping of a whole file, which may be larger than memory and swap (MAP_NORESERVE).

    Raises InsufficientMemoryError where the address space is too small for it.
    """
    access: dict[str, int] = {"access": mmap.ACCESS_COPY}
    if hasattr(mmap, "MAP_PRIVATE"):
        flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", LINUX_MAP_NORESERVE)
        access = {"flags": flags, "prot": mmap.PROT_READ | mmap.PROT_WRITE}
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, **access)
        except OSError as error:
            if error.errno != errno.ENOMEM:
                raise
            raise InsufficientMemoryError(
                f"{path}: its {os.path.getsize(path)} bytes cannot be mapped ({error.strerror}). Raise the "
                'limit of the address space (`ulimit -v`), or load with strategy="stream", which maps no file'
            ) from None
    return torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()


def prefetch(tensors: Iterable[Tensor], readers: int, chunk_bytes: int) -> None:
    """Read what mapped tensors stand on and enter it into the page tables, where the system can be told so.

    `readers` threads; takes page cache and nothing else. (Linux 5.14; before, the disk is only told.)
    """
    if sys.platform != "linux":
        return
    advise = ctypes.CDLL(None).madvise
    page, step = mmap.PAGESIZE, max(chunk_bytes, STEP) // mmap.PAGESIZE * mmap.PAGESIZE

    def touch(begin: int, end: int) -> None:
        for advice in (MADV_WILLNEED, MADV_POPULATE_READ):
            advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)

    pool = ThreadPoolExecutor(readers)
    try:
        for tensor in tensors:
            begin = tensor.data_ptr() // page * page
            end = tensor.data_ptr() + tensor.untyped_storage().nbytes()
            for at in range(begin, end, step):
                pool.submit(touch, at, min(at + step, end))
        pool.shutdown(wait=True)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def map_tensors(spans: Iterable[TensorSpan]) -> dict[str, Tensor]:
    """Tensors over a private mapping of their files: no bytes are read before they are used.

    Each has a storage of its own (torch.save of one view would else write the whole file) and need not be
    aligned. Costs address space only; what is touched lies in the page cache and can be reclaimed. A file
    that is overwritten in place while mapped kills the process (SIGBUS): replace files instead, as
    `os.replace` does.
    """
    mapped: dict[ByteSource, torch.UntypedStorage] = {}
    tensors = {}
    for span in spans:
        if span.source not in mapped:
            mapped[span.source] = _map_file(span.source.path)
        storage = mapped[span.source][span.offset : span.offset + span.extent]
        if storage.nbytes() < span.extent:
            raise CheckpointError(span.source, f"ends before {span.name}; it was truncated while being read")
        tensors[span.name] = torch.empty(0, dtype=span.dtype, device="cpu").set_(
            storage, 0, span.shape, span.stride
        )
    return tensors
