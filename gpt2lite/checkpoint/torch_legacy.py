"""What `torch.save` wrote before torch 1.6, and writes if asked to: five pickles, then the storages.

The pickles are a magic number, a version, the machine that wrote it, the object, and the storages' keys. Then
come, for one key after the other, the number of elements (int64) and the bytes, aligned to nothing.
Format: torch/serialization.py, `_legacy_save` and `_legacy_load`.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

from gpt2lite.checkpoint.described import described
from gpt2lite.checkpoint.inert_pickle import (
    MAX_SMALL_BYTES,
    RESAVE,
    DescribingUnpickler,
    Inert,
    Storage,
    describe,
    shown,
    stored,
)
from gpt2lite.checkpoint.manifest import Manifest, are_sizes, validate
from gpt2lite.checkpoint.source import LocalFile
from gpt2lite.checkpoint.torch_zip import place
from gpt2lite.errors import CheckpointError

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
MAGIC = MAGIC_NUMBER.to_bytes(10, "little")  # as every binary pickle holds it, in the first 32 bytes
MAGIC_TEXT = b"L%dL\n." % MAGIC_NUMBER  # as protocols 0 and 1 hold it
VERSION = 1001
COUNT = struct.Struct("<q")


class _Pickles:
    """The head of a file for unpicklers, which are given the bytes they ask for and no more of them."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, MAX_SMALL_BYTES

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or those that are left in the file."""
        self._left -= size
        if self._left < 0:
            raise CheckpointError(f"its pickles are damaged, or larger than {MAX_SMALL_BYTES >> 20} MiB")
        return self._file.read(size)

    def readline(self) -> bytes:
        """The rest of a line."""
        line = self._file.readline(self._left + 1)
        self._left -= len(line)
        self.read(0)
        return line


class LegacyUnpickler(DescribingUnpickler):
    """Reads the object of a legacy file; `named` are its storages and views, each by its own key."""

    def __init__(self, pickles: _Pickles) -> None:
        super().__init__(pickles, encoding="utf-8")
        self.named: dict[str, Storage] = {}

    @property
    def storages(self) -> dict[str, Storage]:
        """All that lie in the file by themselves, by key, in the order in which torch.load allocates them."""
        return {key: storage for key, storage in self.named.items() if key == storage.key}

    def persistent_load(self, pid: object) -> object:
        """('storage', class, key, location, number of elements, view or None) → Storage.

        ('module', class, path of its source, source) → the class, of which no more is known.

        A view is (key of its own, first element, number of elements); torch has not written one since 0.4.
        """
        match pid:
            case ("module", Inert() as kind, _, _):
                return kind
        if not isinstance(pid, tuple) or len(pid) != 6:
            raise CheckpointError(f"its pickle refers to {shown(pid)}, which is not a storage. {RESAVE}")
        root, view = stored(pid[:5]), pid[5]
        root = self._known(root.key, root)
        if view is None:
            return root
        match view:
            case (str(key), int(first), int(numel)) if are_sizes((first, numel)):
                size = root.dtype.itemsize
                if (first + numel) * size <= root.nbytes:
                    return self._known(key, Storage(root.key, root.dtype, numel * size, first * size))
        raise CheckpointError(f"its pickle views storage {root.key} as {shown(view)}, which is not within it")

    def _known(self, name: str, storage: Storage) -> Storage:
        """The storage, unless the name already stands for another one; empty ones may change their dtype."""
        known = self.named.setdefault(name, storage)
        if known != storage and (known.nbytes or storage.nbytes):
            raise CheckpointError(f"its pickle describes storage {name} in two ways")
        return storage


def _check_head(path: Path, pickles: _Pickles) -> None:
    """The three pickles before the object."""

    def read() -> object:
        return describe(path, DescribingUnpickler(pickles, encoding="utf-8"))

    for what, wanted in (("magic number", MAGIC_NUMBER), ("version", VERSION)):
        found = read()
        if type(found) is not int or found != wanted:
            raise CheckpointError(path, f"its {what} is {shown(found)}, wanted {wanted}: it is damaged")
    machine = read()
    order = machine.get("little_endian") if isinstance(machine, dict) else None
    if order is not True:
        found_order = "of other byte order" if order is False else "that it does not describe"
        raise CheckpointError(path, f"written on a machine {found_order}. {RESAVE}")


def _check_keys(path: Path, keys: object, storages: dict[str, Storage]) -> list[str]:
    """The keys in the order of the file, which must be those of all storages, each once."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(path, f"its list of storages is {shown(keys)}, wanted their keys")
    if len(set(keys)) < len(keys) or set(keys) != storages.keys():
        lacking, unknown = sorted(storages.keys() - set(keys)), sorted(set(keys) - storages.keys())
        raise CheckpointError(
            path,
            f"its list of {len(keys)} storages does not fit its pickle, which describes "
            f"{len(storages)}; missing: {shown(lacking[:3])}, unknown: {shown(unknown[:3])}",
        )
    return keys


def _find_storages(
    path: Path, file: BinaryIO, keys: list[str], storages: dict[str, Storage]
) -> dict[str, int]:
    """The byte where each storage begins. Reads the eight bytes before it alone."""
    size = os.fstat(file.fileno()).st_size
    begins = {}
    for key in keys:
        begin = file.tell() + COUNT.size
        end = begin + storages[key].nbytes
        if end > size:
            raise CheckpointError(
                path,
                f"its storage {key} lies in bytes {begin} to {end}, the file ends at {size}. "
                "It is truncated: copy or download it again.",
            )
        (numel,) = COUNT.unpack(file.read(COUNT.size))
        if numel * storages[key].dtype.itemsize != storages[key].nbytes:
            raise CheckpointError(
                path,
                f"its storage {key} has {numel} elements of {storages[key].dtype}, "
                f"{storages[key].nbytes} bytes are described: it is damaged",
            )
        begins[key] = begin
        file.seek(end)
    return begins


def open_torch_legacy(path: Path) -> Manifest:
    """The manifest of a `.pth` that is no zip. Raises CheckpointError for a file that is damaged.

    Its format is "torch_zip", since torch.load reads both alike. Bytes after the last storage are left alone,
    as torch leaves them.
    """
    state = LocalFile(path).state()
    with open(path, "rb") as file:
        pickles = _Pickles(file)
        _check_head(path, pickles)
        unpickler = LegacyUnpickler(pickles)
        found = described(path, unpickler)
        storages = unpickler.storages
        keys = _check_keys(path, describe(path, DescribingUnpickler(pickles, encoding="utf-8")), storages)
        begins = _find_storages(path, file, keys, storages)
    spans = {
        name: place(path, name, record, begins[record.storage.key]) for name, record in found.tensors.items()
    }
    sizes = tuple(storage.nbytes for storage in storages.values())
    return validate(found.manifest(path, spans, {LocalFile(path): state}, {LocalFile(path): sizes}))
