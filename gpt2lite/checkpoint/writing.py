"""What all writers share: a file appears whole or not at all, where it may lie, and only where it fits.

Everything is written under a temporary name beside its destination and renamed at the end: `fill_…` functions
write where they are told, `replacing` gives them the place.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpt2lite.checkpoint.chunks import TensorToWrite
from gpt2lite.errors import UsageError

Progress = Callable[[int, int], None]  # (bytes done, bytes in all)
Wrote = Callable[[int], None]  # bytes that were just written
Config = Mapping[str, Any]  # the fields of a model's config
MAX_PREFIX = 20  # characters of a temporary name that are the file's own: it must fit wherever the file does
NO_PLACE = {errno.ELOOP: "links lead in a circle", errno.ENAMETOOLONG: "longer than the file system allows"}


def counting(progress: Progress, tensors: Iterable[TensorToWrite]) -> Wrote:
    """What adds up the bytes written of some tensors and says so to `progress`."""
    total, done = sum(tensor.nbytes for tensor in tensors if not tensor.shares), 0

    def wrote(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(done, total)

    return wrote


def _flush(path: Path) -> None:
    """Have the disk hold a file, or every file of a folder, before its name says that it does."""
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
        raise UsageError(f"{path}: is {kind}, and a file is to be written there; choose another name")
    followed = Path(os.path.realpath(path))
    if path.is_symlink() and not followed.parent.exists():
        raise UsageError(
            f"{path}: is a link to {followed}, whose folder does not exist; make it, or mend the link"
        )
    if not followed.parent.is_dir():
        wrong = "is a file, not a folder" if followed.parent.exists() else "does not exist; make it first"
        raise UsageError(f"the folder {followed.parent} {wrong}")
    return followed


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block succeeds and vanishes when not.

    A link is followed, and a file that is replaced hands on its mode. What is written there is on the disk
    before it is renamed. A process that is killed leaves the old file and a folder `.<name>.….part` beside
    it. Raises UsageError as `destination_of`.
    """
    target = destination_of(path)
    prefix = f".{target.name[:MAX_PREFIX]}."
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=".part", dir=target.parent))
    temporary = folder / target.name
    try:
        yield temporary
        _flush(temporary)
        if (replaced := state_of(target)) is not None:
            os.chmod(temporary, stat.S_IMODE(replaced.st_mode))
        os.replace(temporary, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def require_new_folder(folder: Path) -> None:
    """Raise UsageError where a folder is to be made and something lies already."""
    if state_of(folder) is not None:
        kind = "already exists" if folder.is_dir() else "is a file, and a folder is to be made there"
        raise UsageError(f"{folder}: {kind}; choose a new folder")


def require_space(path: Path, nbytes: int) -> None:
    """Raise OSError before writing `nbytes` into a folder, or a file, if the disk has no room.

    Raises UsageError for a file as `destination_of`.
    """
    folder = path if os.path.isdir(path) else destination_of(path).parent
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        said = f"{nbytes / 2**30:.1f} GiB are to be written, {free / 2**30:.1f} GiB are free"
        raise OSError(errno.ENOSPC, said, str(folder))
