"""What `torch.save` writes: a zip with a pickle that describes tensors and one stored entry a storage.

The pickle is read by an unpickler that can only build descriptions: every name that it asks for is looked up
in a table here, nothing is imported and nothing runs. Format: torch/serialization.py, caffe2/serialize.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar

import torch

from gpt2lite.checkpoint.manifest import (
    BOUND_CONFIG,
    FileState,
    Manifest,
    TensorSpan,
    are_sizes,
    flatten,
    is_countable,
    validate,
)
from gpt2lite.checkpoint.page_cache import read_each
from gpt2lite.errors import CheckpointError

MAX_SMALL_BYTES = 64 << 20  # of what is read whole: the pickle
ENCRYPTED, UTF8_NAME = 1, 0x800  # flag bits
CONFIG_ENTRY = "gpt2lite.json"  # our writer's: the model's config, which torch.load passes over
NO_CRC = 0  # what torch writes after set_crc32_options(False)
# zipfile itself raises any of these on flipped bytes.
DAMAGED_ZIP = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OverflowError, struct.error)
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature … name length, extra length
RESAVE = "Where it came from, save the weights alone: torch.save(model.state_dict(), 'model.pth')"

# Opcodes that torch.save does not write: sets, buffers, and other ways to name, call and make things.
NOT_DATA = (
    pickle.BYTEARRAY8,
    pickle.NEXT_BUFFER,
    pickle.READONLY_BUFFER,
    pickle.DICT,
    pickle.EMPTY_SET,
    pickle.ADDITEMS,
    pickle.FROZENSET,
    pickle.INST,
    pickle.OBJ,
    pickle.NEWOBJ,
    pickle.NEWOBJ_EX,
    pickle.EXT1,
    pickle.EXT2,
    pickle.EXT4,
)

STORAGE_DTYPES = {
    "UntypedStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}


@dataclass(frozen=True, slots=True)
class Storage:
    """A storage as the pickle names it: `nbytes` from byte `start` of what is kept under `key`.

    In a zip that is the whole entry `data/<key>`.
    """

    key: str
    dtype: torch.dtype
    nbytes: int
    start: int = 0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """A tensor as the pickle describes it; offset and strides count elements of `dtype`."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Builder:
    """A stand-in for one callable that pickles name."""

    build: Callable[..., object]

    def __call__(self, *args: object) -> object:
        """Build the description."""
        return self.build(*args)


def _is_plain(value: object) -> bool:
    if isinstance(value, int):
        return value.bit_length() <= 64
    return isinstance(value, (str, float, NoneType, torch.dtype))


def shown(value: object) -> str:
    """A short repr; of a nest, whose own might not end, the type alone."""
    parts = value if isinstance(value, (tuple, list)) else (value,)
    return repr(value)[:200] if all(map(_is_plain, parts)) else f"<{type(value).__name__}>"


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    dtype: object = None,
    metadata: object = None,
) -> TensorRecord:
    if not isinstance(storage, Storage):
        raise CheckpointError(f"a tensor is built on {shown(storage)}, not on a storage")
    dtype = storage.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"a tensor has dtype {shown(dtype)}, which is none of torch's")
    if metadata:
        raise CheckpointError(
            f"a tensor carries {shown(metadata)} (conjugated or negated lazily), which is not read"
        )
    if (
        not are_sizes(shape)
        or not are_sizes(stride)
        or not isinstance(offset, int)
        or not are_sizes((offset,))
        or len(shape) != len(stride)
        or not is_countable(shape, dtype)
    ):
        raise CheckpointError(
            f"a tensor has shape {shown(shape)}, strides {shown(stride)}, offset {shown(offset)}, "
            "which no tensor can have"
        )
    return TensorRecord(storage, dtype, offset, shape, stride)


def _tensor_v2(storage, offset, shape, stride, grad, hooks, metadata=None):  # type: ignore[no-untyped-def]
    return _tensor(storage, offset, shape, stride, metadata=metadata)


def _tensor_v3(storage, offset, shape, stride, grad, hooks, dtype, metadata=None):  # type: ignore[no-untyped-def]
    return _tensor(storage, offset, shape, stride, dtype, metadata)


def _parameter(data, grad, hooks, state=None):  # type: ignore[no-untyped-def]
    return data


def _device(kind: object, index: object = None) -> str:
    return shown(kind).strip("'") + (f":{shown(index)}" if index is not None else "")


def _check_keys(keys: Iterable[object]) -> None:
    """Only plain keys and flat tuples: to hash a nest of tuples can take for ever, or end the process."""
    for key in keys:
        if not all(map(_is_plain, key if isinstance(key, tuple) else (key,))):
            raise CheckpointError(f"a dict in its pickle has the key {shown(key)}, which is not plain")


def _ordered_dict(pairs: object = ()) -> OrderedDict[Any, Any]:
    if not isinstance(pairs, (list, tuple)):
        raise CheckpointError(f"its pickle makes an OrderedDict of {shown(pairs)}")
    _check_keys(key for key, _ in pairs)
    return OrderedDict(pairs)


ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): Builder(_ordered_dict),
    ("torch", "Size"): Builder(tuple),
    ("torch", "device"): Builder(_device),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Builder(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_parameter),
}


def _allowed(module: str, name: str) -> object:
    if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
        return STORAGE_DTYPES[name]
    found = vars(torch).get(name)  # getattr would import what torch imports lazily
    if module == "torch" and isinstance(found, torch.dtype):
        return found
    if (module, name) in ALLOWED:
        return ALLOWED[module, name]
    raise CheckpointError(f"its pickle asks for {module}.{name}, which is not data and was not run. {RESAVE}")


class DescribingUnpickler(pickle._Unpickler):
    """An unpickler that can build nothing but lists, tuples, dicts, plain values and `TensorRecord`s.

    Python's own, since the one in C takes memory by the largest memo index that a pickle names.
    """

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code: load for code, load in pickle._Unpickler.dispatch.items() if code not in b"".join(NOT_DATA)
    }

    def load_build(self) -> None:
        """Forget the attributes of a state dict (its `_metadata`); refuse to alter anything else."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict):
            raise CheckpointError(f"its pickle wants to alter {shown(self.stack[-1])}, which was not done")

    def load_setitem(self) -> None:
        """One key and value into a dict."""
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key], [value])

    def load_setitems(self) -> None:
        """Keys and values into a dict."""
        items = self.pop_mark()
        self._set_items(items[::2], items[1::2])

    def _set_items(self, keys: list[object], values: list[object]) -> None:
        if not isinstance(self.stack[-1], dict):
            raise CheckpointError(f"its pickle wants to alter {shown(self.stack[-1])}, which was not done")
        _check_keys(keys)
        self.stack[-1].update(zip(keys, values, strict=True))

    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems

    def find_class(self, module: str, name: str) -> object:
        """Look a global up in the table; raise CheckpointError for any other."""
        return _allowed(module, name)

    def persistent_load(self, pid: object) -> Storage:
        """('storage', class, key, location, number of elements) → Storage."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(numel)) if are_sizes(
                (numel,)
            ) and is_countable((numel,), dtype):
                return Storage(key, dtype, numel * dtype.itemsize)
        raise CheckpointError(f"its pickle refers to {shown(pid)}, which is not a storage")


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
            raise CheckpointError(f"{path}: {info.filename} does not begin where the zip directory says")
        offsets[info.filename] = begin + LOCAL_HEADER.size + name_length + extra_length
    return offsets


def _read_directory(path: Path, file: io.BufferedIOBase, archive: zipfile.ZipFile) -> dict[str, Entry]:
    """The archive's entries by name, with the archive's own leading folder taken off."""
    infos = {info.filename: info for info in archive.infolist()}
    if len(infos) < len(archive.infolist()):
        raise CheckpointError(f"{path}: the zip holds two entries of one name")
    if any(name.partition("/")[2] == "constants.pkl" for name in infos):
        raise CheckpointError(f"{path}: a TorchScript program, not a state dict. {RESAVE}")
    for name, info in infos.items():
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & ENCRYPTED:
            raise CheckpointError(
                f"{path}: {name} is compressed or encrypted, so it has no byte range. "
                "Re-save it: torch.save(torch.load(path, weights_only=True), path)"
            )
    offsets = _data_offsets(path, file, infos.values())
    return {
        name.partition("/")[2]: Entry(offsets[name], info.file_size, info.CRC) for name, info in infos.items()
    }


def describe(path: Path, unpickler: DescribingUnpickler) -> object:
    """The next object of a pickle of `path`; reads no further than its end. Raises CheckpointError alone."""
    try:
        return unpickler.load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything; none of it is ours
        raise CheckpointError(f"{path}: its pickle is damaged ({type(error).__name__}: {error})") from None


def _read_archive(path: Path) -> tuple[object, str, dict[str, Entry]]:
    """The object that the pickle describes, our own config if it is there, and where each zip entry lies."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = _read_directory(path, file, archive)
            if "data.pkl" not in entries:
                raise CheckpointError(f"{path}: a zip without data.pkl, so torch.save did not write it")
            pickled = _read_small(path, file, entries, "data.pkl")
            order = _read_small(path, file, entries, "byteorder") if "byteorder" in entries else b"little"
            config = _read_small(path, file, entries, CONFIG_ENTRY) if CONFIG_ENTRY in entries else b""
    except DAMAGED_ZIP as error:
        raise CheckpointError(
            f"{path}: has no sound zip directory at its end ({type(error).__name__}: {error}). "
            "It is truncated or damaged: copy or download it again."
        ) from None
    if order != b"little":
        raise CheckpointError(f"{path}: written on a machine of other byte order, {order[:20]!r}. {RESAVE}")
    tree = describe(path, DescribingUnpickler(io.BytesIO(pickled), encoding="utf-8"))
    return tree, config.decode("utf-8", "replace"), entries


def _read_small(path: Path, file: io.BufferedIOBase, entries: dict[str, Entry], name: str) -> bytes:
    """One entry as a whole, checked against its sum."""
    entry = entries[name]
    if entry.nbytes > MAX_SMALL_BYTES:
        raise CheckpointError(f"{path}: its {name} is larger than {MAX_SMALL_BYTES >> 20} MiB")
    file.seek(entry.offset)
    data = file.read(entry.nbytes)
    if len(data) < entry.nbytes or entry.crc not in (NO_CRC, zlib.crc32(data)):
        raise CheckpointError(f"{path}: its {name} is damaged: copy or download it again")
    return data


def described_tensors(
    path: Path, tree: object
) -> tuple[dict[str, TensorRecord], dict[str, object], dict[str, str]]:
    """The tensors and plain values of a described object by their dotted names, and the tensors'
    containers.
    """
    try:
        return flatten(tree, TensorRecord)  # type: ignore[return-value]
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def place(path: Path, name: str, record: TensorRecord, begin: int) -> TensorSpan:
    """The span of a tensor, what is kept under its storage's key beginning at byte `begin` of the file."""
    storage, start = record.storage, record.offset * record.dtype.itemsize
    offset = begin + storage.start + start
    span = TensorSpan(name, record.dtype, record.shape, record.stride, path, offset)
    if start + span.extent > storage.nbytes:
        raise CheckpointError(f"{path}: {name} reaches past the end of its storage {storage.key}")
    return span


def _span(path: Path, name: str, record: TensorRecord, entries: dict[str, Entry]) -> TensorSpan:
    entry = entries.get(f"data/{record.storage.key}")
    if entry is None or entry.nbytes < record.storage.nbytes:
        found = "is missing" if entry is None else f"has {entry.nbytes} bytes"
        raise CheckpointError(
            f"{path}: {name} needs data/{record.storage.key} of {record.storage.nbytes} bytes, which {found}"
        )
    return place(path, name, record, entry.offset)


def open_torch_zip(path: Path) -> Manifest:
    """The manifest of a zip `.pth`. Raises CheckpointError for anything but tensors and plain data."""
    state = FileState.of(path)
    tree, config, entries = _read_archive(path)
    records, values, containers = described_tensors(path, tree)
    if config:
        values[BOUND_CONFIG] = config
    spans = {name: _span(path, name, record, entries) for name, record in records.items()}
    storages = {record.storage.key: record.storage.nbytes for record in records.values()}
    sizes = tuple(storages.values())
    return validate(Manifest(path, "torch_zip", spans, values, {path: state}, {path: sizes}, containers))
