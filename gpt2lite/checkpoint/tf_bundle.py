"""TensorFlow's V2 checkpoints, as OpenAI released GPT-2: `<prefix>.index` and `<prefix>.data-0000k-of-0000n`.

The index is a LevelDB table from names to `BundleEntryProto`; the data files are the tensors' bytes in a row.
Its checksums are ignored, as in other formats; but tensors must fit exactly, and none may overlap.
Formats: https://github.com/google/leveldb/blob/main/doc/table_format.md and
https://github.com/tensorflow/tensorflow/blob/master/tensorflow/core/protobuf/tensor_bundle.proto
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from gpt2lite.checkpoint.foreign import DAMAGED
from gpt2lite.checkpoint.manifest import MAX_NAME, Manifest, TensorSpan, are_sizes, contiguous_span
from gpt2lite.checkpoint.remote import Place
from gpt2lite.checkpoint.source import ByteSource, read_all, source_of
from gpt2lite.errors import CheckpointError, CheckpointNotFoundError

FOOTER_BYTES = 48
MAGIC = (0xDB4775248B80FB57).to_bytes(8, "little")
TRAILER_BYTES = 5  # after each block: a type and a masked CRC-32C of block and type
MAX_INDEX_BYTES = 1 << 20  # GPT-2 XL with its optimizer takes 60 KB; keys that share grow a thousandfold
MAX_TENSORS = 20_000  # of XL with its optimizer 1,740
MAX_BLOCKS = 1000  # TensorFlow's hold 256 KiB each; thousands of tiny ones would only cost time
MAX_VERSION = 1  # of the bundle's format, which has had no other
MAX_SHARDS = 10**5  # their names count in five digits
VARINT, DELIMITED = 0, 2  # kinds of fields
WIDTHS = {1: 8, 5: 4}  # bytes of the kinds that are fixed
MAX_NOTE = 1 << 16  # characters of the file `checkpoint` that are read
MAX_SHOWN = 80  # characters of a name that may be anything

# TensorFlow's DataType, from 1 on, in torch's words; "-" is a string, a quantized number, a resource
TYPES = "float32 float64 int32 uint8 int16 int8 - complex64 int64 bool - - - bfloat16"
TYPES += " - - uint16 complex128 float16 - - uint32 uint64"
DTYPES = {code: getattr(torch, name) for code, name in enumerate(TYPES.split(), 1) if name != "-"}

Handle = tuple[int, int]  # a block's first byte, and how many it has
# A protocol buffer by field number: the last of its numbers, all of its strings and messages.
Message = tuple[dict[int, int], dict[int, list[bytes]]]


def _damaged(what: str) -> CheckpointError:
    return CheckpointError(f"{what}: {DAMAGED}")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at byte `at`, seven bits a byte, and where it ends."""
    number = 0
    for place, byte in enumerate(data[at : at + 10]):
        number |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return number & 0xFFFFFFFFFFFFFFFF, at + place + 1
    raise _damaged("a varint in it never ends")


def _message(data: bytes) -> Message:
    """The fields of one message; those inside of its parts stay bytes, so nothing recurses."""
    numbers, parts, at = dict[int, int](), dict[int, list[bytes]](), 0
    while at < len(data):
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if kind == VARINT:
            numbers[field], at = _varint(data, at)
            continue
        length, at = _varint(data, at) if kind == DELIMITED else (WIDTHS.get(kind, len(data)), at)
        value, at = data[at : at + length], at + length
        if at > len(data):
            raise _damaged(f"a field of kind {kind} and {length} bytes reaches past its message")
        if kind == DELIMITED:
            parts.setdefault(field, []).append(value)
        else:
            numbers[field] = int.from_bytes(value, "little")
    return numbers, parts


def _handle(data: bytes, at: int = 0) -> tuple[Handle, int]:
    """Where a block lies, and where its handle ends."""
    offset, at = _varint(data, at)
    size, at = _varint(data, at)
    return (offset, size), at


def _pairs(index: bytes, handle: Handle) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of a block. A key leaves out what it shares with the key before."""
    offset, last = handle[0], len(index) - FOOTER_BYTES - TRAILER_BYTES
    if sum(handle) > last:
        raise _damaged(f"a block lies in bytes {offset} to {sum(handle)}, its blocks end at {last}")
    if index[sum(handle)] != 0:  # its type: not compressed
        raise CheckpointError(f"the block at byte {offset} is compressed. Save it again with TensorFlow.")
    block = index[offset : sum(handle)]
    restarts = int.from_bytes(block[-4:], "little")  # places for a binary search, which nobody needs here
    end, at, key = len(block) - 4 - 4 * restarts, 0, b""
    if end < 0:
        raise _damaged(f"a block of {len(block)} bytes announces {restarts} restarts")
    while at < end:
        shared, at = _varint(block, at)
        rest, at = _varint(block, at)
        length, at = _varint(block, at)
        if shared > len(key) or shared + rest > MAX_NAME or at + rest + length > end:
            said = f"an entry shares {shared} bytes of a {len(key)}-byte name, adds {rest} and {length}"
            raise _damaged(f"{said} of value; {end - at} are left, and names have at most {MAX_NAME}")
        key = key[:shared] + block[at : at + rest]
        at += rest + length
        yield key, block[at - length : at]


def _table(index: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values of the whole table, in the order that the format demands."""
    if len(index) < FOOTER_BYTES or not index.endswith(MAGIC):
        raise _damaged(f"its {len(index)} bytes do not end as a TensorFlow index does")
    footer = index[-FOOTER_BYTES : -len(MAGIC)]
    _, at = _handle(footer)  # of filters, which TensorFlow does not write
    directory, _ = _handle(footer, at)
    previous, free, count = None, 0, 0
    for number, (_, value) in enumerate(_pairs(index, directory)):
        handle, _ = _handle(value)
        if number >= MAX_BLOCKS:
            raise _damaged(f"has more than {MAX_BLOCKS} blocks")
        if handle[0] < free:
            raise _damaged(f"a block begins at byte {handle[0]}, the one before ends at {free}")
        free = sum(handle) + TRAILER_BYTES
        for key, content in _pairs(index, handle):
            if previous is not None and key <= previous:
                raise _damaged(f"the name {key[:MAX_SHOWN]!r} comes after {previous[:MAX_SHOWN]!r}")
            previous, count = key, count + 1
            if count > MAX_TENSORS:
                raise _damaged(f"has more than {MAX_TENSORS} tensors")
            yield key, content


def _count_shards(header: bytes) -> int:
    """How many data files there are, from the bundle's header."""
    numbers, parts = _message(header)
    needs = max((_message(version)[0].get(2, 0) for version in parts.get(3, [])), default=0)
    if numbers.get(2):
        raise CheckpointError("written on a big-endian machine. Save it again on a little-endian one.")
    if needs > MAX_VERSION:
        raise CheckpointError(f"asks for readers of version {needs}. Save it again with TensorFlow 2.")
    if not 0 < (count := numbers.get(1, 0)) < MAX_SHARDS:
        raise _damaged(f"its header announces {count} data files")
    return count


def _name(key: bytes, parts: dict[int, list[bytes]]) -> str:
    """A tensor's name. A slice's key begins with a zero byte; a sliced tensor lists its slices, field 7."""
    if key.startswith(b"\0") or 7 in parts:
        shown = key.lstrip(bytes(1)).split(bytes(1))[0][:MAX_SHOWN]
        raise CheckpointError(f"{shown!r} is partitioned: stored in slices. Save it without a partitioner.")
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise _damaged(f"the name {key[:MAX_SHOWN]!r} is not UTF-8") from None


def _span(key: bytes, content: bytes, shards: list[ByteSource]) -> TensorSpan | tuple[str, str]:
    """One tensor from its description; its name and why it is not read for a dtype that torch lacks."""
    numbers, parts = _message(content)
    name, axes = _name(key, parts), _message(parts.get(2, [b""])[-1])
    shape = tuple(_message(axis)[0].get(1, 0) for axis in axes[1].get(2, []))
    code, shard, offset, nbytes = (numbers.get(field, 0) for field in (1, 3, 4, 5))
    if axes[0].get(3) or not are_sizes(shape) or not are_sizes((offset, nbytes)):  # 3: its rank is unknown
        said = f"has shape {shape[:8]}, offset {offset}, {nbytes} bytes, which no tensor can have"
        raise _damaged(f"{name[:MAX_SHOWN]} {said}")
    if code not in DTYPES:
        return name, f"has TensorFlow's dtype {code}, which is not read"
    if shard >= len(shards):
        raise _damaged(f"{name[:MAX_SHOWN]} is in data file {shard}; the last is {len(shards) - 1}")
    return contiguous_span(name, DTYPES[code], shape, shards[shard], offset, nbytes)


def _check_apart(spans: Iterable[TensorSpan]) -> None:
    """No byte may belong to two tensors: TensorFlow writes one after the other."""
    ends: dict[ByteSource, int] = {}
    for span in sorted(spans, key=lambda span: (span.offset, span.nbytes)):
        if span.offset < ends.get(span.source, 0):
            what = f"{span.name} begins at byte {span.offset}, inside of the tensor before it"
            raise CheckpointError(span.source, what, name=span.name)
        ends[span.source] = span.offset + span.nbytes


def open_tf_bundle(source: ByteSource) -> Manifest:
    """The manifest of a TensorFlow V2 checkpoint, from its index; its data lie beside it.

    Names and shapes are as stored; strings and what else torch has no dtype for are unreadable. Reads the
    index alone, a few KB. Raises CheckpointNotFoundError where a data file is missing, CheckpointError for an
    index that is damaged, compressed or big-endian and for tensors in slices.
    """
    index = read_all(source, MAX_INDEX_BYTES)
    try:
        table = _table(index)
        key, header = next(table, (None, b""))
        if key != b"":
            raise _damaged(f"begins with the entry {key and key[:MAX_SHOWN]!r}, not with the header")
        count, prefix = _count_shards(header), source.path.name.removesuffix(".index")
        shards = [source.sibling(f"{prefix}.data-{shard:05}-of-{count:05}") for shard in range(count)]
        found = [_span(key, content, shards) for key, content in table]
    except CheckpointError as error:
        raise CheckpointError(source, error, name=error.name) from None
    try:
        files = {file: file.state() for file in (source, *shards)}
    except CheckpointNotFoundError as error:
        what = f"{error}. {source.path.name} needs {count} data files beside it: copy or download them too"
        raise CheckpointNotFoundError(what) from None
    spans = {span.name: span for span in found if isinstance(span, TensorSpan)}
    _check_apart(spans.values())
    unreadable = dict(reason for reason in found if isinstance(reason, tuple))
    return Manifest(source.path, "tf_bundle", spans, files=files, unreadable=unreadable)


def index_of(prefix: Place) -> Place:
    """The index of what TensorFlow's users call a checkpoint, `model.ckpt`, which is not a file itself."""
    return prefix.with_name(prefix.name + ".index")


def current_index(folder: Place, indices: list[Place]) -> Place:
    """The only index of a folder, or the one that TensorFlow's own note `checkpoint` says is current."""
    note = folder / "checkpoint"
    if len(indices) > 1 and note.is_file():
        with source_of(note).open() as file:
            text = file.read(MAX_NOTE).decode("utf-8", "replace")
        said = re.search(r'^model_checkpoint_path: "([^"\n]*)"', text, re.MULTILINE)
        indices = [index for index in indices if said and index.stem == Path(said[1]).name] or indices
    if len(indices) == 1:
        return indices[0]
    names = ", ".join(index.name for index in indices[:5])
    raise CheckpointError(folder, f"holds several TensorFlow checkpoints; pass one: {names}")
