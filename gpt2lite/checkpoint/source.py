"""Where bytes lie. Whoever reads a checkpoint asks a `ByteSource` for ranges and knows no path."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from gpt2lite.errors import CheckpointNotFoundError


@dataclass(frozen=True, slots=True)
class FileState:
    """What tells that a file was replaced, truncated or written to."""

    size: int
    modified_ns: int
    inode: int


class ByteSource(Protocol):
    """Bytes that lie somewhere, read by ranges. Equal for one place; `str` is what messages say."""

    @property
    def path(self) -> Path:
        """Where it lies."""

    def __hash__(self) -> int:
        """By its place."""

    def state(self) -> FileState:
        """Its state now. Raises CheckpointNotFoundError."""

    def open(self) -> BinaryIO:
        """A file object that can seek, for headers."""

    def sibling(self, name: str) -> ByteSource:
        """What lies under a name relative to its folder, there or not."""


@dataclass(frozen=True, slots=True, order=True)
class LocalFile:
    """A file that the system can open."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def state(self) -> FileState:
        """Its state now. Raises CheckpointNotFoundError."""
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            raise CheckpointNotFoundError(self.path, "no such file or folder") from None
        return FileState(found.st_size, found.st_mtime_ns, found.st_ino)

    def open(self) -> BinaryIO:
        """The file, buffered."""
        return open(self.path, "rb")

    def sibling(self, name: str) -> LocalFile:
        """The file of this name, relative to its folder, there or not."""
        return LocalFile(self.path.parent / name)
