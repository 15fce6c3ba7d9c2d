"""What `torch.save` wrote before torch 1.6, and writes if asked to: five pickles, then the storages.

The pickles are a magic number, a version, the machine that wrote it, the object, and the storages' keys. Then
come, for one key after the other, the number of elements (int64) and the bytes, aligned to nothing.
Format: torch/serialization.py, `_legacy_save` and `_legacy_load`.
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from gpt2lite.checkpoint.foreign import DAMAGED, RESAVE
from gpt2lite.checkpoint.inert_pickle import (
    DescribingUnpickler,
    Inert,
    Storage,
    describe,
    described,
    shown,
    stored,
)
from gpt2lite.checkpoint.manifest import Manifest, are_sizes
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.checkpoint.torch_zip import MAX_SMALL_BYTES, manifest_of
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
    """Reads the object of a legacy file; a view, too, is a storage, by a key of its own."""

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
        match view:
            case None:
                return root
            case (str(key), int(first), int(numel)) if are_sizes((first, numel)):
                size = root.dtype.itemsize
                if (first + numel) * size <= root.nbytes:
                    return self._known(key, Storage(root.key, root.dtype, numel * size, first * size))
        raise CheckpointError(f"its pickle has a view {shown(view)} that does not fit storage {root.key}")

    def _known(self, name: str, storage: Storage) -> Storage:
        """The storage, unless the name already stands for another one; empty ones may change their dtype."""
        known = self.storages.setdefault(name, storage)
        if known != storage and (known.nbytes or storage.nbytes):
            raise CheckpointError(f"its pickle describes storage {name} in two ways")
        return storage


def _check_head(source: ByteSource, pickles: _Pickles) -> None:
    """The three pickles before the object."""
    magic, version, machine = (describe(source, DescribingUnpickler(pickles)) for _ in range(3))
    for what, found, wanted in (("magic number", magic, MAGIC_NUMBER), ("version", version, VERSION)):
        if type(found) is not int or found != wanted:
            raise CheckpointError(source, f"its {what} is {shown(found)}, wanted {wanted}: {DAMAGED}")
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise CheckpointError(source, f"not marked as written on a little-endian machine. {RESAVE}")


def _find_storages(
    source: ByteSource, file: BinaryIO, keys: object, storages: dict[str, Storage]
) -> dict[str, tuple[int, int]]:
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
        found[key] = begin, storage.nbytes
        file.seek(end)
    return found


def open_torch_legacy(source: ByteSource) -> Manifest:
    """The manifest of a `.pth` that is no zip. Raises CheckpointError for a file that is damaged.

    Its format is "torch_zip", since torch.load reads both alike. Bytes after the last storage are left alone,
    as torch leaves them.
    """
    state = source.state()
    with source.open() as file:
        pickles = _Pickles(file)
        _check_head(source, pickles)
        unpickler = LegacyUnpickler(pickles)
        found = described(source, unpickler)
        keys = describe(source, DescribingUnpickler(pickles))
        whole = {key: storage for key, storage in unpickler.storages.items() if key == storage.key}
        kept = _find_storages(source, file, keys, whole)
    return manifest_of(found, source, state, kept, whole)
