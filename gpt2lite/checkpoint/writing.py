"""What all writers share: a tensor's bytes a few MiB at a time, and a file that appears whole or not at all.

Everything is written under a temporary name beside its destination and renamed at the end: `fill_…` functions
write where they are told, `replacing` gives them the place.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import Shaped
from gpt2lite.checkpoint.source import in_memory, memory_of
from gpt2lite.devices import caller_stream, on_stream
from gpt2lite.errors import UsageError

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Wrote = Callable[[int], None]  # bytes that were just written
Config = Mapping[str, Any]  # the fields of a model's config
MAX_PREFIX = 20  # characters of a temporary name that are the file's own: it must fit wherever the file does
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = {errno.ELOOP: "its links form a loop", errno.ENAMETOOLONG: "longer than the file system allows"}
CHUNK_BYTES = 8 << 20
TILE = (256, 112)  # of a transpose: fits the cache, and one thread does it (torch divides 32768 elements)


# ---- a tensor's bytes --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorToWrite(Shaped):
    """A tensor that will be written: `chunks()` yields its bytes in order, row-major.

    `shares` names a tensor of the same bytes that comes before it: a format that can tie stores them once.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[memoryview]]
    shares: str = ""


def _is_turned(tensor: Tensor) -> bool:
    return tensor.dim() == 2 and tensor.stride(0) == 1 and tensor.stride(1) > 1


def _turn(piece: Tensor, out: Tensor) -> None:
    """Copy a transposed view tile by tile, so that what is read across its memory stays in the cache."""
    tall, wide = TILE
    for row in range(0, piece.shape[0], tall):
        for column in range(0, piece.shape[1], wide):
            tile = slice(row, row + tall), slice(column, column + wide)
            out[tile].copy_(piece[tile])


def _joined(pieces: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Pieces side by side, cast, contiguous, on the host; a single one that already is, is not copied.

    Raises CheckpointError as `in_memory`.
    """
    pieces = [in_memory(piece) for piece in pieces]
    if len(pieces) == 1 and not _is_turned(pieces[0]):
        return pieces[0].to("cpu", dtype).contiguous()
    rows, widths = pieces[0].shape[0], [piece.shape[1] for piece in pieces]
    joined = torch.empty((rows, sum(widths)), dtype=dtype, device="cpu")
    for piece, place in zip(pieces, joined.split(widths, 1), strict=True):
        _turn(piece, place) if _is_turned(piece) and piece.device.type == "cpu" else place.copy_(piece)
    return joined


def chunks_of(parts: Sequence[Tensor], axis: int, dtype: torch.dtype) -> Iterator[memoryview]:
    """The bytes of `parts` joined along `axis` and cast, CHUNK_BYTES or a row at a time.

    Allocates one chunk at a time, two where it is mapped and transposed or cast, none for what lies ready in
    host memory; of a tensor that is divided over ranks, which must all ask, the whole.
    """
    parts = [part.full_tensor() if hasattr(part, "full_tensor") else part for part in parts]
    for sheet in [[part] for part in parts] if axis == 0 else [parts]:
        row_bytes = sum(part[:1].numel() for part in sheet) * dtype.itemsize
        step = max(1, CHUNK_BYTES // max(1, row_bytes))
        for begin in range(0, sheet[0].shape[0], step):
            yield memory_of(_joined([part[begin : begin + step] for part in sheet], dtype))


def made_ahead(chunks: Iterable[memoryview]) -> Iterator[memoryview]:
    """The same chunks in the same order, the next made in a thread while one is written: two at a time."""
    coming, stream = iter(chunks), caller_stream()

    def make() -> memoryview | None:
        with on_stream(stream):  # the caller's: a thread has another one, which waits for nothing
            return next(coming, None)

    with ThreadPoolExecutor(1) as maker:
        try:
            following = maker.submit(make)
        except RuntimeError:  # the system grants no thread
            yield from coming
            return
        while (chunk := following.result()) is not None:
            following = maker.submit(make)
            yield chunk


def join(
    name: str, parts: Sequence[Tensor], *, axis: int = 0, dtype: torch.dtype | None = None
) -> TensorToWrite:
    """Tensors along `axis` as one to write; by default in the dtype that holds them all."""
    parts = [part.detach().reshape(1) if part.dim() == 0 else part.detach() for part in parts]
    dtype = dtype or reduce(torch.promote_types, (part.dtype for part in parts))
    shape = list(parts[0].shape)
    shape[axis] = sum(part.shape[axis] for part in parts)
    return TensorToWrite(name, dtype, tuple(shape), partial(chunks_of, parts, axis, dtype))


def tensors_of(state: Mapping[str, Tensor]) -> list[TensorToWrite]:
    """A state dict to write; tied tensors share the bytes of the first. Raises UsageError on meta."""
    first: dict[tuple[object, ...], str] = {}
    found = []
    for name, tensor in state.items():
        if tensor.is_meta:
            raise UsageError(f"{name} is on the meta device and has no values to write")
        place = id(tensor) if hasattr(tensor, "device_mesh") else tensor.data_ptr()  # a DTensor's is 0
        address = (tensor.device, place, tensor.shape, tensor.stride(), tensor.dtype)
        shared = first.setdefault(address if tensor.numel() else (name,), name)
        shares = shared if shared != name else ""
        found.append(replace(join(name, [tensor]), shape=tuple(tensor.shape), shares=shares))
    return found


# ---- a file ------------------------------------------------------------------------------------------------


# Writes a new file: where, what, what to tell of each chunk, and the config to put into it.
Fill = Callable[[Path, Sequence[TensorToWrite], Wrote, Config | None], None]


def counting(progress: Progress, tensors: Iterable[TensorToWrite]) -> Wrote:
    """A callback that adds up the bytes written and reports them to `progress`."""
    total, done = sum(tensor.nbytes for tensor in tensors if not tensor.shares), 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return wrote


def _flush(path: Path) -> None:
    """Flush a file, or every file of a folder, to the disk before it gets its final name."""
    for file in path.iterdir() if path.is_dir() else (path,):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def state_of(path: Path) -> os.stat_result | None:
    """What lies at `path`, links followed; None if nothing does. UsageError for a path that never can."""
    try:
        return os.stat(path)
    except OSError as error:
        if error.errno in NO_PLACE:
            raise UsageError(f"{path}: {NO_PLACE[error.errno]}; choose another name") from None
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
    return None


def destination_of(path: Path) -> Path:
    """Where the file that is to be written at `path` will lie: a link is followed, and stays a link.

    Raises UsageError where no file can be put: its folder does not exist, the name is too long, links lead in
    a circle, or a folder, FIFO, socket or device lies there.
    """
    found = state_of(path)
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a FIFO, socket or device"
        raise UsageError(f"{path}: is {kind}, which a file cannot replace; choose another name")
    followed = Path(os.path.realpath(path))
    if not followed.parent.is_dir():
        wrong = "is a file, not a folder" if followed.parent.exists() else "does not exist; make it first"
        leads = f"{path}: is a link to {followed}; " if path.is_symlink() else ""
        raise UsageError(f"{leads}the folder {followed.parent} {wrong}")
    return followed


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Where writing fails for want of room, say where and what is free there, which the system does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM or error.filename is not None:
            raise
        free = shutil.disk_usage(folder).free
        raise OSError(error.errno, f"{error.strerror}, {free:,} bytes are free", str(folder)) from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when not.

    A link is followed, and a file that is replaced hands on its mode. What is written there is on the disk
    before it is renamed. A process that is killed leaves the old file and a folder `.<name>.….part` beside
    it. Raises UsageError as `destination_of`, OSError for a full disk.
    """
    target = destination_of(path)
    prefix = f".{target.name[:MAX_PREFIX]}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=target.parent))
    temporary = folder / target.name
    try:
        with full_disk_named(target.parent):
            yield temporary
            _flush(temporary)
        if (replaced := state_of(target)) is not None:
            os.chmod(temporary, stat.S_IMODE(replaced.st_mode))
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_whole(
    fill: Fill, path: Path, tensors: Sequence[TensorToWrite], progress: Progress, config: Config | None = None
) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path) as temporary:
        fill(temporary, tensors, counting(progress, tensors), config)


def require_new_folder(folder: Path) -> None:
    """Raise UsageError where a folder is to be made and something lies already."""
    if state_of(folder) is not None:
        kind = "already exists" if folder.is_dir() else "already exists as a file"
        raise UsageError(f"{folder}: {kind}; choose a new folder")


def require_space(path: Path, nbytes: int) -> None:
    """Raise OSError before writing `nbytes` into a folder, or a file, if the disk has no room.

    Raises UsageError for a file as `destination_of`.
    """
    folder = path if os.path.isdir(path) else destination_of(path).parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        said = f"needs {nbytes:,} bytes, {free:,} are free, {nbytes - free:,} are missing"
        raise OSError(errno.ENOSPC, said, str(folder))
