"""Files that lie elsewhere: folders of names, paths in them, and sources that read them by ranges.

How a file is found and how its ranges are read is the business of whoever makes a `Remote`: `http_ranges` for
addresses, `hub` for repositories, `on_fsspec` for what that package knows. Nothing is written to disk.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import partial
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, ClassVar, Protocol

import torch

from gpt2lite.checkpoint.source import STEP, ByteSource, FileState
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError, UsageError, first_line

PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds before each further attempt
LONGEST_PAUSE = 60.0  # that a server may ask for
BLOCK = 64 << 10  # what headers are fetched by; a request costs more than its bytes
INSTEAD = "or download it and pass the file"


class Reader(AbstractContextManager[Any], Protocol):
    """What reads ranges of a file, for one thread."""

    def read_into(self, memories: Iterable[memoryview], offset: int) -> None:
        """Fill one memory after the other from byte `offset`."""

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Small ranges (offset, bytes) from all over the file."""

    def forget(self, offset: int = 0, nbytes: int = 0) -> None:
        """Give back what the system caches of a range."""

    def stop(self) -> None:
        """Have a read in another thread end at once."""


@dataclass(frozen=True, slots=True)
class Located:
    """Where a file's bytes are asked for: `headers` go to that address alone.

    `tag` is what changes with the content, "" where nobody says; `sha256` the hash that is stated of it.
    """

    address: str
    size: int
    tag: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    sha256: str | None = None


# ---- patience ----------------------------------------------------------------------------------------------


class TransientError(Exception):
    """What may go well at the next attempt, after `pause` seconds where a server said so."""

    def __init__(self, said: object, *, pause: float = 0.0, has_moved: bool = False) -> None:
        super().__init__(said)
        self.pause, self.has_moved = pause, has_moved


class Patience:
    """How long to wait before the next attempt; there are as many as PAUSES for each STEP bytes."""

    def __init__(self) -> None:
        self.left, self.nbytes = iter(PAUSES), 0

    def gained(self, nbytes: int) -> None:
        """Note that something came."""
        self.nbytes += nbytes

    def pause_after(self, error: Exception) -> float | None:
        """Seconds, or None where it is enough."""
        if self.nbytes >= STEP:
            self.left, self.nbytes = iter(PAUSES), 0
        pause, asked = next(self.left, None), getattr(error, "pause", 0.0)
        return None if pause is None or asked > LONGEST_PAUSE else max(pause, asked)


def gave_up(where: object, what: str, error: Exception) -> CheckpointError:
    """The error after the last attempt."""
    return CheckpointError(where, f"{what}: {first_line(error)}. Check the network and try again, {INSTEAD}")


# ---- a folder and what is in it ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Remote:
    """A folder elsewhere: the names in it that can be seen, how each is found, and what reads ranges of it.

    `find` raises CheckpointNotFoundError for a name that is not there, and TransientError. What was found is
    `known`, what answers said of their content `tags`, headers that were read are in `blocks`, for as long as
    somebody holds a path in the folder.
    """

    address: str
    names: frozenset[str]
    find: Callable[[str], Located]
    read: Callable[[RemoteSource, Sequence[tuple[int, int]]], Reader]
    known: dict[str, Located] = field(default_factory=dict)
    blocks: dict[tuple[str, int], bytes] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def located(self, name: str) -> Located:
        """Where a file lies, found when it is first asked for. Raises CheckpointError after all attempts."""
        patience = Patience()
        while name not in self.known:
            try:
                self.known[name] = self.find(name)
            except TransientError as error:
                if (pause := patience.pause_after(error)) is None:
                    raise gave_up(f"{self.address}/{name}", "cannot be found", error) from None
                time.sleep(pause)
        return self.known[name]

    def locate_again(self, name: str) -> Located:
        """Where it lies now, asked once. Raises CheckpointError if it is another file, TransientError."""
        was, now = self.located(name), self.find(name)
        if (was.size, was.tag) != (now.size, now.tag):
            raise CheckpointError(f"{self.address}/{name}", "changed while it was being read. Load it again.")
        self.known[name] = now
        return now


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """A file or folder in a `Remote`, with those of pathlib's methods that opening a checkpoint needs.

    As text it is its address, so that it can be passed wherever a path can.
    """

    remote: Remote
    inner: PurePosixPath

    def __str__(self) -> str:
        return f"{self.remote.address}/{self.inner}" if self.inner.name else self.remote.address

    def __fspath__(self) -> str:
        return str(self)

    def __truediv__(self, name: str) -> RemotePath:
        return replace(self, inner=self.inner / name)

    @property
    def name(self) -> str:
        """The last part, of the folder itself its address's."""
        return self.inner.name or self.remote.address.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.inner.stem

    @property
    def suffix(self) -> str:
        """The suffix, with its dot."""
        return self.inner.suffix

    @property
    def parent(self) -> RemotePath:
        """The folder; of the outermost, itself."""
        return replace(self, inner=self.inner.parent)

    def with_name(self, name: str) -> RemotePath:
        """Another file of the same folder; beside the outermost nothing can be seen."""
        return replace(self, inner=self.inner.parent / name)

    def with_suffix(self, suffix: str) -> RemotePath:
        """The same name with another suffix."""
        return self.with_name(PurePosixPath(self.name).with_suffix(suffix).name)

    @property
    def source(self) -> RemoteSource:
        """What reads it."""
        return RemoteSource(self)

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def is_file(self) -> bool:
        """Whether a file of this name can be seen."""
        return str(self.inner) in self.remote.names

    def is_dir(self) -> bool:
        """Whether some file lies below."""
        return not self.inner.name or any(self.inner in PurePosixPath(n).parents for n in self.remote.names)

    def exists(self) -> bool:
        """Whether it is either."""
        return self.is_file() or self.is_dir()

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """What lies in the folder under a name of this pattern."""
        below = (PurePosixPath(name) for name in self.remote.names)
        inside = {path.parts[len(self.inner.parts)] for path in below if self.inner in path.parents}
        return (self / name for name in inside if fnmatchcase(name, pattern))


Place = Path | RemotePath


@dataclass(frozen=True, slots=True, order=True)
class RemoteSource(ByteSource):
    """A file elsewhere, read by ranges. Its readers see to it that all of them are of one content."""

    is_local: ClassVar[bool] = False
    can_map: ClassVar[bool] = False
    path: RemotePath  # type: ignore[assignment]

    @property
    def located(self) -> Located:
        """Where it lies."""
        return self.path.remote.located(str(self.path.inner))

    def state(self) -> FileState:
        """As it was found; what is read later and is not of that content is an error there."""
        found = self.located
        return FileState(found.size, 0, 0, found.tag)

    def open(self) -> BinaryIO:
        """The file, in blocks that are fetched once, for headers."""
        return _Blocks(self)  # type: ignore[return-value]

    def sibling(self, name: str) -> RemoteSource:
        """The file of this name, relative to its folder, there or not."""
        return RemoteSource(self.path.parent / name)

    def reader(  # type: ignore[override]
        self, *, past_cache: bool = False, ahead: Sequence[tuple[int, int]] = ()
    ) -> Reader:
        """What reads it, for one thread; `ahead` are the ranges that will be read, in order."""
        return self.path.remote.read(self, ahead)

    def is_best_past_cache(self) -> bool:
        """No."""
        return False

    def map(self) -> torch.UntypedStorage:
        """Raises UsageError."""
        raise UsageError(f'{self}: cannot be mapped where it lies; use strategy="stream", {INSTEAD}')

    def forget(self) -> None:
        """Do nothing: the system caches none of it."""

    def check_sha256(self) -> bool:
        """Read all of it, in order, and compare its hash with the one that is stated; False where none is.

        Takes 1 MiB. Raises CheckpointError.
        """
        stated, size = self.located.sha256, self.located.size
        if stated is None:
            return False
        digest, memory = sha256(), memoryview(bytearray(STEP))
        with self.reader(ahead=[(0, size)]) as reader:
            for offset in range(0, size, STEP):
                part = memory[: size - offset]
                reader.read_into([part], offset)
                digest.update(part)
        if digest.hexdigest() != stated:
            said = f"its SHA-256 is {digest.hexdigest()}, stated is {stated}; it is damaged or not that file"
            raise CheckpointError(self, said)
        return True


class _Blocks(io.RawIOBase):
    """A remote file for whoever reads its headers: seeks and small reads cost no request each."""

    def __init__(self, source: RemoteSource) -> None:
        self.source, self.size, self.at = source, source.located.size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(offset + (0, self.at, self.size)[whence], 0)
        return self.at

    def readinto(self, memory: Any) -> int:
        """Fill all of the memory, or what is left of the file."""
        view = memoryview(memory).cast("B")
        view = view[: max(self.size - self.at, 0)]
        blocks, name = self.source.path.remote.blocks, str(self.source.path.inner)
        wanted = range(self.at // BLOCK, -(-(self.at + len(view)) // BLOCK))
        if missing := [number for number in wanted if (name, number) not in blocks]:
            begin, end = missing[0] * BLOCK, min((missing[-1] + 1) * BLOCK, self.size)
            fetched = memoryview(bytearray(end - begin))
            with self.source.reader(ahead=[(begin, end)]) as reader:
                reader.read_into([fetched], begin)
            for number in range(missing[0], missing[-1] + 1):
                blocks[name, number] = bytes(fetched[number * BLOCK - begin :][:BLOCK])
        for number in wanted:
            low, high = max(self.at, number * BLOCK), min(self.at + len(view), (number + 1) * BLOCK)
            view[low - self.at : high - self.at] = blocks[name, number][low - number * BLOCK :][: high - low]
        self.at += len(view)
        return len(view)


# ---- through fsspec ----------------------------------------------------------------------------------------


class _FsspecReader:
    """Reads ranges through fsspec, STEP at a time; what it takes beside the memories is one step."""

    def __init__(self, filesystem: Any, source: RemoteSource, ahead: Sequence[tuple[int, int]]) -> None:
        self.filesystem, self.source = filesystem, source

    def __enter__(self) -> _FsspecReader:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read_into(self, memories: Iterable[memoryview], offset: int) -> None:
        """Fill one memory after the other from byte `offset`."""
        for memory in memories:
            for begin in range(0, len(memory), STEP):
                part = memory[begin : begin + STEP]
                part[:] = self._read(offset + begin, len(part))
            offset += len(memory)

    def read_each(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """Small ranges from all over the file."""
        return [self._read(offset, nbytes) for offset, nbytes in ranges]

    def _read(self, offset: int, nbytes: int) -> bytes:
        with _explained(self.source):
            found: bytes = self.filesystem.cat_file(self.source.located.address, offset, offset + nbytes)
        if len(found) != nbytes:
            said = f"{len(found)} of {nbytes} bytes came from byte {offset}; it was changed or truncated"
            raise CheckpointError(self.source, said)
        return found

    def forget(self, offset: int = 0, nbytes: int = 0) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing: a step ends by itself."""


@contextmanager
def _explained(where: object) -> Iterator[None]:
    """Errors of a file system, whose classes nobody knows, as CheckpointError."""
    try:
        yield
    except FileNotFoundError:
        raise CheckpointNotFoundError(where, "no such file or folder") from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:
        raise CheckpointError(where, f"cannot be read ({first_line(error)}); {INSTEAD}") from error


def on_fsspec(address: str) -> RemotePath:
    """The path of a file or folder at an address that fsspec knows: `s3://`, `gs://`, `memory://` …

    Raises UsageError where fsspec, or what it needs for such an address, is not installed; CheckpointError.
    """
    try:
        import fsspec

        filesystem, path = fsspec.core.url_to_fs(address)
    except (ImportError, ValueError) as error:
        scheme = address.partition("://")[0]
        do = f"pip install 'gpt2lite[remote]', and what fsspec needs for {scheme}://"
        raise UsageError(f"{address}: {first_line(error)}; {do}") from None

    def find(name: str) -> Located:
        with _explained(f"{where}/{name}"):
            info = filesystem.info(f"{folder}/{name}")
        said = (info.get(key) for key in ("ETag", "etag", "md5Hash", "mtime", "LastModified", "created"))
        tag = next((f"{value}" for value in said if value), "")
        return Located(info["name"], info["size"], tag)

    with _explained(address):
        is_file = filesystem.isfile(path)
        folder, name = path.rstrip("/").rpartition("/")[::2] if is_file else (path.rstrip("/"), "")
        found = filesystem.find(folder, maxdepth=1)
    if not found:
        raise CheckpointNotFoundError(address, "no such file or folder")
    where = address.rstrip("/").removesuffix(f"/{name}") if name else address.rstrip("/")
    names = frozenset(str(PurePosixPath(each).relative_to(folder)) for each in found)
    remote = Remote(where, names, find, partial(_FsspecReader, filesystem))
    return RemotePath(remote, PurePosixPath(name))
