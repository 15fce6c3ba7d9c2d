"""What all writers share: a tensor's bytes a few MiB at a time, and a file that appears whole or not at all.

Everything is written under a temporary name beside its destination and renamed at the end: `fill_…` functions
write where they are told, `replacing` gives them the place.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpt2lite.checkpoint.manifest import Shaped
from gpt2lite.checkpoint.source import in_memory, memory_of
from gpt2lite.devices import caller_stream, on_stream
from gpt2lite.errors import DiskFullError, UsageError

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Wrote = Callable[[int], None]  # bytes that were just written
Config = Mapping[str, Any]  # the fields of a model's config
MAX_PREFIX = 20  # characters of a temporary name that are the file's own: it must fit wherever the file does
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
NO_PLACE = {errno.ELOOP: "its links form a loop", errno.ENAMETOOLONG: "longer than the file system allows"}
PART = re.compile(r"\..+\.[0-9a-f]{8}\.part")
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


def stored_bytes(tensors: Iterable[TensorToWrite]) -> int:
    """Bytes of all that will be written, those that share another's once."""
    return sum(tensor.nbytes for tensor in tensors if not tensor.shares)


def counting(progress: Progress, tensors: Sequence[TensorToWrite]) -> Wrote:
    """A callback that adds up the bytes written and reports them to `progress`."""
    total, done = stored_bytes(tensors), 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return wrote


def _flush(path: Path) -> None:
    """Have the disk take a file, or a folder and all in it."""
    for inner in path.iterdir() if path.is_dir() else ():
        _flush(inner)
    _sync(path)


def _sync(path: Path) -> None:
    """Have the disk take a file's content, or which names a folder has."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a folder, on a file system that keeps those otherwise
            raise
    finally:
        os.close(opened)


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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it; torch's writers put their own in the place of the system's."""
    while error is not None:
        yield error
        for failed, *_ in getattr(error, "failures", {}).values():  # of torch.distributed.checkpoint's
            yield from _causes(failed)
        error = error.__cause__ or error.__context__


@contextmanager
def full_disk_named(folder: Path, left: Callable[[], int] = lambda: 0) -> Iterator[None]:
    """Where writing fails for want of room, raise DiskFullError; `left` says how many bytes were to come."""
    try:
        yield
    except DiskFullError:
        raise
    except BaseException as error:
        codes = (cause.errno for cause in _causes(error) if isinstance(cause, OSError))
        if (code := next((code for code in codes if code in NO_ROOM), None)) is None:
            raise
        raise DiskFullError(folder, code, needed=left(), free=shutil.disk_usage(folder).free) from error


def _part_of(target: Path) -> Path:
    """The folder beside a destination in which its next content is made: always the same."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()[:8]
    return target.with_name(f".{target.name[:MAX_PREFIX]}.{digest}.part")


def _is_made(folder: Path) -> bool:
    try:
        folder.mkdir(0o700)
    except FileExistsError:
        return False
    return True


def _is_locked(held: int, is_new: bool) -> bool:
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody knows whether the one who made it lives
        return is_new
    return True


def _lock(folder: Path, target: Path) -> int:
    """Make a folder that no other process or thread has; returns its descriptor, whose closing frees it.

    The system frees it however a process ends, so that one which is there and free was left by one that was
    killed. Raises UsageError where it is not free.
    """
    while True:
        is_new = _is_made(folder)
        with suppress(FileNotFoundError):  # whoever had it has just finished
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            if not _is_locked(held, is_new):
                os.close(held)
                said = f"another process is writing it, in {folder.name}; wait, or choose another name"
                raise UsageError(f"{target}: {said}")
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(held), os.stat(folder)):
                    return held
            os.close(held)


@contextmanager
def making(target: Path, folder: Path | None = None) -> Iterator[Path]:
    """An empty folder beside a destination for its next content, which goes in the end with all in it.

    Raises UsageError where another process has it.
    """
    folder = folder or _part_of(target)
    held = _lock(folder, target)
    try:
        for left in folder.iterdir():  # by one that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(held)


def _hand_on(replaced: os.stat_result, path: Path) -> None:
    """Give a file the owner, as far as that is allowed, and the mode of the one that it replaces."""
    for owner, group in ((replaced.st_uid, -1), (-1, replaced.st_gid)):
        with suppress(PermissionError):
            os.chown(path, owner, group)
    os.chmod(path, stat.S_IMODE(replaced.st_mode))


def _size_of(path: Path) -> int:
    return sum(file.lstat().st_size for file in path.rglob("*") if file.is_file())


def remove_parts(folder: Path) -> None:
    """Remove from a folder what killed processes left there of files that may never be written again."""
    for found in filter(PART.fullmatch, os.listdir(folder)):
        with suppress(UsageError), making(folder / found, folder / found):
            pass


@contextmanager
def replacing(path: Path, nbytes: int = 0) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when not.

    A link is followed, and a file that is replaced hands on its mode, and its owner where that is allowed.
    What is written there is on the disk before it is renamed, and the new name before this returns. A process
    that is killed leaves the old file, and beside it a folder `.<name>.….part`, which the next that writes
    there removes. `nbytes` are about to be written, if it is known.

    Raises UsageError as `destination_of`, and where another process is writing there; DiskFullError.
    """
    target = destination_of(path)
    with making(target) as folder:
        destination_of(path)  # again: another process may have finished meanwhile
        temporary = folder / target.name
        with full_disk_named(target.parent, lambda: nbytes and max(nbytes - _size_of(folder), 1)):
            yield temporary
            _flush(temporary)
            if (replaced := state_of(target)) is not None:
                _hand_on(replaced, temporary)
            os.replace(temporary, target)
        _sync(target.parent)


def write_whole(
    fill: Fill, path: Path, tensors: Sequence[TensorToWrite], progress: Progress, config: Config | None = None
) -> None:
    """Write a file that appears whole or not at all."""
    with replacing(path, stored_bytes(tensors)) as temporary:
        fill(temporary, tensors, counting(progress, tensors), config)


def require_new_folder(folder: Path) -> None:
    """Raise UsageError where a folder is to be made and something lies already."""
    if state_of(folder) is not None:
        kind = "already exists" if folder.is_dir() else "already exists as a file"
        raise UsageError(f"{folder}: {kind}; choose a new folder")


def require_space(path: Path, nbytes: int) -> None:
    """Raise DiskFullError before writing `nbytes` into a folder, or a file, if the disk has no room.

    Raises UsageError for a file as `destination_of`.
    """
    folder = path if os.path.isdir(path) else destination_of(path).parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise DiskFullError(folder, errno.ENOSPC, needed=nbytes, free=free)
