"""What lies where in a checkpoint: names, dtypes, shapes and byte ranges, without a byte of tensor data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch

from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.source import CHANGED, ByteSource, FileState
from gpt2lite.errors import CheckpointError

BOUND_CONFIG = "gpt2lite"  # the value that is the model's config as JSON, in the weights' own file
MAX_ENTRIES = 1_000_000
MAX_DEPTH = 32
MAX_NAME = 1000  # characters
MAX_RANK = 64
MAX_BYTES = 2**63 - 1  # what torch's own sizes can count


class Shaped:
    """What has a shape and a dtype, and so a size."""

    __slots__ = ()
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its elements, each once, without what lies between them."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorSpan(Shaped):
    """One tensor on disk: its first element is at byte `offset` of `source`; strides count elements.

    `checksum` is what the file says of exactly its bytes, a CRC-32; None where it says none.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    source: ByteSource
    offset: int
    checksum: int | None = None

    @property
    def is_contiguous(self) -> bool:
        """Whether the tensor lies row-major, without gaps."""
        return self.stride == contiguous_stride(self.shape)

    @property
    def extent(self) -> int:
        """Bytes on disk from the first to the last element, both included."""
        if not self.numel:
            return 0
        last = sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))
        return (last + 1) * self.dtype.itemsize

    @property
    def address(self) -> tuple[object, ...]:
        """Equal for two spans exactly when they are the same memory seen the same way: a tie."""
        place = (self.source, self.offset, self.dtype, self.shape, self.stride)
        return place if self.numel else (*place, self.name)

    def part(self, box: Sequence[range]) -> TensorSpan:
        """The part that a range of each axis leaves; its extent reaches no further than its own elements."""
        skipped = sum(rows.start * step for rows, step in zip(box, self.stride, strict=True))
        offset = self.offset + skipped * self.dtype.itemsize
        return replace(self, shape=tuple(map(len, box)), offset=offset, checksum=None)


def contiguous_stride(shape: Iterable[int]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major tensor of `shape`."""
    sizes = [max(size, 1) for size in shape]
    return tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))


def are_sizes(numbers: object) -> TypeGuard[tuple[int, ...]]:
    """Whether this tuple can be a tensor's shape, strides or byte offsets."""
    if not isinstance(numbers, tuple) or len(numbers) > MAX_RANK:
        return False
    return all(type(n) is int and 0 <= n <= MAX_BYTES for n in numbers)


def is_countable(shape: Iterable[int], dtype: torch.dtype) -> bool:
    """Whether torch can count the bytes of such a tensor; of an empty one, the bytes of its other axes."""
    return math.prod(max(size, 1) for size in shape) * dtype.itemsize <= MAX_BYTES


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents.

    `values` holds the plain numbers, strings and flags that were saved beside the tensors, by their dotted
    names, the plain attributes of objects, and an `Unread` for what is not plain; `files` the state of every
    file when it was opened; `storages` the bytes of everything that `torch.load` allocates to read a file,
    which can be more than the tensors.
    `modules` are the classes of pickled modules, by the modules' names ("" for the whole); `unreadable` says
    why a tensor is not read. `is_plain` is False for a pickle that `torch.load(weights_only=True)`
    may refuse.
    `containers` says in which dict or module of its file a tensor lies, by that one's dotted name; what is
    not there lies in the outermost. `unsaved` are tensors of pickled modules that a state dict leaves out.
    """

    path: Place
    format: str
    tensors: Mapping[str, TensorSpan]
    values: Mapping[str, object] = field(default_factory=dict)
    files: Mapping[ByteSource, FileState] = field(default_factory=dict)
    storages: Mapping[ByteSource, tuple[int, ...]] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    unreadable: Mapping[str, str] = field(default_factory=dict)
    is_plain: bool = True
    containers: Mapping[str, str] = field(default_factory=dict)
    unsaved: Mapping[str, TensorSpan] = field(default_factory=dict)

    def container_of(self, tensor: str) -> str:
        """The dotted name of the dict that holds a tensor, with a dot at its end; "" for the outermost."""
        return f"{found}." if (found := self.containers.get(tensor)) else ""

    def check_unchanged(self) -> None:
        """Raise CheckpointError if a file is not what it was when the manifest was made."""
        for source, state in self.files.items():
            if source.state() != state:
                raise CheckpointError(source, CHANGED)


@dataclass(frozen=True, slots=True)
class Unread:
    """A value that is not plain, by the name that its file gives its kind."""

    kind: str

    def __repr__(self) -> str:
        return f"<{self.kind:.60}, which cannot be read>"


def contiguous_span(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], source: ByteSource, offset: int, nbytes: int
) -> TensorSpan:
    """A row-major tensor that is said to have `nbytes`. Raises CheckpointError where it cannot."""
    span = TensorSpan(name, dtype, shape, contiguous_stride(shape), source, offset)
    if nbytes != span.nbytes or not is_countable(shape, dtype):
        needed = span.nbytes if is_countable(shape, dtype) else "more bytes than can be counted"
        what = f"{name} takes {nbytes} bytes, {dtype} {shape[:8]} needs {needed}"
        raise CheckpointError(source, what, name=name)
    return span


def joined(parts: Sequence[Manifest]) -> Manifest:
    """The manifests of several files as one, of the first one's path and format."""
    names = ("tensors", "values", "files", "storages", "modules", "unreadable", "containers", "unsaved")
    merged: dict[str, Any] = {
        name: {key: value for part in parts for key, value in getattr(part, name).items()} for name in names
    }
    return replace(parts[0], is_plain=all(part.is_plain for part in parts), **merged)


def validate(manifest: Manifest) -> Manifest:
    """Check every tensor's name and place in its file; one CheckpointError names the first that is wrong."""
    for span in manifest.tensors.values():
        if len(span.name) > MAX_NAME:
            raise CheckpointError(span.source, f"{span.name[:40]}…: a name longer than {MAX_NAME} characters")
        end, size = span.offset + span.extent, manifest.files[span.source].size
        if span.offset < 0 or end > size:
            said = f"{span.name} lies in bytes {span.offset} to {end}, the file ends at {size}"
            raise CheckpointError(span.source, f"{said}. It is truncated: copy or download it again.")
    return manifest


def contents_of(node: object) -> Iterable[tuple[object, object]] | None:
    """A container's keys or places, each with what lies there; None for all else."""
    if isinstance(node, dict):
        return node.items()
    return enumerate(node) if isinstance(node, (list, tuple)) else None


Contents = Callable[[object], Iterable[tuple[object, object]] | None]


def walk(
    node: object, visited: Iterator[int], contents: Contents, name: str = "", depth: int = 0
) -> Iterator[tuple[str, object]]:
    """(dotted name, node) for all in `node`, itself and containers too: they are what has `contents`."""
    if depth > MAX_DEPTH or next(visited) > MAX_ENTRIES or len(name) > MAX_NAME:
        limits = f"{MAX_DEPTH} levels, {MAX_ENTRIES} entries or names of {MAX_NAME} characters"
        raise CheckpointError(f"{name[:40] or 'the top'}: more than {limits}; not weights")
    yield name, node
    for key, child in contents(node) or ():
        yield from walk(child, visited, contents, dotted(name, key), depth + 1)


def dotted(name: str, key: object) -> str:
    """The name of what lies in `name` under `key`."""
    return f"{name}.{key}" if name else str(key)


def flatten(tree: object, leaf: type | tuple[type, ...]) -> dict[str, object]:
    """Nested dicts and lists → {dotted name: leaf object}.

    Raises CheckpointError for trees too deep or too large to be data.
    """
    visited = itertools.count()  # containers too: a nest of empty lists has no entry and 2**MAX_DEPTH nodes
    return {name: node for name, node in walk(tree, visited, contents_of) if isinstance(node, leaf)}
