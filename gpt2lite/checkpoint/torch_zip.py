"""What `torch.save` writes: a zip with a pickle that describes tensors and one stored entry a storage.

The pickle is read by an unpickler that can only build descriptions: every name that it asks for is looked up
in a table here, nothing is imported and nothing runs. Format: torch/serialization.py, pytorch/caffe2/serialize.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from gpt2lite.checkpoint.manifest import FileState, Manifest, TensorSpan, flatten, validate
from gpt2lite.errors import CheckpointError

MAX_PICKLE_BYTES = 64 << 20
LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature … name length, extra length
RESAVE = "Where it came from, save the weights alone: torch.save(model.state_dict(), 'model.pth')"

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
    """A storage as the pickle names it: the zip entry `data/<key>`, `nbytes` long."""

    key: str
    dtype: torch.dtype
    nbytes: int


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
    """A stand-in for one callable that pickles name. Frozen and slotted, so that a pickle cannot alter it."""

    build: Callable[..., object]

    def __call__(self, *args: object) -> object:
        """Build the description."""
        return self.build(*args)


def _tensor(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    dtype: object = None,
    metadata: object = None,
) -> TensorRecord:
    if not isinstance(storage, Storage):
        raise CheckpointError(f"a tensor is built on {storage!r}, not on a storage")
    dtype = storage.dtype if dtype is None else dtype
    numbers = (
        offset,
        *(shape if isinstance(shape, tuple) else ()),
        *(stride if isinstance(stride, tuple) else ()),
    )
    sound = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not sound or not isinstance(dtype, torch.dtype) or any(type(n) is not int or n < 0 for n in numbers):
        raise CheckpointError(f"a tensor has shape {shape!r}, strides {stride!r}, offset {offset!r}")
    if metadata:
        raise CheckpointError(
            f"a tensor carries {metadata!r} (conjugated or negated lazily), which is not read"
        )
    return TensorRecord(storage, dtype, numbers[0], shape, stride)


def _tensor_v2(storage, offset, shape, stride, grad, hooks, metadata=None):  # type: ignore[no-untyped-def]
    return _tensor(storage, offset, shape, stride, metadata=metadata)


def _tensor_v3(storage, offset, shape, stride, grad, hooks, dtype, metadata=None):  # type: ignore[no-untyped-def]
    return _tensor(storage, offset, shape, stride, dtype, metadata)


def _parameter(data, grad, hooks, state=None):  # type: ignore[no-untyped-def]
    return data


ALLOWED: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): Builder(tuple),
    ("torch", "device"): Builder(lambda *args: str(args)),
    ("torch._utils", "_rebuild_tensor_v2"): Builder(_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Builder(_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Builder(_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Builder(_parameter),
}


def _allowed(module: str, name: str) -> object:
    if module in ("torch", "torch.storage") and name in STORAGE_DTYPES:
        return STORAGE_DTYPES[name]
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if (module, name) in ALLOWED:
        return ALLOWED[module, name]
    raise CheckpointError(f"its pickle asks for {module}.{name}, which is not data and was not run. {RESAVE}")


class DescribingUnpickler(pickle.Unpickler):
    """An unpickler that can build nothing but containers, plain values and `TensorRecord`s."""

    def find_class(self, module: str, name: str) -> object:  # type: ignore[override]
        """Look a global up in the table; raise CheckpointError for any other."""
        return _allowed(module, name)

    def persistent_load(self, pid: object) -> Storage:
        """('storage', class, key, location, number of elements) → Storage."""
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), _, int(numel)) if numel >= 0:
                return Storage(key, dtype, numel * dtype.itemsize)
        raise CheckpointError(f"its pickle refers to {pid!r}, which is not a storage")


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored zip entry: `nbytes` of data at byte `offset` of the file."""

    offset: int
    nbytes: int


def _read_directory(path: Path, file: io.BufferedIOBase, archive: zipfile.ZipFile) -> dict[str, Entry]:
    """The archive's entries by name, with the archive's own leading folder taken off."""
    entries = {}
    for info in archive.infolist():
        name = info.filename.partition("/")[2]
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(f"{path}: {info.filename} is compressed or encrypted, so it has no byte range. "
                                  "Re-save it: torch.save(torch.load(path, weights_only=True), path)")  # fmt: skip
        file.seek(info.header_offset)
        header = file.read(LOCAL_HEADER.size)
        if len(header) < LOCAL_HEADER.size or header[:4] != b"PK\x03\x04":
            raise CheckpointError(f"{path}: {info.filename} does not begin where the zip directory says")
        _, name_length, extra_length = LOCAL_HEADER.unpack(header)
        if name in entries:
            raise CheckpointError(f"{path}: the zip holds {info.filename} twice")
        start = info.header_offset + LOCAL_HEADER.size + name_length + extra_length
        entries[name] = Entry(start, info.file_size)
    return entries


def _unpickle(path: Path, data: bytes) -> object:
    try:
        return DescribingUnpickler(io.BytesIO(data), encoding="utf-8").load()
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything; none of it is ours
        raise CheckpointError(f"{path}: its pickle is damaged ({type(error).__name__}: {error})") from None


def _read_archive(path: Path) -> tuple[object, dict[str, Entry]]:
    """The object that the pickle describes, and where each zip entry lies."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            entries = _read_directory(path, file, archive)
            if "constants.pkl" in entries:
                raise CheckpointError(f"{path}: a TorchScript program, not a state dict. {RESAVE}")
            if "data.pkl" not in entries:
                raise CheckpointError(f"{path}: a zip without data.pkl, so torch.save did not write it")
            if entries["data.pkl"].nbytes > MAX_PICKLE_BYTES:
                raise CheckpointError(f"{path}: its pickle is larger than {MAX_PICKLE_BYTES >> 20} MiB")
            pickled = _read_entry(file, entries["data.pkl"])
            order = _read_entry(file, entries["byteorder"]) if "byteorder" in entries else b"little"
    except (zipfile.BadZipFile, EOFError, struct.error) as error:
        raise CheckpointError(
            f"{path}: begins like a zip but has no sound directory at its end ({error}). "
            "It is truncated or damaged: copy or download it again."
        ) from None
    if order != b"little":
        raise CheckpointError(
            f"{path}: written on a {order.decode(errors='replace')}-endian machine. {RESAVE}"
        )
    return _unpickle(path, pickled), entries


def _read_entry(file: io.BufferedIOBase, entry: Entry) -> bytes:
    file.seek(entry.offset)
    return file.read(entry.nbytes)


def _span(path: Path, name: str, record: TensorRecord, entries: dict[str, Entry]) -> TensorSpan:
    entry = entries.get(f"data/{record.storage.key}")
    if entry is None or entry.nbytes < record.storage.nbytes:
        found = "is missing" if entry is None else f"has {entry.nbytes} bytes"
        raise CheckpointError(
            f"{path}: {name} needs data/{record.storage.key} of {record.storage.nbytes} bytes, which {found}"
        )
    start = record.offset * record.dtype.itemsize
    span = TensorSpan(name, record.dtype, record.shape, record.stride, path, entry.offset + start)
    if start + span.extent > entry.nbytes:
        raise CheckpointError(f"{path}: {name} reaches past the end of its storage data/{record.storage.key}")
    return span


def open_torch_zip(path: Path) -> Manifest:
    """The manifest of a zip `.pth`. Raises CheckpointError for anything but tensors and plain data."""
    state = FileState.of(path)
    tree, entries = _read_archive(path)
    try:
        records, values = flatten(tree, TensorRecord)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    spans = {name: _span(path, name, record, entries) for name, record in records.items()}  # type: ignore[arg-type]
    return validate(Manifest(path, "torch_zip", spans, values, {path: state}))
