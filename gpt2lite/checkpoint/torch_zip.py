"""What `torch.save` writes: a zip with a pickle that describes tensors and one stored entry a storage.

The pickle is read by an unpickler that can only build descriptions: every name that it asks for is looked up
in a table here, nothing is imported and nothing runs. Format: torch/serialization.py, caffe2/serialize.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gpt2lite.checkpoint.described import Described, described
from gpt2lite.checkpoint.inert_pickle import MAX_SMALL_BYTES, RESAVE, DescribingUnpickler, TensorRecord
from gpt2lite.checkpoint.manifest import BOUND_CONFIG, Manifest, TensorSpan, validate
from gpt2lite.checkpoint.source import ByteSource, LocalFile, read_each
from gpt2lite.errors import CheckpointError

ENCRYPTED, UTF8_NAME = 1, 0x800  # flag bits
CONFIG_ENTRY = "gpt2lite.json"  # our writer's: the model's config, which torch.load passes over
NO_CRC = 0  # what torch writes after set_crc32_options(False)
# zipfile itself raises any of these on flipped bytes.
DAMAGED_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error)
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature … name length, extra length


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored zip entry: `nbytes` of data at byte `offset` of the file."""

    offset: int
    nbytes: int
    crc: int


def _encoded_name(info: zipfile.ZipInfo) -> bytes:
    return info.orig_filename.encode("utf-8" if info.flag_bits & UTF8_NAME else "cp437")


def _data_offsets(path: Path, file: io.BufferedIOBase, infos: Iterable[zipfile.ZipInfo]) -> dict[str, int]:
    """Where each entry's data begin, by the entry's own header."""
    names = {info: _encoded_name(info) for info in infos}
    last = path.stat().st_size - LOCAL_HEADER.size
    begins = [min(max(info.header_offset, 0), last) for info in names]
    heads = [
        (begin, LOCAL_HEADER.size + len(name)) for begin, name in zip(begins, names.values(), strict=True)
    ]
    offsets = {}
    read = read_each(file.fileno(), heads)
    for (info, name), begin, head in zip(names.items(), begins, read, strict=True):
        signature, name_length, extra_length = LOCAL_HEADER.unpack(head[: LOCAL_HEADER.size])
        is_its_own = signature == b"PK\x03\x04" and name_length == len(name) and head.endswith(name)
        if begin != info.header_offset or not is_its_own:
            raise CheckpointError(path, f"{info.filename} does not begin where the zip directory says")
        offsets[info.filename] = begin + LOCAL_HEADER.size + name_length + extra_length
    return offsets


def _read_directory(path: Path, file: io.BufferedIOBase, archive: zipfile.ZipFile) -> dict[str, Entry]:
    """The archive's entries by name, with the archive's own leading folder taken off."""
    infos = {info.filename: info for info in archive.infolist()}
    if len(infos) < len(archive.infolist()):
        raise CheckpointError(path, "the zip holds two entries of one name")
    if any(name.partition("/")[2] == "constants.pkl" for name in infos):
        raise CheckpointError(path, f"a TorchScript program, not a state dict. {RESAVE}")
    for name, info in infos.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            raise CheckpointError(
                path,
                f"{name} is compressed or encrypted, so it has no byte range. "
                "Re-save it: torch.save(torch.load(path, weights_only=True), path)",
            )
    offsets = _data_offsets(path, file, infos.values())
    return {
        name.partition("/")[2]: Entry(offsets[name], info.file_size, info.CRC) for name, info in infos.items()
    }


def _read_archive(path: Path) -> tuple[Described, dict[str, Entry]]:
    """What the pickle describes, our own config if it is there, and where each zip entry lies."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = _read_directory(path, file, archive)
            if "data.pkl" not in entries:
                raise CheckpointError(path, "a zip without data.pkl, so torch.save did not write it")
            pickled = _read_small(path, file, entries, "data.pkl")
            order = _read_small(path, file, entries, "byteorder") if "byteorder" in entries else b"little"
            config = _read_small(path, file, entries, CONFIG_ENTRY) if CONFIG_ENTRY in entries else b""
            config = _read_small(path, file, entries, CONFIG_ENTRY) if CONFIG_ENTRY in entries else b""
    except DAMAGED_ZIP as error:
        raise CheckpointError(
            path,
            f"has no sound zip directory at its end ({type(error).__name__}: {error}). "
            "It is truncated or damaged: copy or download it again.",
        ) from None
    if order != b"little":
        raise CheckpointError(path, f"written on a machine of other byte order, {order[:20]!r}. {RESAVE}")
    found = described(path, DescribingUnpickler(io.BytesIO(pickled), encoding="utf-8"))
    if config:
        found.values[BOUND_CONFIG] = config.decode("utf-8", "replace")
    return found, entries


def _read_small(path: Path, file: io.BufferedIOBase, entries: dict[str, Entry], name: str) -> bytes:
    """One entry as a whole, checked against its sum."""
    entry = entries[name]
    if entry.nbytes > MAX_SMALL_BYTES:
        raise CheckpointError(path, f"its {name} is larger than {MAX_SMALL_BYTES >> 20} MiB")
    file.seek(entry.offset)
    data = file.read(entry.nbytes)
    if len(data) < entry.nbytes or entry.crc not in (NO_CRC, zlib.crc32(data)):
        raise CheckpointError(path, f"its {name} is damaged: copy or download it again")
    return data


def place(path: Path, name: str, record: TensorRecord, begin: int) -> TensorSpan:
    """The span of a tensor, what is kept under its storage's key beginning at byte `begin` of the file."""
    storage, start = record.storage, record.offset * record.dtype.itemsize
    offset = begin + storage.start + start
    span = TensorSpan(name, record.dtype, record.shape, record.stride, LocalFile(path), offset)
    if start + span.extent > storage.nbytes:
        raise CheckpointError(path, f"{name} reaches past the end of its storage {storage.key}")
    return span


def _lacking(record: TensorRecord, entries: dict[str, Entry]) -> str | None:
    """What is wrong with the entry that holds a tensor's storage."""
    storage, entry = record.storage, entries.get(f"data/{record.storage.key}")
    if entry is not None and entry.nbytes >= storage.nbytes:
        return None
    found = "is missing" if entry is None else f"has {entry.nbytes} bytes"
    return f"needs data/{storage.key} of {storage.nbytes} bytes, which {found}"


def open_torch_zip(path: Path) -> Manifest:
    """The manifest of a zip `.pth`. Raises CheckpointError for a file that is damaged.

    What the pickle names and we do not know is neither imported nor called.
    """
    state = LocalFile(path).state()
    found, entries = _read_archive(path)
    for name, record in list(found.tensors.items()):
        if lacking := _lacking(record, entries):
            found.unreadable[name] = lacking
            del found.tensors[name]
    spans = {
        name: place(path, name, record, entries[f"data/{record.storage.key}"].offset)
        for name, record in found.tensors.items()
    }
    storages = {record.storage.key: record.storage.nbytes for record in found.tensors.values()}
    sizes: dict[ByteSource, tuple[int, ...]] = {LocalFile(path): tuple(storages.values())}
    return validate(found.manifest(path, spans, {LocalFile(path): state}, sizes))
