"""TensorFlow's V2 checkpoints, as OpenAI released GPT-2: `<prefix>.index` and `<prefix>.data-0000k-of-0000n`.

The index is a LevelDB table from names to `BundleEntryProto`; the data files are the tensors' bytes in a row.
Formats: https://github.com/google/leveldb/blob/main/doc/table_format.md and
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from gpt2lite.checkpoint.crc32c import crc32c, masked
from gpt2lite.checkpoint.manifest import (
    MAX_ENTRIES,
    MAX_NAME,
    Manifest,
    TensorSpan,
    are_sizes,
    contiguous_stride,
    is_countable,
    validate,
)
from gpt2lite.checkpoint.reading import memory_of, read_bytes_into
from gpt2lite.checkpoint.source import ByteSource, FileState, LocalFile
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

FOOTER_BYTES = 48
MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
TRAILER_BYTES = 5  # after each block: a type and a masked CRC-32C of block and type
UNCOMPRESSED = 0
MAX_INDEX_BYTES = 1 << 20  # GPT-2 XL with its optimizer takes 60 KB; keys that share grow a thousandfold
MAX_BLOCKS = 1000  # TensorFlow's hold 256 KiB each; thousands of tiny ones would only cost time
MAX_VERSION = 1  # of the bundle's format, which has had no other
CHUNK_BYTES = 1 << 20  # of a tensor, whose sum is being checked
VARINT, FIXED64, DELIMITED, FIXED32 = 0, 1, 2, 5
WIDTHS = {FIXED64: 8, FIXED32: 4}
MAX_NOTE = 1 << 16  # characters of the file `checkpoint` that are read
MAX_SHOWN = 80  # characters of a name that may be anything
SLICES, UNKNOWN_RANK = 7, 3  # fields
STRING = 7  # the only dtype that is not a run of numbers; TensorFlow 2 keeps a description of objects in one

DTYPES = {
    1: torch.float32,
    2: torch.float64,
    3: torch.int32,
    4: torch.uint8,
    5: torch.int16,
    6: torch.int8,
    8: torch.complex64,
    9: torch.int64,
    10: torch.bool,
    14: torch.bfloat16,
    17: torch.uint16,
    18: torch.complex128,
    19: torch.float16,
    22: torch.uint32,
    23: torch.uint64,
}


class Message(NamedTuple):
    """A protocol buffer by field number: the last of its numbers, all of its strings and messages."""

    numbers: dict[int, int]
    parts: dict[int, list[bytes]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor as the index describes it, before anything is believed."""

    name: str
    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    nbytes: int
    crc: int


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"{what}. It is truncated or damaged: copy or download it again.")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at byte `at`, seven bits a byte, and where it ends."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at + place + 1
    raise _damaged("a number in it has no end")


def _message(data: bytes) -> Message:
    """The fields of one message; those inside of its parts stay bytes, so nothing recurses."""
    message, at = Message({}, {}), 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == VARINT:
            message.numbers[field], at = _varint(data, at)
            continue
        length, at = _varint(data, at) if kind == DELIMITED else (WIDTHS.get(kind, len(data)), at)
        value, at = data[at : at + length], at + length
        if at > len(data):
            raise _damaged(f"a field of kind {kind} and {length} bytes reaches past its message")
        if kind == DELIMITED:
            message.parts.setdefault(field, []).append(value)
        else:
            message.numbers[field] = int.from_bytes(value, "little")
    return message


def _block(index: bytes, handle: tuple[int, int]) -> bytes:
    """The contents of one block, checked against its sum."""
    offset, size = handle
    end = offset + size
    if end + TRAILER_BYTES > len(index) - FOOTER_BYTES:
        blocks_end = len(index) - FOOTER_BYTES
        raise _damaged(f"a block lies in bytes {offset} to {end}, its blocks end at {blocks_end}")
    compression, stored = index[end], int.from_bytes(index[end + 1 : end + TRAILER_BYTES], "little")
    if masked(crc32c([index[offset : end + 1]])) != stored:
        raise _damaged(f"the block in bytes {offset} to {end} does not agree with its sum")
    if compression != UNCOMPRESSED:
        raise CheckpointError(
            f"the block at byte {offset} is compressed (type {compression}, 1 is snappy), which TensorFlow "
            "checkpoints never are. Save it again with TensorFlow."
        )
    return index[offset:end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block. A key leaves out what it shares with the key before."""
    restarts = int.from_bytes(block[-4:], "little")  # places for a binary search, which nobody needs here
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise _damaged(f"a block of {len(block)} bytes announces {restarts} restarts")
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or shared + rest > MAX_NAME or at + rest + length > end:
            raise _damaged(
                f"a name shares {shared} bytes with one of {len(key)} and has {rest} of its own and {length} "
                f"of value, {end - at} bytes before the end; names end at {MAX_NAME}"
            )
        key = key[:shared] + block[at : at + rest]
        at += rest + length
        yield key, block[at - length : at]


def _handle(data: bytes, at: int = 0) -> tuple[tuple[int, int], int]:
    """(offset, size) of a block, and where the handle ends."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _table(index: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the whole table, every block checked, in the order that the format demands."""
    if len(index) < FOOTER_BYTES or not index.endswith(MAGIC):
        raise _damaged(f"its {len(index)} bytes do not end as a TensorFlow index does")
    footer = index[-FOOTER_BYTES : -len(MAGIC)]
    filters, at = _handle(footer)
    directory, _ = _handle(footer, at)
    _block(index, filters)
    previous, free = None, 0
    for number, (_, value) in enumerate(_pairs(_block(index, directory))):
        handle, _ = _handle(value)
        if number >= MAX_BLOCKS:
            raise _damaged(f"has more than {MAX_BLOCKS} blocks")
        if handle[0] < free:
            raise _damaged(f"a block begins at byte {handle[0]}, the one before ends at {free}")
        free = sum(handle) + TRAILER_BYTES
        for key, content in _pairs(_block(index, handle)):
            if previous is not None and key <= previous:
                raise _damaged(
                    f"the name {key[:MAX_SHOWN]!r} comes after {previous[:MAX_SHOWN]!r}, names must rise"
                )
            previous = key
            yield key, content


def _shards(header: bytes) -> int:
    """How many data files there are, from the bundle's header."""
    numbers, parts = _message(header)
    count, big_endian = numbers.get(1, 0), numbers.get(2, 0)
    needs = max((_message(version).numbers.get(2, 0) for version in parts.get(3, [])), default=0)
    if big_endian:
        raise CheckpointError(
            "written on a machine of other byte order, big-endian. Save it again on a little-endian one."
        )
    if needs > MAX_VERSION:
        raise CheckpointError(
            f"asks for readers of version {needs}, {MAX_VERSION} is the last that is known. "
            "Save it again with TensorFlow 2."
        )
    if not 0 < count < MAX_ENTRIES:
        raise _damaged(f"its header announces {count} data files")
    return count


def _entry(key: bytes, content: bytes) -> Entry:
    """One tensor's description. A slice's key begins with a zero byte, a sliced tensor lists its slices."""
    numbers, parts = _message(content)
    if key.startswith(b"\0") or SLICES in parts:
        shown = key.lstrip(b"\0").split(b"\0")[0][:MAX_SHOWN]
        raise CheckpointError(
            f"{shown!r} is partitioned: stored in slices, so it lies nowhere as a whole. "
            "Save it again with TensorFlow, without a partitioner."
        )
    try:
        name = key.decode()
    except UnicodeDecodeError:
        raise _damaged(f"the name {key[:MAX_SHOWN]!r} is not UTF-8") from None
    shape = _message(parts.get(2, [b""])[-1])
    sizes = tuple(_message(axis).numbers.get(1, 0) for axis in shape.parts.get(2, []))
    dtype, shard, offset, nbytes, crc = (numbers.get(field, 0) for field in (1, 3, 4, 5, 6))
    if shape.numbers.get(UNKNOWN_RANK) or not are_sizes(sizes) or not are_sizes((offset, nbytes)):
        raise _damaged(
            f"{name[:MAX_SHOWN]} has shape {sizes[:8]}, offset {offset}, {nbytes} bytes, as no tensor can"
        )
    return Entry(name, dtype, sizes, shard, offset, nbytes, crc)


def _read_index(path: Path) -> tuple[list[Path], list[Entry]]:
    """The data files that the index announces and the tensors that it describes, strings left out."""
    with open(path, "rb") as file:
        index = file.read(MAX_INDEX_BYTES + 1)
    try:
        if len(index) > MAX_INDEX_BYTES:
            raise CheckpointError(f"is larger than {MAX_INDEX_BYTES >> 10} KiB, which no model's index is")
        table = _table(index)
        key, header = next(table, (None, b""))
        if key != b"":
            raise _damaged(f"begins with the entry {key and key[:MAX_SHOWN]!r}, not with the header")
        shards = _shards(header)
        entries = [_entry(key, content) for key, content in table]
    except CheckpointError as error:
        raise CheckpointError(path, f"{error}") from None
    prefix = path.name.removesuffix(".index")
    files = [path.with_name(f"{prefix}.data-{shard:05}-of-{shards:05}") for shard in range(shards)]
    return files, [entry for entry in entries if entry.dtype != STRING]


def _states(index: Path, shards: list[Path]) -> dict[ByteSource, FileState]:
    try:
        return {LocalFile(file): LocalFile(file).state() for file in (index, *shards)}
    except CheckpointNotFoundError as error:
        raise CheckpointNotFoundError(
            f"{error}. {index.name} needs {len(shards)} data files beside it: copy or download them too."
        ) from None


def _span(path: Path, entry: Entry, shards: list[Path]) -> TensorSpan:
    dtype, shape = DTYPES.get(entry.dtype), entry.shape
    if dtype is None:
        raise CheckpointError(
            path,
            f"{entry.name} has TensorFlow's dtype {entry.dtype}, which is not read; known: "
            f"{' '.join(f'{code} ({dtype})' for code, dtype in DTYPES.items())}",
        )
    if entry.shard >= len(shards):
        raise CheckpointError(
            path, f"{entry.name} lies in data file {entry.shard}, counted from 0, of {len(shards)}"
        )
    if not is_countable(shape, dtype):
        raise CheckpointError(path, f"{entry.name} has shape {shape}, more bytes than can be counted")
    source, stride = LocalFile(shards[entry.shard]), contiguous_stride(shape)
    span = TensorSpan(entry.name, dtype, shape, stride, source, entry.offset)
    if entry.nbytes != span.nbytes:
        raise CheckpointError(
            path, f"{entry.name} takes {entry.nbytes} bytes, {dtype} {shape} needs {span.nbytes}"
        )
    return span


def _check_apart(spans: Iterable[TensorSpan]) -> None:
    """No byte may belong to two tensors: TensorFlow writes one after the other."""
    ends: dict[ByteSource, int] = {}
    for span in sorted(spans, key=lambda span: (span.offset, span.nbytes)):
        if span.offset < ends.get(span.source, 0):
            raise CheckpointError(
                span.source, f"{span.name} begins at byte {span.offset}, inside of the tensor before it"
            )
        ends[span.source] = span.offset + span.nbytes


def index_of(prefix: Path) -> Path:
    """What TensorFlow's users call a checkpoint, `model.ckpt`, is no file; its index is."""
    return prefix.with_name(prefix.name + ".index")


def current_index(folder: Path, indices: list[Path]) -> Path:
    """The only index of a folder, or the one that TensorFlow's own note `checkpoint` says is current."""
    if len(indices) == 1:
        return indices[0]
    note = folder / "checkpoint"
    if note.is_file():
        with open(note, encoding="utf-8", errors="replace") as file:
            said = re.search(r'^model_checkpoint_path: "([^"\n]*)"', file.read(MAX_NOTE), re.MULTILINE)
        current = folder / f"{Path(said[1]).name}.index" if said else None
        if current in indices:
            return current
    raise CheckpointError(
        folder,
        f"holds several TensorFlow checkpoints, and its file `checkpoint` names none of them. "
        f"Name one: {', '.join(index.name for index in indices[:5])}",
    )


def open_tf_bundle(path: Path) -> Manifest:
    """The manifest of a TensorFlow V2 checkpoint, by the path of its index; its data lie beside it.

    Names and shapes are as stored; strings are left out. Reads the index alone, a few KB, and checks its
    sums; `check_crc32c` checks those of the tensors. Raises CheckpointNotFoundError where a data file is
    missing, CheckpointError for an index that is damaged, compressed or big-endian and for tensors in slices.
    """
    shards, entries = _read_index(path)
    files = _states(path, shards)
    spans = {entry.name: _span(path, entry, shards) for entry in entries}
    _check_apart(spans.values())
    return validate(Manifest(path, "tf_bundle", spans, {}, files))


def _chunks(span: TensorSpan) -> Iterator[memoryview]:
    """A tensor's bytes in order, always in the same memory."""
    memory = memory_of(torch.empty(min(CHUNK_BYTES, span.nbytes), dtype=torch.uint8, device="cpu"))
    for begin in range(0, span.nbytes, CHUNK_BYTES):
        chunk = memory[: span.nbytes - begin]
        read_bytes_into(chunk, span.source, span.offset + begin)
        yield chunk


def check_crc32c(manifest: Manifest, progress: Callable[[int, int], None] | None = None) -> int:
    """Read every tensor of a `tf_bundle` and compare it with the sum in the index; return how many there are.

    Takes some 13 s a GB and 4 MiB of memory; `progress` is told (bytes done, bytes in all). Raises
    CheckpointError for the first tensor that differs, and where a file changed since it was opened.
    """
    manifest.check_unchanged()
    sums = {entry.name: entry.crc for entry in _read_index(manifest.path)[1]}
    total, done = sum(span.nbytes for span in manifest.tensors.values()), 0
    for name, span in manifest.tensors.items():
        found = masked(crc32c(_chunks(span)))
        if found != sums[name]:
            raise CheckpointError(
                span.source,
                f"{name}, bytes {span.offset} to {span.offset + span.nbytes}, has the sum "
                f"{found:08x}, the index says {sums[name]:08x}. It is damaged: copy or download it again.",
            )
        done += span.nbytes
        if progress:
            progress(done, total)
    manifest.check_unchanged()
    return len(sums)
