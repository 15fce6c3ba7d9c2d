"""What `torch.save` writes: a zip with a pickle that describes tensors and one stored entry per storage.

The pickle is read by an unpickler that can only build descriptions: nothing is imported and nothing runs.
What it wrote before 1.6 is no zip. Format: torch/serialization.py, caffe2/serialize.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch

from gpt2lite.checkpoint.foreign import DAMAGED, RESAVE, what_is_zip
from gpt2lite.checkpoint.inert_pickle import (
    Described,
    DescribingUnpickler,
    Inert,
    Storage,
    describe,
    described,
    shown,
)
from gpt2lite.checkpoint.manifest import BOUND_CONFIG, Manifest, TensorSpan, contiguous_stride
from gpt2lite.checkpoint.source import ByteSource, FileState
from gpt2lite.checkpoint.writing import Config, TensorToWrite, Wrote, made_ahead, state_of
from gpt2lite.errors import CheckpointError, UsageError

MAX_SMALL_BYTES = 64 << 20  # of what is read whole: a pickle
MAX_DIRECTORY_BYTES = 2 << 20  # of a zip: zipfile takes ten times as much; gpt2-xl's takes 60 KB
ENCRYPTED, UTF8_NAME = 1, 0x800  # flag bits
CONFIG_ENTRY = "gpt2lite.json"  # our writer's: the model's config, which torch.load passes over
NO_CRC = 0  # what torch writes after set_crc32_options(False)
# zipfile itself raises any of these on flipped bytes.
DAMAGED_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error)
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature … name length, extra length
ZIP64_EXTRA_BYTES = 20
ALIGNMENT = 64  # torch.save's own, so that mapped tensors are aligned
STORAGES = torch.storage._dtype_to_storage_type_map()  # newer dtypes than these have no class of their own

MAX_PADDING = 256  # bytes of an entry's own header after its name, as torch pads it
DESCRIPTOR_BYTES = (16, 24)  # behind the data where a flag says so; longer where sizes have 64 bits
DESCRIBED = 8  # that flag
MAX_ASKED = 1000  # entries of a zip elsewhere whose own headers are read, a request each

Entries = dict[str, tuple[int, zipfile.ZipInfo]]  # where the data begin, by name


# ---- reading -----------------------------------------------------------------------------------------------


def _entries(source: ByteSource, archive: zipfile.ZipFile) -> Entries:
    """The archive's entries, without its own leading folder; their own headers say where their data begin."""
    infos = archive.infolist()
    names = {info.filename for info in infos}
    inside = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inside or "data.pkl" not in inside:
        raise CheckpointError(source, what_is_zip(names))
    if len(names) < len(infos):
        raise CheckpointError(source, "the zip holds two entries of one name")
    for info in infos:
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            raise CheckpointError(source, f"{info.filename} is compressed or encrypted; save it again")
    if not source.is_local:
        if laid_out := _laid_out(infos, archive.start_dir):
            pairs = zip(infos, laid_out, strict=True)
            return {info.filename.partition("/")[2]: (begin, info) for info, begin in pairs}
        if len(infos) > MAX_ASKED:
            said = f"torch did not lay out its {len(infos)} entries, and a request for each would take long"
            raise CheckpointError(source, f"{said}; download it and pass the file")
    last = source.state().size - LOCAL_HEADER.size
    encoded = [i.orig_filename.encode("utf-8" if i.flag_bits & UTF8_NAME else "cp437") for i in infos]
    begins = [min(max(info.header_offset, 0), last) for info in infos]
    ranges = [(at, LOCAL_HEADER.size + len(name)) for at, name in zip(begins, encoded, strict=True)]
    found = {}
    with source.reader() as reader:
        heads = reader.read_each(ranges)
    for info, name, begin, head in zip(infos, encoded, begins, heads, strict=True):
        signature, name_length, extra_length = LOCAL_HEADER.unpack(head[: LOCAL_HEADER.size])
        is_its_own = (signature, head[LOCAL_HEADER.size :], name_length) == (b"PK\x03\x04", name, len(name))
        if begin != info.header_offset or not is_its_own:
            raise CheckpointError(source, f"{info.filename} does not begin where the zip directory says")
        found[info.filename.partition("/")[2]] = begin + len(head) + extra_length, info
    return found


def _laid_out(infos: Sequence[zipfile.ZipInfo], end: int) -> list[int]:
    """Where the data of entries begin by torch's own layout, without their headers: a request for each.

    One entry behind the other up to the directory, data at multiples of ALIGNMENT or right behind the name.
    [] where an entry leaves room for none or two such places.
    """
    begins = dict[int, int]()
    for info in sorted(infos, key=lambda info: info.header_offset, reverse=True):
        header = info.header_offset + LOCAL_HEADER.size + len(info.orig_filename.encode())
        descriptors = DESCRIPTOR_BYTES if info.flag_bits & DESCRIBED else (0,)
        places = {end - descriptor - info.file_size for descriptor in descriptors}
        places = {at for at in places if 0 <= at - header <= MAX_PADDING and at % ALIGNMENT == 0} or (
            places & {header}
        )
        if len(places) != 1:
            return []
        (begins[info.header_offset],), end = places, info.header_offset
    return [begins[info.header_offset] for info in infos]


def _read_small(source: ByteSource, file: BinaryIO, entries: Entries, name: str) -> bytes:
    """One entry as a whole, checked against its sum; b"" where there is none."""
    if name not in entries:
        return b""
    offset, info = entries[name]
    if info.file_size > MAX_SMALL_BYTES:
        raise CheckpointError(source, f"its {name} is larger than {MAX_SMALL_BYTES >> 20} MiB")
    file.seek(offset)
    data = file.read(info.file_size)
    if len(data) < info.file_size or info.CRC not in (NO_CRC, zlib.crc32(data)):
        raise CheckpointError(source, f"its {name} is {DAMAGED}")
    return data


def manifest_of(
    found: Described,
    source: ByteSource,
    state: FileState,
    kept: Mapping[str, tuple[int, int, int]],
    storages: Mapping[str, Storage],
) -> Manifest:
    """The manifest of a file of torch.save, which allocates these `storages` to load it.

    `kept` says of a storage, by its key, its first byte in the file, how many there are, and their CRC-32 or
    NO_CRC. A tensor whose storage is not there, or is of another size than its pickle says (of its dtype,
    say), is unreadable. Raises CheckpointError for one that reaches past it.
    """
    spans, unreadable = {}, dict(found.unreadable)
    for name, record in (found.unsaved | found.tensors).items():
        storage, start = record.storage, record.offset * record.dtype.itemsize
        begin, nbytes, checksum = kept.get(storage.key, (0, -1, NO_CRC))
        span = TensorSpan(name, record.dtype, record.shape, record.stride, source, begin + start)
        if start + span.extent > storage.nbytes:
            what = f"{name} reaches past the end of its storage {storage.key}"
            raise CheckpointError(source, what, name=name)
        if 0 <= nbytes - storage.nbytes < storage.dtype.itemsize:
            is_all = span.is_contiguous and (start, span.nbytes) == (0, nbytes) and checksum != NO_CRC
            spans[name] = replace(span, checksum=checksum) if is_all else span
        else:
            said = f"has {nbytes} bytes" if storage.key in kept else "is missing"
            unreadable[name] = f"needs data/{storage.key} of {storage.nbytes} bytes, which {said}"
    unsaved = {name: spans.pop(name) for name in found.unsaved.keys() - found.tensors.keys() & spans.keys()}
    rest = (found.modules, unreadable, found.is_plain and not unreadable, found.containers(), unsaved)
    sizes = {source: tuple(storage.nbytes for storage in storages.values())}
    return Manifest(source.path, "torch_zip", spans, found.values, {source: state}, sizes, *rest)


def open_torch_zip(source: ByteSource) -> Manifest:
    """The manifest of a zip `.pth`. Raises CheckpointError for a file that is damaged.

    What the pickle names and we do not know is neither imported nor called.
    """
    state = source.state()
    try:
        with source.open() as file:
            end = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # as ZipFile is about to find it
            if end and end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
                raise CheckpointError(source, f"its zip directory is over {MAX_DIRECTORY_BYTES >> 20} MiB")
            with zipfile.ZipFile(file) as archive:
                entries = _entries(source, archive)
            names = ("data.pkl", "byteorder", CONFIG_ENTRY)
            pickled, order, config = (_read_small(source, file, entries, name) for name in names)
    except DAMAGED_ZIP as error:
        what = f"no valid zip directory at its end ({type(error).__name__}: {error})"
        raise CheckpointError(source, f"{what}: {DAMAGED}") from None
    if order not in (b"little", b""):
        raise CheckpointError(source, f"written on a machine of other byte order, {order[:20]!r}. {RESAVE}")
    unpickler = DescribingUnpickler(io.BytesIO(pickled), len(pickled))
    found = described(source, unpickler)
    if config:
        found.values[BOUND_CONFIG] = config.decode("utf-8", "replace")
    lies = {name: (offset, info.file_size, info.CRC) for name, (offset, info) in entries.items()}
    kept = {key: lies[f"data/{key}"] for key in unpickler.storages if f"data/{key}" in lies}
    return manifest_of(found, source, state, kept, unpickler.storages)


# ---- reading what torch.save wrote before 1.6, and writes if asked to --------------------------------------
# Five pickles: a magic number, a version, the machine that wrote it, the object, and the storages' keys. Then
# come, for one key after the other, the number of elements (int64) and the bytes, aligned to nothing.
# Format: torch/serialization.py, `_legacy_save` and `_legacy_load`.

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
MAGIC = MAGIC_NUMBER.to_bytes(10, "little")  # as every binary pickle holds it, in the first 32 bytes
MAGIC_TEXT = b"L%dL\n." % MAGIC_NUMBER  # as protocols 0 and 1 hold it
VERSION = 1001
COUNT = struct.Struct("<q")


class _Pickles:
    """The head of a file for unpicklers, which are given the bytes they ask for and no more of them."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left, self.nbytes = file, MAX_SMALL_BYTES, min(size, MAX_SMALL_BYTES)

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or those that are left in the file."""
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"its pickles are damaged, or larger than {MAX_SMALL_BYTES >> 20} MiB")
        return self._file.read(min(size, self.nbytes))

    def readline(self) -> bytes:
        """The rest of a line."""
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        self.read(0)
        return line


class LegacyUnpickler(DescribingUnpickler):
    """Reads the object of a legacy file."""

    def persistent_load(self, pid: object) -> object:
        """('storage', class, key, location, number of elements, view or None) → Storage.

        ('module', class, path of its source, source) → the class, of which no more is known.

        Torch has not written a storage that is a view of another one since 0.4, before GPT-2.
        """
        match pid:
            case ("module", Inert() as kind, _, _):
                return kind
            case (*whole, None):
                return super().persistent_load(tuple(whole))
        raise CheckpointError(f"its pickle refers to {shown(pid)}, which is not a whole storage. {RESAVE}")


def _check_head(source: ByteSource, pickles: _Pickles) -> None:
    """The three pickles before the object."""
    head = (DescribingUnpickler(pickles, pickles.nbytes) for _ in range(3))
    magic, version, machine = (describe(source, unpickler) for unpickler in head)
    for what, found, wanted in (("magic number", magic, MAGIC_NUMBER), ("version", version, VERSION)):
        if type(found) is not int or found != wanted:
            raise CheckpointError(source, f"its {what} is {shown(found)}, wanted {wanted}: {DAMAGED}")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(source, f"not marked as written on a little-endian machine. {RESAVE}")


def _find_storages(
    source: ByteSource, file: BinaryIO, keys: object, storages: dict[str, Storage]
) -> dict[str, tuple[int, int, int]]:
    """Where each storage lies, by its key: one after the other, all of them, a count before each."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(source, f"its list of storages is {shown(keys)}, wanted their keys")
    if sorted(keys) != sorted(storages):
        differ = shown(sorted(set(keys) ^ storages.keys())[:3])
        what = f"its list of {len(keys)} storages does not fit its pickle, which describes {len(storages)}"
        raise CheckpointError(source, f"{what}; they differ in {differ}")
    size, found = source.state().size, {}
    for key in keys:
        storage, begin = storages[key], file.tell() + COUNT.size
        end = begin + storage.nbytes
        if end > size:
            what = f"its storage {key} lies in bytes {begin} to {end}, the file ends at {size}"
            raise CheckpointError(source, f"{what}: {DAMAGED}")
        (numel,) = COUNT.unpack(file.read(COUNT.size))
        if numel * storage.dtype.itemsize != storage.nbytes:
            what = f"its storage {key} has {numel} elements of {storage.dtype}"
            raise CheckpointError(source, f"{what}, {storage.nbytes} bytes are described: {DAMAGED}")
        found[key] = begin, storage.nbytes, NO_CRC
        file.seek(end)
    return found


def open_torch_legacy(source: ByteSource) -> Manifest:
    """The manifest of a `.pth` that is no zip. Raises CheckpointError for a file that is damaged.

    Its format is "torch_zip", since torch.load reads both alike. Bytes after the last storage are left alone,
    as torch leaves them.
    """
    state = source.state()
    with source.open() as file:
        pickles = _Pickles(file, state.size)
        _check_head(source, pickles)
        unpickler = LegacyUnpickler(pickles, pickles.nbytes)
        found = described(source, unpickler)
        keys = describe(source, DescribingUnpickler(pickles, pickles.nbytes))
        kept = _find_storages(source, file, keys, unpickler.storages)
    return manifest_of(found, source, state, kept, unpickler.storages)


# ---- writing -----------------------------------------------------------------------------------------------


class _DescribingPickler(pickle.Pickler):
    """Writes the pickle that torch.save would write of tensors that are not there yet.

    `keys` say in which entry `data/<key>` the bytes of a tensor will be, by its name.
    """

    def __init__(self, file: Any, keys: dict[str, str]) -> None:
        super().__init__(file, protocol=2)
        self.keys = keys

    def persistent_id(self, obj: object) -> Any:
        if not isinstance(obj, Storage):
            return None
        name = STORAGES.get(obj.dtype, "UntypedStorage")  # which counts bytes
        numel = obj.nbytes // obj.dtype.itemsize if obj.dtype in STORAGES else obj.nbytes
        return ("storage", getattr(torch, name), obj.key, "cpu", numel)

    def reducer_override(self, obj: object) -> Any:
        if not isinstance(obj, TensorToWrite):
            return NotImplemented
        storage = Storage(self.keys[obj.shares or obj.name], obj.dtype, obj.nbytes)
        hooks: OrderedDict[str, object] = OrderedDict()
        described = (storage, 0, obj.shape, contiguous_stride(obj.shape), False, hooks)
        if obj.dtype in STORAGES:
            return torch._utils._rebuild_tensor_v2, described
        return torch._utils._rebuild_tensor_v3, (*described, obj.dtype)


def _entry(archive: zipfile.ZipFile, name: str, nbytes: int) -> zipfile.ZipInfo:
    """A stored entry whose data begin at a multiple of ALIGNMENT, padded as torch does: by an extra field."""
    info = zipfile.ZipInfo(name)
    info.file_size = nbytes
    is_zip64 = nbytes * 1.05 > zipfile.ZIP64_LIMIT  # zipfile's own rule
    assert archive.fp is not None
    begin = archive.fp.tell() + LOCAL_HEADER.size + len(name) + (ZIP64_EXTRA_BYTES if is_zip64 else 0)
    padding = -(begin + 4) % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    return info


def fill_torch_zip(
    path: Path,
    tensors: Sequence[TensorToWrite],
    wrote: Wrote,
    config: Config | None = None,
    arrange: Callable[[OrderedDict[str, Any]], object] = OrderedDict,
) -> None:
    """Write a new file as `torch.save` does; `arrange` puts the state dict into what surrounds it.

    The model's config goes into an entry of its own, which torch.load passes over: in the weights' own file
    it cannot become another model's. Tensors that share another's bytes are stored with it. No date is in it:
    equal tensors, equal bytes. Holds two chunks in memory.
    """
    keys = {tensor.name: str(i) for i, tensor in enumerate(t for t in tensors if not t.shares)}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("archive/data.pkl"), "w") as entry:
            state = OrderedDict((tensor.name, tensor) for tensor in tensors)
            _DescribingPickler(entry, keys).dump(arrange(state))
        archive.writestr(zipfile.ZipInfo("archive/byteorder"), "little")
        if config is not None:
            archive.writestr(zipfile.ZipInfo(f"archive/{CONFIG_ENTRY}"), json.dumps(config, indent=2))
        for tensor in (t for t in tensors if not t.shares):
            name = f"archive/data/{keys[tensor.name]}"
            with archive.open(_entry(archive, name, tensor.nbytes), "w") as entry:
                for chunk in made_ahead(tensor.chunks()):
                    entry.write(chunk)
                    wrote(len(chunk))
        archive.writestr(zipfile.ZipInfo("archive/version"), "3\n")


def fill_tensor_folder(folder: Path, tensors: Sequence[TensorToWrite], wrote: Wrote) -> None:
    """Write `<name>.pt` for every tensor, those that share another's bytes left out.

    Raises UsageError for a tensor whose name cannot be a file's, before anything is written.
    """
    stored = [tensor for tensor in tensors if not tensor.shares]
    for name in (tensor.name for tensor in stored):
        if not name or name.startswith(".") or set(name) & {os.sep, "\0"}:
            raise UsageError(f"{folder}: a tensor is called {name!r}, which cannot be a file's name")
        state_of(folder.parent / f"{name}.pt")
    folder.mkdir()
    for tensor in stored:
        path = folder / f"{tensor.name}.pt"
        fill_torch_zip(path, [tensor], wrote, arrange=lambda state: next(iter(state.values())))
